"""Files with one piece of work in each line: bad lines are named, the others are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from cogview2_jax import errors
from cogview2_jax.cli import common, sheets


def for_each_line(file: Path, wanted: str, do: Callable[[bytes, int], None]) -> None:
    """Calls `do` with every line of a file that is not empty, and its number from 1.

    Where a call raises ClickException, ValueError or OSError, its line is named on stderr; the
    others are done, and the exit code is 1. Raises ClickException for a file without a line of
    what is `wanted`.
    """
    from cogview2_jax.files import read_file

    with common.refusing(f"{file}: "):
        content = read_file(file)
    done, failed = 0, False
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip(b"\xef\xbb\xbf \t\r"):
            continue
        try:
            do(line, number)
            done += 1
        except (click.ClickException, ValueError, OSError) as error:
            click_said = error.message if isinstance(error, click.ClickException) else None
            common.complain(f"{file}: line {number}: {click_said or errors.reason(error)}")
            failed = True
    if not (done or failed):
        raise click.ClickException(f"{file}: no line with {wanted}")
    if failed:
        raise click.exceptions.Exit(1)


def fields_of(line: bytes, number: int) -> list[str]:
    """The fields of a line with tabs between them. Raises ValueError for what is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r").split("\t")
    except UnicodeDecodeError:
        raise ValueError("must be UTF-8: save the file so") from None


def require_new(name: str, number: int, names: dict[str, int]) -> None:
    """Raises ValueError if the files of a line would have the names of an earlier line's files."""
    slug = sheets.slug(name)
    if slug in names:
        raise ValueError(f"has the id of line {names[slug]}, {name}: give another id")
    names[slug] = number
