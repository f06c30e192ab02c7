"""`cogview2 plan`: what fits into the memory of a device, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cogview2_jax.cli import bars, common, sampling
from cogview2_jax.pipeline import settings

if TYPE_CHECKING:
    from cogview2_jax.description import Description
    from cogview2_jax.pipeline.memory import Plan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_DTYPES = ("bfloat16", "int8")  # of --memory, the better one first


class Memory(click.ParamType):
    """A size such as 16GB (10⁹ bytes) or 16GiB (2³⁰), in bytes."""

    name = "size"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", value.strip().upper())
        size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
        if not size:
            self.fail(f"must be a size such as 16GB or 24GiB: got {value!r}", parameter, context)
        return size


memory_option = click.option(
    "--memory",
    type=Memory(),
    metavar="SIZE",
    help="Choose --dtype and whether networks are on the device in turn, so that generation fits"
    " into SIZE, such as 16GB. `cogview2 plan` shows the choice.",
)


def fitting(
    folder: Path,
    memory: int | None,
    dtype: str,
    num_images: int,
    together: bool,
    stage: str,
    chosen_sampling: dict[str, float],
) -> tuple[str, dict[str, Any]]:
    """The dtype for `--memory`, and more arguments of `CogView`; without it, dtype as asked. It is
    for drawing up to `stage`, with these options of sampling.

    Of `num_images`, as many are drawn at once as fit, all of them if they must be `together`.
    Raises ClickException if not even one fits.
    """
    if memory is None:
        return dtype, {}
    from cogview2_jax import bundle as bundles

    source = click.get_current_context().get_parameter_source("dtype")
    dtypes = (dtype,) if source == ParameterSource.COMMANDLINE else _DTYPES
    fewer = [] if together else [size for size in settings.BATCHES if size < num_images]
    with common.refusing():
        description = sampling.changed(bundles.read_description(folder), chosen_sampling)
    networks = settings.STAGES[stage]
    chosen, looked = _best(description, memory, dtypes, (num_images, *fewer), networks)
    if chosen is None:
        least = min(looked, key=lambda plan: plan.peak)
        raise click.ClickException(
            f"{least.batch} pictures at once take at least {_size(least.peak)} ({least.dtype},"
            f" {least.stage}), more than {_size(memory)}"
        )
    common.complain(f"--memory {_size(memory)}: {_said(chosen)}")
    return chosen.dtype, {"in_turn": chosen.in_turn, "at_once": chosen.batch}


@click.command(
    "plan",
    epilog="""\b
Examples:
  cogview2 plan --memory 16GB --bundle MODEL
  cogview2 plan --memory 24GiB --dtype bfloat16 --batch 8 --batch 4 --bundle MODEL
""",
)
@click.option(
    "--memory", type=Memory(), required=True, metavar="SIZE", help="Such as 16GB or 24GiB."
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(("float32", *_DTYPES)),
    multiple=True,
    default=_DTYPES,
    show_default=True,
    help="To choose from, the better one first.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 4096),
    multiple=True,
    default=settings.BATCHES,
    show_default=True,
    metavar="N",
    help="Pictures at once, to choose from.",
)
@common.bundle_option
def plan_command(
    memory: int, dtypes: tuple[str, ...], batches: tuple[int, ...], bundle: Path | None
) -> int:
    """How to generate in SIZE bytes of device memory: dtype, pictures at once, networks in turn.

    Reads the model's configuration only, and compiles each stage for this machine's device: up to a
    minute for each at the published size. Prints a line for each setting: dtype, pictures at once,
    the most memory with all networks on the device, and with one at a time. Exit code 1 if nothing
    fits.
    """
    folder = common.check_model(bundle)
    common.use_compilation_cache()
    from cogview2_jax import bundle as bundles

    order = tuple(sorted(set(batches), reverse=True))
    with common.refusing():
        description = bundles.read_description(folder)
    chosen, looked = _best(description, memory, dtypes, order, bundles.NETWORKS)
    click.echo(f"{'dtype':10s}{'pictures':>9s}{'all networks':>16s}{'in turn':>16s}  fullest")
    for together, in_turn in zip(looked[::2], looked[1::2], strict=True):
        click.echo(
            f"{in_turn.dtype:10s}{in_turn.batch:9d}{_size(together.peak):>16s}"
            f"{_size(in_turn.peak):>16s}  {in_turn.stage}"
        )
    if chosen is None:
        common.complain(f"nothing fits into {_size(memory)}")
        return 1
    click.echo(_said(chosen))
    return 0


def _best(
    description: Description,
    memory: int,
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    networks: Collection[str],
) -> tuple[Plan | None, list[Plan]]:

    from cogview2_jax.pipeline import memory as memories

    total = len(dtypes) * len(batches) * len(memories.programs_of(networks))
    with bars.bar("plan", total, "programs", leave=False) as bar:

        def measure(stage: str, batch: int, precision: Any) -> memories.Usage:
            bar.update()
            return memories.usage(description, stage, batch, precision)

        return memories.best(
            description,
            memory,
            dtypes=dtypes,
            batches=batches,
            networks=networks,
            measure=measure,
        )


def _said(plan: Plan) -> str:
    which = "one network at a time (in turn)" if plan.in_turn else "all networks"
    return (
        f"{plan.dtype}, {plan.batch} pictures at once, {which}: {_size(plan.peak)},"
        f" most in {plan.stage}"
    )


def _size(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,} bytes"
