"""Tokens, positions and masks of every task, as pure functions of their arguments and the config.

- The inputs for sampling and for super-resolution training (`text_to_image`, `captioning`,
  `direct_super_resolution`, `iterative_super_resolution`) are computed with jax.numpy, over any
  leading dimensions and under jit. Their shapes depend only on the config: text has a fixed number
  of slots and a mask `is_text` (`right_padded`, `left_padded`), so one compilation serves every
  prompt.
- `infill`, which depends on the values of a mask, and `lopar_schedule`, which depends only on the
  config, run on the host with NumPy.

The base model's text is padded on the RIGHT, so that slot i holds position i, as in a training
record. The published super-resolution models pad on the LEFT, with id 0. No query attends to a pad,
except the pads of direct super-resolution.

A mask is bool, True where the query (row) sees the key (column). Ids and positions are int32.
Sources: the released code (`cogview2_text2image.py`, `comp_pipeline/base_completion.py`,
`pretrain_coglm.py`, `sr_pipeline/*_sampling.py`). Recorded numbers: `tests/golden/`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cogview2_jax.config import CogLMConfig, DirectSRConfig, IterativeSRConfig, Vocabulary

_Array = TypeVar("_Array", jax.Array, np.ndarray)


class NetworkInput(NamedTuple):
    """The tokens, positions and mask that a network is given."""

    tokens: jax.Array  # [..., s] int32
    positions: jax.Array  # [..., s] int32
    # [..., s, s] bool; for the super-resolution networks only the part that is attended densely
    mask: jax.Array
    # [..., s] bool: text tokens, without pads and start tokens; for `text_key_bias`
    is_text: Any = None


# --- Text slots -----------------------------------------------------------------------------------


def right_padded(
    texts: Sequence[Sequence[int]], slots: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Texts in the first of `slots` slots, `<pad>` after them: tokens int32 [b, slots], is_text
    bool [b, slots].

    Raises ValueError for an empty text, one longer than `slots`, and an id that is no text id.
    """
    return _padded(texts, slots, vocabulary, vocabulary.pad, left=False)


def left_padded(
    texts: Sequence[Sequence[int]], slots: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Texts in the last of `slots` slots, id 0 before them, as in the published super-resolution
    models: tokens int32 [b, slots], is_text bool [b, slots].

    Raises as `right_padded`. Iterative SR reads the first 16 tokens of a longer text: the caller
    cuts it.
    """
    return _padded(texts, slots, vocabulary, 0, left=True)


def _padded(
    texts: Sequence[Sequence[int]], slots: int, vocabulary: Vocabulary, pad: int, *, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(texts), slots), pad, np.int32)
    is_text = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        ids = text_ids(f"texts[{row}]", text, slots, vocabulary)
        start = slots - len(ids) if left else 0
        tokens[row, start : start + len(ids)] = ids
        is_text[row, start : start + len(ids)] = True
    return tokens, is_text


def text_key_bias(is_text: jax.Array, upweight: float | jax.Array) -> jax.Array:
    """The term added to every score of a key, float32 [..., t]: `upweight` (published: 1.4) at text
    tokens, 0 at pads, `<start_of_image>` and image tokens.
    """
    return jnp.where(is_text, jnp.asarray(upweight, jnp.float32), jnp.float32(0))


# --- Text → image ---------------------------------------------------------------------------------


def text_to_image(
    text: jax.Array, is_text: jax.Array, image: jax.Array, config: CogLMConfig
) -> NetworkInput:
    """`text <start_of_image> image`: text sees text, everything after is causal and sees all text.

    `text`, `is_text` [..., slots]; `image` [..., n] with n from 0 (the prefix that decoding starts
    from) to the grid's cells. s = slots + 1 + n. Pads may be on either side; their rows see the
    text.
    """
    _require_text(text, is_text)
    if image.shape[-1] > config.num_image_tokens:
        raise ValueError(
            f"image must have at most {config.num_image_tokens} tokens: got {image.shape[-1]}"
        )
    length = image.shape[-1] + 1
    tokens = _join(text, [config.vocabulary.start_of_image], image)
    positions = _join(_text_positions(is_text), config.image_position - 1 + np.arange(length))
    keys = _join(is_text, np.zeros(length, bool))
    return NetworkInput(tokens, positions, text_then_causal(keys, text.shape[-1]), keys)


def with_and_without_text(given: NetworkInput) -> NetworkInput:
    """The rows of `given` [b, s], then as many in which no slot sees the text: [2b, s]."""
    without = given.mask & ~given.is_text[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(given.mask, without.shape), without])
    tokens, positions, is_text = (
        jnp.concatenate([array, array]) if array.ndim > 1 else array
        for array in (given.tokens, given.positions, given.is_text)
    )
    return NetworkInput(tokens, positions, mask, is_text)


# --- Image → text ---------------------------------------------------------------------------------


def captioning(
    image: jax.Array,
    text: jax.Array,
    is_text: jax.Array,
    english: jax.Array | bool,
    config: CogLMConfig,
) -> tuple[NetworkInput, jax.Array]:
    """`image <start_of_english|chinese> text`: image sees image, text is causal and sees the
    image.

    `image` [..., cells]; `text`, `is_text` [..., slots], padded on the right; `english` bool
    [...]. s = cells + 1 + slots. Also returns the loss mask [..., s], True at text tokens, each of
    which is predicted by the slot before. The caption's score is their mean log-likelihood.
    """
    _require_text(text, is_text)
    _require_cells("image", image, config)
    cells, vocabulary = config.num_image_tokens, config.vocabulary
    english = jnp.asarray(english)
    start = jnp.where(english, vocabulary.start_of_english, vocabulary.start_of_chinese)
    tokens = _join(image, start[..., None], text)
    positions = _join(
        config.image_position + np.arange(cells),
        # The start token has position 0, so the text begins at 1; pads keep 0.
        [0],
        jnp.where(is_text, _text_positions(is_text) + 1, 0),
    )
    slot = np.arange(tokens.shape[-1])
    keys = _join(np.zeros(cells + 1, bool), is_text)
    exists = keys | (slot <= cells)
    mask = exists[..., None, :] & ((slot < cells) | (slot <= slot[:, None]))
    return NetworkInput(tokens, positions, mask, keys), keys


# --- Infilling ------------------------------------------------------------------------------------


class Infill(NamedTuple):
    """An infilling sequence `text <start_of_image> context rest`. Its shapes depend only on the
    config.

    `rest` starts at slot `start`. Decoding runs the slots before it in one pass and then one slot
    at a time, each with its row of `mask`. The logits of a slot predict the next slot; a prediction
    is written where that slot holds −1.
    """

    tokens: np.ndarray  # [s] int32, −1 where a token is to be sampled
    positions: np.ndarray  # [s] int32
    mask: np.ndarray  # [s, s] bool
    is_text: np.ndarray  # [s] bool
    start: int  # first slot of `rest`
    cells: np.ndarray  # [cells] int32: raster index of the cell in each image slot
    slot_of_cell: np.ndarray  # [cells] int32: slot of each cell, in the whole sequence


def infill(
    mask: ArrayLike,
    text: Sequence[int],
    image: ArrayLike,
    config: CogLMConfig,
    *,
    slots: int | None = None,
) -> Infill:
    """The infilling sequence that fills the cells where `mask` [y, x] is true and keeps the ids of
    `image` [y, x] or [y·x] elsewhere.

    `rest` holds, in raster order, the masked cells and each kept cell with a masked right neighbour
    in its row (none for a run that begins in the first column). `context` holds the other kept
    cells. Context cells see each other, `rest` is causal, and all see the text. Each token has the
    position of its cell. The text is padded on the right to `slots` (default `config.max_text`).

    Raises ValueError for a grid of another shape, a mask without a true cell, kept ids that are not
    image ids, and as `right_padded`.
    """
    slots = config.max_text if slots is None else slots
    masked, grid_ids = np.asarray(mask) != 0, np.asarray(image)
    if masked.shape != config.grid:
        raise ValueError(f"mask must have the grid's shape {config.grid}: got {masked.shape}")
    if not masked.any():
        raise ValueError("mask must have a true cell to fill: got 0")
    if grid_ids.shape not in (config.grid, (config.num_image_tokens,)):
        raise ValueError(f"image must have the grid's shape {config.grid}: got {grid_ids.shape}")
    require_range("image", grid_ids.reshape(config.grid)[~masked], 0, config.vocabulary.num_image)
    text_tokens, text_is_text = right_padded([text], slots, config.vocabulary)

    in_rest = masked.copy()
    in_rest[:, :-1] |= masked[:, 1:]
    # A stable sort by "in rest" keeps the raster order inside both parts.
    cells = np.argsort(in_rest.reshape(-1), kind="stable").astype(np.int32)
    ids = np.where(masked, -1, grid_ids.reshape(config.grid)).reshape(-1)[cells]
    tokens = np.concatenate([text_tokens[0], [config.vocabulary.start_of_image], ids])
    positions = np.concatenate(
        [
            np.where(text_is_text[0], np.arange(slots), 0),
            [config.image_position - 1],
            config.image_position + cells,
        ]
    )
    keys = np.pad(text_is_text[0], (0, 1 + len(cells)))
    start = int(slots + 1 + len(cells) - in_rest.sum())
    slot = np.arange(len(tokens))
    context = (slot > slots) & (slot < start)
    # `<start_of_image>` sees no image cell, as in every other task.
    see = text_then_causal(keys, slots) | (context & (slot > slots)[:, None])
    return Infill(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        see,
        keys,
        start,
        cells,
        (slots + 1 + np.argsort(cells)).astype(np.int32),
    )


# --- Super-resolution -----------------------------------------------------------------------------


def direct_super_resolution(
    text: jax.Array, is_text: jax.Array, coarse: jax.Array, config: DirectSRConfig
) -> NetworkInput:
    """`pads text coarse queries`, every query holding `<start_of_image>`.

    `text`, `is_text` [..., text_slots] from `left_padded`; `coarse` [..., coarse cells]. s =
    prefix + fine cells. Positions: pads 0, text from 0, coarse cells as in the base model, queries
    from `num_positions` (their own table). The mask [..., prefix, prefix] covers text and coarse
    cells: text slots see text slots, coarse cells see text and coarse cells, and only pads see
    pads. The windows of the queries are in the network, not in the mask.
    """
    _require_text(text, is_text, config.text_slots)
    _require_cells("coarse", coarse, config.coglm)
    base, fine = config.coglm, config.num_image_tokens
    tokens = _join(text, coarse, np.full(fine, base.vocabulary.start_of_image))
    positions = _join(
        _text_positions(is_text),
        base.image_position + np.arange(base.num_image_tokens),
        base.num_positions + np.arange(fine),
    )
    is_image = np.arange(config.num_prefix) >= config.text_slots
    is_pad = _join(jnp.logical_not(is_text), np.zeros(base.num_image_tokens, bool))
    mask = (is_pad[..., :, None] | ~is_pad[..., None, :]) & (is_image[:, None] | ~is_image)
    keys = _join(is_text, np.zeros(base.num_image_tokens + fine, bool))
    return NetworkInput(tokens, positions, mask, keys)


def iterative_super_resolution(
    text: jax.Array, is_text: jax.Array, fine: jax.Array, config: IterativeSRConfig
) -> NetworkInput:
    """`pads text image`; the slot of a cell predicts the token of that cell.

    `text`, `is_text` [..., text_slots] from `left_padded`; `fine` [..., cells], with
    `<start_of_image>` in the cells to predict. Positions: pads 0, text from 0, cells from
    `num_positions` (their own table). The mask [..., text_slots] is True at the text slots that
    text and cells attend to. The windows of the cells are in the network, not in the mask.
    """
    _require_text(text, is_text, config.text_slots)
    _require_cells("fine", fine, config)
    cells = np.arange(config.num_image_tokens)
    positions = _join(_text_positions(is_text), config.num_positions + cells)
    keys = _join(is_text, np.zeros(len(cells), bool))
    return NetworkInput(_join(text, fine), positions, jnp.asarray(is_text), keys)


def lopar_order(config: IterativeSRConfig) -> np.ndarray:
    """`config.order` tiled over the grid from its top left corner, cropped at the other borders:
    int32 [y, x].
    """
    tile = np.asarray(config.order, np.int32)
    repeats = [-(-side // step) for side, step in zip(config.grid, tile.shape, strict=True)]
    return np.tile(tile, repeats)[: config.grid[0], : config.grid[1]]


def lopar_schedule(config: IterativeSRConfig) -> np.ndarray:
    """The cells that each round masks and writes: bool [rounds, cells], raster order.

    Rounds count from 1, and round r takes the cells of order r and above. So cells of order 0 keep
    their token, as those of negative order do, and as in the recorded rounds.
    """
    return lopar_order(config).reshape(-1) >= np.arange(1, config.rounds + 1)[:, None]


# --- Shared parts ---------------------------------------------------------------------------------


def text_then_causal(is_text: _Array, slots: int) -> _Array:
    """The mask [..., s, s] in which every row sees the text keys, and slots from `slots` on are
    causal. `is_text` [..., s]; NumPy in, NumPy out.
    """
    slot = np.arange(is_text.shape[-1])
    return is_text[..., None, :] | ((slot >= slots) & (slot <= slot[:, None]))


def _text_positions(is_text: jax.Array) -> jax.Array:
    """0, 1, … along the text and 0 at pads, which may be on either side."""
    is_text = jnp.asarray(is_text)
    return jnp.where(is_text, jnp.cumsum(is_text, axis=-1) - 1, 0)


def _join(*parts: ArrayLike) -> jax.Array:
    """Concatenate along the last axis, leading axes broadcast. The result is bool or int32."""
    arrays = [jnp.asarray(part) for part in parts]
    lead = np.broadcast_shapes(*(array.shape[:-1] for array in arrays))
    joined = jnp.concatenate(
        [jnp.broadcast_to(array, (*lead, array.shape[-1])) for array in arrays], axis=-1
    )
    return joined if joined.dtype == bool else joined.astype(jnp.int32)


def text_ids(name: str, text: Sequence[int], room: int, vocabulary: Vocabulary) -> np.ndarray:
    ids = np.asarray(text)
    if ids.ndim != 1 or not 0 < ids.size <= room:
        raise ValueError(f"{name} must have 1 to {room} tokens: got {ids.size}")
    # Start tokens too: whoever types one in a text gets its id, as published.
    require_range(name, ids, vocabulary.num_image, vocabulary.size)
    return ids


def require_range(name: str, ids: np.ndarray, low: int, high: int) -> None:
    wrong = ids[(ids < low) | (ids >= high)]
    if wrong.size:
        raise ValueError(f"{name} must hold ids from {low} to {high - 1}: got {wrong[0]}")


def _require_text(text: jax.Array, is_text: jax.Array, slots: int | None = None) -> None:
    if text.shape != is_text.shape:
        raise ValueError(
            f"text and is_text must have one shape: got {text.shape} and {is_text.shape}"
        )
    if slots is not None and text.shape[-1] != slots:
        raise ValueError(f"text must have {slots} slots: got {text.shape[-1]}")


def _require_cells(name: str, image: jax.Array, config: CogLMConfig | IterativeSRConfig) -> None:
    if image.shape[-1] != config.num_image_tokens:
        raise ValueError(
            f"{name} must have the {config.num_image_tokens} tokens of grid {config.grid}:"
            f" got {image.shape[-1]}"
        )
