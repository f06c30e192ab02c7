"""Writes the .pt files of torch without torch: dicts of plain values and tensors.

Such a file is a zip archive: a pickle that says what each tensor is, and the tensors' numbers, one
entry each. The pickle is put together here, for Python's own writes only names that it can import.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogview2_jax.published.pickles import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_DATE = (1980, 1, 1, 0, 0, 0)  # the same file for the same tensors


class NewTensor(NamedTuple):
    """A tensor that is still to be read; `blocks` gives it in parts, contiguous, in order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def write_pt(
    file: Path, content: Mapping[str, Any], progress: Callable[[int], None] = lambda count: None
) -> None:
    """The new file `file` with this content: str, int, None, lists, dicts and `NewTensor`s.

    `progress` is called with the number of bytes that were written. Raises what the blocks raise,
    and OSError where nothing can be written.
    """
    tensors: list[NewTensor] = []
    described = b"\x80\x02" + b"".join(_pickled(content, tensors)) + pickle.STOP
    with zipfile.ZipFile(file, "x", zipfile.ZIP_STORED) as archive:

        def add(name: str, blocks: Iterator[bytes | memoryview]) -> None:
            entry = zipfile.ZipInfo(f"{file.stem}/{name}", _DATE)
            with archive.open(entry, "w", force_zip64=True) as place:
                for block in blocks:
                    place.write(block)

        add("data.pkl", iter([described]))
        add("byteorder", iter([b"little"]))
        for number, tensor in enumerate(tensors):
            add(f"data/{number}", _bytes_of(tensor, progress))
        add("version", iter([b"3\n"]))


def _bytes_of(tensor: NewTensor, progress: Callable[[int], None]) -> Iterator[memoryview]:
    written = 0
    for block in tensor.blocks():
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        written += block.nbytes
        progress(block.nbytes)
    if written != math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise AssertionError(f"{written} bytes of a tensor of {tensor.shape}")


def _pickled(value: Any, tensors: list[NewTensor]) -> Iterator[bytes]:
    """The opcodes (protocol 2) that make `value`; its tensors are added to `tensors`."""
    if value is None:
        yield pickle.NONE
    elif isinstance(value, NewTensor):
        yield from _pickled_tensor(value, tensors)
    elif isinstance(value, int):
        if -(2**31) <= value < 2**31:
            yield pickle.BININT + struct.pack("<i", value)
        else:
            encoded = pickle.encode_long(value)
            yield pickle.LONG1 + bytes([len(encoded)]) + encoded
    elif isinstance(value, str):
        encoded = value.encode()
        yield pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
    elif isinstance(value, (tuple, list)):
        is_list = isinstance(value, list)
        yield pickle.EMPTY_LIST + pickle.MARK if is_list else pickle.MARK
        for each in value:
            yield from _pickled(each, tensors)
        yield pickle.APPENDS if is_list else pickle.TUPLE
    elif isinstance(value, Mapping):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, each in value.items():
            yield from _pickled(key, tensors)
            yield from _pickled(each, tensors)
        yield pickle.SETITEMS
    else:
        raise TypeError(f"a {type(value).__name__} is not written")


def _pickled_tensor(tensor: NewTensor, tensors: list[NewTensor]) -> Iterator[bytes]:
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    module, name = _STORAGE_OF[tensor.dtype.name].split(" ")
    yield pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
    yield pickle.MARK
    yield from _pickled("storage", tensors)
    yield pickle.GLOBAL + f"{module}\n{name}\n".encode()
    for each in (str(len(tensors)), "cpu", math.prod(tensor.shape)):
        yield from _pickled(each, tensors)
    yield pickle.TUPLE + pickle.BINPERSID
    for part in (0, tensor.shape, tuple(strides)):
        yield from _pickled(part, tensors)
    # requires_grad, and hooks, of which there are none
    yield pickle.NEWFALSE + pickle.GLOBAL + b"collections\nOrderedDict\n"
    yield pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE
    tensors.append(tensor)
