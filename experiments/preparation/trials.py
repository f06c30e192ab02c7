"""The commands on many inputs: how fast, in how much memory, and what kills cost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from cogview2_jax.data import scenes
from experiments.caption_match.scoring import make_prompts

ROOT = Path(__file__).parents[2]
Watch = Callable[[], None]
DAMAGED_EVERY = 33  # of the inputs of `write_inputs`: 3 %
LARGE_EVERY = 250  # as many are pictures of 30 million pixels
_WAYS = ("no json", "no caption", "missing", "truncated", "text")  # how they are damaged, in turn


# Memory that is freed is no longer a process's: else one that is starved may live on what it had.
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def command(*words: Any, watch: Watch = lambda: None) -> dict[str, float]:
    """Seconds of a `cogview2` command in a process of its own, and the peak of memory in MB of that
    and its own processes together. `watch` is called a few times a second.

    Raises ClickException, with its last words, for one that fails.
    """
    run = [sys.executable, "-m", "cogview2_jax.cli", *map(str, words)]
    begin, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            run, cwd=ROOT, env=os.environ | _RETURNED, stdout=subprocess.DEVNULL, stderr=said
        )
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            watch()
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            last = said.read().decode(errors="replace").splitlines()[-1:]
            raise click.ClickException(f"`{' '.join(run[2:])}` failed: {''.join(last)}")
    return {"seconds": round(seconds, 2), "peak_mb": round(peak, 1)}


def resident(pid: int) -> float:
    """MB of a process and those below it, of memory that each has for itself or shares."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True).stdout
    rows = [[int(word) for word in line.split()] for line in listed.splitlines()[1:]]
    family, total = {pid}, 0
    for child, parent, size in sorted(rows):
        if child in family or parent in family:
            family.add(child)
            total += size
    return total / 1024


def writers() -> list[int]:
    """The numbers of the processes of a cluster of this machine that are writing a shard."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::_Writer.write" in line]


class Trouble:
    """Kills a process of the cluster with signal 9 once a fifth of `shards` are in `folder`, and
    once half of them are there leaves another no memory to ask for, of which it dies.
    """

    def __init__(self, folder: Path, shards: int, starve: bool = True) -> None:
        self._folder, self._shards, self._starve = folder, shards, starve
        self._killed, self._starved = 0, 0
        self.deaths: list[str] = []

    def __call__(self) -> None:
        done = len(list(self._folder.glob("*.array_record")))
        if self._starved and "out of memory" not in self.deaths:
            self._leave_nothing()
        if self._killed and (self._starved or not self._starve) or not (found := writers()):
            return
        if done >= self._shards / 5 and not self._killed:
            os.kill(found[0], signal.SIGKILL)
            self._killed = found[0]
            self.deaths.append("killed")
        elif done >= self._shards / 2 and self._starve and not self._starved:
            self._starved = found[-1]

    def _leave_nothing(self) -> None:
        """Limits the process to what it has now: enough for a thread to start, which would else
        hang, too little for a large picture.
        """
        try:
            pages = int(Path(f"/proc/{self._starved}/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 2**26
            soft, _ = resource.prlimit(self._starved, resource.RLIMIT_AS)
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.prlimit(self._starved, resource.RLIMIT_AS, (most, most))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            self.deaths.append("out of memory")


def write_inputs(
    folder: Path, number: int, illustrations: Path | None = None, distinct: int = 1000
) -> Counter[str]:
    """Writes captions.jsonl with `number` lines for `distinct` pictures of Scenes and up to as many
    of a folder of `data gather illustrations`; of 33 lines one is damaged, and of 250 one is a
    large picture. How many are damaged in which way.
    """
    files = []
    for one in range(min(distinct, number)):
        files.append(f"scene{one}.png")
        scenes.example("train", one).image.save(folder / files[-1])
    found = sorted(illustrations.rglob("*.png")) if illustrations else []
    for one, file in enumerate(found[:: -(-len(found) // distinct) or 1]):
        files.append(f"illustration{one}{file.suffix}")
        shutil.copy(file, folder / files[-1])
    content = (folder / files[0]).read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (6000, 5000), "white").save(folder / "large.png")
    rng, ways, lines = np.random.default_rng(0), Counter[str](), []
    for row in range(number):
        image = files[int(rng.integers(len(files)))]
        image = "large.png" if row % LARGE_EVERY == LARGE_EVERY - 2 else image
        caption = f"a picture, number {row}"
        if row % DAMAGED_EVERY == DAMAGED_EVERY - 1:
            way = _WAYS[row // DAMAGED_EVERY % len(_WAYS)]
            ways[way] += 1
            if way == "no json":
                lines.append('{"image": "scene0.png", "capt')
                continue
            caption = "" if way == "no caption" else caption
            image = image if way == "no caption" else f"{way}.png"
        lines.append(json.dumps({"image": image, "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return ways


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def killed_and_starved(
    folder: Path,
    number: int,
    illustrations: Path | None,
    *options: Any,
    processes: int = 3,
    shard_size: int = 200,
) -> dict[str, Any]:
    """`data prepare` of `write_inputs` alone, and by a cluster of which a process is killed and one
    runs out of memory: whether all files are the same, and each damaged input listed once.
    """
    ways = write_inputs(folder, number, illustrations)
    words = ["data", "prepare", folder / "captions.jsonl", "--allow-unknown", *options]
    words += ["--shard-size", shard_size, "--out"]
    alone, cluster = folder / "alone", folder / "cluster"
    times = {"one process": command(*words, alone)}
    trouble = Trouble(cluster, -(-number // shard_size))
    ray = ("--engine", "ray", "--processes", processes)
    times["cluster"] = command(*words, cluster, *ray, watch=trouble)
    refused = [json.loads(line) for line in (cluster / "refused.jsonl").read_text().splitlines()]
    report = json.loads((cluster / "report.json").read_text())
    there, here = contents(cluster), contents(alone)
    return {
        "inputs": report["inputs"],
        "records": report["records"],
        "damaged": sum(ways.values()),
        "listed": len(refused),
        "listed_once": len({one["input"] for one in refused}) == len(refused),
        "kinds": report["refused"],
        "processes": processes,
        "deaths": trouble.deaths,
        "files": len(here),
        "same_bytes": there == here,
        "times": times,
    }


def drawn_with_a_kill(
    folder: Path, number: int, stage: str, *options: Any, processes: Sequence[int] = (1, 3)
) -> dict[str, Any]:
    """`data draw` of so many prompts by clusters of these numbers of processes, one of which is
    killed in the last cluster: whether all pictures are the same.
    """
    prompts = [prompt.text for prompt in make_prompts(number, 0)]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    words = ["data", "draw", folder / "prompts.txt", "--stage", stage, "--candidates", 1, *options]
    words += ["--shard-size", 32, "--engine", "ray"]
    times, made = {}, []
    for one in processes:
        out = folder / f"by{one}"
        trouble = Trouble(out, -(-number // 32), starve=False)
        watch: Watch = trouble if one == processes[-1] else lambda: None
        times[f"{one} processes"] = command(*words, "--out", out, "--processes", one, watch=watch)
        made.append(contents(out))
    return {
        "prompts": number,
        "stage": stage,
        "deaths": trouble.deaths,
        "files": len(made[0]),
        "same_bytes": all(one == made[0] for one in made),
        "times": times,
    }
