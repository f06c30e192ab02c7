"""The judge: a convolutional network that says which thing a picture shows, and in which style.

It sees 192x192 pixels and nothing else: no prompt, no token, no part of any generator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.data.illustrations import STYLES
from experiments.caption_match import judge as scenes_judge
from experiments.caption_match.judge import Params
from experiments.illustrations.presets import FINE_PIXELS

WEIGHTS = Path(__file__).with_name("judge.safetensors")
STYLE_NAMES = tuple(STYLES)


class Judge(NamedTuple):
    """Weights, and the things that they tell apart, in the order of the logits."""

    params: Params
    things: tuple[str, ...]


class Reading(NamedTuple):
    """Logits float32 [b, things] and [b, styles]."""

    thing: jax.Array
    style: jax.Array


class Seen(NamedTuple):
    """What each of n pictures shows: "red-apple" and "3d"."""

    things: list[str]
    styles: list[str]


class _Network(nn.Module):
    """Four reductions of a picture at 96 pixels, with one or two 3x3 layers after each."""

    num_things: int

    @nn.compact
    def __call__(self, images: jax.Array) -> Reading:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        x = nn.avg_pool(x, (2, 2), (2, 2))  # 96
        x = self._layer(x, 32, kernel=4, stride=2)  # 48
        x = self._layer(x, 64, kernel=4, stride=2)  # 24
        x = self._layer(x, 64)
        x = self._layer(x, 128, kernel=4, stride=2)  # 12
        x = self._layer(x, 128)
        x = self._layer(x, 192, kernel=4, stride=2)  # 6
        x = self._layer(x, 192)
        x = nn.relu(nn.Dense(256)(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)))
        return Reading(nn.Dense(self.num_things)(x), nn.Dense(len(STYLE_NAMES))(x))

    def _layer(self, x: jax.Array, features: int, kernel: int = 3, stride: int = 1) -> jax.Array:
        x = nn.Conv(features, (kernel, kernel), (stride, stride), use_bias=False)(x)
        return nn.relu(nn.GroupNorm(num_groups=8)(x))


def init_params(key: jax.Array, num_things: int) -> Params:
    """Fresh weights, float32."""
    side = FINE_PIXELS
    params: Params = _Network(num_things).init(key, jnp.zeros((1, side, side, 3)))["params"]
    return params


def apply(params: Params, images: jax.Array | np.ndarray, num_things: int) -> Reading:
    """Reads pictures: uint8 or float32 of the same range, [b, 192, 192, 3]."""
    out = _Network(num_things).apply({"params": params}, images)
    assert isinstance(out, Reading)
    return out


_apply = jax.jit(apply, static_argnums=2)


def read(judge: Judge, pictures: np.ndarray, batch: int = 64) -> Seen:
    """What pictures uint8 [n, 192, 192, 3] show. Raises ValueError for other sizes or types."""
    side = FINE_PIXELS
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (side, side, 3):
        raise ValueError(
            f"pictures must be uint8 [n, {side}, {side}, 3]: got {pictures.dtype}"
            f" {list(pictures.shape)}"
        )
    things, styles = [], []
    for begin in range(0, len(pictures), batch):
        part = pictures[begin : begin + batch]
        # One batch size, so that one compilation serves any number of pictures.
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        reading = _apply(judge.params, filled, len(judge.things))
        thing, style = (np.asarray(logits).argmax(-1)[: len(part)] for logits in reading)
        things += [judge.things[number] for number in thing]
        styles += [STYLE_NAMES[number] for number in style]
    return Seen(things, styles)


def save(judge: Judge, figures: dict[str, object], file: Path = WEIGHTS) -> None:
    """The weights in half precision, and beside them a JSON file with the things and `figures`."""
    scenes_judge.save(judge.params, file)
    made = figures | {"things": list(judge.things)}
    file.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def load(file: Path = WEIGHTS) -> Judge:
    """Raises FileNotFoundError where there is no judge."""
    things: Sequence[str] = json.loads(file.with_suffix(".json").read_text("utf-8"))["things"]
    return Judge(scenes_judge.load(file), tuple(things))
