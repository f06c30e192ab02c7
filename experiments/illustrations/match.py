"""Do pictures show the thing that their prompts name, in the style that they name?

\b
    python -m experiments.illustrations.match --pictures illustrations --bundle DIR \\
        --num-prompts 400 --num-images 4 --json results.json --sheet sheet.png

Half of the prompts are of pairs of thing and style that were seen in training, half of pairs that
were not; half of each are Chinese. The judge (judge.py) reads the pictures after each stage:

\b
    thing   share of pictures in which it sees the thing, among all things
    style   share in which it sees the style
    both    share in which it sees both

For each picture the nearest real one of the training split is looked for, by what is not white,
cut out and made as large: `copies` is the share that is so near that it may be called a copy. Of a
pair that was seen, a copy is a right answer; of one that was not, it is the thing in a style that
is known, or something else. --sheet shows pictures of each stage and the nearest real one.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.settings import LANGUAGES, STAGES
from experiments import results
from experiments.illustrations import examples, judge, presets
from experiments.illustrations.judge import Judge

GROUPS = ("seen", "unseen_pairs", "english", "chinese")
COPY = 0.1  # a smaller distance, from 0 to 1, is a copy: see `nearest`
_CUT = 32  # pixels a side of what is compared


class Prompt(NamedTuple):
    text: str
    item: Item  # the real picture of what it says
    groups: tuple[str, str]  # of GROUPS


def make_prompts(items: Sequence[Item], number: int, seed: int) -> list[Prompt]:
    """Prompts of pairs that were seen and of pairs that were not in turn, two in English, two in
    Chinese. No pair comes twice before all have come.
    """
    rng = np.random.default_rng((0x3A7C, seed))
    split = {"seen": "train", "unseen_pairs": "unseen_pair"}
    pairs = {
        group: rng.permutation([n for n, item in enumerate(items) if item.split == split[group]])
        for group in split
    }
    made = []
    for index in range(number):
        group = GROUPS[index % 2]
        language = LANGUAGES[index // 2 % 2]
        item = items[pairs[group][index // 2 % len(pairs[group])]]
        groups = (group, "english" if language == "en" else "chinese")
        made.append(Prompt(illustrations.captions(item, rng)[language], item, groups))
    return made


def stages_of(cv: CogView) -> tuple[str, ...]:
    """The stages that a model has networks for."""
    return tuple(stage for stage, needs in STAGES.items() if set(needs) <= set(cv.networks))


def draw(
    cv: CogView, prompts: Sequence[Prompt], num_images: int, seed: int, at_once: int = 10
) -> dict[str, np.ndarray]:
    """Pictures of all prompts by stage: uint8 [prompts, num_images, 192, 192, 3]."""
    stages = stages_of(cv)
    made: dict[str, list[np.ndarray]] = {stage: [] for stage in stages}
    for begin in tqdm(range(0, len(prompts), at_once), desc="drawing"):
        texts = [prompt.text for prompt in prompts[begin : begin + at_once]]
        filled = texts + texts[-1:] * (at_once - len(texts))  # one size of batch, one compilation
        key = jax.random.fold_in(jax.random.key(seed), begin)
        drawn = cv.generate_stages(filled, key, num_images, stages=stages)
        for stage in stages:
            made[stage].append(drawn[stage][: len(texts)])
    return {stage: np.concatenate(parts) for stage, parts in made.items()}


def score(
    prompts: Sequence[Prompt], pictures: np.ndarray, made: Judge
) -> dict[str, dict[str, float]]:
    """The judge's verdict by group, on pictures uint8 [prompts, n, 192, 192, 3]."""
    number = pictures.shape[1]
    seen = judge.read(made, pictures.reshape(-1, *pictures.shape[2:]))
    wanted = [prompt for prompt in prompts for _ in range(number)]
    thing = np.array([a == b.item.thing for a, b in zip(seen.things, wanted, strict=True)])
    style = np.array([a == b.item.style for a, b in zip(seen.styles, wanted, strict=True)])
    verdicts = {"thing": thing, "style": style, "both": thing & style}
    scores = {}
    for group in GROUPS:
        chosen = np.array([group in prompt.groups for prompt in wanted])
        if chosen.any():
            scores[group] = {
                name: round(float(right[chosen].mean()), 4) for name, right in verdicts.items()
            }
    return scores


def cut_out(pictures: np.ndarray) -> np.ndarray:
    """What is not white in pictures uint8 [n, y, x, 3], cut out with its box and made as large for
    all: float32 [n, pixels], in [0, 1].
    """
    made = []
    for picture in pictures:
        rows, columns = np.nonzero((picture < 240).any(-1))
        image = Image.fromarray(picture)
        if len(rows):
            top, left = int(rows.min()), int(columns.min())
            image = image.crop((left, top, int(columns.max()) + 1, int(rows.max()) + 1))
        small = image.resize((_CUT, _CUT), Image.Resampling.BOX)
        made.append(np.asarray(small, np.float32).reshape(-1) / 255)
    return np.stack(made)


def nearest(pictures: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The real picture nearest to each of `pictures`, and how far it is: int [n], float [n]. Both
    are as `cut_out` gives them; a distance is the root of the mean square of differences.
    """
    squares = (pictures**2).sum(1)[:, None] + (real**2).sum(1) - 2 * pictures @ real.T
    found = squares.argmin(1)
    of_found = squares[np.arange(len(found)), found]
    return found, np.sqrt(of_found.clip(min=0) / pictures.shape[1])


def sheet(
    prompts: Sequence[Prompt],
    pictures: Mapping[str, np.ndarray],
    real: np.ndarray,
    limit: int = 40,
    side: int = 128,
) -> Image.Image:
    """The first picture of some prompts after each stage, and the nearest real picture `real`
    [prompts, 192, 192, 3].
    """
    columns = [*(made[:, 0] for made in pictures.values()), real]
    number, words = min(limit, len(prompts)), 230
    image = Image.new("RGB", (len(columns) * side + words, number * side), "white")
    pen = ImageDraw.Draw(image)
    for row, prompt in enumerate(prompts[:number]):
        for column, made in enumerate(columns):
            small = Image.fromarray(made[row]).resize((side, side), Image.Resampling.LANCZOS)
            image.paste(small, (column * side, row * side))
        # In English, whatever the prompt: Pillow's own font has no Chinese.
        lines = (f"{prompt.item.english}, {prompt.item.style}", ", ".join(prompt.groups))
        place = (len(columns) * side + 8, row * side + 8)
        pen.multiline_text(place, "\n".join(lines), fill="black", font_size=14)
    return image


def experiment(
    cv: CogView,
    collection: examples.Collection,
    prompts: Sequence[Prompt],
    num_images: int,
    seed: int,
    made: Judge,
) -> tuple[dict[str, Any], Image.Image]:
    """All figures, and the sheet."""
    pictures = draw(cv, prompts, num_images, seed)
    scores = {stage: score(prompts, of_stage, made) for stage, of_stage in pictures.items()}
    real = collection.pictures[collection.indices("train")]
    last = next(reversed(pictures.values()))
    found, distances = nearest(cut_out(last.reshape(-1, *last.shape[2:])), cut_out(real))
    near = (distances < COPY).reshape(len(prompts), num_images)
    copies = {}
    for group in GROUPS[:2]:
        chosen = [group in prompt.groups for prompt in prompts]
        copies[group] = round(float(near[chosen].mean()), 4)
    return {"stages": scores, "copies": copies}, sheet(prompts, pictures, real[found[::num_images]])


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text, in per cent."""
    lines = [f"{'stage':8s}{'prompts':14s}{'thing':>8s}{'style':>8s}{'both':>8s}"]
    for stage, groups in figures["stages"].items():
        for group, shares in groups.items():
            cells = "".join(f"{100 * share:8.1f}" for share in shares.values())
            lines.append(f"{stage:8s}{group:14s}{cells}")
    near = ", ".join(f"{100 * share:.1f} % {group}" for group, share in figures["copies"].items())
    return "\n".join([*lines, f"near copies of a training picture: {near}"])


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@results.bundle_option
@click.option("--num-prompts", type=click.IntRange(2), default=400, show_default=True)
@click.option("--num-images", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of prompts and pictures.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sheet", "sheet_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    pictures: Path,
    bundle: Path | None,
    num_prompts: int,
    num_images: int,
    seed: int,
    json_file: Path | None,
    sheet_file: Path | None,
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    collection = examples.of_kinds(examples.read(pictures), presets.KINDS)
    prompts = make_prompts(collection.items, num_prompts, seed)
    figures, drawn = experiment(cv, collection, prompts, num_images, seed, judge.load())
    click.echo(table(figures))
    if sheet_file:
        drawn.save(sheet_file)
    if json_file:
        settings = {"prompts": num_prompts, "num_images": num_images, "seed": seed}
        results.write(json_file, figures | settings, bundle, begin)


if __name__ == "__main__":
    main()
