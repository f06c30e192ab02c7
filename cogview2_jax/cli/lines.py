"""Files with one piece of work in each line: bad lines are named, the others are done, each by one
of the processes that have the same file and the same folder for results.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from cogview2_jax import errors
from cogview2_jax.cli import common, sheets


def for_each_line(
    file: Path, wanted: str, out: Path, prepare: Callable[[bytes, int], Callable[[], bool]]
) -> None:
    """Does the work of every line of a file that is not empty.

    `prepare` checks a line, given its number from 1, and returns its work, which writes to `out`
    and returns false if its files were there. Several processes may do the same file: each takes
    the lines that no other is at, and ends when all are done.

    Where a line raises ClickException, ValueError or OSError, it is named on stderr; the others are
    done, and the exit code is 1. Raises ClickException for a file without a line of what is
    `wanted`.
    """
    from cogview2_jax.files import held, read_file

    with common.refusing(f"{file}: "):
        content = read_file(file)
    counts: Counter[str] = Counter()
    begun_elsewhere: list[tuple[int, Callable[[], bool]]] = []

    def do(number: int, work: Callable[[], bool], wait: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        with held(out / f".{file.name}.line{number}.lock", wait=wait) as mine:
            if mine:
                counts["done" if work() else "there"] += 1
            else:
                begun_elsewhere.append((number, work))

    @contextlib.contextmanager
    def naming(number: int) -> Iterator[None]:
        try:
            yield
        except (click.ClickException, ValueError, OSError) as error:
            click_said = error.message if isinstance(error, click.ClickException) else None
            common.complain(f"{file}: line {number}: {click_said or errors.reason(error)}")
            counts["failed"] += 1

    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip(b"\xef\xbb\xbf \t\r"):
            with naming(number):
                do(number, prepare(line, number), wait=False)
    # Another process may end before it has done what it took.
    for number, work in list(begun_elsewhere):
        with naming(number):
            do(number, work, wait=True)
    if counts["there"]:
        common.complain(f"{file}: {counts['there']} lines were done before, or by another run")
    if not counts:
        raise click.ClickException(f"{file}: no line with {wanted}")
    if counts["failed"]:
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
