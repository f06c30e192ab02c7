"""Work for a cluster, in a module that its processes can import."""

import os
import resource
import time
from pathlib import Path

from cogview2_jax.data import prepare
from cogview2_jax.data.shards import write_shards
from cogview2_jax.data.sources import Input, PictureFolder

SHARD_SIZE = 10


class Troubled:
    """A folder of pictures. Where `hungry` is named, the first process to read that input takes all
    the memory it may have; where `deadly` is, every process that reads it ends.
    """

    def __init__(self, folder: Path, marks: Path, hungry: int = -1, deadly: int = -1) -> None:
        self._pictures, self._marks = PictureFolder(folder), marks
        self._hungry, self._deadly = hungry, deadly
        self.fingerprint = self._pictures.fingerprint
        self.left_out = self._pictures.left_out

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Input:
        time.sleep(0.01)  # long enough to be killed in between
        if index == self._deadly:
            _die(self._marks)
        if index == self._hungry and not (self._marks / "fed").exists():
            (self._marks / "fed").touch()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
            return Input("", bytes(2**33), ())
        return self._pictures[index]


def _die(marks: Path) -> None:
    with (marks / "deaths").open("a") as file:
        file.write("one\n")
    os._exit(1)


def prepare_troubled(
    folder, out, marks, trouble, *, run=write_shards, progress=lambda inputs: None
):
    if trouble == "at the door":
        _die(marks)
    source = Troubled(folder, marks, **trouble)
    how = {"shard_size": SHARD_SIZE, "workers": 2, "run": run, "progress": progress}
    return prepare.prepare_pictures(source, out, **how)
