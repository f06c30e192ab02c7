"""How much device memory does each stage take at the published size?

\b
    python -m experiments.full_size.memory --json memory.json

Every stage's program is compiled for Hopper (sm_90a), which needs no GPU but the packages of
`pip install '.[compile-gate]'`, and the compiler says what it needs. The last two columns are the
fullest moment of a generation with all networks on the device, and with one after another.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Sampling,
)
from cogview2_jax.description import Description
from cogview2_jax.pipeline import memory
from cogview2_jax.pipeline.memory import NETWORK_OF, PRECISIONS, Plan, Usage
from experiments import results
from experiments.local_attention import compile_gate

PUBLISHED = Description(
    CogLMConfig(), DirectSRConfig(), IterativeSRConfig(), HVQVAEConfig(), Sampling(), {}
)
GIB = 1 << 30
# dtype, batch → the most GiB that the whole pipeline may take, networks in turn.
LIMITS = {("bfloat16", 4): 24, ("int8", 4): 16, ("int8", 1): 12}


def measured(dtype: str, batch: int) -> dict[str, Usage]:
    """What each stage takes, by a compiler for sm_90a."""
    place = compile_gate.absent_device()
    used = {}
    for stage in NETWORK_OF:
        with compile_gate.lowering_for_gpu():
            used[stage] = memory.usage(PUBLISHED, stage, batch, PRECISIONS[dtype], place)
    return used


def rows(dtypes: tuple[str, ...], batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Figures of each setting, printed as they come."""
    for dtype in dtypes:
        for batch in batches:
            begin = time.monotonic()
            used = measured(dtype, batch)
            plans = [memory.peak(used, dtype, batch, in_turn) for in_turn in (False, True)]
            click.echo(line(dtype, batch, used, plans))
            yield {
                "dtype": dtype,
                "batch": batch,
                "stages": {stage: each._asdict() for stage, each in used.items()},
                "all_networks": plans[0].peak,
                "in_turn": plans[1].peak,
                "seconds": round(time.monotonic() - begin, 1),
            }


def line(dtype: str, batch: int, used: dict[str, Usage], plans: list[Plan]) -> str:
    stages = "".join(
        f"{each.params / GIB:8.2f} +{each.temporary / GIB:5.2f}" for each in used.values()
    )
    return f"{dtype:9s}{batch:4d}{stages}" + "".join(f"{plan.peak / GIB:9.2f}" for plan in plans)


@click.command(help=__doc__)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice([*PRECISIONS]),
    multiple=True,
    default=("bfloat16", "int8"),
)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 4, 16))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(dtypes: tuple[str, ...], batches: tuple[int, ...], json_file: Path | None) -> None:
    missing = compile_gate.missing_packages()
    if missing:
        raise click.ClickException(missing)
    begin = time.monotonic()
    titles = "".join(f"{stage:>15s}" for stage in NETWORK_OF)
    click.echo(f"GiB, params + the rest; sm_90a, jax {jax.__version__}")
    click.echo(f"{'':13s}{titles}{'all':>9s}{'in turn':>9s}")
    with compile_gate.toolchain():
        made = list(rows(dtypes, batches))
    if json_file:
        results.write(json_file, {"settings": made}, None, begin)
    over = [
        f"{row['dtype']}, batch {row['batch']}: {row['in_turn'] / GIB:.2f} GiB, at most {most}"
        for row in made
        if (most := LIMITS.get((row["dtype"], row["batch"]))) and row["in_turn"] > most * GIB
    ]
    for words in over:
        click.echo(words, err=True)
    sys.exit(int(bool(over)))


if __name__ == "__main__":
    main()
