"""Train the judge on real pictures, damaged; writes `judge.safetensors` and `judge.json`.

\b
    python -m experiments.illustrations.train_judge --pictures illustrations
    python -m experiments.illustrations.train_judge --pictures illustrations --hold-out \\
        --out held_out.safetensors

It learns the pictures of every split, as it has to read those that generators never saw. With
--hold-out it does not see the pairs of thing and style that are held out, and is measured on them:
what it makes of a thing in a style that it does not know it in.
"""

import contextlib
import itertools
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
import optax
from PIL import Image, ImageDraw
from tqdm import tqdm

from experiments.caption_match.judge import Params
from experiments.caption_match.pictures import damage, through_64
from experiments.caption_match.train_judge import make_optimizer
from experiments.illustrations import examples, judge
from experiments.illustrations.examples import Collection
from experiments.illustrations.judge import Judge
from experiments.illustrations.presets import FINE_PIXELS, KINDS

_STREAM = 0x1D6F  # sets the judge's pictures apart from those of any other network
_MIXED = 0.25  # share of pictures that are half one and half another
_SMALLEST = 0.5  # of a picture, of its side
_TURN = 12.0  # degrees


class Batch(NamedTuple):
    """Pictures uint8 [b, 192, 192, 3], and probabilities of what they show, [b, things] and
    [b, styles].
    """

    images: np.ndarray
    thing: np.ndarray
    style: np.ndarray


def batches(
    collection: Collection, known: np.ndarray, things: tuple[str, ...], seed: int, size: int
) -> Generator[Batch, None, None]:
    """Endless batches of the pictures `known`, drawn one ahead in a thread of their own."""
    labels = np.array([things.index(item.thing) for item in collection.items])
    styles = np.array([judge.STYLE_NAMES.index(item.style) for item in collection.items])

    def make(step: int) -> Batch:
        rng = np.random.default_rng((_STREAM, seed, step))
        pairs = rng.choice(known, (size, 2))
        pairs[:, 1] = np.where(rng.random(size) < _MIXED, pairs[:, 1], pairs[:, 0])
        images = [_mixed(collection.pictures[one], collection.pictures[two], rng)
                  if one != two else _placed(collection.pictures[one], rng)
                  for one, two in pairs]  # fmt: skip
        return Batch(
            np.stack([np.asarray(damage(image, rng)) for image in images]),
            np.eye(len(things), dtype=np.float32)[labels[pairs]].mean(1),
            np.eye(len(judge.STYLE_NAMES), dtype=np.float32)[styles[pairs]].mean(1),
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, 0)
        for step in itertools.count(1):
            ready, ahead = ahead, pool.submit(make, step)
            yield ready.result()


def _placed(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The picture smaller, turned a little, perhaps mirrored, somewhere on white."""
    side = int(rng.integers(round(_SMALLEST * FINE_PIXELS), FINE_PIXELS + 1))
    image = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        turn = rng.uniform(-_TURN, _TURN)
        image = image.rotate(turn, Image.Resampling.BILINEAR, fillcolor="white")
    x, y = (int(value) for value in rng.integers(FINE_PIXELS - side + 1, size=2))
    canvas = Image.new("RGB", (FINE_PIXELS, FINE_PIXELS), "white")
    canvas.paste(image, (x, y))
    return canvas


def _mixed(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Half of one picture and half of another, cut along a line through the middle."""
    middle = FINE_PIXELS / 2
    angle = rng.uniform(0, 2 * np.pi)
    along = 2 * FINE_PIXELS * np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    corners = (along, -along, across - along, across + along)
    mask = Image.new("L", (FINE_PIXELS, FINE_PIXELS))
    polygon = [(float(middle + x), float(middle + y)) for x, y in corners]
    ImageDraw.Draw(mask).polygon(polygon, fill=255)
    image = Image.fromarray(one)
    image.paste(Image.fromarray(other), mask=mask)
    return image


def train(
    collection: Collection,
    known: np.ndarray,
    things: tuple[str, ...],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Judge:
    """A judge after `steps`."""
    params = judge.init_params(jax.random.key(seed), len(things))
    optimizer = make_optimizer(steps, learning_rate)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any, jax.Array]:
        def loss(params: Params) -> jax.Array:
            reading = judge.apply(params, batch.images, len(things))
            of_thing = optax.softmax_cross_entropy(reading.thing, batch.thing)
            return (of_thing + optax.softmax_cross_entropy(reading.style, batch.style)).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    with contextlib.closing(batches(collection, known, things, seed, batch_size)) as stream:
        bar = tqdm(itertools.islice(stream, steps), total=steps, desc="judge", mininterval=5)
        for batch in bar:
            params, state, value = step(params, state, batch)
            bar.set_postfix(loss=f"{float(value):.3f}")
    return Judge(params, things)


def measure(made: Judge, collection: Collection, numbers: np.ndarray) -> dict[str, Any]:
    """Shares of pictures whose thing and style are read right: as they are, reduced to 64 pixels
    and enlarged, and placed and damaged as in training, at other random numbers.
    """
    rng = np.random.default_rng((_STREAM, 1))
    images = [Image.fromarray(collection.pictures[number]) for number in numbers]
    views = {
        "as they are": images,
        "through 64 pixels": [through_64(image) for image in images],
        "damaged": [damage(_placed(np.asarray(image), rng), rng) for image in images],
    }
    items = [collection.items[number] for number in numbers]
    shares = {}
    for name, view in views.items():
        seen = judge.read(made, np.stack([np.asarray(image) for image in view]))
        shares[name] = {
            "thing": _share(seen.things, [item.thing for item in items]),
            "style": _share(seen.styles, [item.style for item in items]),
        }
    return shares


def _share(found: list[str], true: list[str]) -> float:
    return round(float(np.mean([a == b for a, b in zip(found, true, strict=True)])), 4)


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--steps", type=click.IntRange(1), default=1500, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--learning-rate", default=0.02, show_default=True)
@click.option("--seed", default=20, show_default=True)
@click.option("--kind", "kinds", multiple=True, default=KINDS, show_default=True)
@click.option("--hold-out", is_flag=True, help="Leave out the held-out pairs.")
@click.option("--out", type=click.Path(path_type=Path), default=judge.WEIGHTS)
def main(pictures: Path, kinds: tuple[str, ...], hold_out: bool, out: Path, **how: Any) -> None:
    begin = time.monotonic()
    collection = examples.of_kinds(examples.read(pictures), kinds)
    things = tuple(sorted({item.thing for item in collection.items}))
    held = collection.indices("unseen_pair")
    every = np.arange(len(collection.items))
    known = np.setdiff1d(every, held) if hold_out else every
    judge.save(train(collection, known, things, **how), {}, out)
    made = judge.load(out)  # measured as written, in half precision
    right = {"known": measure(made, collection, known)}
    if hold_out:
        right["held out"] = measure(made, collection, held)
    for group, views in right.items():
        for view, shares in views.items():
            click.echo(f"{group:10s}{view:20s}" + "".join(f"{s:8.4f}" for s in shares.values()))
    figures = {"right": right, **how, "seconds": round(time.monotonic() - begin)}
    judge.save(made, figures | {"jax": jax.__version__}, out)


if __name__ == "__main__":
    main()
