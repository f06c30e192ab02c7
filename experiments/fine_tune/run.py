"""Can a user teach the model 200 pictures of their own, with three commands?

\b
    python -m experiments.fine_tune.run --json experiments/fine_tune/results.json \\
        --grid experiments/fine_tune/grid.png

The pictures are close-ups: one object, twice as large as any that the training saw. A tenth of them
is kept for validation. Measured is the share of a picture that its object fills, before and after,
for prompts that do not name a size. Everything is under --work; run again, the commands resume.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from PIL import Image

import cogview2_jax
from cogview2_jax.data import scenes
from cogview2_jax.pipeline.cogview import CogView

ROOT = Path(__file__).parents[2]
SIDE = 96  # pixels of 192 that a close-up shows
SHOWN = ("red circle", "green star", "purple heart", "yellow square")
SHAPES = ("circle", "square", "star", "heart")
PREPARE = "data prepare photos/captions.jsonl --allow-unknown --out records"
TRAIN = "train coglm records --steps {steps} --validation 0.1 --out run"
GENERATE = 'generate --bundle run/model --out fine_tuned "a red circle"'


def make_photos(folder: Path, number: int) -> None:
    """Close-ups, and a captions file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(91)
    lines = []
    for index in range(number):
        picture, item = close_up(rng)
        picture.save(folder / f"{index}.png")
        line = {"image": f"{index}.png", "caption": f"a {item.colour} {item.shape}"}
        lines.append(json.dumps(line) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))


def close_up(rng: np.random.Generator) -> tuple[Image.Image, scenes.SceneObject]:
    """A picture of one object, twice as large as in any scene, and the object."""
    scene = scenes.sample_scene(rng, num_objects=1)
    item = dataclasses.replace(scene.objects[0], size="large")
    picture = scenes.draw(dataclasses.replace(scene, objects=(item,)))
    left, top = (min(max(at - SIDE // 2, 0), scenes.CANVAS - SIDE) for at in (item.x, item.y))
    return picture.crop((left, top, left + SIDE, top + SIDE)), item


def cogview2(command: str, folder: Path) -> None:
    """Run a command of the training README in `folder`. Raises ClickException if it fails."""
    click.echo(f"$ cogview2 {command}")
    words = [sys.executable, "-m", "cogview2_jax.cli", *shlex.split(command)]
    # From a checkout too, where the package is not installed.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if subprocess.run(words, cwd=folder, env=environment).returncode:
        raise click.ClickException(f"`cogview2 {command}` failed in {folder}")


def validation(folder: Path) -> list[dict[str, Any]]:
    """The validation figures of a run, by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "validation_loss" in line]


def draw(model: CogView) -> tuple[np.ndarray, float]:
    """Pictures of `SHOWN`, uint8 [4, y, x, 3], and the share of a picture that its object fills, a
    mean over pictures of one object of each colour.
    """
    prompts = [f"a {colour} {shape}" for colour in scenes.COLOURS for shape in SHAPES]
    made = model.generate_stages(prompts, jax.random.key(1), 1, stages=("base",))["base"][:, 0]
    grounds = np.array(list(scenes.BACKGROUNDS.values()))
    off = np.abs(made[..., None, :].astype(int) - grounds).max(axis=-1).min(axis=-1)
    shown = np.stack([made[prompts.index(f"a {words}")] for words in SHOWN])
    return shown, round(float((off > 30).mean()), 3)


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/fine_tune")
)
@click.option("--pictures", "number", type=click.IntRange(160), default=200, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--grid", "grid_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    work: Path, number: int, steps: int, json_file: Path | None, grid_file: Path | None
) -> None:
    make_photos(work / "photos", number)
    for command in (PREPARE, TRAIN.format(steps=steps), GENERATE):
        cogview2(command, work)
    found = validation(work / "run")
    before, filled_before = draw(cogview2_jax.load())
    after, filled_after = draw(cogview2_jax.load(work / "run" / "model"))
    results = {
        "pictures": number,
        "steps": steps,
        "validation_loss": [found[0]["validation_loss"], found[-1]["validation_loss"]],
        "filled": [filled_before, filled_after],
    }
    click.echo(json.dumps(results))
    if grid_file:
        rows = [np.concatenate(list(row), axis=1) for row in (before, after)]
        Image.fromarray(np.concatenate(rows)).save(grid_file)
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
