"""Reading files that a user names, none of which makes a command wait or fills the memory; and
pieces of work that several processes share through a folder.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 1 << 30  # of a file that is read as a whole


def require_file(file: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file, or of what a link to one leads to.

    Raises ValueError for anything else that is there (a folder, a pipe, a device: a pipe may never
    end), OSError for what is not there.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(file)} is not a file")
    return status


def read_file(file: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `require_file`, and
    ValueError for a larger one.
    """
    size = require_file(file).st_size
    if size > most:
        raise ValueError(f"{os.fspath(file)} has {size:,} bytes, more than {most:,}")
    return Path(file).read_bytes()


@contextlib.contextmanager
def held(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process got a piece of work, whose `lock` it holds until the end; with `wait`,
    after any other process that holds it. A kill releases the lock.

    Whoever gets it must look whether the work is done already. Raises OSError for a file that
    cannot be made.
    """
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # A process that opened the file before this finds, once it has the lock, the work done.
            lock.unlink(missing_ok=True)
