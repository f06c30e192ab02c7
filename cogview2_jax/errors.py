"""One way to say what went wrong in a line. Knows nothing but the standard library."""

import os


def one_line(error: BaseException) -> str:
    """The whole message in one line; the error's type where it has no message."""
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
    """What went wrong, in one line: of an error of the operating system its file and its reason
    ("a.json: Permission denied"), of any other the message.
    """
    if isinstance(error, OSError) and error.strerror:
        said = " ".join(error.strerror.split())
        return f"{os.fsdecode(error.filename)}: {said}" if _is_path(error.filename) else said
    return one_line(error)


def _is_path(filename: object) -> bool:
    return isinstance(filename, (str, bytes, os.PathLike))
