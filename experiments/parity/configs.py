"""The networks of a recorded file: configurations read off its arrays and tensors.

Where a file does not say (it has, say, no positions at all), the published value stands.
"""

import math
from collections.abc import Mapping

import numpy as np

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    Grid,
    IterativeSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.published import names
from experiments.parity.golden import Golden

Tensors = Mapping[str, np.ndarray]


def square(cells: int) -> Grid:
    """The grid of so many cells."""
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"image tokens must fill a square grid: got {cells}")
    return side, side


def transformer(golden: Golden, tensors: Tensors) -> tuple[TransformerConfig, Vocabulary]:
    num_heads, size, num_image = (int(number) for number in golden["config"][2:5])
    # No id of the seeded models is a pad's or an unknown word's; what a pad holds is seen by none.
    vocabulary = Vocabulary(num_image, size, pad=num_image, unknown=num_image)
    return names.transformer_config(tensors, num_heads), vocabulary


def coglm(golden: Golden, tensors: Tensors) -> CogLMConfig:
    sizes, vocabulary = transformer(golden, tensors)
    published = CogLMConfig()
    if "comp_mask20" in golden:
        rows, columns = golden["comp_mask20"].shape
        grid = (int(rows), int(columns))
    elif "decode_step_logits" in golden:
        grid = square(golden["decode_step_logits"].shape[1])
    elif "t2i_tokens" in golden:
        grid = square(
            golden["t2i_tokens"].shape[1] - _end_of_text(golden["t2i_tokens"], vocabulary) - 1
        )
    else:
        grid = published.grid
    # The image's last cell has the highest position in every sequence.
    recorded = [golden[name].max() for name in golden if name.endswith("position_ids")]
    last = int(recorded[0]) if recorded else published.image_position + grid[0] * grid[1] - 1
    texts = [
        _end_of_text(golden[name], vocabulary)
        for name in ("t2i_tokens", "decode_tokens", "comp_filled_seq")
        if name in golden
    ]
    image_position = last + 1 - grid[0] * grid[1]
    return CogLMConfig(
        sizes,
        vocabulary,
        grid=grid,
        # As many slots as a decoder has in use, so that the recorded text is padded in them.
        max_text=max([min(published.max_text, image_position - 1), *texts]),
        num_positions=names.table_sizes(tensors)[1],
        image_position=image_position,
    )


def split_text(tokens: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """`text <start_of_image> image` [b, s] → text [b, n], image [b, cells]."""
    end = _end_of_text(tokens, vocabulary)
    return tokens[:, :end], tokens[:, end + 1 :]


def _end_of_text(tokens: np.ndarray, vocabulary: Vocabulary) -> int:
    return int(np.argmax(tokens[0] == vocabulary.start_of_image))


def direct_sr(golden: Golden, tensors: Tensors) -> DirectSRConfig:
    sizes, vocabulary = transformer(golden, tensors)
    slots, prefix, length = (int(number) for number in golden["layout"])
    grid = square(prefix - slots)
    fine, cross = ((int(rows), int(columns)) for rows, columns in golden["windows"])
    image_position = int(golden["position_ids"].reshape(-1)[slots])
    base = CogLMConfig(
        sizes,
        vocabulary,
        grid=grid,
        max_text=min(slots, image_position - 1),
        num_positions=names.table_sizes(tensors)[1],
        image_position=image_position,
    )
    ratio = square(length - prefix)[0] // grid[0]
    return DirectSRConfig(base, ratio=ratio, text_slots=slots, window=fine, cross_window=cross)


def iterative_sr(golden: Golden, tensors: Tensors) -> IterativeSRConfig:
    sizes, vocabulary = transformer(golden, tensors)
    slots, length = (int(number) for number in golden["layout"])
    rows, columns = (int(number) for number in golden["window"])
    return IterativeSRConfig(
        sizes,
        vocabulary,
        grid=square(length - slots),
        text_slots=slots,
        num_positions=names.table_sizes(tensors)[1],
        window=(rows, columns),
        order=tuple(tuple(row) for row in golden["lopar_order_6x6"].tolist()),
        rounds=len(golden["topk_per_step"]),
    )


def pretraining(golden: Golden) -> CogLMConfig:
    """The geometry of the pre-training samples; their ids are from the published vocabulary."""
    published = CogLMConfig()
    records = [golden[name] for name in golden if name.startswith("sample/")]
    cells = len(records[0]) - published.text_slots - 1
    return CogLMConfig(grid=square(cells))


def editing(golden: Golden) -> DirectSRConfig:
    """The geometry of the recorded edits; the file has no network."""
    coarse, fine = (int(golden[name].shape[-1]) for name in ("masks_20", "masks_60"))
    base = CogLMConfig(grid=(coarse, coarse))
    if "case_text" in golden and "case_positions" in golden:
        text, positions = golden["case_text"].reshape(-1), golden["case_positions"].reshape(-1)
        start = int(text[-1])  # the prompt ends with its own `<start_of_image>`
        # Image ids end where the lowest id of the text is, or before.
        num_image = int(text.min())
        base = CogLMConfig(
            vocabulary=Vocabulary(
                num_image, start + 3, pad=num_image, unknown=num_image, first_chinese=num_image
            ),
            grid=(coarse, coarse),
            max_text=len(text),
            num_positions=int(positions.max()) + 1,
            image_position=int(positions.max()) + 1 - coarse**2,
        )
    return DirectSRConfig(base, ratio=fine // coarse)
