"""Reads the .pt files of torch without torch, and runs no code from them.

Such a file is a zip archive: `data.pkl` describes a tree of objects, `data/0`, `data/1`, … hold the
numbers of tensors. Before torch 1.6 it was a row of pickles, with the numbers behind them. A pickle
is not loaded but interpreted (`pickles.Interpreter`): it makes plain values, containers and
`Tensor`s, and nothing else. Numbers are read when they are asked for, a block at a time.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from cogview2_jax.errors import one_line
from cogview2_jax.files import require_file
from cogview2_jax.published.pickles import DAMAGE, STORAGES, Interpreter, RefusedError

ADVICE = "copy or download it again"
BLOCK = 1 << 20  # bytes that are read at once: they stay in a core's cache
_MOST_PICKLE = 256 << 20  # bytes of data.pkl; a published one has less than one million
_OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickle of the magic number
_MOST_NUMBER = 1 << 62  # no size, offset or stride is larger


class Entry(NamedTuple):
    """Bytes in the file: `start` is where they begin, unless a header of a zip entry comes first;
    `checksum` is their CRC-32, where there is one.
    """

    name: str
    size: int
    start: int
    zipped: zipfile.ZipInfo | None = None

    @property
    def checksum(self) -> int | None:
        return self.zipped.CRC if self.zipped else None


class Storage(NamedTuple):
    """The numbers of one or more tensors: so many of a dtype, in an entry of the file."""

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
        self._entries: dict[str, Entry] = {}
        self._old_sizes: dict[str, int] | None = None  # of storages, in the format before torch 1.6
        try:
            if self._file.read(len(_OLD)) == _OLD:
                self.content = self._old_content()
            else:
                self._entries = self._directory()
                self.content = self._interpreted(io.BytesIO(self._pickle()))
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

    def _interpreted(self, pickle: BinaryIO) -> Any:
        return Interpreter(self._storage, self._tensor).run(pickle)

    # --- The archive ------------------------------------------------------------------------------

    def _directory(self) -> dict[str, Entry]:
        """Entries by name, without the folder that all of them lie in."""
        self._file.seek(0)
        if not self._file.read(2).startswith(b"PK"):
            raise RefusedError("is no file of torch: it is not a zip archive")
        self._archive = zipfile.ZipFile(self._file)
        entries: dict[str, Entry] = {}
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
            entries[name] = Entry(name, entry.file_size, entry.header_offset, entry)
        if "data.pkl" not in entries:
            raise RefusedError("is no file of torch: it has no data.pkl")
        if "byteorder" in entries and (order := self._read(entries["byteorder"])):
            if order != b"little":
                raise RefusedError(
                    f"was written with byte order {order[:20]!r}: only little is read"
                )
        return entries

    def _pickle(self) -> bytes:
        size = self._entries["data.pkl"].size
        if size > _MOST_PICKLE:
            raise ValueError(f"data.pkl has {size:,} bytes")
        return self._read(self._entries["data.pkl"])

    def _read(self, entry: Entry) -> bytes:
        assert entry.zipped is not None
        return self._archive.read(entry.zipped)

    def _start(self, entry: Entry) -> int:
        """Where the bytes of an entry begin: in an archive, behind its own header."""
        if entry.zipped is None:
            return entry.start
        self._file.seek(entry.start)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self.damaged(f"no header of {entry.name!r}")
        name, extra = struct.unpack("<HH", header[26:])
        if self._file.read(name) != entry.zipped.orig_filename.encode():
            raise self.damaged(f"another header in place of that of {entry.name!r}")
        return entry.start + 30 + int(name) + int(extra)

    # --- The format before torch 1.6 --------------------------------------------------------------

    def _old_content(self) -> Any:
        """Pickles of a magic number, a version, the system, the object and the storages' keys; then
        each storage's length and numbers. Storages are found after the object that names them.
        """
        self._file.seek(0)
        _, version, system = (self._interpreted(self._file) for _ in range(3))
        if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise RefusedError(
                f"is in version {version!r} of torch's old format: only 1001 is read"
            )
        sizes = self._old_sizes = {}
        content = self._interpreted(self._file)
        keys = self._interpreted(self._file)
        if sorted(keys) != sorted(sizes):
            raise ValueError("its storages are not those that its tensors name")
        end = os.fstat(self._file.fileno()).st_size
        place = self._file.tell()
        for key in keys:
            size = sizes[key]
            if place + 8 + size > end:
                raise ValueError(f"it ends within storage {key!r}")
            self._entries[f"data/{key}"] = Entry(f"data/{key}", size, place + 8)
            place += 8 + size
        return content

    def _storage(self, key: Any, kind: str, count: Any) -> Storage:
        if kind not in STORAGES or not isinstance(key, str):
            raise ValueError("not a reference to a storage")
        name, dtype = f"data/{key}", np.dtype(jax.numpy.dtype(STORAGES[kind]))
        if self._old_sizes is not None:
            self._old_sizes[key] = _whole(count) * dtype.itemsize
            return Storage(name, dtype, count)
        if name not in self._entries:
            raise ValueError(f"no entry {name!r}")
        size = self._entries[name].size
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
            whole = b"".join(bytes(part) for part in self._bytes(entry, 0, entry.size, BLOCK))
            numbers = np.frombuffer(whole, storage.dtype)[tensor.offset :]
            steps = [stride * storage.dtype.itemsize for stride in tensor.strides]
            yield np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, shape, steps))
            return
        row = math.prod(shape[1:]) * storage.dtype.itemsize
        most = max(1, most // row) * row
        first = tensor.offset * storage.dtype.itemsize
        count = math.prod(shape) * storage.dtype.itemsize
        if count < entry.size and entry.zipped and entry.name not in self._checked:
            for _ in self._bytes(entry, 0, entry.size, BLOCK):
                pass  # the checksum is that of the whole entry
        for part in self._bytes(entry, first, count, most):
            yield part.view(storage.dtype).reshape(-1 if shape else (), *shape[1:])

    def _bytes(self, entry: Entry, first: int, count: int, most: int) -> Iterator[np.ndarray]:
        """`count` bytes of an entry from `first` on, as uint8. If they are all of them, the
        checksum is compared at the end.
        """
        place, checksum, left = self._start(entry) + first, 0, count
        while left:
            part = np.empty(min(most, left), np.uint8)
            self._file.seek(place)
            if self._file.readinto(part.data) != len(part):
                raise self.damaged(f"it ends within {entry.name!r}")
            if count == entry.size:
                checksum = zlib.crc32(part.data, checksum)
            place, left = place + len(part), left - len(part)
            yield part
        if count == entry.size:
            if entry.checksum not in (None, checksum):
                raise self.damaged(f"the checksum of {entry.name!r} is wrong")
            self._checked.add(entry.name)


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_NUMBER:
        raise ValueError("a size, offset or stride that is none")
    return number


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
