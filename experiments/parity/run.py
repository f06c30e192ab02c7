"""Are the networks the published ones, number by number?

    python -m experiments.parity.run --golden DIR [--bundle DIR] [--text-model FILE] [--json FILE]

Runs every check that the recorded files of DIR allow, and with a text model those of its ids, and
prints a table. With a bundle, that `cogview2 convert` made from published files of the same seeded
weights, the networks have its weights. Exit code 1 if a check fails, 2 if there is nothing to
check.
"""

import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jax

from experiments.parity import networks, operations, texts
from experiments.parity.golden import Check, Golden, Outcome, Skipped, failure, guarded

CHECKS: Mapping[str, Callable[..., Iterator[Outcome]]] = {
    "coglm": networks.check_coglm,
    "coglm_masks": operations.check_coglm_masks,
    "direct_sr": networks.check_direct_sr,
    "iterative_sr": networks.check_iterative_sr,
    "hvqvae": networks.check_hvqvae,
    "local_attention": operations.check_local_attention,
    "sampling": operations.check_sampling,
    "editing": operations.check_editing,
}
NETWORKS = ("coglm", "direct_sr", "iterative_sr", "hvqvae")  # checks that have weights


def outcomes(directory: Path, bundle: Path | None = None) -> Iterator[tuple[str, Outcome, float]]:
    """The name of the file, each outcome, and the seconds it took."""
    for file, check in CHECKS.items():
        path = directory / f"{file}.npz"
        if not path.exists():
            yield file, Skipped("", f"{path.name} is not there"), 0.0
            continue
        began = time.monotonic()
        try:
            golden = Golden(path)
        except Exception as error:
            yield file, failure("reading", error), time.monotonic() - began
            continue
        given = (bundle,) if file in NETWORKS else ()
        for outcome in guarded("", golden, (), check, *given):
            yield file, outcome, time.monotonic() - began
            began = time.monotonic()
        if unread := golden.unread():
            yield file, Skipped("", f"not looked at: {', '.join(unread)}"), 0.0


def text_outcomes(model: Path, ids: Path) -> Iterator[tuple[str, Outcome, float]]:
    """As `outcomes`, of the ids that the text model gives."""
    began = time.monotonic()
    try:
        for outcome in texts.check_text_ids(model, ids):
            yield ids.name, outcome, time.monotonic() - began
            began = time.monotonic()
    except Exception as error:  # whatever a damaged or foreign file leads to is a failed check
        yield ids.name, failure("reading", error), time.monotonic() - began


def line(file: str, outcome: Outcome) -> str:
    name = f"{file}: {outcome.name}" if outcome.name else file
    if isinstance(outcome, Skipped):
        return f"{name:<68} {'':>10} {'':>10}  skipped  {outcome.note}"
    if math.isnan(outcome.error):
        return f"{name:<68} {'':>10} {'':>10}  FAIL     {outcome.note}"
    # Where numbers must be equal, the error is how many are not.
    limit = "equal" if outcome.tolerance == 0 else f"{outcome.tolerance:.4g}"
    verdict = "pass" if outcome.passed else "FAIL"
    return f"{name:<68} {outcome.error:>10.3g} {limit:>10}  {verdict:<8} {outcome.note}".rstrip()


def as_json(file: str, outcome: Outcome, seconds: float) -> dict[str, Any]:
    fields = {"file": file, **outcome._asdict(), "seconds": round(seconds, 3)}
    # JSON has no nan: nothing could be compared.
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }


@click.command()
@click.option(
    "--golden",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of recorded files (tests/golden, or another in its format).",
)
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model converted from files with the recorded weights: checks those of the model.",
)
@click.option(
    "--text-model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The published text model, ice_text.model.",
)
@click.option(
    "--text-ids",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recorded texts and their ids. Default: text_ids.json in the text model's folder.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write everything there too.",
)
def main(
    directory: Path | None,
    bundle: Path | None,
    text_model: Path | None,
    text_ids: Path | None,
    json_path: Path | None,
) -> None:
    """Compare networks and text ids with recorded numbers of the published code."""
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise click.UsageError(f"the folder of {json_path} does not exist")
    if directory is None and text_model is None:
        raise click.UsageError("give --golden, --text-model or both")
    if bundle is not None and directory is None:
        raise click.UsageError("--bundle goes with --golden")
    if text_ids is not None and text_model is None:
        raise click.UsageError("--text-ids goes with --text-model")
    if directory is not None and not any((directory / f"{file}.npz").exists() for file in CHECKS):
        files = ", ".join(f"{file}.npz" for file in CHECKS)
        raise click.UsageError(f"{directory} has none of {files}")
    began = time.monotonic()
    click.echo(f"{'check':<68} {'error':>10} {'tolerance':>10}  verdict")
    made = []
    # On a GPU, float32 products are TF32 unless told not to be: ten bits, and no parity.
    with jax.default_matmul_precision("highest"):
        found = [outcomes(directory, bundle)] if directory is not None else []
        if text_model is not None:
            ids = text_ids or text_model.with_name("text_ids.json")
            found.append(text_outcomes(text_model, ids))
        for file, outcome, seconds in itertools.chain(*found):
            click.echo(line(file, outcome))
            made.append((file, outcome, seconds))
    checks = [outcome for _, outcome, _ in made if isinstance(outcome, Check)]
    failed = sum(not check.passed for check in checks)
    seconds = time.monotonic() - began
    click.echo(f"{len(checks) - failed} of {len(checks)} checks pass ({seconds:.0f} s)")
    if json_path is not None:
        report = {
            "passed": failed == 0,
            "checks": [as_json(*each) for each in made if isinstance(each[1], Check)],
            "skipped": [as_json(*each) for each in made if isinstance(each[1], Skipped)],
            "seconds": round(seconds, 1),
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
