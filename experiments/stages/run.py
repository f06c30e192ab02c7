"""What does each stage add? Pictures after each stage, compared with a clean drawing of what they
show.

\b
    python -m experiments.stages.run --json experiments/stages/results.json \\
        --grid experiments/stages/grid.png

The judge of experiments/caption_match reads each picture, and its reading is drawn on the picture's
own background. Each stage has four figures; the last two are over the pictures that have a clear
reading after every stage:

\b
    right      share of pictures that show all their prompt names
    clear      share of pictures in which the judge is sure of all it sees
    sharpness  mean colour gradient on the drawing's edges, as a share of the drawing's own
    error      mean absolute difference from the drawing inside its objects, in grey levels of 255
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import jax
import numpy as np
from PIL import Image

from cogview2_jax.data import scenes
from experiments import results
from experiments.caption_match import judge, scoring
from experiments.caption_match.run import STAGES, experiment

README_PROMPTS = (
    "a red circle above a striped blue square",
    "蓝色条纹正方形上方的红色圆",
    "a large checked green star",
    "a dotted yellow heart to the left of a small purple cross",
)


def clean_drawing(picture: np.ndarray, found: list[scenes.SceneObject]) -> scenes.Scene | None:
    """The scene read in a picture uint8 [192, 192, 3], or None where a reading is unclear."""
    corners = np.concatenate([picture[:8, :8], picture[-8:, -8:]]).reshape(-1, 3)
    middle = np.median(corners, axis=0)
    background = min(
        scenes.BACKGROUNDS,
        key=lambda name: float(np.abs(middle - np.array(scenes.BACKGROUNDS[name])).sum()),
    )
    words = (scenes.SHAPES, scenes.COLOURS, scenes.SIZES, scenes.FILLS)
    for item in found:
        said = (item.shape, item.colour, item.size, item.fill)
        if not all(word in known for word, known in zip(said, words, strict=True)):
            return None
    return scenes.Scene(tuple(found), background) if found else None


def _gradient(picture: np.ndarray) -> np.ndarray:
    """Length of the colour gradient, float64 [y, x]."""
    slopes = np.stack([np.gradient(picture.astype(np.float64), axis=axis) for axis in (0, 1)])
    return np.sqrt(np.einsum("ayxc,ayxc->yx", slopes, slopes))


def against_drawing(picture: np.ndarray, scene: scenes.Scene) -> tuple[float, float]:
    """Sharpness and error (see the module) of a picture uint8 [192, 192, 3]."""
    drawing = np.asarray(scenes.draw(scene))
    steep = _gradient(drawing)
    edges = steep > 20
    inside = np.abs(drawing.astype(int) - scenes.BACKGROUNDS[scene.background]).max(axis=-1) > 4
    error = np.abs(picture.astype(int) - drawing)[inside].mean()
    return float(_gradient(picture)[edges].mean() / steep[edges].mean()), float(error)


def measure(
    pictures: Mapping[str, np.ndarray],
    prompts: Sequence[scoring.Prompt],
    found: Mapping[str, Sequence[Sequence[Sequence[scenes.SceneObject]]]],
) -> dict[str, dict[str, float]]:
    """The figures of each stage: `pictures` uint8 [prompts, images, 192, 192, 3] of each."""
    figures: dict[str, dict[str, list[float]]] = {
        stage: {"right": [], "clear": [], "sharpness": [], "error": []} for stage in pictures
    }
    for row, column in np.ndindex(next(iter(pictures.values())).shape[:2]):
        drawings = {}
        for stage, figure in figures.items():
            reading = found[stage][row][column]
            drawings[stage] = clean_drawing(pictures[stage][row, column], list(reading))
            figure["right"].append(scenes.check(prompts[row].claims, reading).all_named)
            figure["clear"].append(drawings[stage] is not None)
        for stage, scene in drawings.items():
            if scene is not None and None not in drawings.values():
                sharp, off = against_drawing(pictures[stage][row, column], scene)
                figures[stage]["sharpness"].append(sharp)
                figures[stage]["error"].append(off)
    return {
        stage: {name: round(float(np.mean(values)), 4) for name, values in figure.items() if values}
        | {"pictures": len(figure["right"]), "compared": len(figure["error"])}
        for stage, figure in figures.items()
    }


def grid(pictures: dict[str, np.ndarray]) -> Image.Image:
    """A row for each stage, base on top, a column for each prompt: its first picture."""
    rows = [np.concatenate(list(pictures[stage][:, 0]), axis=1) for stage in STAGES]
    return Image.fromarray(np.concatenate(rows))


@click.command(help=__doc__)
@click.option("--num-prompts", type=click.IntRange(1), default=60, show_default=True)
@click.option("--num-images", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seed", default=1, show_default=True)
@results.bundle_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--grid", "grid_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    num_prompts: int,
    num_images: int,
    seed: int,
    bundle: Path | None,
    json_file: Path | None,
    grid_file: Path | None,
) -> None:
    model = results.load_model(bundle)
    prompts = scoring.make_prompts(num_prompts, seed)
    _, pictures, found = experiment(model.generate_stages, prompts, num_images, seed, judge.load())
    measured = measure(pictures, prompts, found)
    for stage, figures in measured.items():
        click.echo(f"{stage:8s}" + "".join(f"  {name} {value}" for name, value in figures.items()))
    if grid_file:
        made = model.generate_stages(README_PROMPTS, jax.random.key(seed), 1)
        grid(made).save(grid_file)
    if json_file:
        json_file.write_text(json.dumps({"seed": seed, "stages": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
