"""One run at a time in a folder: a lock that ends with the process that holds it.

`<folder>/lock` is locked with `flock` while a run holds it, so the system releases it however the
run ends, kill -9 included. The file names the run; one that a kill left behind blocks nobody.

Of several processes, process 0 takes the lock for all. On a network file system the server decides
how well this works: NFS 4, and NFS 3 with lockd, lock between hosts. On a file system without
locks, a warning says so and the run continues.
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
_ATTEMPTS = 100


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
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    file, refusal = None, ""
    try:
        if jax.process_index() == 0:
            try:
                file = _take(folder)
            except OSError as error:
                refusal = str(error)
        if refusal := _first_says(refusal):
            raise OSError(refusal)
        _held.folders.add(folder)
        yield
    finally:
        _held.folders.discard(folder)
        if file is not None:
            (folder / "lock").unlink(missing_ok=True)
            file.close()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # not empty: something was written
                for place in missing:
                    place.rmdir()


def _take(folder: Path) -> IO[bytes] | None:
    """The locked file; None where there are no locks."""
    path = folder / "lock"
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        except FileNotFoundError:  # a run that ends has just removed its empty folder
            continue
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"{folder} must be a folder: a part of it is a file") from None
        except OSError as error:
            raise OSError(f"{path} could not be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(file, path):  # a run that ends may have just removed it
                _sign(file)
                return file
            file.close()
        except BlockingIOError:
            file.close()
            raise OSError(
                f"{folder} is in use by another run ({_holder(path)}): wait until it has ended, or"
                " give another folder"
            ) from None
        except OSError as error:
            path.unlink(missing_ok=True)
            file.close()
            if error.errno in _UNSUPPORTED:
                said = "is on a file system without locks: see to it that only one run uses it"
                print(f"{folder} {said}", file=sys.stderr)
                return None
            raise OSError(f"{path} could not be written: {error.strerror}") from None
    raise OSError(f"{path} could not be written: its folder is removed again and again")


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
        return "which has not written its name yet"


def _first_says(message: str) -> str:
    """Process 0's message, in every process."""
    if jax.process_count() == 1:
        return message
    content = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))
    return bytes(np.asarray(told)).rstrip(b"\0").decode(errors="replace")
