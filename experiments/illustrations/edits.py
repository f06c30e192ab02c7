"""Is a thing of two replaced by the one that the text names?

\b
    python -m experiments.illustrations.edits --pictures illustrations --bundle DIR \\
        --num-edits 200 --json FILE

A frame has two things of one style, side by side or one above the other. The half with one of them
is masked, and a text names another thing there. The judge reads that half, cut out and enlarged:

\b
    thing      share of edits in which it sees the thing
    style      share in which it sees the frame's style
    unchanged  share in which no pixel of the other half changed

The row `drawing` has the frames as they should be: the judge's own limit.
"""

import time
from pathlib import Path
from typing import NamedTuple

import click
import jax
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.editing import Box
from cogview2_jax.pipeline.settings import LANGUAGES
from experiments import results
from experiments.illustrations import examples, judge, presets
from experiments.illustrations.examples import Collection
from experiments.illustrations.judge import Judge
from experiments.illustrations.presets import FINE_PIXELS

HALVES: dict[str, Box] = {
    "left": (0, 0, 1, 0.5),
    "right": (0, 0.5, 1, 1),
    "above": (0, 0, 0.5, 1),
    "below": (0.5, 0, 1, 1),
}
"""Where the first thing of a frame is, by its relation to the second."""


class Task(NamedTuple):
    before: np.ndarray  # uint8 [192, 192, 3]
    after: np.ndarray  # as it should be, with the new thing as a real picture
    box: Box
    text: str
    wanted: Item


def make_task(collection: Collection, rng: np.random.Generator, language: str) -> Task:
    """A frame of two things of the train split, and a text that names another for the first."""
    known = collection.indices("train")
    items = [collection.items[number] for number in known]
    first, second, relation, _ = illustrations.draw_frame(items, rng)
    kept, there = items[second], (items[first].thing, items[second].thing)
    others = [
        number
        for number, item in enumerate(items)
        if item.style == kept.style and item.thing not in there
    ]
    new = int(rng.choice(others))
    text = illustrations.frame_captions(items[new], kept, relation, rng)[language]
    seed = int(rng.integers(2**31))

    def frame(number: int) -> np.ndarray:
        one, two = (Image.fromarray(collection.pictures[known[n]]) for n in (number, second))
        # From one seed, so that the second thing is at one place in both.
        rng = np.random.default_rng(seed)
        return np.asarray(illustrations.compose(one, two, relation, rng, FINE_PIXELS))

    return Task(frame(first), frame(new), HALVES[relation], text, items[new])


def pixels_in(box: Box) -> tuple[slice, slice]:
    """Rows and columns of a box."""
    top, left, bottom, right = (round(edge * FINE_PIXELS) for edge in box)
    return slice(top, bottom), slice(left, right)


def half_of(picture: np.ndarray, box: Box) -> np.ndarray:
    """What is in the box, without the white around it, enlarged: uint8 [192, 192, 3]."""
    part = Image.fromarray(picture[pixels_in(box)])
    dark = part.convert("L").point(lambda value: 255 * (value < 240))
    cut = part.crop(dark.getbbox() or (0, 0, *part.size))
    margin = FINE_PIXELS // 16
    inner = (FINE_PIXELS - 2 * margin,) * 2
    return np.asarray(ImageOps.expand(ImageOps.pad(cut, inner, color="white"), margin, "white"))


def verdicts(tasks: list[Task], made: np.ndarray, judged: Judge) -> dict[str, float]:
    """The shares (see the module) of edited pictures uint8 [tasks, 192, 192, 3]."""
    halves = [half_of(picture, task.box) for task, picture in zip(tasks, made, strict=True)]
    seen = judge.read(judged, np.stack(halves))
    rows = []
    for task, picture, thing, style in zip(tasks, made, seen.things, seen.styles, strict=True):
        changed = (picture != task.before).any(-1)
        changed[pixels_in(task.box)] = False
        rows.append((thing == task.wanted.thing, style == task.wanted.style, not changed.any()))
    shares = np.mean(rows, axis=0)
    names = ("thing", "style", "unchanged")
    return {name: round(float(share), 4) for name, share in zip(names, shares, strict=True)}


def run_edits(cv: CogView, tasks: list[Task], seed: int) -> np.ndarray:
    """The edited picture of each task: uint8 [tasks, 192, 192, 3]."""
    made = []
    for number, task in enumerate(tqdm(tasks, desc="editing")):
        key = jax.random.fold_in(jax.random.key(seed), number)
        made.append(cv.edit(task.text, task.before, box=task.box, num_images=1, key=key)[0])
    return np.stack(made)


def sheet(tasks: list[Task], made: np.ndarray, limit: int = 30, columns: int = 3) -> Image.Image:
    """Before and after, of some edits, with what the text names."""
    side, words = 128, 150
    limit = min(limit, len(tasks))
    rows = -(-limit // columns)
    whole = Image.new("RGB", (columns * (2 * side + words), rows * side), "white")
    pen = ImageDraw.Draw(whole)
    for number in range(limit):
        x, y = number % columns * (2 * side + words), number // columns * side
        for place, picture in enumerate((tasks[number].before, made[number])):
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            whole.paste(small, (x + place * side, y))
        wanted = tasks[number].wanted
        pen.text((x + 2 * side + 4, y + 4), f"{wanted.english}\n{wanted.style}", fill="black")
    return whole


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@results.bundle_option
@click.option("--num-edits", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the edits and their pictures.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sheet", "sheet_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    pictures: Path,
    bundle: Path | None,
    num_edits: int,
    seed: int,
    json_file: Path | None,
    sheet_file: Path | None,
) -> None:
    begin = time.monotonic()
    cv, judged = results.load_model(bundle), judge.load()
    collection = examples.of_kinds(examples.read(pictures), presets.KINDS)
    rng = np.random.default_rng((0x3A7F, seed))
    tasks = [make_task(collection, rng, LANGUAGES[n % 2]) for n in range(num_edits)]
    made = run_edits(cv, tasks, seed)
    figures = {
        "edit": verdicts(tasks, made, judged),
        "drawing": verdicts(tasks, np.stack([task.after for task in tasks]), judged),
    }
    for name, shares in figures.items():
        cells = "".join(f"  {what} {100 * share:.1f} %" for what, share in shares.items())
        click.echo(f"{name:8s}{cells}")
    if sheet_file:
        sheet(tasks, made).save(sheet_file)
    if json_file:
        results.write(json_file, figures | {"edits": num_edits, "seed": seed}, bundle, begin)


if __name__ == "__main__":
    main()
