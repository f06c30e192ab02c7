"""Prepared records → batches for training, with grain: shuffled, sharded by process, resumable.

A data set here is a `grain.MapDataset` of batches that is read by step: `dataset[step]` is a
function of the folder, the seed and the step, so a run resumes exactly by asking for the next one.
With threads that read ahead:

    batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=8)))
    state = batches.get_state()         # {"next_index": n}: keep it in the checkpoint
    batches.set_state({"next_index": n})

Process p of n gets rows p·b/n to (p+1)·b/n of each global batch of b, so that the processes' rows
one after the other are the same global batch whatever n is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.sources import open_picture


class Records:
    """The records of a folder as bytes, by number, in the order of the inputs.

    Raises FileNotFoundError or ValueError, in one line, for a folder without records, one that is
    not finished and a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from array_record.python.array_record_module import ArrayRecordReader

        self.manifest: Manifest = manifests.read(folder)
        every = range(self.manifest.num_shards)
        files = [self.manifest.shard_file(folder, shard) for shard in every]
        if missing := sum(not file.exists() for file in files):
            raise FileNotFoundError(
                f"{folder} lacks {missing} of {len(files)} shards: prepare it to the end"
            )
        for file in files:
            reader = ArrayRecordReader(str(file))
            intact = reader.ok()  # a file that is cut short has no index, and no records
            if intact:
                reader.close()
            else:
                raise ValueError(_damaged(file))
        self._folder = folder
        self._source = ArrayRecordDataSource([str(file) for file in files])
        if not len(self._source):
            raise ValueError(f"{folder} has no records: all inputs were refused")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        try:
            content: bytes = self._source[index]
        except RuntimeError as error:
            shard, _ = self._source._reader_idx_and_position(index)
            file = self.manifest.shard_file(self._folder, shard)
            raise ValueError(_damaged(file)) from error
        return content


def tokens(
    folder: Path,
    batch_size: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    held_out: float = 0.0,
    validation: bool = False,
) -> Any:
    """Batches of token records: a `grain.MapDataset` of int32 [batch_size / process_count, length].

    `batch_size` is the global one. Each of `epochs` (None: without end) has its own order; rows
    that do not fill the last batch are left out. Columns are those of `Records(folder).
    manifest.layout`. The last share `held_out` of the records is for `validation` alone, where it
    comes once and in order: records of one input lie together, so at most one input is on both
    sides. Raises ValueError for a batch that the processes cannot share, and as
    `Records` does.
    """
    records = Records(folder)
    layout = records.manifest.layout
    if layout is None:
        raise ValueError(f"{folder} holds pictures, not tokens")

    def row(content: bytes) -> np.ndarray:
        return np.frombuffer(content, "<i4").astype(np.int32)

    part = _part(records, seed, epochs, held_out, validation)
    return _batches(part.map(row), batch_size, process_index, process_count)


def num_training(records: Records, held_out: float) -> int:
    """How many of the records, from the first, are not held out. Raises ValueError for none."""
    kept = len(records) - round(held_out * len(records))
    if not 0 <= held_out < 1 or not kept:
        raise ValueError(f"held_out must leave records of {len(records)}: got {held_out}")
    return kept


def record_numbers(
    folder: Path, batch_size: int, step: int, *, seed: int = 0, held_out: float = 0.0
) -> list[int]:
    """Which records make the global batch of a step, as `Records(folder)` numbers them."""
    kept = num_training(Records(folder), held_out)
    batches = _batches(_shuffled(range(kept), seed, None), batch_size, 0, 1)
    return [int(number) for number in batches[step]]


def pictures(
    folder: Path,
    batch_size: int,
    side: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    smallest: int | None = None,
    flip: bool = True,
    held_out: float = 0.0,
    validation: bool = False,
) -> Any:
    """Batches of crops to train an image tokenizer with: a `grain.MapDataset` of uint8
    [batch_size / process_count, side, side, 3].

    Each crop is a random square of the picture, from `smallest` pixels (default: `side`) to all of
    its shorter side, resized to `side`; half are mirrored, unless not `flip`. What is random
    depends on the seed and the place in the data alone. The rest is as in `tokens`.
    """
    records = Records(folder)
    if records.manifest.kind != manifests.PICTURES:
        raise ValueError(f"{folder} holds {records.manifest.kind}, not pictures")
    if side < 1 or (smallest is not None and smallest < 1):
        raise ValueError(f"side and smallest must be at least 1: got {side} and {smallest}")

    def crop(content: bytes, rng: np.random.Generator) -> np.ndarray:
        return random_crop(open_picture(content), side, rng, smallest or side, flip)

    part = _part(records, seed, epochs, held_out, validation)
    return _batches(part.random_map(crop), batch_size, process_index, process_count)


def random_crop(
    picture: Image.Image, side: int, rng: np.random.Generator, smallest: int, flip: bool = True
) -> np.ndarray:
    """A random square of `picture` as uint8 [side, side, 3]; see `pictures`.

    Shrinking averages areas and enlarging is bicubic, as where pictures are tokenised.
    """
    shorter = min(picture.size)
    edge = int(rng.integers(min(smallest, shorter), shorter + 1))
    left, top = (int(rng.integers(length - edge + 1)) for length in picture.size)
    way = Image.Resampling.BOX if edge > side else Image.Resampling.BICUBIC
    box = (left, top, left + edge, top + edge)
    made = np.asarray(picture.convert("RGB").resize((side, side), way, box))
    return np.ascontiguousarray(made[:, ::-1]) if flip and rng.random() < 0.5 else made


class _Slice:
    """Some of the records, by number."""

    def __init__(self, records: Records, numbers: range) -> None:
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> bytes:
        return self._records[self._numbers[index]]


def _part(
    records: Records, seed: int, epochs: int | None, held_out: float, validation: bool
) -> Any:
    kept = num_training(records, held_out)
    if not validation:
        return _shuffled(_Slice(records, range(kept)), seed, epochs)
    import grain

    unseen = _Slice(records, range(kept, len(records)))
    if not len(unseen):
        raise ValueError(f"held_out keeps none of {len(records)} records: got {held_out}")
    return grain.MapDataset.source(unseen).seed(seed)


def _shuffled(records: Any, seed: int, epochs: int | None) -> Any:
    import grain

    return grain.MapDataset.source(records).seed(seed).shuffle().repeat(epochs)


def _batches(dataset: Any, batch_size: int, process_index: int, process_count: int) -> Any:
    if not 0 <= process_index < process_count or batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be shared equally by the processes: got {batch_size} for process"
            f" {process_index} of {process_count}"
        )
    # Batches of what one process holds, and of these every n-th: rows stay in global order.
    whole = dataset[: len(dataset) // batch_size * batch_size]
    if not len(whole):
        raise ValueError(
            f"batch_size must be at most the {len(dataset)} records that there are to read or are"
            f" held out: got {batch_size}"
        )
    return whole.batch(batch_size // process_count)[process_index::process_count]


def _damaged(file: Path) -> str:
    return (
        f"{file} is damaged: delete it and run `cogview2 data prepare` as before to make it again"
    )
