"""Reads the .pt files of torch without torch, and runs no code from them.

Such a file is a zip archive: `data.pkl` describes a tree of objects, `data/0`, `data/1`, … hold the
numbers of tensors. The pickle is not loaded but interpreted (`pickles.Interpreter`): it makes plain
values, containers and `Tensor`s, and nothing else. Numbers are read when they are asked for, a
block at a time.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cogview2_jax.errors import one_line
from cogview2_jax.files import require_file
from cogview2_jax.published.pickles import DAMAGE, STORAGES, Interpreter, RefusedError

ADVICE = "copy or download it again"
BLOCK = 1 << 20  # bytes that are read at once: they stay in a core's cache
_MOST_PICKLE = 256 << 20  # bytes of data.pkl; a published one has less than one million
_MOST_NUMBER = 1 << 62  # no size, offset or stride is larger


class Storage(NamedTuple):
    """The numbers of one or more tensors: so many of a dtype, in an entry of the archive."""

    entry: str
    dtype: np.dtype
    length: int


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet. Offset and strides count numbers, not bytes."""

    file: "TorchFile"
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """All numbers. Raises ValueError if the file is damaged."""
        blocks = list(self.blocks(max(1, self.size * self.dtype.itemsize)))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def blocks(self, most: int = BLOCK) -> Iterator[np.ndarray]:
        """The tensor as arrays of whole rows of about `most` bytes, in order; at least one.

        Raises ValueError if the file is damaged: after the last block, for its checksum.
        """
        return self.file._blocks(self, most)


class TorchFile:
    """An open .pt file. `content` is its tree of dicts, lists, tuples, plain values, `Tensor`s and
    `Unread`s. Use it in a `with` statement.

    Raises ValueError, in one line that begins with the path, for anything that is not such a file,
    is damaged, or asks for a global that is not in `pickles.GLOBALS`; OSError for one that cannot
    be read.
    """

    content: Any

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        require_file(path)
        self._file = open(path, "rb")  # noqa: SIM115 (closed by `close`)
        self._checked: set[str] = set()
        try:
            self._entries = self._directory()
            self.content = Interpreter(self._storage, self._tensor).run(self._pickle())
        except RefusedError as error:
            self.close()
            raise ValueError(f"{self.path} {error}") from error
        except (*DAMAGE, zipfile.BadZipFile, zlib.error, EOFError) as error:
            self.close()
            raise self.damaged(one_line(error)) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged ({what}): {ADVICE}")

    # --- The archive ------------------------------------------------------------------------------

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by name, without the folder that all of them lie in."""
        start = self._file.read(32)
        if not start.startswith(b"PK"):
            if b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in start:
                raise RefusedError(
                    "is in the format of torch before 1.6: load and save it with a newer torch"
                )
            raise RefusedError("is no file of torch: it is not a zip archive")
        self._archive = zipfile.ZipFile(self._file)
        entries: dict[str, zipfile.ZipInfo] = {}
        size = os.fstat(self._file.fileno()).st_size
        for entry in self._archive.infolist():
            folder, _, name = entry.filename.partition("/")
            if name in entries:
                raise ValueError(f"two entries {name!r}")
            if not 0 <= entry.header_offset <= entry.header_offset + entry.file_size <= size:
                raise ValueError(f"entry {name!r} is not within the file")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise RefusedError(
                    f"has a compressed or encrypted entry {name!r}: torch writes none"
                )
            entries[name] = entry
        if "data.pkl" not in entries:
            raise RefusedError("is no file of torch: it has no data.pkl")
        if "byteorder" in entries and (order := self._archive.read(entries["byteorder"])):
            if order != b"little":
                raise RefusedError(
                    f"was written with byte order {order[:20]!r}: only little is read"
                )
        return entries

    def _pickle(self) -> bytes:
        entry = self._entries["data.pkl"]
        if entry.file_size > _MOST_PICKLE:
            raise ValueError(f"data.pkl has {entry.file_size:,} bytes")
        return self._archive.read(entry)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin: behind its own header."""
        self._file.seek(entry.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self.damaged(f"no header of {entry.filename!r}")
        name, extra = struct.unpack("<HH", header[26:])
        if self._file.read(name) != entry.orig_filename.encode():
            raise self.damaged(f"another header in place of that of {entry.filename!r}")
        return entry.header_offset + 30 + int(name) + int(extra)

    def _storage(self, key: Any, kind: str, count: Any) -> Storage:
        if kind not in STORAGES or not isinstance(key, str):
            raise ValueError("not a reference to a storage")
        name, dtype = f"data/{key}", np.dtype(jax.numpy.dtype(STORAGES[kind]))
        if name not in self._entries:
            raise ValueError(f"no entry {name!r}")
        size = self._entries[name].file_size
        if _whole(count) * dtype.itemsize != size:
            raise ValueError(f"entry {name!r} has {size:,} bytes, not {count:,} numbers of {dtype}")
        return Storage(name, dtype, count)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without storage")
        shape, strides = tuple(map(_whole, shape)), tuple(map(_whole, strides))
        if len(shape) != len(strides):
            raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
        steps = zip(shape, strides, strict=True)
        last = _whole(offset) + sum((length - 1) * stride for length, stride in steps)
        if math.prod(shape) and last >= storage.length:
            raise ValueError(f"a tensor that reaches beyond entry {storage.entry!r}")
        return Tensor(self, storage, offset, shape, strides)

    # --- Numbers ----------------------------------------------------------------------------------

    def _blocks(self, tensor: Tensor, most: int) -> Iterator[np.ndarray]:
        storage, shape = tensor.storage, tensor.shape
        entry = self._entries[storage.entry]
        if not tensor.size:
            yield np.zeros(shape, tensor.dtype)
            return
        if tensor.strides != _row_major(shape):  # a transposed one, say: the storage as a whole
            whole = b"".join(bytes(part) for part in self._bytes(entry, 0, entry.file_size, BLOCK))
            numbers = np.frombuffer(whole, storage.dtype)[tensor.offset :]
            steps = [stride * storage.dtype.itemsize for stride in tensor.strides]
            yield np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, shape, steps))
            return
        row = math.prod(shape[1:]) * storage.dtype.itemsize
        most = max(1, most // row) * row
        first = tensor.offset * storage.dtype.itemsize
        count = math.prod(shape) * storage.dtype.itemsize
        if count < entry.file_size and storage.entry not in self._checked:
            for _ in self._bytes(entry, 0, entry.file_size, BLOCK):
                pass  # the checksum is that of the whole entry
        for part in self._bytes(entry, first, count, most):
            yield part.view(storage.dtype).reshape(-1 if shape else (), *shape[1:])

    def _bytes(
        self, entry: zipfile.ZipInfo, first: int, count: int, most: int
    ) -> Iterator[np.ndarray]:
        """`count` bytes of an entry from `first` on, as uint8. If they are all of them, the
        checksum is compared at the end.
        """
        place, checksum, left = self._start(entry) + first, 0, count
        while left:
            part = np.empty(min(most, left), np.uint8)
            self._file.seek(place)
            if self._file.readinto(part.data) != len(part):
                raise self.damaged(f"it ends within {entry.filename!r}")
            if count == entry.file_size:
                checksum = zlib.crc32(part.data, checksum)
            place, left = place + len(part), left - len(part)
            yield part
        if count == entry.file_size:
            if checksum != entry.CRC:
                raise self.damaged(f"the checksum of {entry.filename!r} is wrong")
            self._checked.add(f"data/{entry.filename.rpartition('/')[2]}")


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_NUMBER:
        raise ValueError("a size, offset or stride that is none")
    return number


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
