"""One way to report an error in one line. Imports only the standard library."""

import os
from typing import Any


def one_line(error: BaseException) -> str:
    """The whole message in one line; the error's type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def plain(words: str) -> str:
    """`words` in one line that any terminal can show: spaces for breaks, and escapes for control
    characters and for bytes of a file name that are no text.
    """
    words = " ".join(words.split())
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in words)


def first_line(error: BaseException) -> str:
    """The first line of the message, for libraries that explain at length below it."""
    return next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__


def reason(error: BaseException) -> str:
    """The reason of an error in one line: file and reason of an operating system's error ("a.json:
    Permission denied"), else the message.
    """
    if isinstance(error, OSError) and error.strerror:
        said = " ".join(error.strerror.split())
        return f"{os.fsdecode(error.filename)}: {said}" if _is_path(error.filename) else said
    return one_line(error)


def first_difference(
    there: Any, asked: Any, name: str = "", missing: Any = None
) -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first: the name of the place, and both values. `missing` stands
    for a key that is not there.
    """
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in {**there, **asked}:
            values = there.get(key, missing), asked.get(key, missing)
            found = first_difference(*values, f"{name}.{key}".strip("."), missing)
            if found:
                return found
        return None
    return None if there == asked else (name, there, asked)


def _is_path(filename: object) -> bool:
    return isinstance(filename, (str, bytes, os.PathLike))
