"""Trains the judge on its own pictures; writes `judge.safetensors` and `judge.json` to its folder.

    python -m experiments.caption_match.train_judge

Takes about six minutes on two cores. The seed and the stream of pictures are the judge's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from PIL import Image

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import SceneObject
from experiments.caption_match import judge
from experiments.caption_match.pictures import Sample, damage, sample, through_64

_STREAM = 0x1D6E  # sets the judge's pictures apart from those of any other network
_ADAM_LEARNING_RATE = 3e-3
Step = Callable[
    [judge.Params, optax.OptState, Sample], tuple[judge.Params, optax.OptState, jax.Array]
]
_NEAR = 8.0  # pixels; a third of a cell, so that the lattice position is beyond doubt


def loss(params: judge.Params, batch: Sample) -> jax.Array:
    """Mean over the batch of: presence at all grid positions, and position and words of objects."""
    reading = judge.apply(params, batch.image)
    found = optax.sigmoid_binary_cross_entropy(reading.present, batch.present) * batch.weight
    misses = optax.huber_loss(reading.offset, batch.offset, delta=0.1).sum(-1)
    for name, words in batch.words.items():
        misses += optax.softmax_cross_entropy(reading.words[name], words)
    # Both are sums over the picture: an empty position counts like an object.
    return jnp.sum(found + misses * batch.present) / len(batch.image)


def batches(seed: int, size: int) -> Generator[Sample, None, None]:
    """Endless batches, drawn one ahead in a thread of their own."""

    def make(step: int) -> Sample:
        rng = np.random.default_rng(np.random.SeedSequence((_STREAM, seed, step)))
        samples = [sample(rng) for _ in range(size)]
        stacked: Sample = jax.tree.map(lambda *leaves: np.stack(leaves), *samples)
        return stacked

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, 0)
        step = 0
        while True:
            step += 1
            ready, ahead = ahead, pool.submit(make, step)
            yield ready.result()


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Muon for kernels, AdamW for the rest, warmed up and annealed to zero over `steps`.

    Muon takes a kernel as a matrix from its window to its features. After 120 batches of 32 its
    loss was a third of AdamW's.
    """

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20 + 1, steps)

    kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.contrib.muon(
            schedule(learning_rate),
            adam_learning_rate=schedule(_ADAM_LEARNING_RATE),
            muon_weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda x: kernel if x.ndim == 4 else None, tree
            ),
        ),
    )


def make_step(optimizer: optax.GradientTransformation) -> Step:
    """The jitted step: (weights, optimizer state, batch) to (weights, state, loss)."""

    @jax.jit
    def step(
        params: judge.Params, state: optax.OptState, batch: Sample
    ) -> tuple[judge.Params, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> judge.Params:
    """Weights after `steps`; prints the loss as it goes."""
    params = judge.init_params(jax.random.key(seed))
    optimizer = make_optimizer(steps, learning_rate)
    state = optimizer.init(params)
    step = make_step(optimizer)
    start = time.monotonic()
    with contextlib.closing(batches(seed, batch_size)) as stream:
        for number, batch in enumerate(itertools.islice(stream, steps), 1):
            params, state, value = step(params, state, batch)
            if number % 50 == 0 or number == steps:
                click.echo(
                    f"{number:5d}  loss {float(value):.3f}  {time.monotonic() - start:.0f} s"
                )
    return params


def same(found: list[SceneObject], drawn: tuple[SceneObject, ...]) -> bool:
    """Whether the judge saw exactly the objects drawn, with every attribute, where they are."""
    left = list(found)
    for item in drawn:
        twins = [f for f in left if dataclasses.replace(f, x=item.x, y=item.y) == item]
        near = [f for f in twins if max(abs(f.x - item.x), abs(f.y - item.y)) <= _NEAR]
        if not near:
            return False
        left.remove(near[0])
    return not left


def measure(params: judge.Params, count: int) -> dict[str, float]:
    """Fractions of pictures read without a mistake: as drawn, and damaged in several ways."""
    rng = np.random.default_rng((_STREAM, 1))
    results = {}
    for split in ("test", "composition"):
        examples = [scenes.example(split, i) for i in range(count)]
        views: dict[str, list[Image.Image]] = {split: [e.image for e in examples]}
        if split == "test":
            views["test, through 64 pixels"] = [through_64(e.image) for e in examples]
            views["test, damaged"] = [damage(e.image, rng) for e in examples]
        for name, images in views.items():
            found = judge.read(params, np.stack([np.asarray(image) for image in images]))
            right = [same(f, e.scene.objects) for f, e in zip(found, examples, strict=True)]
            results[name] = float(np.mean(right))
    return results


@click.command(help=__doc__)
@click.option("--steps", default=600, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--learning-rate", default=0.02, show_default=True)
@click.option("--seed", default=20, show_default=True)
@click.option("--test-pictures", default=2000, show_default=True, help="Of each kind.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=judge.WEIGHTS, help="Where the weights go."
)
def main(
    steps: int, batch_size: int, learning_rate: float, seed: int, test_pictures: int, out: Path
) -> None:
    start = time.monotonic()
    params = train(steps, batch_size, learning_rate, seed)
    seconds = time.monotonic() - start
    judge.save(params, out)
    # Measures the float16 weights that were written.
    right = measure(judge.load(out), test_pictures)
    for name, fraction in right.items():
        click.echo(f"{name:26s} {fraction:.4f}")
    report = {
        "right": right,
        "test_pictures": test_pictures,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "seconds": round(seconds),
        "jax": jax.__version__,
    }
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
