"""Does each objective teach its network?

    python -m experiments.objectives.run [--part overfit|ablations] [--quick] [--out DIR]

Prints tables; --out also writes results.json and plot.png there. After an interruption, the same
command resumes. Exits with 1 if an objective does not reach its share of the first loss, or the
full training is not the better one. See README.md for what to expect.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from cogview2_jax import bundle as bundles
from cogview2_jax.cli import common
from cogview2_jax.training.loop import keep_freed_memory
from experiments.local_attention.report import device_name
from experiments.objectives import ablations, figures, overfit

# The largest share of the first loss that the last may be. Quick runs are too short for 5 %.
LIMIT, QUICK_LIMIT = 0.05, 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("overfit", "ablations"), help="default: both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these objectives or ablations")
    parser.add_argument("--seeds", type=int, default=2, help="of each ablation")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="the runs")
    parser.add_argument("--out", type=Path, help="write results.json and plot.png here")
    arguments = parser.parse_args(argv)

    common.use_compilation_cache()  # these two as `cogview2 train` does
    keep_freed_memory()
    bundle = bundles.load(None, ("tokenizer", "coglm"))
    work = arguments.work / ("quick" if arguments.quick else "full")
    file = arguments.out / "results.json" if arguments.out else None
    record: dict[str, Any] = {"device": device_name(), "jax": jax.__version__}
    holds = True
    if arguments.part != "ablations":
        limit = QUICK_LIMIT if arguments.quick else LIMIT
        size = overfit.QUICK if arguments.quick else overfit.FULL
        runs = overfit.runs(bundle, size, work / "overfit")
        curves = {name: runs[name]() for name in chosen(runs, arguments.only)}
        record["overfit"] = {n: overfit_figures(curve, limit) for n, curve in curves.items()}
        print(f"\n{'objective':<32}{'first loss':>10}{'last loss':>11}{'left':>8}  < {limit:.0%}")
        for name, curve in curves.items():
            reached = curve.left < limit
            holds &= reached
            print(
                f"{name:<32}{curve.losses[0]:>10.3f}{curve.losses[-1]:>11.4f}{curve.left:>8.2%}"
                f"  {'holds' if reached else 'DOES NOT HOLD'}"
            )
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            figures.plot(curves, limit, arguments.out / "plot.png")
    if arguments.part != "overfit":
        folder = work / "ablations"
        sizes = ablations.QUICK if arguments.quick else ablations.FULL
        planned = ablations.ablations(bundle, sizes, folder)
        found = {
            name: ablations.run(name, planned[name], arguments.seeds, folder)
            for name in chosen(planned, arguments.only)
        }
        record["ablations"] = found
        for name, sides in found.items():
            ablation = planned[name]
            print(
                f"\n{ablation.question} Validation {ablation.figure} loss, mean and range of seeds"
            )
            for side, each in sides.items():
                mean, least, most = ablations.means(each, ablation.figure)
                print(f"  {side:<24}{mean:>9.4f}  {least:.4f} to {most:.4f}")
            full, without = (ablations.means(each, ablation.figure)[0] for each in sides.values())
            holds &= full < without
            print(f"  expected {ablation.full}: {'holds' if full < without else 'DOES NOT HOLD'}")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text()) if file.exists() else {}
        for part in ("overfit", "ablations"):  # what was not run now stays
            record[part] = before.get(part, {}) | record.get(part, {})
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {file}")
    return int(not holds)


def chosen(known: dict[str, Any], only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in known:
            raise SystemExit(f"--only must be of {', '.join(map(repr, known))}: got {name!r}")
    return [name for name in known if not only or name in only]


def overfit_figures(curve: figures.Curve, limit: float) -> dict[str, float | int | None]:
    first = curve.losses[0]
    under = [s for s, loss in zip(*curve, strict=True) if loss < limit * first]
    return {
        "first_loss": round(first, 4),
        "last_loss": round(curve.losses[-1], 5),
        "left": round(curve.left, 5),
        "steps": curve.steps[-1],
        "first_step_below": under[0] if under else None,
    }


if __name__ == "__main__":
    sys.exit(main())
