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
from cogview2_jax.tokenizer.pictures import open_picture


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
    manifest.layout`.

    The last `held_out` (a share of 0 to 1) of the records is kept for validation and is in no
    batch; with `validation`, the batches are of it alone. Records in a row that show the same
    picture are never split between the two, so the part held out may be some records larger.

    Raises ValueError for a batch that the processes cannot share or the part cannot fill and for a
    part that is empty, and as `Records` does.
    """
    records = Records(folder)
    if records.manifest.layout is None:
        raise ValueError(f"{folder} holds pictures, not tokens")

    def row(number: int) -> np.ndarray:
        return np.frombuffer(records[number], "<i4").astype(np.int32)

    part = _part(records, held_out, validation)
    dataset = _shuffled(part, seed, epochs).map(row)
    return _batches(dataset, batch_size, process_index, process_count)


def num_training(records: Records, held_out: float) -> int:
    """How many records, from the first, are not held out. Raises ValueError for none."""
    return len(_part(records, held_out, validation=False))


def record_numbers(
    folder: Path,
    batch_size: int,
    step: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    held_out: float = 0.0,
    validation: bool = False,
) -> np.ndarray:
    """The numbers in `Records(folder)` of the records of batch `step`: int [batch_size /
    process_count].

    With the arguments that `tokens` or `pictures` was given, the rows of their batches in order,
    to name the records that a run has met.
    """
    dataset = _shuffled(_part(Records(folder), held_out, validation), seed, epochs)
    numbers: np.ndarray = _batches(dataset, batch_size, process_index, process_count)[step]
    return numbers


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

    def crop(number: int, rng: np.random.Generator) -> np.ndarray:
        return random_crop(open_picture(records[number]), side, rng, smallest or side, flip)

    part = _part(records, held_out, validation)
    dataset = _shuffled(part, seed, epochs).random_map(crop)
    return _batches(dataset, batch_size, process_index, process_count)


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
    made = np.asarray(picture.resize((side, side), way, box))
    return np.ascontiguousarray(made[:, ::-1]) if flip and rng.random() < 0.5 else made


def _part(records: Records, held_out: float, validation: bool) -> range:
    """The numbers of the records that are trained with, or of those that are held out."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1: got {held_out}")
    layout, total = records.manifest.layout, len(records)
    start_of_picture = 4 * (layout.text_slots + 1) if layout else 0

    def picture(number: int) -> bytes:
        return records[number][start_of_picture:]

    cut = total - round(held_out * total)
    # The records of an input lie together. So do, often, inputs that name the same picture.
    while 0 < cut < total and picture(cut - 1) == picture(cut):
        cut -= 1
    part = range(cut, total) if validation else range(cut)
    if not part:
        name = "for validation" if validation else "to train with"
        raise ValueError(f"no records {name}: held_out is {held_out} of {total} records")
    return part


def _shuffled(part: range, seed: int, epochs: int | None) -> Any:
    """Record numbers of `part`, each epoch in an order of its own."""
    import grain

    return grain.MapDataset.source(part).seed(seed).shuffle().repeat(epochs)


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
            f"batch_size must be at most the number of records, {len(dataset)}: got {batch_size}"
        )
    return whole.batch(batch_size // process_count)[process_index::process_count]


def _damaged(file: Path) -> str:
    return (
        f"{file} is damaged: delete it and run `cogview2 data prepare` as before to make it again"
    )
