"""Training with and without each choice: the same data, steps and seeds, measured on the same
validation records.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.data.sources import Scenes
from cogview2_jax.training.codebook import codebook_revision
from cogview2_jax.training.coglm import coglm_task
from cogview2_jax.training.options import (
    CogLMOptions,
    DirectSROptions,
    IterativeSROptions,
    LoopOptions,
    Options,
    TokenizerOptions,
)
from cogview2_jax.training.run import run as run_task
from cogview2_jax.training.super_resolution import direct_sr_task, iterative_sr_task
from cogview2_jax.training.task import Task
from cogview2_jax.training.tokenizer import tokenizer_task
from experiments.objectives import figures, overfit
from experiments.scenes import prepared


@dataclass(frozen=True)
class Size:
    """Numbers of scenes and steps, and the transformers that start from nothing."""

    scenes: int
    fine_scenes: int
    small_scenes: int
    validation: float
    layers: int
    width: int
    mix_steps: int
    direct_steps: int
    iterative_steps: int
    tokenizer_steps: int
    channels: int
    codes: int


FULL = Size(2000, 300, 1000, 0.1, 3, 128, 200, 120, 200, 200, channels=16, codes=512)
QUICK = Size(64, 32, 32, 0.3, 2, 64, 20, 3, 10, 12, channels=16, codes=128)


class Ablation(NamedTuple):
    """`full` is expected to have the lower validation `figure`."""

    question: str
    full: str
    without: str
    figure: str
    tasks: Callable[[int], tuple[Task, Task, Options]]  # seed → full, without, how to train both


class _Setup(NamedTuple):
    """What all ablations share. `bundle` holds its tokenizer and its CogLM."""

    bundle: Bundle
    small: Bundle
    size: Size
    work: Path

    def options(self, seed: int, steps: int, batch_size: int) -> Options:
        return dataclasses.replace(
            overfit.MUON,
            num_steps=steps,
            batch_size=batch_size,
            seed=seed,
            validation=self.size.validation,
        )


def ablations(bundle: Bundle, size: Size, work: Path) -> dict[str, Ablation]:
    """All of them by name. `bundle` holds its tokenizer and its CogLM."""
    setup = _Setup(bundle, overfit.small(bundle, size.layers, size.width), size, work)
    return {
        "direct": Ablation(
            "Does direct SR gain from starting as CogLM?",
            "from CogLM",
            "from nothing",
            "image",
            functools.partial(_direct, setup),
        ),
        "mix": Ablation(
            "Does the three-task mix teach captions, in addition to pictures?",
            "three tasks",
            "generation alone",
            "caption",
            functools.partial(_mix, setup),
        ),
        "masks": Ablation(
            "Does iterative SR gain from masks like those of its rounds?",
            "masks of the rounds",
            "scattered masks",
            "image",
            functools.partial(_iterative, setup),
        ),
        "codes": Ablation(
            "Does the tokenizer gain from placing and reviving codes?",
            "placed and revived",
            "moving average alone",
            "reconstruction",
            functools.partial(_tokenizer, setup),
        ),
    }


def _mix(setup: _Setup, seed: int) -> tuple[Task, Task, Options]:
    records = prepared.tokens(
        setup.work / "records", setup.bundle, Scenes(setup.size.scenes), fine=False
    )
    chosen = setup.options(seed, setup.size.mix_steps, 32)

    def task(**tasks: Any) -> Task:
        return coglm_task(setup.small, records, chosen, CogLMOptions("nothing", **tasks))

    # Both are measured on as many samples of captioning as of generation.
    judged = task(caption_ratio=0.5, text_ratio=0.0).read_validation
    full, without = task(), task(caption_ratio=0.0, text_ratio=0.0)
    return (
        full._replace(read_validation=judged),
        without._replace(read_validation=judged),
        chosen,
    )


def _direct(setup: _Setup, seed: int) -> tuple[Task, Task, Options]:
    records = prepared.tokens(
        setup.work / "fine_records", setup.bundle, Scenes(setup.size.fine_scenes)
    )
    chosen = setup.options(seed, setup.size.direct_steps, 8)

    def task(start: str) -> Task:
        return direct_sr_task(setup.bundle, records, chosen, DirectSROptions(start))

    return task("coglm"), task("nothing"), chosen


def _iterative(setup: _Setup, seed: int) -> tuple[Task, Task, Options]:
    fresh = overfit.with_small_grid(setup.small)
    records = prepared.tokens(setup.work / "small_records", fresh, Scenes(setup.size.small_scenes))
    chosen = setup.options(seed, setup.size.iterative_steps, 16)
    full = iterative_sr_task(fresh, records, chosen, IterativeSROptions("nothing"))
    return full, full._replace(read=scattered(full.read, seed)), chosen


def _tokenizer(setup: _Setup, seed: int) -> tuple[Task, Task, Options]:
    pictures = prepared.pictures(setup.work / "pictures", Scenes(setup.size.scenes))
    chosen = setup.options(seed, setup.size.tokenizer_steps, 16)
    config = overfit.small_tokenizer(
        setup.bundle.tokenizer_config, setup.size.channels, setup.size.codes
    )
    fresh = setup.bundle._replace(tokenizer_config=config)

    def task(settle: float) -> Task:
        own = TokenizerOptions("nothing", side=overfit.SIDE, settle=settle)
        return tokenizer_task(fresh, pictures, chosen, own)

    alone = codebook_revision()
    return task(0.1), task(0.0)._replace(before_step=None, revise=alone), chosen


def scattered(read: Callable[[int], Any], seed: int) -> Callable[[int], Any]:
    """The same batches with the masked cells of each picture, and their weights, moved to random
    places.
    """

    def moved(step: int) -> Any:
        batch = read(step)
        rng = np.random.default_rng((seed, 2, step))
        order = rng.random(batch.masked.shape).argsort(axis=1)
        return batch._replace(
            masked=np.take_along_axis(batch.masked, order, 1),
            weights=np.take_along_axis(batch.weights, order, 1),
        )

    return moved


def run(name: str, ablation: Ablation, seeds: int, work: Path) -> dict[str, Any]:
    """Train both sides with each seed: their validation figures, one dictionary a seed."""
    found: dict[str, Any] = {ablation.full: [], ablation.without: []}
    for seed in range(seeds):
        full, without, options = ablation.tasks(seed)
        for side, task in ((ablation.full, full), (ablation.without, without)):
            folder = work / f"{name}_{figures.slug(side)}_{seed}"
            # One save, at the end: validation takes place then.
            loop = LoopOptions(save_every=options.num_steps, keep=1, log_every=10)
            run_task(task, options, folder, loop)
            found[side].append(_summed(figures.validation(folder)))
    return found


def _summed(figures: dict[str, float]) -> dict[str, float]:
    """The figures, with the means over the two languages and over the strides, if there are any."""
    both = [figures[name] for name in ("english", "chinese") if name in figures]
    strides = [value for name, value in figures.items() if name.startswith("reconstruction_")]
    for name, values in (("caption", both), ("reconstruction", strides)):
        if values:
            figures[name] = round(float(np.mean(values)), 4)
    return figures


def means(found: list[dict[str, float]], figure: str) -> tuple[float, float, float]:
    """Mean, minimum and maximum of a figure over the seeds."""
    values = [one[figure] for one in found]
    return float(np.mean(values)), min(values), max(values)
