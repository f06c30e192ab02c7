"""One run in a folder: a second is refused and names the first, however the first ends."""

import errno
import json
import os
import resource
import socket
import threading
import time

import pytest

from cogview2_jax.training import lock
from tests.processes import Started, ending

HOLDS = """
import sys, time
from pathlib import Path
from cogview2_jax.training import lock
with lock.hold(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


def in_a_thread(function):
    """The error that it raises, or None."""
    raised: list[BaseException | None] = []

    def call():
        try:
            function()
            raised.append(None)
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return raised[0]


def takes(folder):
    with lock.hold(folder):
        pass


def test_a_second_thread_is_refused_and_the_same_one_is_not(tmp_path):
    folder = tmp_path / "new" / "run [v2]"
    with lock.hold(folder):
        with lock.hold(folder):
            pass
        error = in_a_thread(lambda: takes(folder))
        holder = json.loads((folder / "lock").read_text())
    assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
    assert str(error) == (
        f"{folder} is in use by another run (process {os.getpid()} on {holder['host']} since"
        f" {holder['since']}): wait until it has ended, or give another folder"
    )
    assert in_a_thread(lambda: takes(folder)) is None


def test_an_error_releases_it_and_leaves_no_empty_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    for written in (False, True):
        with pytest.raises(KeyError), lock.hold(folder):
            if written:
                (folder / "model").touch()
            raise KeyError
        assert sorted(path.name for path in tmp_path.rglob("*")) == (
            ["model", "new", "run"] if written else []
        )
        assert in_a_thread(lambda: takes(folder)) is None


def test_of_many_at_once_one_holds_it_at_a_time(tmp_path):
    """Each of them removes the file and makes it again."""
    inside, most, times = [0], [0], [0]

    def works():
        for _ in range(30):
            try:
                with lock.hold(tmp_path / "run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    times[0] += 1
                    time.sleep(0.001)
                    inside[0] -= 1
            except OSError as error:
                assert "in use by another run" in str(error)

    threads = [threading.Thread(target=works) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and times[0]


def test_a_kill_releases_it(tmp_path):
    command = ["-c", HOLDS, tmp_path / "run"]
    with ending([Started(command, tmp_path / "log", tmp_path / "cache")]) as (process,):
        process.wait_until(lambda: "holds" in process.out())
        pid = json.loads((tmp_path / "run" / "lock").read_text())["pid"]
        with pytest.raises(OSError, match=f"in use by another run .process {pid} on "):
            takes(tmp_path / "run")
        process.kill()
        takes(tmp_path / "run")


def test_a_full_disk_is_one_line_and_leaves_it_free(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with pytest.raises(OSError) as caught:
            takes(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"{tmp_path / 'lock'} could not be written: File too large"
    takes(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"^{folder} must be a folder: a part of it is a file$"):
            takes(folder)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    takes(tmp_path)
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr().err == (
        f"{tmp_path} is on a file system without locks: see to it that only one run uses it\n"
    )
