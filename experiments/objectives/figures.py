"""Reading and plotting of a run's metrics.jsonl."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from cogview2_jax.training.options import LoopOptions, Options
from cogview2_jax.training.run import run
from cogview2_jax.training.task import Task


class Curve(NamedTuple):
    """The loss before each step's update: steps count from 1."""

    steps: list[int]
    losses: list[float]

    @property
    def left(self) -> float:
        """The last loss over the first one."""
        return self.losses[-1] / self.losses[0]


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")


def train(task: Task, options: Options, folder: Path) -> Curve:
    """Train as `cogview2 train` does, or resume, or only read the metrics of a finished run."""
    run(task, options, folder, LoopOptions(save_every=100, keep=1, log_every=1))
    lines = [line for line in read(folder) if "loss" in line]
    return Curve([line["step"] for line in lines], [line["loss"] for line in lines])


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validation(folder: Path) -> dict[str, float]:
    """The last validation figures of a run."""
    last = [line for line in read(folder) if "validation_loss" in line][-1]
    return {
        name.removeprefix("validation_"): round(value, 4)
        for name, value in last.items()
        if name.startswith("validation_") and value is not None
    }


def plot(curves: dict[str, Curve], limit: float, file: Path) -> None:
    """Each loss as a share of its first one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        axis.plot(curve.steps, [loss / curve.losses[0] for loss in curve.losses], label=name, lw=1)
    axis.axhline(limit, color="k", ls=":", label=f"{limit:.0%}")
    axis.set(yscale="log", xlabel="step", ylabel="loss over the first loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
