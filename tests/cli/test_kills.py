"""train, stopped and killed at any moment: no step that was saved is lost, and none is taken
twice.
"""

import itertools
import random
import re
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.processes import Started, ending, free_port

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def start(tiny_folder, records, tmp_path_factory):
    """Starts `cogview2 train coglm` in a folder, once or as several processes."""
    place = tmp_path_factory.mktemp("kills")
    numbers = itertools.count()

    def start(out, *options, processes=1, devices=1):
        command = ["-m", "cogview2_jax.cli", "train", "coglm", records, "--out", out]
        command += ["--bundle", tiny_folder, "--text-ratio", 0, "--patch-size", 2]
        command += ["--batch-size", 8, "--log-every", 1, *options]
        if processes == 1:
            return Started(command, place / str(next(numbers)), place / "cache", devices=devices)
        meet = ["--coordinator", f"localhost:{free_port()}", "--processes", processes]
        return [
            Started(
                [*command, *meet, "--process", number],
                place / str(next(numbers)),
                place / "cache",
                devices=devices,
            )
            for number in range(processes)
        ]

    return start


def committed(out):
    """The newest checkpoint that is whole; 0 if there is none."""
    folder = out / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def began_at(process):
    """The step that a process says it goes on from."""
    said = re.search(r"CogLM: goes on from step (\d+)", process.err())
    return int(said[1]) if said else 0


def saved(out, step):
    """Everything that was saved of a step, as NumPy arrays."""
    with ocp.StandardCheckpointer() as reader:
        found = [
            reader.restore(out.absolute() / "checkpoints" / str(step) / part) for part in PARTS
        ]
    return jax.device_get(found)


PARTS = ("params", "rest")


def assert_equal(out, other, step):
    jax.tree.map(np.testing.assert_array_equal, saved(out, step), saved(other, step))


def finish(process):
    assert process.finish() == 0, process.err()


STEPS = 120


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with ending([start(out, "--steps", STEPS, "--save-every", STEPS)]) as (process,):
        finish(process)
    return out


def test_twenty_kills_lose_nothing(start, whole, tmp_path):
    """Killed at random moments: while it starts, in steps, in saves."""
    rng = random.Random(7)
    out = tmp_path / "run"
    options = ("--steps", STEPS, "--save-every", 2)
    known, moments = 0, []
    for _ in range(20):
        with ending([start(out, *options)]) as (process,):
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0.0, 3.0))
            else:
                process.wait_until(lambda p=process: stepped(p))
                time.sleep(rng.uniform(0.0, 0.8))
            assert process.running(), process.err()
            process.kill()
        if stepped(process):
            assert began_at(process) == known
        now = committed(out)
        moments.append((known, now, unfinished(out)))
        assert now >= known
        known = now
    with ending([start(out, *options)]) as (process,):
        finish(process)
    assert began_at(process) == known
    assert_equal(out, whole, STEPS)
    print(moments)


def stepped(process):
    return "loss=" in process.err()


def unfinished(out):
    folder = out / "checkpoints"
    return [p.name for p in folder.iterdir() if not p.name.isdigit()] if folder.exists() else []
