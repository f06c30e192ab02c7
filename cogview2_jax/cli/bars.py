"""Progress of a command on stderr: a bar in a terminal, a line now and then everywhere else."""

from __future__ import annotations

import sys
from typing import Any

SECONDS = 30.0  # between lines
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} left"


def bar(name: str, total: int | None, unit: str, **options: Any) -> Any:
    """A bar of tqdm. Where stderr is no terminal, as in a log file, nothing is redrawn: it is a
    line every half minute and at the end, if that is more than a second away.
    """
    from tqdm import tqdm

    unit = f" {unit}" if len(unit) > 1 else unit
    if sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, file=sys.stderr, **options)
    plain: dict[str, Any] = {"mininterval": SECONDS, "miniters": 1, "bar_format": _LINE}
    plain["delay"] = SECONDS / 30
    return tqdm(total=total, desc=name, unit=unit, file=_Lines(), **plain, **options)


class _Lines:
    """A file for tqdm that makes a line of each redrawing."""

    def write(self, text: str) -> None:
        said = text.strip()
        if said:
            sys.stderr.write(said + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
