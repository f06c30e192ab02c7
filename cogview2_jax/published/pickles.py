"""Pickles of published files, interpreted: plain values and tensors, and no code.

A pickle is a program for a small stack machine, and Python's own runs whatever function the pickle
names. This one knows a fixed list of names (`GLOBALS`), calls none of them, and refuses every other
by name.
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

STORAGES = {
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch ByteStorage": "uint8",
    "torch CharStorage": "int8",
    "torch ShortStorage": "int16",
    "torch IntStorage": "int32",
    "torch LongStorage": "int64",
    "torch BoolStorage": "bool",
}
_TENSOR, _DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
# Random states, settings and counters that lie beside the tensors: their values are not read.
_UNREAD = {
    "__builtin__ set",
    "builtins set",
    "_codecs encode",
    "argparse Namespace",
    "numpy dtype",
    "numpy ndarray",
    "numpy._core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
}
GLOBALS = frozenset({*STORAGES, _TENSOR, _DICT, *_UNREAD})


class Global(NamedTuple):
    """A name that a pickle asks for. It stays a name."""

    name: str


class Unread:
    """In place of a value that nobody here needs."""

    __slots__ = ()


class RefusedError(Exception):
    """Something that is well formed and not read; the message goes on behind the path."""


# What a wrong sequence of opcodes leads to, here, in pickletools and in zipfile.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    struct.error,
    NotImplementedError,
)


class Interpreter:
    """The opcodes of pickle, on values that cannot run anything.

    `storage` is called with the key, the kind and the number of values of a storage, `tensor` with
    what `storage` returned, offset, shape and strides: whatever the file has there, unchecked. A
    pickle that is no pickle leads to one of `DAMAGE`, one that is not read to `RefusedError`.
    """

    def __init__(self, storage: Callable[[Any, str, Any], Any], tensor: Callable[..., Any]) -> None:
        self._make_storage, self._make_tensor = storage, tensor
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def run(self, content: BinaryIO) -> Any:
        """The object that the next pickle in `content` describes. Reads to that pickle's end."""
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSHED:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif (step := getattr(self, f"_{name.lower()}", None)) is not None:
                step(argument)
            elif name.startswith(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")):
                place = len(self._memo) if name == "MEMOIZE" else argument
                self._memo[place] = self._stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name not in ("PROTO", "FRAME"):
                raise RefusedError(f"has the pickle opcode {name}, which no published file has")
        raise ValueError("a pickle without end")

    def _pop_mark(self, _: Any) -> list[Any]:
        above, self._stack = self._stack, self._marked.pop()
        return above

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _list(self, _: Any) -> None:
        above = self._pop_mark(None)
        self._stack.append(above)

    def _tuple(self, _: Any) -> None:
        above = self._pop_mark(None)
        self._stack.append(tuple(above))

    def _tuple1(self, _: Any) -> None:
        self._last(1)

    def _tuple2(self, _: Any) -> None:
        self._last(2)

    def _tuple3(self, _: Any) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("a tuple of nothing")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        above = self._pop_mark(None)
        self._extend(above)

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("what is no list has members")
        self._stack[-1].extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        above = self._pop_mark(None)
        self._fill(above)

    def _fill(self, flat: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise ValueError("what is no dict has keys")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Hashing a deeply nested key could overflow the stack of C.
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise ValueError(f"a key that is a {type(key).__name__}")
            self._stack[-1][key] = value

    def _global(self, name: str) -> None:
        if name not in GLOBALS:
            plain = name.replace(" ", ".")
            raise RefusedError(
                f"asks for {plain[:200]!r}, which no published file has: not read, nothing was run"
            )
        self._stack.append(Global(name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self._global(f"{module} {name}")

    def _binpersid(self, _: Any) -> None:
        kind, storage, key, _, count, *view = self._stack.pop()  # old files have a view: None
        if any(view):
            raise RefusedError("has a storage within another one, which no published file has")
        if kind != "storage" or not isinstance(storage, Global):
            raise ValueError("not a reference to a storage")
        self._stack.append(self._make_storage(key, storage.name, count))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise ValueError("a call of what is no function")
        made: Any = Unread()
        if function.name == _TENSOR:
            made = self._make_tensor(*arguments[:4])
        elif function.name == _DICT:
            made = {}
            if arguments:
                raise ValueError("an OrderedDict made from arguments")
        self._stack.append(made)

    def _newobj(self, _: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Global) or type(arguments) is not tuple:
            raise ValueError("an object of what is no class")
        self._stack.append(Unread())

    def _build(self, _: Any) -> None:
        # The state of an Unread, or attributes of an OrderedDict: neither is kept.
        self._stack.pop()
        if not isinstance(self._stack[-1], (Unread, dict)):
            raise ValueError("a state of what is no object")


_PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING"
    " UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
