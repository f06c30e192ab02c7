"""Reading files that a user names: none makes a command wait, or fill the memory."""

import os
import stat
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
