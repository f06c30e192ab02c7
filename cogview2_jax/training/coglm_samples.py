"""CogLM's training samples: generation, captioning with masked patches, masked spans of text, and
completion of pictures.

A record has the texts and the image tokens of a picture in one row. A sample is the network's input
made from a record, with labels. NumPy on the host, vectorised over the batch; all random choices
are arguments. Masks are as in `networks.inputs`.
Facts: the released `pretrain_coglm.py`; numbers to match: `tests/golden/coglm_masks.npz`.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cogview2_jax.config import CogLMConfig
from cogview2_jax.data.records import text_spans, text_width
from cogview2_jax.networks.inputs import text_then_causal

# --- Samples --------------------------------------------------------------------------------------


class LossKind(IntEnum):
    """What a position of a training sample predicts."""

    NONE = 0
    IMAGE = 1  # the next image token, given the text
    PATCH = 2  # the next cell of a masked patch
    ENGLISH = 3  # a caption's next token
    CHINESE = 4
    SPAN = 5  # the next token of a masked text span
    COMPLETION = 6  # the next cell to draw, given the text and the rest of the picture


class TrainingSample(NamedTuple):
    """A batch of pre-training samples: the logits at a position predict its label."""

    tokens: np.ndarray  # [b, s] int32
    positions: np.ndarray  # [b, s] int32
    labels: np.ndarray  # [b, s] int32
    mask: np.ndarray  # [b, s, s] bool
    loss_mask: np.ndarray  # [b, s] bool
    kind: np.ndarray  # [b, s] int8, a LossKind


# --- The three tasks ------------------------------------------------------------------------------


def generation_samples(
    records: np.ndarray, second: ArrayLike, config: CogLMConfig
) -> TrainingSample:
    """Image from text: `records` [b, s], and `second` bool [b], which text is shown where there
    are two.

    Every row sees the chosen text; `<start_of_image>` and the image are causal; the other text is
    seen by none. The loss is on all image tokens.
    """
    begin, end, width = *_shown_text(records, second, config), text_width(records, config)
    slot = np.arange(records.shape[1])
    is_text = (slot >= begin) & (slot < end)
    tokens = records.astype(np.int32)
    tokens[:, width - 1] = config.vocabulary.start_of_image
    image = slot - width + config.image_position
    positions = np.where(is_text, slot - begin, np.where(slot >= width - 1, image, 0))
    # The published labels are the record's own tokens, so `<start_of_image>` is never a label.
    labels = np.append(records[:, 1:], records[:, -1:], 1)
    predicts = np.broadcast_to((slot >= width - 1) & (slot < len(slot) - 1), tokens.shape)
    kind = predicts * np.int8(LossKind.IMAGE)
    return _sample(tokens, positions, labels, text_then_causal(is_text, width - 1), kind)


def captioning_samples(
    records: np.ndarray,
    english: ArrayLike,
    corners: np.ndarray,
    config: CogLMConfig,
    *,
    patch_size: int = 4,
    predict_end: bool = False,
) -> TrainingSample:
    """Text from image, and masked patches: `english` bool [b, 2], a flag for each text;
    `corners` int [b, patches, 2], the (row, column) of each patch's first cell.

    The texts move right by one, so that each begins with its start token; each is causal, sees no
    other text, and sees all image cells. Every row sees every kept cell; kept cells see nothing
    else; masked cells also see earlier masked ones and themselves. The loss is on the texts, and
    on all but the last column of each patch, whose cells predict the next cell.

    The published loss says nothing about where a text ends. With `predict_end`, the last token of
    each predicts a pad, so that a caption drawn from the model stops.
    """
    spans, width = text_spans(records, config), text_width(records, config)
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
            f"lengths and gaps must stay within {records.shape[1]} tokens:"
            f" got ends up to {ends.max(initial=0)}"
        )
    slot = np.arange(records.shape[1])
    present = (lengths > 0)[..., None]
    in_span = (present & (slot >= starts[..., None]) & (slot < ends[..., None])).any(1)
    # The text before a span is visible to all rows, except for the first token after the previous
    # span, which stays causal.
    before = np.append(np.zeros((len(records), 1), int), ends[:, :-1] + 1, 1)
    shown = (present & (slot >= before[..., None]) & (slot < starts[..., None])).any(1)
    mask = shown[:, None, :] | (~shown[:, :, None] & (slot <= slot[:, None]))
    positions = np.broadcast_to(slot, records.shape)
    labels = np.append(records[:, 1:], records[:, -1:], 1)
    return _sample(records, positions, labels, mask, in_span * np.int8(LossKind.SPAN))


def completion_samples(
    records: np.ndarray,
    second: ArrayLike,
    masks: np.ndarray,
    ended: ArrayLike,
    config: CogLMConfig,
) -> TrainingSample:
    """A part of a picture from the text and the rest of the picture: the sequence of
    `inputs.infill`, from which pictures are edited. It is ours: in the published tasks, masked
    patches do not see the text.

    `records` [b, s]; `second` bool [b], which text is shown where there are two; `masks` bool
    [b, y, x], the cells to draw, some in every row; `ended` bool [b], whether the text ends with a
    `<start_of_image>` of its own, as in `patch_completion.sequence`. The loss is on the slots whose
    next one is to be drawn.
    """
    begin, end, width = *_shown_text(records, second, config), text_width(records, config)
    start_of_image, slot = config.vocabulary.start_of_image, np.arange(records.shape[1])
    ended = np.asarray(ended, bool)[:, None] & (end < width - 1)  # where there is room for it
    is_text = (slot >= begin) & (slot < end + ended)
    masked = np.asarray(masks, bool)
    in_rest = masked.copy()
    in_rest[:, :, :-1] |= masked[:, :, 1:]
    masked, in_rest = masked.reshape(len(records), -1), in_rest.reshape(len(records), -1)
    cells = np.argsort(in_rest, axis=1, kind="stable")
    tokens = np.where(ended & (slot == end), start_of_image, records)
    tokens[:, width - 1] = start_of_image
    tokens[:, width:] = np.take_along_axis(records[:, width:], cells, 1)
    positions = np.where(is_text, slot - begin, 0)
    positions[:, width - 1] = config.image_position - 1
    positions[:, width:] = config.image_position + cells
    labels = np.append(tokens[:, 1:], tokens[:, -1:], 1)
    context = (slot >= width) & (slot < width + (~in_rest).sum(1, keepdims=True))
    mask = text_then_causal(is_text, width - 1)
    mask |= context[:, None, :] & (slot >= width)[:, None]
    kind = np.zeros(tokens.shape, np.int8)
    kind[:, width - 1 : -1] = np.take_along_axis(masked, cells, 1) * LossKind.COMPLETION
    return _sample(tokens, positions, labels, mask, kind)


def hide_text(samples: TrainingSample, chosen: np.ndarray, config: CogLMConfig) -> None:
    """Hides the text of the rows `chosen`, bool [b], of generation or completion, from all that is
    drawn: what a model must know for classifier-free guidance. Ours.
    """
    slots = samples.tokens.shape[1] - config.num_image_tokens - 1
    samples.mask[chosen, :, :slots] = False


# --- The random choices ---------------------------------------------------------------------------


class Choices(NamedTuple):
    """The random choices of a batch of pre-training samples."""

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
    """Choices for `mixed_samples`, with the published ratio of captioning samples; patches
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
    never masked; `to_border` includes it. Raises ValueError for more patches than there are
    corners.
    """
    rows, columns = (side - patch_size + to_border for side in config.grid)
    if num_patches is None:
        num_patches = max(1, int(0.8 * config.num_image_tokens / patch_size**2))
    if rows < 1 or columns < 1 or not 0 < num_patches <= rows * columns:
        raise ValueError(
            f"num_patches must be 1 to {max(rows, 0) * max(columns, 0)} for patches of {patch_size}"
            f" in grid {config.grid}: got {num_patches}"
        )
    order = rng.random((batch, rows * columns)).argsort(1)[:, :num_patches]
    return np.stack([order // columns, order % columns], -1)


def draw_rectangles(rng: np.random.Generator, batch: int, config: CogLMConfig) -> np.ndarray:
    """The cells of a rectangle, bool [b, y, x], from a quarter to the whole of each side; every
    second one has the whole of one side.
    """
    whole = rng.integers(4, size=batch)  # 0: all rows, 1: all columns, 2 and 3: neither
    lines = []
    for axis, side in enumerate(config.grid):
        length = rng.integers(max(1, side // 4), side + 1, size=batch)
        length = np.where(whole == axis, side, length)[:, None]
        start = (rng.random((batch, 1)) * (side - length + 1)).astype(int)
        lines.append((np.arange(side) >= start) & (np.arange(side) < start + length))
    return lines[0][:, :, None] & lines[1][:, None, :]


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


def mixed_samples(
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


def _shown_text(
    records: np.ndarray, second: ArrayLike, config: CogLMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The first column of each record's text, the second one where asked for and there, and the
    last + 1: int [b, 1] each.
    """
    spans = text_spans(records, config)
    has_second = spans[:, 1, 1] > spans[:, 1, 0]
    chosen = (np.asarray(second, bool) & has_second).astype(int)
    begin, end = spans[np.arange(len(records)), chosen].T[..., None]
    return begin, end


def _patches(
    corners: np.ndarray, config: CogLMConfig, patch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cells in a patch, and those in a patch but not in its last column: bool [b, cells] each."""
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
