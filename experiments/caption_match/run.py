"""How often do pictures show what their prompts say, after each stage?

    python -m experiments.caption_match.run --num-prompts 200 --num-images 4 --json results.json

Prompts are sentences of Scenes, half of them Chinese. Pictures come from the bundle that ships, or
from --bundle. The judge (judge.py) sees only the pictures, and its reading is compared with what
the prompt names.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from PIL import Image, ImageDraw

from cogview2_jax.data.scenes import SceneObject, check
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.scoring import (
    COLUMNS,
    GROUPS,
    Prompt,
    make_prompts,
    read_prompts,
    score,
)

STAGES = ("base", "direct", "full")

Generate = Callable[[Sequence[str], jax.Array, int], Mapping[str, np.ndarray]]
"""(prompts, key, num_images) -> stage -> uint8 [prompts, num_images, 192, 192, 3].

A stage's own pictures may be smaller; they come enlarged to 192 pixels, bicubically.
"""


def load_generator(bundle: Path | None, candidates: int | None = None) -> Generate:
    """The generator of a bundle. Raises as `results.load_model`."""
    return functools.partial(results.load_model(bundle).generate_stages, candidates=candidates)


def generate_all(
    generate: Generate,
    prompts: Sequence[Prompt],
    key: jax.Array,
    num_images: int,
    prompts_per_call: int,
) -> dict[str, np.ndarray]:
    """Pictures of all prompts: stage -> uint8 [prompts, num_images, 192, 192, 3].

    Every call has the same number of prompts, so that a jitted generator compiles once; the last
    one is filled up with its last prompt.
    """
    pictures: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    starts = range(0, len(prompts), prompts_per_call)
    with click.progressbar(starts, label="generating", file=sys.stderr) as bar:
        for start in bar:
            texts = [prompt.text for prompt in prompts[start : start + prompts_per_call]]
            filled = texts + texts[-1:] * (prompts_per_call - len(texts))
            made = generate(filled, jax.random.fold_in(key, start), num_images)
            for stage in STAGES:
                pictures[stage].append(np.asarray(made[stage])[: len(texts)])
    return {stage: np.concatenate(parts) for stage, parts in pictures.items()}


def read_all(params: judge.Params, pictures: np.ndarray) -> list[list[list[SceneObject]]]:
    """The objects seen in each picture of each prompt: uint8 [prompts, num_images, 192, 192, 3]."""
    number, num_images = pictures.shape[:2]
    flat = judge.read(params, pictures.reshape(-1, *pictures.shape[2:]))
    return [flat[i * num_images : (i + 1) * num_images] for i in range(number)]


def experiment(
    generate: Generate,
    prompts: Sequence[Prompt],
    num_images: int,
    seed: int,
    params: judge.Params,
    prompts_per_call: int = 10,
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, list[list[list[SceneObject]]]]]:
    """The scores of all stages, the pictures, and what the judge saw in them, both by stage."""
    pictures = generate_all(generate, prompts, jax.random.key(seed), num_images, prompts_per_call)
    found = {stage: read_all(params, pictures[stage]) for stage in STAGES}
    return {stage: score(prompts, found[stage]) for stage in STAGES}, pictures, found


def table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The scores as text, in per cent; "-" where a group has no such claim."""
    lines = [f"{'stage':8s}{'prompts':14s}{'pictures':>9s}" + "".join(f"{c:>11s}" for c in COLUMNS)]
    for stage, groups in scores.items():
        for group in GROUPS:
            row = groups[group]
            cells = ("-" if row[c] is None else f"{100 * row[c]:.1f}" for c in COLUMNS)
            number = row["counts"]["all_named"][1]
            lines.append(f"{stage:8s}{group:14s}{number:9d}" + "".join(f"{c:>11s}" for c in cells))
    return "\n".join(lines)


def sheet(
    prompts: Sequence[Prompt],
    pictures: Mapping[str, np.ndarray],
    found: Mapping[str, Sequence[Sequence[Sequence[SceneObject]]]],
    limit: int = 40,
) -> Image.Image:
    """The first picture of each of the first prompts, a row a prompt and a column a stage.

    Next to them are the prompt's claims and the last stage's reading, to check both by eye.
    """
    side, text_width = 192, 460
    number = min(limit, len(prompts))
    image = Image.new("RGB", (len(STAGES) * side + text_width, number * side), "white")
    pen = ImageDraw.Draw(image)
    for row, prompt in enumerate(prompts[:number]):
        for column, stage in enumerate(STAGES):
            image.paste(Image.fromarray(pictures[stage][row, 0]), (column * side, row * side))
            right = check(prompt.claims, found[stage][row][0]).all_named
            box = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
            pen.rectangle(box, outline="green" if right else "red", width=2)
        # Claims rather than the sentence: Pillow's own font has no Chinese.
        lines = [f"{row}. claims"]
        lines += [
            "   " + " ".join(v for v in vars(item).values() if v) for item in prompt.claims.objects
        ]
        lines += [f"   first {prompt.claims.relation} second"] if prompt.claims.relation else []
        lines += ["   seen in the last"]
        lines += [
            f"   {o.size} {o.fill} {o.colour} {o.shape} at {o.x}, {o.y}"
            for o in found[STAGES[-1]][row][0]
        ]
        place = (len(STAGES) * side + 8, row * side + 8)
        pen.multiline_text(place, "\n".join(lines), fill="black", font_size=15)
    return image


@click.command(help=__doc__)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt per line, instead of random ones.",
)
@click.option("--num-prompts", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the prompts and the pictures.")
@click.option("--num-images", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Results go here."
)
@click.option(
    "--sheet",
    "sheet_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A PNG of pictures and readings, to check the judge by eye.",
)
@click.option(
    "--candidates",
    type=click.IntRange(1),
    help="Base pictures to choose the best from, by caption score.  [default: the bundle's]",
)
@results.bundle_option
def main(
    prompts_file: Path | None,
    num_prompts: int,
    seed: int,
    num_images: int,
    json_file: Path | None,
    sheet_file: Path | None,
    candidates: int | None,
    bundle: Path | None,
) -> None:
    start = time.monotonic()
    try:
        if prompts_file is None:
            prompts = make_prompts(num_prompts, seed)
        else:
            prompts = read_prompts(prompts_file.read_text("utf-8").splitlines())
            if not prompts:
                raise ValueError("no prompts in it")
    except ValueError as error:
        raise click.UsageError(f"{prompts_file}: {error}") from None
    generate = load_generator(bundle, candidates)
    scores, pictures, found = experiment(generate, prompts, num_images, seed, judge.load())
    click.echo(table(scores))
    if sheet_file:
        sheet(prompts, pictures, found).save(sheet_file)
    if json_file:
        report = {
            "stages": scores,
            "prompts": len(prompts),
            "num_images": num_images,
            "seed": seed,
            "candidates": candidates,
        }
        results.write(json_file, report, bundle, start)


if __name__ == "__main__":
    main()
