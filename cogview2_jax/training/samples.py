"""Pictures that a network draws during its training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import HVQVAEConfig
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.settings import STAGES
from cogview2_jax.styles import PLAIN
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.training.processes import on_host

Params = Any
_LABEL_WIDTH = 40


def of_prompts(
    bundle: Bundle,
    put: Callable[[Bundle, Params], Bundle],
    stage: str,
    prompts: Sequence[str],
    num_images: int = 4,
) -> Callable[[Params], np.ndarray]:
    """Parameters → a picture with a row of `num_images` for each prompt, after `stage`.

    Raises ValueError, now and not at the first picture, without prompts and for a bundle that lacks
    a network which the stage needs.
    """
    if not prompts:
        raise ValueError("sample_every needs a prompt to draw: give --prompt")
    *before, _, tokenizer = STAGES[stage]  # the one between them is in training
    for network in (tokenizer, *before):
        bundle.params(network)

    def draw(params: Params) -> np.ndarray:
        cv = CogView(put(bundle, jax.device_put(on_host(params))))
        made = cv.generate_stages(
            list(prompts),
            jax.random.key(0),
            num_images,
            candidates=1,
            stages=(stage,),
            style=PLAIN,  # what it learns are captions, without the template of a style
        )
        return _tiles(made[stage])

    return draw


def reconstructions(
    crops: np.ndarray, strides: Sequence[int], config: HVQVAEConfig
) -> Callable[[Params], np.ndarray]:
    """Parameters → a picture with the crops, and below them their labelled reconstructions at each
    of the trained `strides`.
    """

    @jax.jit
    def reconstruct(params: Params, pixels: jax.Array) -> jax.Array:
        images = pixels.astype(jnp.float32) / 255
        made = [images]
        for stride in strides:
            ids = image_tokenizer.encode(params, images, stride, config=config)
            made.append(image_tokenizer.decode(params, ids, stride, config=config))
        return jnp.stack(made)

    def draw(params: Params) -> np.ndarray:
        made = np.asarray(reconstruct(on_host(params), crops)).clip(0, 1)
        rows = _tiles((made * 255).round().astype(np.uint8))
        return _labelled(rows, ["crops", *(f"/ {stride}" for stride in strides)])

    return draw


def _tiles(pictures: np.ndarray) -> np.ndarray:
    """[rows, columns, y, x, 3] → one picture."""
    rows, columns, y, x, channels = pictures.shape
    return pictures.transpose(0, 2, 1, 3, 4).reshape(rows * y, columns * x, channels)


def _labelled(picture: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A picture of equally high rows, with a label on the left of each."""
    height, width = picture.shape[:2]
    sheet = Image.new("RGB", (width + _LABEL_WIDTH, height), "white")
    sheet.paste(Image.fromarray(picture), (_LABEL_WIDTH, 0))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        draw.text((4, height // len(labels) * row + 4), label, fill="black")
    return np.asarray(sheet)
