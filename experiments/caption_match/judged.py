"""Pictures of Scenes in figures: right, diverse, and near to real ones, by the judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.data import scenes
from cogview2_jax.evaluation import distances
from cogview2_jax.tokenizer.pictures import fit_picture
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.scoring import Prompt

SIDE = 192  # of the judge's pictures
_WORDS = (scenes.SHAPES, scenes.COLOURS, scenes.SIZES, scenes.FILLS)
FEATURES = 2 * (1 + sum(map(len, _WORDS)))
_outputs = jax.jit(judge.apply)
_weights = functools.cache(judge.load)


def judge_features(pictures: np.ndarray) -> np.ndarray:
    """The judge's outputs, mean and largest over its grid, of pictures uint8 [n, SIDE, SIDE, 3]:
    float32 [n, FEATURES].
    """
    params, found = _weights(), []
    for begin in range(0, len(pictures), 32):
        part = pictures[begin : begin + 32]
        filled = np.concatenate([part, np.repeat(part[-1:], 32 - len(part), axis=0)])
        reading = _outputs(params, filled)
        flat = [reading.present[..., None], *reading.words.values()]
        grid = jax.nn.sigmoid(jnp.concatenate(flat, axis=-1))
        both = jnp.concatenate([grid.mean((1, 2)), grid.max((1, 2))], axis=-1)
        found.append(np.asarray(both)[: len(part)])
    return np.concatenate(found)


class Judged:
    """Measures pictures of Scenes against real ones of the validation split."""

    def __init__(self, num_real: int) -> None:
        self._params = _weights()
        real = [
            fit_picture(item.picture, SIDE, SIDE) for item in results.validation_scenes(num_real)
        ]
        self._real = distances.statistics([judge_features(np.stack(real))])

    def measure(self, prompts: Sequence[Prompt], pictures: np.ndarray) -> dict[str, float]:
        """Of pictures uint8 [prompts, n, 192, 192, 3]. Errors are standard errors over prompts."""
        flat = pictures.reshape(-1, *pictures.shape[2:])
        seen = judge.read(self._params, flat)
        number = pictures.shape[1]
        right = np.array(
            [
                scenes.check(prompts[index // number].claims, objects).all_named
                for index, objects in enumerate(seen)
            ],
            float,
        ).reshape(-1, number)
        small = pictures[:, :, ::6, ::6].astype(np.float32) / 255
        apart = [_apart(each.reshape(number, -1)) for each in small]
        made = distances.statistics([judge_features(flat)])
        return {
            "right": float(right.mean()),
            "right_error": standard_error(right.mean(1)),
            "diversity": float(np.mean(apart)),
            "diversity_error": standard_error(np.array(apart)),
            "fid": distances.frechet_distance(made, self._real),
        }


def _apart(rows: np.ndarray) -> float:
    """The mean distance of pairs of pictures [n, d], as a root mean square of their values."""
    first, second = np.triu_indices(len(rows), 1)
    return float(np.sqrt(((rows[first] - rows[second]) ** 2).mean(1)).mean())


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values [n]."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def judged_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of experiments whose points are judged: how much, and where it is written."""
    file = click.Path(dir_okay=False, path_type=Path)
    at_least_two = click.IntRange(2)
    options = (
        click.option("--num-prompts", type=at_least_two, default=100, show_default=True),
        click.option("--num-images", type=at_least_two, default=4, show_default=True),
        click.option(
            "--real", type=at_least_two, default=2000, show_default=True, help="Real scenes."
        ),
        click.option("--seed", default=0, show_default=True, help="Of prompts and pictures."),
        click.option("--json", "json_file", type=file),
        click.option("--plot", "plot_file", type=file),
        results.bundle_option,
    )
    for option in reversed(options):
        command = option(command)
    return command
