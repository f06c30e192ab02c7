"""Prepared records → batches for training, with grain: shuffled, sharded by process, resumable.

A data set here is a `grain.MapDataset` of batches, read by step: `dataset[step]` is a function of
the folder, the seed and the step, so a run resumes exactly by asking for the next step. With
threads that read ahead:

    batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=8)))
    state = batches.get_state()         # {"next_index": n}: keep it in the checkpoint
    batches.set_state({"next_index": n})

Process p of n gets rows p·b/n to (p+1)·b/n of each global batch of b. Concatenated in the order of
the processes they are the same global batch for every n.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.tokenizer.pictures import open_picture

# The way in which records are split into training and validation, its seed included.
SPLIT = "random by picture"
_SPLIT_SEED = 0
_ENDLESS = 2**53


class Records:
    """The records of a folder as bytes, by number, in the order of the inputs.

    Raises FileNotFoundError or ValueError, in one line, for a folder without records, an unfinished
    one and a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from array_record.python.array_record_module import ArrayRecordReader

        self.manifest: Manifest = manifests.read(folder)
        number = self.manifest.num_shards
        done = self.manifest.shards_in(folder)
        if missing := number - len(done):
            raise FileNotFoundError(
                f"{folder} lacks {missing} of {number} shards: prepare it to the end"
            )
        files = [self.manifest.shard_file(folder, shard) for shard in done]
        for file in files:
            reader = ArrayRecordReader(str(file))
            intact = reader.ok()  # a truncated file has no index, and no records
            if intact:
                reader.close()
            else:
                raise ValueError(_damaged(file))
        self.folder = folder
        self.splits: dict[float, np.ndarray] = {}  # share → what `validation_numbers` has found
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
            file = self.manifest.shard_file(self.folder, shard)
            raise ValueError(_damaged(file)) from error
        return content

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Several records at once, which is quicker than one after another."""
        try:
            contents: list[bytes] = self._source.__getitems__(numbers)
        except RuntimeError:  # one at a time, to name the damaged file
            contents = [self[number] for number in numbers]
        return contents


def tokens(
    folder: Path | Records,
    batch_size: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    validation_share: float = 0.0,
    validation: bool = False,
) -> Any:
    """Batches of token records: a `grain.MapDataset` of int32 [batch_size / process_count, length].

    `batch_size` is the global one. Each of `epochs` (None: without end) has its own order; rows
    that do not fill the last batch are left out, but there is always one batch: where `epochs` have
    fewer rows, further epochs fill it. Columns are those of `Records(folder).manifest.layout`.

    The share `validation_share` (0 to 1) of the records, chosen by `validation_numbers`, is kept
    for validation: with `validation` batches have only these records, otherwise only the others.

    Raises ValueError for a batch that the processes cannot split equally and for records that
    cannot be split, and as `Records` does.
    """
    records = opened(folder)
    if records.manifest.layout is None:
        raise ValueError(f"{records.folder} holds pictures, not tokens")

    def row(number: int) -> np.ndarray:
        return np.frombuffer(records[number], "<i4").astype(np.int32)

    part = _part(records, validation_share, validation)
    dataset = _shuffled(part, seed, epochs, batch_size).map(row)
    return _batches(dataset, batch_size, process_index, process_count)


def validation_numbers(records: Records, share: float) -> np.ndarray:
    """The numbers of the records that are kept for validation, ascending: int [about share · n].

    They are drawn at random, the same for every seed, process and number of processes. A picture is
    drawn with all its records: the neighbours that show it, whether they come from one input or
    from several. So their number may differ a little from `share`; there is at least one if `share`
    is above 0, and at least one remains for training. Raises ValueError for a share below 0, or of
    1 or more, and for one above 0 if all records show one picture.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share for validation must be at least 0 and below 1: got {share}")
    if share not in records.splits:
        records.splits[share] = _drawn_for_validation(records, share)
    return records.splits[share]


def training_numbers(records: Records, validation_share: float) -> Sequence[int] | np.ndarray:
    """The numbers of the other records, ascending. Raises ValueError as `validation_numbers`."""
    kept = validation_numbers(records, validation_share)
    if not len(kept):
        return range(len(records))
    return np.delete(np.arange(len(records)), kept)


def split_settings(validation_share: float) -> dict[str, Any]:
    """JSON values that change when records are split in another way. A training run saves them, so
    that a resumed run never trains on its validation records.
    """
    return {"validation_split": SPLIT} if validation_share else {}


def record_numbers(
    folder: Path | Records,
    batch_size: int,
    step: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    validation_share: float = 0.0,
    validation: bool = False,
) -> np.ndarray:
    """The numbers in `Records(folder)` of the records of batch `step`: int [batch_size /
    process_count].

    With the arguments of `tokens` or `pictures`, these are the records of their batches, row by
    row.
    """
    part = _part(opened(folder), validation_share, validation)
    dataset = _shuffled(part, seed, epochs, batch_size)
    numbers: np.ndarray = _batches(dataset, batch_size, process_index, process_count)[step]
    return numbers


def pictures(
    folder: Path | Records,
    batch_size: int,
    side: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    smallest: int | None = None,
    mirror: bool = False,
    validation_share: float = 0.0,
    validation: bool = False,
) -> Any:
    """Batches of crops to train an image tokenizer with: a `grain.MapDataset` of uint8
    [batch_size / process_count, side, side, 3].

    Each crop is a random square of the picture, from `smallest` pixels (default: `side`) to all of
    its shorter side, resized to `side`; with `mirror`, half of them are mirrored. The random
    choices depend only on the seed and the place in the data. The rest is as in `tokens`.
    """
    records = opened(folder)
    if records.manifest.kind != manifests.PICTURES:
        raise ValueError(f"{records.folder} holds {records.manifest.kind}, not pictures")
    if side < 1 or (smallest is not None and smallest < 1):
        raise ValueError(f"side and smallest must be at least 1: got {side} and {smallest}")

    def crop(number: int, rng: np.random.Generator) -> np.ndarray:
        return random_crop(open_picture(records[number]), side, rng, smallest or side, mirror)

    part = _part(records, validation_share, validation)
    dataset = _shuffled(part, seed, epochs, batch_size).random_map(crop)
    return _batches(dataset, batch_size, process_index, process_count)


def random_crop(
    picture: Image.Image, side: int, rng: np.random.Generator, smallest: int, mirror: bool = False
) -> np.ndarray:
    """A random square of `picture` as uint8 [side, side, 3]; see `pictures`.

    Shrinking averages areas and enlarging is bicubic, as in `fit_picture`.
    """
    shorter = min(picture.size)
    edge = int(rng.integers(min(smallest, shorter), shorter + 1))
    left, top = (int(rng.integers(length - edge + 1)) for length in picture.size)
    way = Image.Resampling.BOX if edge > side else Image.Resampling.BICUBIC
    box = (left, top, left + edge, top + edge)
    made = np.asarray(picture.resize((side, side), way, box))
    return np.ascontiguousarray(made[:, ::-1]) if mirror and rng.random() < 0.5 else made


def opened(folder: Path | Records) -> Records:
    """The records of a folder, or those given."""
    return folder if isinstance(folder, Records) else Records(folder)


def _drawn_for_validation(records: Records, share: float) -> np.ndarray:
    total = len(records)
    if not share:
        return np.zeros(0, np.int64)
    wanted = max(1, round(share * total))
    kept, seen = np.zeros(total, bool), np.zeros(total, bool)
    number, shortest = 0, range(total)
    pictures = _Pictures(records)
    for chosen in pictures.ahead(np.random.default_rng(_SPLIT_SEED).permutation(total)):
        if number >= wanted:
            break
        if seen[chosen]:
            continue
        run = pictures.run(chosen)
        seen[run.start : run.stop] = True
        if len(run) < len(shortest):
            shortest = run
        if len(run) <= wanted and number + len(run) < total:
            kept[run.start : run.stop] = True
            number += len(run)
    if not number:  # every picture has more records than are wanted
        kept[shortest.start : shortest.stop] = True
    if kept.all():
        raise ValueError(
            f"{total} records of one picture cannot be split: the share for validation must be 0,"
            f" got {share}"
        )
    return np.flatnonzero(kept)


class _Pictures:
    """Which records show the same picture as their neighbours."""

    def __init__(self, records: Records) -> None:
        layout = records.manifest.layout
        self._records, self._digests = records, dict[int, bytes]()
        self._start = 4 * (layout.text_slots + 1) if layout else 0  # of the picture in a record

    def ahead(self, numbers: np.ndarray) -> Iterator[int]:
        """`numbers` in order; these and their neighbours are read in blocks, which is quicker."""
        for start in range(0, len(numbers), 64):
            block = numbers[start : start + 64]
            around = np.unique(np.concatenate([block - 1, block, block + 1]))
            wanted = around[(around >= 0) & (around < len(self._records))].tolist()
            contents = self._records.read(wanted)
            self._digests = dict(zip(wanted, map(self._digest, contents), strict=True))
            yield from block.tolist()

    def run(self, number: int) -> range:
        """The numbers of the records around `number` that show the same picture."""
        shown = self._picture(number)
        first, last = number, number
        while first > 0 and self._picture(first - 1) == shown:
            first -= 1
        while last + 1 < len(self._records) and self._picture(last + 1) == shown:
            last += 1
        return range(first, last + 1)

    def _picture(self, number: int) -> bytes:
        if number not in self._digests:
            self._digests[number] = self._digest(self._records[number])
        return self._digests[number]

    def _digest(self, record: bytes) -> bytes:
        return hashlib.sha256(record[self._start :]).digest()


def _part(
    records: Records, validation_share: float, validation: bool
) -> Sequence[int] | np.ndarray:
    """The numbers of the records to train with, or of those for validation."""
    if not validation:
        return training_numbers(records, validation_share)
    if not validation_share:
        raise ValueError("there are no records for validation: their share must be above 0")
    return validation_numbers(records, validation_share)


def _shuffled(
    part: Sequence[int] | np.ndarray, seed: int, epochs: int | None, batch_size: int
) -> Any:
    """Record numbers of `part`, each epoch in its own order, and `batch_size` of them or more."""
    import grain

    if epochs is not None:
        epochs = max(epochs, -(-batch_size // len(part)))
    return grain.MapDataset.source(part).seed(seed).shuffle().repeat(epochs)


def _batches(dataset: Any, batch_size: int, process_index: int, process_count: int) -> Any:
    if not 0 <= process_index < process_count or batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be shared equally by the processes: got {batch_size} for process"
            f" {process_index} of {process_count}"
        )
    # Batches of one process's size, of which it takes every n-th: rows stay in global order.
    # An endless data set is cut where a float can still count: grain counts batches of 1 in one.
    rows = min(len(dataset), _ENDLESS)
    whole = dataset[: rows // batch_size * batch_size]
    return whole.batch(batch_size // process_count)[process_index::process_count]


def _damaged(file: Path) -> str:
    return (
        f"{file} is damaged: delete it and run `cogview2 data prepare` as before to make it again"
    )
