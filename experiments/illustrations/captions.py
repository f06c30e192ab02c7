"""Do captions name what pictures show, in a style that the thing was never seen in, and does rank
pick the right name of ten?

\b
    python -m experiments.illustrations.captions --pictures illustrations --bundle DIR --json FILE

Pictures are real ones, of the pairs of thing and style that training never saw. A caption counts if
it is one of those that the data set gives to some picture of the thing; `style` is counted the same
way. For rank, each picture is scored with its own name and with those of nine other things, all in
the picture's style; `rank` is the share of pictures whose own name comes first. Blind: 0.1.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.settings import LANGUAGES
from experiments import results
from experiments.illustrations import examples, presets

NAMES = 10  # that rank chooses from


def meanings(items: Sequence[Item], language: str) -> dict[str, tuple[str, str]]:
    """Caption → thing and style, of every caption that there is."""
    return {
        caption: (item.thing, item.style)
        for item in items
        for caption in illustrations.single_captions(item, language)
    }


def caption_scores(
    captions: Sequence[str], pictures: Sequence[Item], known: dict[str, tuple[str, str]]
) -> dict[str, float]:
    """Shares of captions that name the thing, and the style, of their pictures, and of those that
    are captions of the data set at all.
    """
    said = [known.get(caption, ("", "")) for caption in captions]
    right = [
        (bool(thing), thing == item.thing, style == item.style)
        for (thing, style), item in zip(said, pictures, strict=True)
    ]
    shares = np.mean(right, axis=0)
    return {
        name: round(float(share), 4)
        for name, share in zip(("sentences", "thing", "style"), shares, strict=True)
    }


def choices(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    """Picture `number`, and nine of other things in its style."""
    own = items[number]
    others = [item for item in items if item.style == own.style and item.thing != own.thing]
    picked = rng.choice(len(others), NAMES - 1, replace=False)
    return [own, *(others[index] for index in picked)]


def rank_share(
    cv: CogView, collection: examples.Collection, numbers: np.ndarray, language: str, seed: int
) -> float:
    """The share of pictures whose own name has the best score of ten."""
    rng = np.random.default_rng((0x3A7D, seed))
    first = 0
    for number in tqdm(numbers, desc=f"rank, {language}"):
        names = choices(collection.items, number, rng)
        texts = [illustrations.single_captions(item, language)[0] for item in names]
        first += int(np.argmax(cv.scores(texts, [collection.pictures[number]])) == 0)
    return round(first / len(numbers), 4)


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@results.bundle_option
@click.option("--num-pictures", type=click.IntRange(1), default=288, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the pictures and the names.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    pictures: Path, bundle: Path | None, num_pictures: int, seed: int, json_file: Path | None
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    collection = examples.of_kinds(examples.read(pictures), presets.KINDS)
    numbers = np.random.default_rng((0x3A7E, seed)).permutation(collection.indices("unseen_pair"))
    numbers = numbers[:num_pictures]
    shown = [collection.items[number] for number in numbers]
    figures: dict[str, Any] = {}
    for language in LANGUAGES:
        said = cv.captions(list(collection.pictures[numbers]), language=language)
        figures[language] = {
            "caption": caption_scores(said, shown, meanings(collection.items, language)),
            "rank": rank_share(cv, collection, numbers, language, seed),
        }
        click.echo(f"{language}: {figures[language]}")
    if json_file:
        settings = {"pictures": len(numbers), "seed": seed}
        results.write(json_file, figures | settings, bundle, begin)


if __name__ == "__main__":
    main()
