"""One run at a time in a folder: a lock that ends with the process that holds it.

`<folder>/lock` is locked with `flock` for as long as a run holds it, so the system releases it
however the run ends, kill -9 included. The file stays and names the run that holds it.

Of several processes, process 0 takes the lock for all. On a network file system the lock is as
good as the server's: NFS 4 and NFS 3 with lockd lock between hosts. Where a file system has no
locks, a warning says so and the run goes on.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MESSAGE_BYTES = 2048


class _Held(threading.local):
    def __init__(self) -> None:
        self.folders: set[Path] = set()


_held = _Held()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only run in `folder`, which is made if missing, until the block ends.

    A thread that holds the folder already may hold it again: the command takes it before anything
    is loaded, and `fit` inside takes it too. All processes of a run have to call it.

    Raises OSError, in one line, where another run holds it (its process, host and start are named)
    and where the file cannot be written.
    """
    folder = folder.absolute()
    if folder in _held.folders:
        yield
        return
    file, refusal = None, ""
    if jax.process_index() == 0:
        try:
            file = _take(folder)
        except OSError as error:
            refusal = str(error)
    if refusal := _first_says(refusal):
        raise OSError(refusal)
    _held.folders.add(folder)
    try:
        yield
    finally:
        _held.folders.discard(folder)
        if file is not None:
            with contextlib.suppress(OSError):  # the lock goes with the file, full disk or not
                file.truncate(0)
            file.close()


def _take(folder: Path) -> IO[bytes] | None:
    """The locked file; None where there are no locks."""
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise NotADirectoryError(f"{folder} must be a folder: a part of it is a file") from None
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(file)
    except BlockingIOError:
        file.close()
        raise OSError(
            f"{folder} is in use by another run ({_holder(path)}): wait until it has ended, or give"
            " another folder"
        ) from None
    except OSError as error:
        file.close()
        if error.errno not in _UNSUPPORTED:
            raise OSError(f"{path} could not be written: {error.strerror}") from None
        print(
            f"{folder} is on a file system without locks: see to it that only one run uses it",
            file=sys.stderr,
        )
        return None
    return file


def _sign(file: IO[bytes]) -> None:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    file.truncate(0)
    file.write(json.dumps(holder).encode() + b"\n")


def _holder(path: Path) -> str:
    time.sleep(0.2)  # it may have been locked this moment and not be signed yet
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not said its name"


def _first_says(message: str) -> str:
    """Process 0's message, in every process."""
    if jax.process_count() == 1:
        return message
    content = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))
    return bytes(np.asarray(told)).rstrip(b"\0").decode(errors="replace")
