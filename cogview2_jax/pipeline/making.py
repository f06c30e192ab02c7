"""Looking inside: how a picture came to be, as an animation, and how sure the model was of it."""

import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cogview2_jax import config as configs
from cogview2_jax.config import Grid
from cogview2_jax.networks import coglm, direct_sr, inputs
from cogview2_jax.networks.transformer import tied_logits, word_rows
from cogview2_jax.pipeline.editing import cell_of_pixel
from cogview2_jax.pipeline.settings import ANIMATIONS
from cogview2_jax.sharding import Execution

Array = jax.Array
Params = dict

_UNDRAWN = 205  # grey of a cell that is not drawn yet
_FRAMES = 24  # at most, of the base stage
_SECONDS = 1.6  # of the base stage; then of each step, and of the last one
_EACH, _LAST = 0.45, 2.0
_ROWS_AT_ONCE = 120  # of logits
# From unsure to sure: dark violet, red, yellow.
_COLOURS = np.array([[38, 10, 77], [196, 48, 72], [252, 230, 130]], np.float32)


class Making(NamedTuple):
    """How pictures of one prompt came to be."""

    steps: tuple[tuple[str, np.ndarray], ...]  # as `CogView.watch`: step, uint8 [n, y, x, 3]
    base: np.ndarray  # float32 [n, y, x]: the probability of each coarse token
    fine: np.ndarray | None  # that of each fine token of direct super-resolution, if it ran


@functools.partial(jax.jit, static_argnames=("config", "text_upweight", "execution"))
def base_probability(
    params: Params,
    text: Array,
    is_text: Array,
    image: Array,
    *,
    config: configs.CogLMConfig,
    text_upweight: float = 0.0,
    execution: Execution = Execution(),
) -> Array:
    """The probability that the base model gave each of its tokens, after those before it:
    float32 [b, cells].

    Among image tokens, at temperature 1, from all clusters. `text`, `is_text` [b, max_text] as in
    `stages.decode_image`; `image` int32 [b, cells].
    """
    given = inputs.text_to_image(text, is_text, image, config)
    bias = inputs.text_key_bias(given.is_text, text_upweight)
    hidden = coglm.hidden_states(params, given, config=config, bias=bias, execution=execution)
    # The slot before each image token predicts it.
    return _probability(params, hidden[:, text.shape[1] : -1], image, config.vocabulary, execution)


@functools.partial(jax.jit, static_argnames=("config", "execution"))
def direct_probability(
    params: Params,
    text: Array,
    is_text: Array,
    coarse: Array,
    fine: Array,
    *,
    config: configs.DirectSRConfig,
    execution: Execution = Execution(),
) -> Array:
    """The probability of each fine token in direct super-resolution: float32 [b, fine cells].

    As `base_probability`; `text`, `is_text` [b, text_slots] and `coarse` as in
    `stages.super_resolve_direct`; `fine` int32 [b, fine cells].
    """
    given = inputs.direct_super_resolution(text, is_text, coarse, config)
    hidden = direct_sr.hidden_states(params, given, config=config, execution=execution)
    return _probability(params, hidden, fine, config.coglm.vocabulary, execution)


def _probability(
    params: Params,
    hidden: Array,
    ids: Array,
    vocabulary: configs.Vocabulary,
    execution: Execution,
) -> Array:
    """The softmax over image tokens at `ids` [b, c], from hidden states [b, c, e]."""
    rows = word_rows(params, (0, vocabulary.num_image))

    def of_cell(cell: tuple[Array, Array]) -> Array:
        logits = tied_logits(cell[0], rows, execution.sharding)
        found = jnp.take_along_axis(logits, cell[1][:, None], axis=-1)[:, 0]
        return jnp.exp(found - jax.nn.logsumexp(logits, axis=-1))

    cells = jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(ids, 1, 0)
    size = max(_ROWS_AT_ONCE // len(hidden), 1)
    return jnp.moveaxis(jax.lax.map(of_cell, cells, batch_size=size), 0, 1)


def animation(
    steps: Sequence[tuple[str, np.ndarray]], grid: Grid, kind: str = ANIMATIONS[0]
) -> bytes:
    """A picture's steps as an animated "webp" or "gif": its coarse tokens in decoding order, then
    super-resolution and its rounds.

    `steps` are (step, uint8 [y, x, 3]) of one size, "base" or "candidate" first; `grid` is the
    coarse one. A cell that is not decoded yet is grey; the others look as they do in the end.
    """
    if kind not in ANIMATIONS:
        raise ValueError(f"an animation must be {' or '.join(ANIMATIONS)}: got {kind}")
    pictures = [np.asarray(picture) for step, picture in steps if step != "candidate"]
    cells = grid[0] * grid[1]
    known = [cells * (n + 1) // min(cells, _FRAMES) for n in range(min(cells, _FRAMES) - 1)]
    shown = [_first_cells(pictures[0], grid, number) for number in (0, *known)]
    frames = [Image.fromarray(picture) for picture in (*shown, *pictures)]
    seconds = [_SECONDS / len(shown)] * len(shown) + [_EACH] * (len(pictures) - 1) + [_LAST]
    content = io.BytesIO()
    options: dict[str, Any] = {"quality": 90} if kind == "webp" else {}
    frames[0].save(
        content,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * each) for each in seconds],
        loop=0,
        **options,
    )
    return content.getvalue()


def animations(
    steps: Sequence[tuple[str, np.ndarray]], grid: Grid, kind: str = ANIMATIONS[0]
) -> list[bytes]:
    """The `animation` of each picture of steps as `CogView.watch` yields them."""
    number = len(steps[-1][1])
    return [animation([(step, each[i]) for step, each in steps], grid, kind) for i in range(number)]


def _first_cells(picture: np.ndarray, grid: Grid, number: int) -> np.ndarray:
    """A picture with the first `number` of its cells, and grey."""
    known = (np.arange(grid[0] * grid[1]) < number).reshape(grid)
    shown = _enlarge(known, picture.shape[:2])
    return np.where(shown[..., None], picture, np.uint8(_UNDRAWN))


def confidence_map(probability: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Probabilities [y', x'] as colours: uint8 [*size, 3], from dark (0) to yellow (1)."""
    place = probability.clip(0, 1) * (len(_COLOURS) - 1)
    levels = np.arange(len(_COLOURS))
    colours = [np.interp(place, levels, channel) for channel in _COLOURS.T]
    return _enlarge(np.stack(colours, axis=-1).round().astype(np.uint8), size)


def confidence(making: Making) -> list[np.ndarray]:
    """For each picture uint8 [y, x', 3]: its last step, then its maps, coarse and fine."""
    last = making.steps[-1][1]
    maps = [each for each in (making.base, making.fine) if each is not None]
    return [
        np.concatenate(
            [picture, *(confidence_map(each[i], picture.shape[:2]) for each in maps)], axis=1
        )
        for i, picture in enumerate(last)
    ]


def _enlarge(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each pixel takes the cell [y', x', …] that holds it."""
    rows, columns = map(cell_of_pixel, size, cells.shape[:2])
    return cells[np.ix_(rows, columns)]
