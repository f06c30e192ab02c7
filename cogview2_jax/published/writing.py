"""Writes a file of safetensors array by array, from published tensors in our axes and dtype.

At most two parameters of a layer are in memory, one being made and one being written, and of a
table a few blocks of rows. Several threads transpose, for a full model has 40 GB to be transposed.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from cogview2_jax.published.checkpoints import Checkpoint
from cogview2_jax.published.names import Leaf

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
Progress = Callable[[int, int], None]  # bytes written now, bytes of all
_ROWS = 256  # are transposed at once: they stay in a core's cache
_MOST_PENDING = 16  # blocks that wait to be transposed


class Entry(NamedTuple):
    """One array of the file."""

    name: str
    kind: str  # as safetensors calls the dtype
    shape: tuple[int, ...]
    bytes: int
    blocks: Callable[[Executor], Iterator[np.ndarray]]  # the array in parts, contiguous, in order


def write_safetensors(file: BinaryIO, entries: Sequence[Entry], progress: Progress) -> None:
    """A header that says where each array is, and their bytes one behind the other.

    `file` may hold what an earlier call with the same entries wrote before it was killed: whole
    arrays are kept, and the rest is written. Raises what the entries' blocks raise, and OSError
    where nothing can be written.
    """
    header, place = {}, 0
    for each in entries:
        header[each.name] = {
            "dtype": each.kind,
            "shape": list(each.shape),
            "data_offsets": [place, place + each.bytes],
        }
        place += each.bytes
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    described = struct.pack("<Q", len(described)) + described
    remaining, kept = _remaining(file, described, entries)
    if kept:
        progress(kept, place)
    with ThreadPoolExecutor(_cores()) as workers, ThreadPoolExecutor(1) as writer:
        # The next block is made while one is written.
        last: Future = writer.submit(lambda: None)
        for each in remaining:
            written = 0
            for block in each.blocks(workers):
                last.result()
                last = writer.submit(file.write, block.reshape(-1).view(np.uint8).data)
                written += block.nbytes
                progress(block.nbytes, place)
            if written != each.bytes:
                raise AssertionError(f"{each.name} has {written} bytes, not {each.bytes}")
        last.result()


def _remaining(
    file: BinaryIO, header: bytes, entries: Sequence[Entry]
) -> tuple[Sequence[Entry], int]:
    """The arrays that the file lacks, and the bytes of those that it has. It is cut to these, and
    written on from there.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(header)) != header:
        file.seek(0)
        file.truncate()
        file.write(header)
        return entries, 0
    kept, count = 0, 0
    for each in entries:
        if len(header) + kept + each.bytes > length:
            break
        kept, count = kept + each.bytes, count + 1
    file.seek(len(header) + kept)
    file.truncate()
    return entries[count:], kept


def converted(
    leaf: Leaf, checkpoint: Checkpoint, dtype: np.dtype, workers: Executor
) -> Iterator[np.ndarray]:
    """A parameter in parts, in order, in our axes. Raises ValueError for numbers that are not
    finite in this dtype.
    """
    for name in leaf.names:
        try:
            if leaf.axes == (1, 0):
                blocks = checkpoint.blocks(name)
                yield _transposed(blocks, leaf.published_shape, dtype, workers)
            elif leaf.axes == tuple(range(len(leaf.axes))):
                # The word table may have more rows than there are tokens. All are read, for the
                # checksum.
                left = leaf.published_shape[0]
                for block in checkpoint.blocks(name):
                    yield _cast(block[:left], dtype)
                    left -= min(left, len(block))
            else:
                whole = np.concatenate(list(checkpoint.blocks(name)))
                yield np.ascontiguousarray(_cast(whole, dtype).transpose(leaf.axes))
        except _NotFiniteError as error:
            where = checkpoint.files[0].path
            what = f"{name!r} has numbers that are not finite in {dtype}"
            raise ValueError(f"{where}: {what}") from error


class _NotFiniteError(Exception):
    pass


def _transposed(
    blocks: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, workers: Executor
) -> np.ndarray:
    """A matrix that comes in blocks of rows, transposed: a few rows at a time, which is three times
    as fast as all at once.
    """
    ours = np.empty(shape[::-1], dtype)
    bits = ours.view(f"u{dtype.itemsize}")

    def fill(first: int, rows: np.ndarray) -> None:
        bits[:, first : first + len(rows)] = _cast(rows, dtype).view(bits.dtype).T

    pending: deque[Future] = deque()
    first = 0
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            rows = block[start : start + _ROWS]
            pending.append(workers.submit(fill, first, rows))
            first += len(rows)
        while len(pending) > _MOST_PENDING:
            pending.popleft().result()
    for each in pending:
        each.result()
    return ours


def _cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        ours = block if block.dtype == dtype else block.astype(dtype)
    if not _finite(ours):
        raise _NotFiniteError
    return ours


# The bits of infinity without its sign; all numbers with these or more are not finite.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}


def _finite(numbers: np.ndarray) -> bool:
    if numbers.dtype.name not in _INFINITY:
        return bool(np.isfinite(numbers).all())
    # Three times as fast as NumPy's own test.
    largest = np.max(numbers.view(np.uint16) & np.uint16(0x7FFF), initial=0)
    return bool(largest < _INFINITY[numbers.dtype.name])


def _cores() -> int:
    """How many this process may use, at most 8: more wait for the disk."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, there or 1)
