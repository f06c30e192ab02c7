"""What does the image tokenizer keep? Scenes through it and back, read by the judge.

\b
    python -m experiments.scenes.reconstruction

Two sizes: 64 px (the base stage's 8×8 tokens, enlarged for the judge) and 192 px (24×24 tokens).
Prints, for each, how often the number of objects, each attribute and everything came out right.
"""

from collections import defaultdict
from pathlib import Path

import click
import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer.image import to_pixels, to_tokens
from cogview2_jax.tokenizer.pictures import fit_picture
from experiments import results
from experiments.caption_match import judge

ATTRIBUTES = ("shape", "colour", "size", "fill")
BATCH = 8


def through_tokenizer(bundle: Bundle, pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [b, y, x, 3] → ids → pictures of the same shape."""
    grid = (pictures.shape[1] // TOKEN_STRIDE, pictures.shape[2] // TOKEN_STRIDE)
    config, params = bundle.tokenizer_config, bundle.tokenizer
    ids = to_tokens(params, pictures, stride=TOKEN_STRIDE, config=config)
    made = to_pixels(params, ids, grid=grid, stride=TOKEN_STRIDE, config=config)
    return np.asarray(made)


def score(
    truth: list[scenes.Scene], found: list[list[scenes.SceneObject]]
) -> dict[str, tuple[int, int]]:
    """(right, all) of the count, each attribute over objects, and everything over pictures."""
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, seen in zip(truth, found, strict=True):
        everything = len(seen) == len(scene.objects)
        right["count"].append(everything)
        for item in scene.objects:
            distances = [abs(other.x - item.x) + abs(other.y - item.y) for other in seen]
            nearest = seen[int(np.argmin(distances))] if seen else None
            for name in ATTRIBUTES:
                same = nearest is not None and getattr(nearest, name) == getattr(item, name)
                right[name].append(same)
                everything &= same
        right["everything"].append(everything)
    return {name: (sum(values), len(values)) for name, values in right.items()}


@click.command(help=__doc__)
@click.option("--num-scenes", type=click.IntRange(BATCH), default=200, show_default=True)
@results.bundle_option
def main(num_scenes: int, bundle: Path | None) -> None:
    made_with = results.load_model(bundle).bundle
    num_scenes = num_scenes // BATCH * BATCH
    examples = [scenes.example("validation", index) for index in range(num_scenes)]
    judge_params = judge.load()
    for side in (64, scenes.CANVAS):
        made: list[np.ndarray] = []
        for start in range(0, num_scenes, BATCH):
            drawn = [
                np.asarray(each.image.reduce(scenes.CANVAS // side))
                for each in examples[start : start + BATCH]
            ]
            made += list(through_tokenizer(made_with, np.stack(drawn)))
        enlarged = [fit_picture(picture, scenes.CANVAS, scenes.CANVAS) for picture in made]
        found = judge.read(judge_params, np.stack(enlarged))
        figures = score([each.scene for each in examples], found)
        shown = "  ".join(f"{name} {100 * a / n:.1f} %" for name, (a, n) in figures.items())
        click.echo(f"{side:3d} px  {shown}")


if __name__ == "__main__":
    main()
