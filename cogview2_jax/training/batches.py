"""Rows of records → training batches of each network, with their random choices, on the host.

Every process draws the whole batch's random numbers and keeps its rows. So a batch does not depend
on how many processes make it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cogview2_jax.config import TOKEN_STRIDE, CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2_jax.data.reading import Records
from cogview2_jax.data.records import RecordLayout, english_texts, text_spans
from cogview2_jax.networks import inputs
from cogview2_jax.training import coglm_samples
from cogview2_jax.training.coglm_samples import Choices, TrainingSample
from cogview2_jax.training.options import CogLMOptions


class Rows(NamedTuple):
    """This process's part of a batch: rows `start` to `start + len(records)` of `batch_size`."""

    records: np.ndarray  # int32 [b, length]
    start: int
    batch_size: int

    def of(self, drawn: np.ndarray) -> np.ndarray:
        """The rows of what was drawn for the whole batch."""
        return drawn[self.start : self.start + len(self.records)]


class FineSample(NamedTuple):
    """A batch of super-resolution. `seen` holds the input tokens: for direct SR the coarse ones,
    with `masked` all True; for iterative SR the fine ones, where the network sees the unmasked
    cells.
    """

    text: np.ndarray  # int32 [b, slots], left-padded
    is_text: np.ndarray  # bool [b, slots]
    seen: np.ndarray  # int32 [b, coarse or fine cells]
    fine: np.ndarray  # int32 [b, cells], the labels
    masked: np.ndarray  # bool [b, cells], cells to predict
    weights: np.ndarray  # float32 [b, cells], how much each counts


def require_layout(layout: RecordLayout, config: CogLMConfig, fine_cells: int = 0) -> None:
    """Raises ValueError, saying what to prepare instead, for records that do not fit a network:
    the base model's grid first, and for super-resolution a finer one.
    """
    if layout.vocabulary.id_space != config.vocabulary.id_space:
        raise ValueError(
            f"the records have {layout.vocabulary} and the model {config.vocabulary}:"
            " prepare them with --bundle of this model"
        )
    if layout.stride != TOKEN_STRIDE:
        raise ValueError(
            f"the records have {layout.stride} pixels per token and the model has {TOKEN_STRIDE}:"
            f" prepare them with --stride {TOKEN_STRIDE}"
        )
    side = layout.sizes[0] // layout.stride
    if (side, side) != config.grid:
        raise ValueError(
            f"the records' first size has {side * side} tokens and the base model {config.grid}:"
            f" prepare them with --size {config.grid[0] * layout.stride}"
        )
    if fine_cells and fine_cells not in (layout.cells(size) for size in layout.sizes[1:]):
        coarse = config.grid[0] * layout.stride
        fine = round(fine_cells**0.5) * layout.stride
        raise ValueError(
            f"the records have no picture of {fine_cells} tokens: prepare them with"
            f" --size {coarse} --size {fine}"
        )


def coglm(
    rng: np.random.Generator,
    rows: Rows,
    records: Records,
    prose_from: Sequence[int] | np.ndarray,
    config: CogLMConfig,
    tasks: CogLMOptions,
) -> TrainingSample:
    """A batch of the three tasks. Samples of text alone are concatenated captions of `records`, of
    those with the numbers `prose_from`.
    """
    layout = records.manifest.layout
    assert layout is not None  # `reading.tokens` has refused pictures
    length = layout.text_slots + 1 + config.num_image_tokens
    own = rows.records[:, :length]
    is_prose = rng.random(rows.batch_size) < tasks.text_ratio
    seeds = rng.integers(2**63, size=rows.batch_size)
    choices = coglm_samples.draw_choices(
        rng,
        rows.batch_size,
        config,
        caption_ratio=tasks.caption_ratio,
        patch_size=tasks.patch_size,
        num_patches=tasks.num_patches,
        to_border=tasks.to_border,
    )
    made = coglm_samples.mixed_samples(
        own,
        english_texts(own, config, layout.vocabulary.first_chinese),
        Choices(*map(rows.of, choices)),
        config,
        patch_size=tasks.patch_size,
        predict_end=tasks.predict_end,
    )
    if tasks.completion_ratio:
        _complete(made, rng, rows, choices, config, tasks.completion_ratio)
    if tasks.drop_text:
        dropped = rng.random(rows.batch_size) < tasks.drop_text
        coglm_samples.hide_text(made, rows.of(dropped & ~choices.captioning), config)
    for row in np.flatnonzero(rows.of(is_prose)):
        row_rng = np.random.default_rng(rows.of(seeds)[row])
        text = _prose(row_rng, records, prose_from, length, config)
        spans = coglm_samples.text_span_samples(
            text[None], *coglm_samples.draw_spans(row_rng, 1, length), config
        )
        for whole, part in zip(made, spans, strict=True):
            whole[row] = part[0]
    return made


def _complete(
    made: TrainingSample,
    rng: np.random.Generator,
    rows: Rows,
    choices: Choices,
    config: CogLMConfig,
    share: float,
) -> None:
    """Puts samples of completion in the place of a share of those of generation."""
    drawn, ended = rng.random((2, rows.batch_size)) < [[share], [0.5]]
    masks = coglm_samples.draw_rectangles(rng, rows.batch_size, config)
    chosen = np.flatnonzero(rows.of(drawn & ~choices.captioning))
    if chosen.size:
        length = made.tokens.shape[1]
        samples = coglm_samples.completion_samples(
            rows.records[chosen, :length],
            rows.of(choices.second)[chosen],
            rows.of(masks)[chosen],
            rows.of(ended)[chosen],
            config,
        )
        for whole, part in zip(made, samples, strict=True):
            whole[chosen] = part


def direct_sr(
    rng: np.random.Generator, rows: Rows, layout: RecordLayout, config: DirectSRConfig
) -> FineSample:
    """Coarse and fine tokens of each picture, with one of its texts."""
    text, is_text = _texts(rng, rows, layout, config.coglm, config.text_slots)
    fine = _cells(rows, layout, config.num_image_tokens)
    coarse = rows.records[:, layout.columns(layout.sizes[0])]
    every = np.ones(fine.shape, bool)
    return FineSample(text, is_text, coarse, fine, every, every.astype(np.float32))


def iterative_sr(
    rng: np.random.Generator,
    rows: Rows,
    layout: RecordLayout,
    coglm_config: CogLMConfig,
    config: IterativeSRConfig,
    *,
    kept_weight: float = 2.0,
) -> FineSample:
    """Fine tokens, masked as in one round of the schedule; a round is drawn for each picture.

    Of a round's predictions, only those at the cells of its own order are final: they have weight
    `kept_weight`, the others 1.
    """
    text, is_text = _texts(rng, rows, layout, coglm_config, config.text_slots)
    fine = _cells(rows, layout, config.num_image_tokens)
    reset = inputs.lopar_schedule(config)
    order = inputs.lopar_order(config).reshape(-1)
    rounds = rows.of(rng.integers(len(reset), size=rows.batch_size))
    stays = order == rounds[:, None] + 1
    weights = np.where(stays, kept_weight, 1.0).astype(np.float32)
    return FineSample(text, is_text, fine, fine, reset[rounds], weights)


def _texts(
    rng: np.random.Generator, rows: Rows, layout: RecordLayout, config: CogLMConfig, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """One text of each record, cut to `slots` tokens and left-padded."""
    second = rows.of(rng.random(rows.batch_size) < 0.5)
    part = rows.records[:, : layout.text_slots + 1 + config.num_image_tokens]
    spans = text_spans(part, config)
    chosen = second & (spans[:, 1, 1] > spans[:, 1, 0])
    texts: list[Sequence[int]] = []
    for record, (begin, end) in zip(
        part, spans[np.arange(len(part)), chosen.astype(int)], strict=True
    ):
        texts.append(record[begin : min(end, begin + slots)])
    return inputs.left_padded(texts, slots, config.vocabulary)


def _cells(rows: Rows, layout: RecordLayout, cells: int) -> np.ndarray:
    size = next(size for size in layout.sizes[1:] if layout.cells(size) == cells)
    return rows.records[:, layout.columns(size)]


def _prose(
    rng: np.random.Generator,
    records: Records,
    numbers: Sequence[int] | np.ndarray,
    length: int,
    config: CogLMConfig,
) -> np.ndarray:
    """Captions drawn from the records and concatenated, `length` tokens in all."""
    stream: list[int] = []
    while len(stream) < length:
        number = int(numbers[int(rng.integers(len(numbers)))])
        row = np.frombuffer(records[number], "<i4")[None, :length]
        for begin, end in text_spans(row, config)[0]:
            stream += row[0, begin:end].tolist()
    return np.array(stream[:length], np.int32)
