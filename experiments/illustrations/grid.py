"""Draw things in every style: a row for each thing, a column for each style.

\b
    python -m experiments.illustrations.grid --pictures illustrations --bundle DIR --out grid.png

Prompts are in English and Chinese by turns. A pair that training never saw has a frame.
"""

from pathlib import Path

import click
import jax
import numpy as np
from PIL import Image, ImageDraw

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import STYLES, Item
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.settings import LANGUAGES
from experiments import results
from experiments.illustrations import match

THINGS = ("panda", "owl", "fox", "fish", "red-apple", "watermelon", "pizza", "doughnut")


def rows_of(items: list[Item], things: tuple[str, ...]) -> list[list[Item]]:
    """The real picture of each thing in each style. Raises UsageError for a thing that is not in
    every style.
    """
    by_pair = {(item.thing, item.style): item for item in items}
    for thing in things:
        if any((thing, style) not in by_pair for style in STYLES):
            known = sorted({thing for thing, _ in by_pair})
            raise click.UsageError(f"{thing} is not there in every style: {', '.join(known)}")
    return [[by_pair[thing, style] for style in STYLES] for thing in things]


def draw(cv: CogView, rows: list[list[Item]], seed: int) -> np.ndarray:
    """uint8 [rows, styles, y, x, 3], from a call for each row."""
    stage, made = match.stages_of(cv)[-1], []
    for number, row in enumerate(rows):
        language = LANGUAGES[number % 2]
        prompts = [illustrations.single_captions(item, language)[0] for item in row]
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn = cv.generate_stages(prompts, key, 1, stages=(stage,))
        made.append(drawn[stage][:, 0])
    return np.stack(made)


def grid(rows: list[list[Item]], pictures: np.ndarray, side: int = 144) -> Image.Image:
    """The pictures with names beside and above them."""
    left, top = 110, 24
    size = left + len(STYLES) * side, top + len(rows) * side
    whole = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(whole)
    for column, style in enumerate(STYLES):
        pen.text((left + column * side + 8, 4), style, fill="black", font_size=14)
    for number, row in enumerate(rows):
        y = top + number * side
        pen.text((6, y + side // 2 - 8), row[0].english, fill="black", font_size=14)
        for column, item in enumerate(row):
            x = left + column * side
            picture = Image.fromarray(pictures[number, column])
            whole.paste(picture.resize((side - 4, side - 4), Image.Resampling.LANCZOS), (x, y))
            if item.split != "train":
                pen.rectangle((x, y, x + side - 5, y + side - 5), outline="orange", width=2)
    return whole


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@results.bundle_option
@click.option("--thing", "things", multiple=True, default=THINGS, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    pictures: Path, bundle: Path | None, things: tuple[str, ...], seed: int, out: Path
) -> None:
    rows = rows_of(illustrations.read_index(pictures), things)
    grid(rows, draw(results.load_model(bundle), rows, seed)).save(out)
    click.echo(out)


if __name__ == "__main__":
    main()
