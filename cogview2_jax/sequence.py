"""Layouts, positions and masks of every task, as pure functions whose geometry comes from the
config.

Two kinds of function live here:

- What a network is fed at inference and in super-resolution training (`text_to_image`,
  `captioning`, `direct_super_resolution`, `iterative_super_resolution`) is jax.numpy over any
  leading dimensions: it traces under jit, and its shapes depend on the config alone. Text comes in
  a fixed number of slots with a mask `is_text`, so one compilation serves every prompt;
  `right_padded` and `left_padded` make the slots.
- What depends on a picture's mask or on drawn choices (`infill`, `lopar_schedule`, the
  pre-training samples) is NumPy on the host, vectorised over the batch.

Text of the base model is padded on the RIGHT: slot i then holds position i, as in a training
record, so the slots of a training sample and of the decoder mean the same. The published
super-resolution models pad on the LEFT, with id 0. A pad is a key for nobody but the pads of
direct super-resolution.

A mask is bool, True where the query (row) sees the key (column). Ids and positions are int32.
Facts: the released code (`cogview2_text2image.py`, `comp_pipeline/base_completion.py`,
`pretrain_coglm.py`, `sr_pipeline/*_sampling.py`); numbers to match: `tests/golden/`.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cogview2_jax.config import CogLMConfig, DirectSRConfig, IterativeSRConfig, Vocabulary

_Array = TypeVar("_Array", jax.Array, np.ndarray)


class Layout(NamedTuple):
    """What one network is fed. `mask` covers what is attended densely."""

    tokens: jax.Array  # [..., s] int32
    positions: jax.Array  # [..., s] int32
    mask: jax.Array  # [..., s, s] bool; of the super-resolution networks less: see there
    is_text: jax.Array  # [..., s] bool: keys that hold a text token (no pad, no start token)


# --- Text slots -----------------------------------------------------------------------------------


def right_padded(
    texts: Sequence[Sequence[int]], slots: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Texts at the start of `slots` places, `<pad>` after them: tokens [b, slots] int32, is_text
    [b, slots].

    Raises ValueError for an empty text, one longer than `slots`, and an id that is no text id.
    """
    tokens = np.full((len(texts), slots), vocabulary.pad, np.int32)
    is_text = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        ids = _text_ids(f"texts[{row}]", text, slots, vocabulary)
        tokens[row, : len(ids)] = ids
        is_text[row, : len(ids)] = True
    return tokens, is_text


def left_padded(
    texts: Sequence[Sequence[int]], slots: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Texts at the end of `slots` places, id 0 before them, as the published super-resolution
    models have it.

    Returns tokens [b, slots] int32 and is_text [b, slots]. Raises like `right_padded`. Iterative
    SR reads the first 16 tokens of a longer text: cut it before you call.
    """
    tokens = np.zeros((len(texts), slots), np.int32)
    is_text = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        ids = _text_ids(f"texts[{row}]", text, slots, vocabulary)
        tokens[row, slots - len(ids) :] = ids
        is_text[row, slots - len(ids) :] = True
    return tokens, is_text


def text_key_bias(is_text: jax.Array, upweight: float) -> jax.Array:
    """The term added to every score by its key, [..., t] float32: `upweight` (published 1.4) at
    text tokens.

    Neither pads nor `<start_of_image>` carry it.
    """
    return jnp.where(is_text, jnp.float32(upweight), jnp.float32(0))


# --- Text → image ---------------------------------------------------------------------------------


def text_to_image(
    text: jax.Array, is_text: jax.Array, image: jax.Array, config: CogLMConfig
) -> Layout:
    """`text <start_of_image> image`: text sees text, everything after is causal and sees all text.

    `text`, `is_text` [..., slots]; `image` [..., n] with n up to the grid's cells (0 for the
    prefix that a decoder starts from). s = slots + 1 + n. Pads may be on either side; their rows
    see the text.
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
    return Layout(tokens, positions, _text_then_causal(keys, text.shape[-1]), keys)


def visible_keys(is_text: jax.Array, slots: int, query: int | jax.Array) -> jax.Array:
    """The keys that a decoder's query at slot `query` (after the text) sees: [..., s] bool, one
    row of the mask.

    `is_text` [..., s] is that of the layout, `slots` its text slots, `query` may be traced. Holds
    for `text_to_image`, and for `infill` from its `start` on.
    """
    slot = jnp.arange(is_text.shape[-1])
    return is_text | ((slot >= slots) & (slot <= query))


# --- Image → text ---------------------------------------------------------------------------------


def captioning(
    image: jax.Array,
    text: jax.Array,
    is_text: jax.Array,
    english: jax.Array | bool,
    config: CogLMConfig,
) -> tuple[Layout, jax.Array]:
    """`image <start_of_english|chinese> text`: image sees image, text is causal and sees the
    image.

    `image` [..., cells]; `text`, `is_text` [..., slots], padded on the right; `english` bool
    [...]. s = cells + 1 + slots. Also returns the loss mask [..., s]: the text tokens, each
    predicted by the slot before it. The caption's score is their mean log-likelihood.
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
    return Layout(tokens, positions, mask, keys), keys


# --- Infilling ------------------------------------------------------------------------------------


class Infill(NamedTuple):
    """An infilling sequence `text <start_of_image> context rest`; all its shapes come from the
    config.

    `rest` starts at slot `start`. Run the slots before it at once under `mask`, then one slot at a
    time with `visible_keys(is_text, slots, slot)`; a slot's logits predict the next slot, to be
    written where that holds −1.
    """

    tokens: np.ndarray  # [s] int32, −1 where a token is to be sampled
    positions: np.ndarray  # [s] int32
    mask: np.ndarray  # [s, s] bool
    is_text: np.ndarray  # [s] bool
    start: int  # first slot of `rest`
    cells: np.ndarray  # [cells] int32: the raster cell that each image slot holds
    slot_of_cell: np.ndarray  # [cells] int32: its inverse, counted in slots of the whole sequence


def infill(
    mask: ArrayLike,
    text: Sequence[int],
    image: ArrayLike,
    config: CogLMConfig,
    *,
    slots: int | None = None,
) -> Infill:
    """The infilling sequence for the cells where `mask` [y, x] is true; other cells keep `image`
    [y, x] or [y·x].

    `rest` is, in raster order, the masked cells and each kept cell whose right neighbour in its
    row is masked (a run that begins in the first column brings none); `context` is every other
    kept cell. Context sees itself in both directions, `rest` is causal, all see the text. Each
    token keeps the position of its cell. The text is padded on the right to `slots` (default
    `config.max_text`). Raises ValueError for a wrong grid, a mask of nothing, kept ids that are no
    image ids, and as `right_padded` does.
    """
    slots = config.max_text if slots is None else slots
    masked, grid_ids = np.asarray(mask) != 0, np.asarray(image)
    if masked.shape != config.grid:
        raise ValueError(f"mask must have the grid's shape {config.grid}: got {masked.shape}")
    if not masked.any():
        raise ValueError("mask must have a true cell to fill: got 0")
    if grid_ids.shape not in (config.grid, (config.num_image_tokens,)):
        raise ValueError(f"image must have the grid's shape {config.grid}: got {grid_ids.shape}")
    _require_range("image", grid_ids.reshape(config.grid)[~masked], 0, config.vocabulary.num_image)
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
    # `<start_of_image>` itself sees no image, as in every other task.
    see = _text_then_causal(keys, slots) | (context & (slot > slots)[:, None])
    return Infill(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        see,
        keys,
        start,
        cells,
        (slots + 1 + np.argsort(cells)).astype(np.int32),
    )


def infilled_grid(filled: jax.Array, slot_of_cell: jax.Array) -> jax.Array:
    """The image cells [..., cells] in raster order out of a filled sequence [..., s]."""
    return jnp.take(filled, slot_of_cell, axis=-1)


# --- Super-resolution -----------------------------------------------------------------------------


def direct_super_resolution(
    text: jax.Array, is_text: jax.Array, coarse: jax.Array, config: DirectSRConfig
) -> Layout:
    """`pads text coarse queries`, every query holding `<start_of_image>`.

    `text`, `is_text` [..., text_slots] from `left_padded`; `coarse` [..., coarse cells]. s =
    prefix + fine cells; positions: pads 0, text 0…, coarse as in the base model, queries
    `num_positions`… (their own table). The mask [..., prefix, prefix] is that of text and coarse
    tokens: text slots see text slots, coarse tokens see text and each other, and pads are keys for
    pads alone. Queries see windows: not here.
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
    return Layout(tokens, positions, mask, keys)


def iterative_super_resolution(
    text: jax.Array, is_text: jax.Array, fine: jax.Array, config: IterativeSRConfig
) -> Layout:
    """`pads text image`. `text`, `is_text` [..., text_slots] from `left_padded`; `fine` [...,
    cells], with `<start_of_image>` where a token is to be predicted.

    Position i predicts token i. Positions: pads 0, text 0…, image `num_positions`… (their own
    table). The mask [..., text_slots] says which text slots are keys, for text and image alike;
    windows are not here.
    """
    _require_text(text, is_text, config.text_slots)
    if fine.shape[-1] != config.num_image_tokens:
        raise ValueError(
            f"fine must have the {config.num_image_tokens} tokens of grid {config.grid}:"
            f" got {fine.shape[-1]}"
        )
    cells = np.arange(config.num_image_tokens)
    positions = _join(_text_positions(is_text), config.num_positions + cells)
    keys = _join(is_text, np.zeros(len(cells), bool))
    return Layout(_join(text, fine), positions, jnp.asarray(is_text), keys)


class LoparSchedule(NamedTuple):
    """Which cells (raster order) each round of iterative super-resolution hides, and which it
    writes.
    """

    reset: np.ndarray  # [rounds, cells] bool
    write: np.ndarray  # [rounds, cells] bool; published: the same


def lopar_order(config: IterativeSRConfig) -> np.ndarray:
    """The order's tile repeated over the grid from its top left corner, cut at the far borders:
    [y, x] int32.
    """
    tile = np.asarray(config.order, np.int32)
    if tile.ndim != 2 or not tile.size:
        raise ValueError(f"order must be a rectangle of rows: got shape {tile.shape}")
    repeats = [-(-side // step) for side, step in zip(config.grid, tile.shape, strict=True)]
    return np.tile(tile, repeats)[: config.grid[0], : config.grid[1]]


def lopar_schedule(config: IterativeSRConfig) -> LoparSchedule:
    """Round r = 1 … rounds resets the cells whose order is at least r, and writes those alone.

    The count starts at 1, so cells of order 0 are kept like the negative ones (so do the recorded
    rounds).
    """
    order = lopar_order(config).reshape(-1)
    reset = order >= np.arange(1, config.rounds + 1)[:, None]
    return LoparSchedule(reset, reset.copy())


# --- Pre-training: records ------------------------------------------------------------------------


class LossKind(IntEnum):
    """What a position of a training sample is asked for."""

    NONE = 0
    IMAGE = 1  # the next image token, given the text
    PATCH = 2  # the next cell of a masked patch
    ENGLISH = 3  # a caption's next token
    CHINESE = 4
    SPAN = 5  # the next token of a masked text span


class TrainingSample(NamedTuple):
    """A batch of pre-training samples: the logits at a position predict its label."""

    tokens: np.ndarray  # [b, s] int32
    positions: np.ndarray  # [b, s] int32
    labels: np.ndarray  # [b, s] int32
    mask: np.ndarray  # [b, s, s] bool
    loss_mask: np.ndarray  # [b, s] bool
    kind: np.ndarray  # [b, s] int8, a LossKind


def record(texts: Sequence[Sequence[int]], image: ArrayLike, config: CogLMConfig) -> np.ndarray:
    """A training record: one text or two with a pad between, pads, image. int32 [text_slots + 1 +
    cells].

    The last text place is always a pad: samples put `<start_of_image>` there. Raises ValueError
    for no text or more than two, texts that do not fit, and wrong ids.
    """
    if len(texts) not in (1, 2):
        raise ValueError(f"texts must be one or two, one for each language: got {len(texts)}")
    vocabulary, ids = config.vocabulary, np.asarray(image).reshape(-1)
    if ids.size != config.num_image_tokens:
        raise ValueError(f"image must have {config.num_image_tokens} tokens: got {ids.size}")
    _require_range("image", ids, 0, vocabulary.num_image)
    made = np.full(config.text_slots + 1 + ids.size, vocabulary.pad, np.int32)
    end = -1
    for number, text in enumerate(texts):
        room = config.text_slots - end - 1
        part = _text_ids(f"texts[{number}]", text, room, vocabulary)
        if (part == vocabulary.pad).any():  # pads are what ends a text of a record
            raise ValueError(f"texts[{number}] must not hold the pad id: got {vocabulary.pad}")
        made[end + 1 : end + 1 + len(part)] = part
        end += 1 + len(part)
    made[config.text_slots + 1 :] = ids
    return made


def text_spans(records: np.ndarray, config: CogLMConfig) -> np.ndarray:
    """Where the texts of `records` [b, s] lie: int [b, 2, 2], (start, end) of each; the second is
    empty if absent.

    Raises ValueError when a record is not as `record` makes it.
    """
    _require_records(records, config)
    is_pad = records[:, : config.text_slots + 1] == config.vocabulary.pad
    if not is_pad[:, -1].all() or is_pad[:, 0].any():
        row = int(np.argmin(is_pad[:, -1] & ~is_pad[:, 0]))
        raise ValueError(
            f"records[{row}] must begin with a text and have a pad at {config.text_slots}:"
            f" got ids {records[row, 0]} and {records[row, config.text_slots]}"
        )
    slot = np.arange(is_pad.shape[1])
    first_end = is_pad.argmax(1)
    second_start = first_end + 1
    # The second pad; where there is none, or it follows the first at once, there is no second text.
    second_end = (is_pad & (slot > first_end[:, None])).argmax(1)
    second_end = np.maximum(second_end, second_start)
    first = np.stack([np.zeros_like(first_end), first_end], -1)
    return np.stack([first, np.stack([second_start, second_end], -1)], 1)


def english_texts(records: np.ndarray, config: CogLMConfig, first_chinese: int) -> np.ndarray:
    """Whether each text of `records` is English, by the published rule: every id below
    `first_chinese`. [b, 2].
    """
    spans, slot = text_spans(records, config), np.arange(config.text_slots + 1)
    inside = (slot >= spans[..., :1]) & (slot < spans[..., 1:])
    below = records[:, None, : config.text_slots + 1] < first_chinese
    return np.asarray((below | ~inside).all(-1))


# --- Pre-training: the three tasks ----------------------------------------------------------------


def generation_samples(
    records: np.ndarray, second: ArrayLike, config: CogLMConfig
) -> TrainingSample:
    """Image from text: `records` [b, s], and `second` bool [b], which text is shown where there
    are two.

    Every row sees the chosen text; `<start_of_image>` and the image are causal; the other text is
    seen by none. The loss is on all image tokens.
    """
    spans, width = text_spans(records, config), config.text_slots + 1
    has_second = spans[:, 1, 1] > spans[:, 1, 0]
    chosen = (np.asarray(second, bool) & has_second).astype(int)
    begin, end = spans[np.arange(len(records)), chosen].T[..., None]
    slot = np.arange(records.shape[1])
    is_text = (slot >= begin) & (slot < end)
    tokens = records.astype(np.int32)
    tokens[:, width - 1] = config.vocabulary.start_of_image
    image = slot - width + config.image_position
    positions = np.where(is_text, slot - begin, np.where(slot >= width - 1, image, 0))
    # The published labels are the record's own tokens, so `<start_of_image>` is nobody's label.
    labels = np.append(records[:, 1:], records[:, -1:], 1)
    predicts = np.broadcast_to((slot >= width - 1) & (slot < len(slot) - 1), tokens.shape)
    kind = predicts * np.int8(LossKind.IMAGE)
    return _sample(tokens, positions, labels, _text_then_causal(is_text, width - 1), kind)


def captioning_samples(
    records: np.ndarray,
    english: ArrayLike,
    corners: np.ndarray,
    config: CogLMConfig,
    *,
    patch_size: int = 4,
    predict_end: bool = False,
) -> TrainingSample:
    """Text from image, joined with masked patches: `english` bool [b, 2], a flag for each text;
    `corners` int [b, patches, 2], the (row, column) of each patch's first cell.

    The texts move right by one, so that each begins with its start token; each is causal, sees no
    other text, and sees all image cells. Every row sees every kept cell; kept cells see nothing
    else; masked cells also see earlier masked ones and themselves. The loss is on the texts, and
    on all but the last column of each patch, whose cells predict the next cell.

    The published loss says nothing about where a text ends. With `predict_end`, the last token of
    each predicts a pad, so that a caption drawn from the model stops.
    """
    spans, width = text_spans(records, config), config.text_slots + 1
    vocabulary, (rows, columns) = config.vocabulary, config.grid
    corners = np.asarray(corners)
    last = np.array([rows - patch_size, columns - patch_size])
    if corners.ndim != 3 or (corners < 0).any() or (corners > last).any():
        raise ValueError(
            f"corners must be [b, patches, 2] within {tuple(last.tolist())}:"
            f" got shape {corners.shape} with {corners.min(initial=0)} to {corners.max(initial=0)}"
        )
    tokens = records.astype(np.int32)
    tokens[:, 1:width] = records[:, : width - 1]
    slot = np.arange(records.shape[1])
    image = slot >= width
    image_positions = np.where(image, slot - width + config.image_position, 0)
    positions = np.broadcast_to(image_positions, tokens.shape)
    kind = np.zeros(tokens.shape, np.int8)
    ends = np.zeros(tokens.shape, bool)
    segment = np.zeros(tokens.shape, np.int8)  # 1 and 2: the texts with their start tokens
    every = np.arange(len(records))
    for number, is_english in enumerate(np.asarray(english, bool).T):
        begin, end = spans[:, number].T[..., None]  # after the move, of start token and last token
        present = end > begin
        inside = (slot >= begin) & (slot <= end) & present
        start_token = np.where(is_english, vocabulary.start_of_english, vocabulary.start_of_chinese)
        there = np.minimum(begin[:, 0], width - 1)
        tokens[every, there] = np.where(present[:, 0], start_token, tokens[every, there])
        segment[inside] = number + 1
        positions = np.where(inside, slot - begin, positions)
        language = np.where(is_english, LossKind.ENGLISH, LossKind.CHINESE)[:, None]
        predicts = inside & (slot < end + predict_end)
        kind = np.where(predicts, language, kind)
        ends |= inside & (slot == end)

    masked, in_loss = _patches(corners, config, patch_size)
    kind[:, width:][in_loss] = LossKind.PATCH
    kept = np.append(np.zeros((len(records), width), bool), ~masked, 1)
    labels = np.append(tokens[:, 1:], tokens[:, -1:], 1)
    if predict_end:
        labels[ends] = vocabulary.pad
    causal = slot <= slot[:, None]
    is_text = segment > 0
    same_text = (segment[:, :, None] == segment[:, None, :]) & is_text[:, :, None]
    hidden = image & ~kept
    mask = same_text & causal
    mask |= is_text[:, :, None] & image
    mask |= hidden[:, :, None] & image & causal
    mask |= kept[:, None, :]
    return _sample(tokens, positions, labels, mask, kind)


def text_span_samples(
    records: np.ndarray, lengths: np.ndarray, gaps: np.ndarray, config: CogLMConfig
) -> TrainingSample:
    """Masked spans of pure text: `records` [b, s] without pads, `lengths` and `gaps` int [b,
    spans].

    `gaps` ascend and are the spans' starts in a text from which the spans before are cut out, as
    `draw_spans` gives them; lengths of 0 may end a row of fewer spans. All text between spans is
    seen by every row, and such a row sees nothing else; a span and the token after it are causal.
    The loss is on the spans, each token predicting the next.
    """
    if records.shape[1] > config.num_positions:
        raise ValueError(
            f"records must fit {config.num_positions} positions: got {records.shape[1]} tokens"
        )
    lengths, gaps = np.asarray(lengths), np.asarray(gaps)
    starts = gaps + np.cumsum(lengths, 1) - lengths
    ends = starts + lengths
    if (lengths < 0).any() or (gaps < 0).any() or (ends > records.shape[1]).any():
        raise ValueError(
            f"lengths and gaps must lie within {records.shape[1]} tokens:"
            f" got ends up to {ends.max(initial=0)}"
        )
    slot = np.arange(records.shape[1])
    present = (lengths > 0)[..., None]
    in_span = (present & (slot >= starts[..., None]) & (slot < ends[..., None])).any(1)
    # What lies before a span opens it up to the previous span's end and one more token, which
    # stays causal.
    before = np.append(np.zeros((len(records), 1), int), ends[:, :-1] + 1, 1)
    shown = (present & (slot >= before[..., None]) & (slot < starts[..., None])).any(1)
    mask = shown[:, None, :] | (~shown[:, :, None] & (slot <= slot[:, None]))
    positions = np.broadcast_to(slot, records.shape)
    labels = np.append(records[:, 1:], records[:, -1:], 1)
    return _sample(records, positions, labels, mask, in_span * np.int8(LossKind.SPAN))


# --- Pre-training: the random choices -------------------------------------------------------------


class Choices(NamedTuple):
    """All that is random in a batch of pre-training samples."""

    captioning: np.ndarray  # [b] bool: captioning and patches instead of generation
    second: np.ndarray  # [b] bool: which text is shown to generation
    corners: np.ndarray  # [b, patches, 2] int


def draw_choices(
    rng: np.random.Generator,
    batch: int,
    config: CogLMConfig,
    *,
    caption_ratio: float = 0.3,
    patch_size: int = 4,
    num_patches: int | None = None,
    to_border: bool = False,
) -> Choices:
    """Choices for `pretraining_samples`, with the published ratio of captioning samples; patches
    as by `draw_patches`.
    """
    captioning, second = rng.random((2, batch)) < [[caption_ratio], [0.5]]
    corners = draw_patches(
        rng, batch, config, patch_size=patch_size, num_patches=num_patches, to_border=to_border
    )
    return Choices(captioning, second, corners)


def draw_patches(
    rng: np.random.Generator,
    batch: int,
    config: CogLMConfig,
    *,
    patch_size: int = 4,
    num_patches: int | None = None,
    to_border: bool = False,
) -> np.ndarray:
    """Distinct patch corners [b, patches, 2], int. Default number: patches of 0.8 of the grid's
    area together (20 in 20×20).

    Published corners stop one short of the last place (0…15 in 20), so the last row and column are
    never masked; `to_border` includes it. Raises ValueError when there are fewer corners than
    patches.
    """
    rows, columns = (side - patch_size + to_border for side in config.grid)
    if num_patches is None:
        num_patches = int(0.8 * config.num_image_tokens / patch_size**2)
    if rows < 1 or columns < 1 or not 0 < num_patches <= rows * columns:
        raise ValueError(
            f"num_patches must be 1 to {max(rows, 0) * max(columns, 0)} for patches of {patch_size}"
            f" in grid {config.grid}: got {num_patches}"
        )
    order = rng.random((batch, rows * columns)).argsort(1)[:, :num_patches]
    return np.stack([order // columns, order % columns], -1)


def draw_spans(
    rng: np.random.Generator, batch: int, length: int, *, rate: float = 3.0, ratio: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Span lengths and gaps, int [b, spans], for texts of `length` tokens: at most `ratio` of them
    masked.

    Lengths are Poisson(`rate`), at least 1, taken until the next would pass the share; rows with
    fewer spans end in lengths of 0.
    """
    tries = int(length / rate * ratio) + 10
    lengths: np.ndarray = np.maximum(rng.poisson(rate, (batch, tries)), 1)
    lengths[np.cumsum(lengths, 1) > length * ratio] = 0
    count: np.ndarray = (lengths > 0).sum(1)
    lengths = lengths[:, : max(int(count.max(initial=0)), 1)]
    gaps = np.zeros(lengths.shape, int)
    for row, (number, masked) in enumerate(zip(count, lengths.sum(1), strict=True)):
        gaps[row, :number] = np.sort(rng.permutation(length - masked)[:number])
    return lengths, gaps


def pretraining_samples(
    records: np.ndarray,
    english: np.ndarray,
    choices: Choices,
    config: CogLMConfig,
    *,
    patch_size: int = 4,
    predict_end: bool = False,
) -> TrainingSample:
    """A mixed batch: captioning samples where chosen, generation elsewhere. `records` [b, s],
    `english` [b, 2]. Records of pure text are no part of it: `text_span_samples` makes those.
    """
    made = generation_samples(records, choices.second, config)
    rows = np.flatnonzero(choices.captioning)
    if rows.size:
        captions = captioning_samples(
            records[rows],
            english[rows],
            choices.corners[rows],
            config,
            patch_size=patch_size,
            predict_end=predict_end,
        )
        for whole, part in zip(made, captions, strict=True):
            whole[rows] = part
    return made


# --- Shared parts ---------------------------------------------------------------------------------


def _text_then_causal(is_text: _Array, slots: int) -> _Array:
    """[..., s, s]: every row sees the text keys, and what follows the `slots` is causal. NumPy or
    jax, as given.
    """
    slot = np.arange(is_text.shape[-1])
    return is_text[..., None, :] | ((slot >= slots) & (slot <= slot[:, None]))


def _text_positions(is_text: jax.Array) -> jax.Array:
    """0, 1, … along the text, 0 at pads, on whichever side they are."""
    is_text = jnp.asarray(is_text)
    return jnp.where(is_text, jnp.cumsum(is_text, axis=-1) - 1, 0)


def _join(*parts: ArrayLike) -> jax.Array:
    """Concatenate along the last axis, after broadcasting the leading ones. bool or int32."""
    arrays = [jnp.asarray(part) for part in parts]
    lead = np.broadcast_shapes(*(array.shape[:-1] for array in arrays))
    joined = jnp.concatenate(
        [jnp.broadcast_to(array, (*lead, array.shape[-1])) for array in arrays], axis=-1
    )
    return joined if joined.dtype == bool else joined.astype(jnp.int32)


def _patches(
    corners: np.ndarray, config: CogLMConfig, patch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cells that lie in a patch, and those in all but a patch's last column: bool [b, cells]
    each.
    """
    offset = np.arange(patch_size)
    cells = (corners[..., 0, None] + offset)[..., None] * config.grid[1]
    cells = cells + (corners[..., 1, None] + offset)[..., None, :]  # [b, patches, size, size]
    row = np.arange(len(corners))[:, None]
    masked = np.zeros((len(corners), config.num_image_tokens), bool)
    in_loss = masked.copy()
    masked[row, cells.reshape(len(corners), -1)] = True
    in_loss[row, cells[..., :-1].reshape(len(corners), -1)] = True
    return masked, in_loss


def _sample(
    tokens: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    kind: np.ndarray,
) -> TrainingSample:
    return TrainingSample(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        labels.astype(np.int32),
        mask,
        kind > LossKind.NONE,
        kind.astype(np.int8),
    )


def _text_ids(name: str, text: Sequence[int], room: int, vocabulary: Vocabulary) -> np.ndarray:
    ids = np.asarray(text)
    if ids.ndim != 1 or not 0 < ids.size <= room:
        raise ValueError(f"{name} must have 1 to {room} tokens: got {ids.size}")
    _require_range(name, ids, vocabulary.num_image, vocabulary.start_of_image)
    return ids


def _require_range(name: str, ids: np.ndarray, low: int, high: int) -> None:
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


def _require_cells(name: str, image: jax.Array, config: CogLMConfig) -> None:
    if image.shape[-1] != config.num_image_tokens:
        raise ValueError(
            f"{name} must have the {config.num_image_tokens} tokens of grid {config.grid}:"
            f" got {image.shape[-1]}"
        )


def _require_records(records: np.ndarray, config: CogLMConfig) -> None:
    length = config.text_slots + 1 + config.num_image_tokens
    if records.ndim != 2 or records.shape[1] != length:
        raise ValueError(f"records must be [b, {length}]: got {list(records.shape)}")
