"""Training records: the columns of a row of int32.

A record has the texts and the image tokens of one picture in one row, as in the released
`pretrain_coglm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cogview2_jax.checks import check_count
from cogview2_jax.config import TOKEN_STRIDE, CogLMConfig, Vocabulary
from cogview2_jax.networks.inputs import require_range, text_ids


@dataclass(frozen=True)
class RecordLayout:
    """One row of int32 for each record: `text_slots` places of text, a pad, then the image tokens
    of each of `sizes` in raster order.

    The published record is `RecordLayout()`: 111 + 1 + 20·20 = 512. `sizes` are sides in pixels of
    the square picture, `stride` the pixels of a token's side. Raises ValueError for sizes that the
    stride does not divide, that repeat or that descend.
    """

    text_slots: int = 111
    stride: int = TOKEN_STRIDE
    sizes: tuple[int, ...] = (160,)
    vocabulary: Vocabulary = Vocabulary()

    def __post_init__(self) -> None:
        check_count("text_slots", self.text_slots)
        check_count("stride", self.stride)
        if not isinstance(self.sizes, tuple):
            raise ValueError(f"sizes must be a tuple: got {self.sizes!r}")
        for number, size in enumerate(self.sizes):
            check_count(f"sizes[{number}]", size, least=-(2**31))  # which are wrong, is said below
        if not self.sizes or any(size < 1 or size % self.stride for size in self.sizes):
            raise ValueError(
                f"sizes must be multiples of stride {self.stride}: got {list(self.sizes)}"
            )
        if sorted(set(self.sizes)) != list(self.sizes):
            raise ValueError(f"sizes must ascend, each once: got {list(self.sizes)}")

    @classmethod
    def of(cls, config: CogLMConfig, stride: int = TOKEN_STRIDE, *more: int) -> RecordLayout:
        """The layout of `make_record` for `config`, with further sizes in pixels."""
        if config.grid[0] != config.grid[1]:
            raise ValueError(f"grid must be square: got {config.grid}")
        sizes = (config.grid[0] * stride, *more)
        return cls(config.text_slots, stride, sizes, config.vocabulary)

    def cells(self, size: int) -> int:
        """Image tokens of a picture of `size` pixels a side."""
        return (size // self.stride) ** 2

    @property
    def length(self) -> int:
        return self.text_slots + 1 + sum(map(self.cells, self.sizes))

    def columns(self, size: int) -> slice:
        """The columns of the image tokens of `size`. Raises ValueError for another size."""
        if size not in self.sizes:
            raise ValueError(f"size must be one of {list(self.sizes)}: got {size}")
        before = self.sizes[: self.sizes.index(size)]
        start = self.text_slots + 1 + sum(map(self.cells, before))
        return slice(start, start + self.cells(size))


def make_record(
    texts: Sequence[Sequence[int]], image: ArrayLike, config: CogLMConfig
) -> np.ndarray:
    """A training record: one text or two with a pad between, pads, image. int32 [text_slots + 1 +
    cells].

    The last text place is always a pad: samples put `<start_of_image>` there. Raises ValueError
    for no text or more than two, texts that do not fit, and wrong ids.
    """
    vocabulary, ids = config.vocabulary, np.asarray(image).reshape(-1)
    if ids.size != config.num_image_tokens:
        raise ValueError(f"image must have {config.num_image_tokens} tokens: got {ids.size}")
    require_range("image", ids, 0, vocabulary.num_image)
    part = text_part(texts, config.text_slots, vocabulary)
    return np.concatenate([part, ids.astype(np.int32)])


def text_part(
    texts: Sequence[Sequence[int]], text_slots: int, vocabulary: Vocabulary
) -> np.ndarray:
    """The text columns of a training record: int32 [text_slots + 1]. Raises ValueError as
    `make_record` does.
    """
    if len(texts) not in (1, 2):
        raise ValueError(f"texts must be one or two, one for each language: got {len(texts)}")
    made = np.full(text_slots + 1, vocabulary.pad, np.int32)
    end = -1
    for number, text in enumerate(texts):
        room = text_slots - end - 1
        part = text_ids(f"texts[{number}]", text, room, vocabulary)
        if (part == vocabulary.pad).any():  # a pad ends a text
            raise ValueError(f"texts[{number}] must not hold the pad id: got {vocabulary.pad}")
        made[end + 1 : end + 1 + len(part)] = part
        end += 1 + len(part)
    return made


def text_spans(records: np.ndarray, config: CogLMConfig) -> np.ndarray:
    """The columns of the two texts of `records` [b, s]: int [b, 2, 2], (start, end) of each; the
    second is empty if absent.

    Raises ValueError when a record is not as `make_record` makes it.
    """
    width = text_width(records, config)
    is_pad = records[:, :width] == config.vocabulary.pad
    if not is_pad[:, -1].all() or is_pad[:, 0].any():
        row = int(np.argmin(is_pad[:, -1] & ~is_pad[:, 0]))
        raise ValueError(
            f"records[{row}] must begin with a text and have a pad at {width - 1}:"
            f" got ids {records[row, 0]} and {records[row, width - 1]}"
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
    spans, width = text_spans(records, config), text_width(records, config)
    slot = np.arange(width)
    inside = (slot >= spans[..., :1]) & (slot < spans[..., 1:])
    below = records[:, None, :width] < first_chinese
    return np.asarray((below | ~inside).all(-1))


def text_width(records: np.ndarray, config: CogLMConfig) -> int:
    """Columns of a record before its image, including the pad at their end. Two texts may need more
    than a prompt's `config.text_slots`; each has positions from 0.
    """
    width = records.shape[-1] - config.num_image_tokens
    if records.ndim != 2 or width < 2:
        raise ValueError(
            f"records must be [b, text places + {config.num_image_tokens}]:"
            f" got {list(records.shape)}"
        )
    return width
