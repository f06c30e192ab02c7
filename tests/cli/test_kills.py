"""train, stopped, killed and out of disk at any moment: no saved step is lost, and a resumed run
equals an undisturbed one bit for bit.
"""

import contextlib
import itertools
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.processes import Started, ending, free_port

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 120  # of one process; two take half as many
PEER_TIMEOUT = 10


@pytest.fixture(scope="module")
def start(tiny_folder, records, tmp_path_factory):
    """Starts or resumes `cogview2 train coglm` in a folder; returns its processes."""
    place = tmp_path_factory.mktemp("kills")
    numbers = itertools.count()

    def start(out, *options, processes=1, largest_file=None, limited=(0, 1)):
        command = ["-m", "cogview2_jax.cli", "train", "coglm", records, "--out", out]
        command += ["--bundle", tiny_folder, "--text-ratio", 0, "--patch-size", 2]
        command += ["--batch-size", 8, "--log-every", 1, *options]
        command += ["--steps", STEPS // processes]
        meet = ["--coordinator", f"localhost:{free_port()}", "--processes", processes]
        meet += ["--fsdp", 2, "--tensor", 2, "--peer-timeout", PEER_TIMEOUT]
        return [
            Started(
                command if processes == 1 else [*command, *meet, "--process", process],
                place / str(next(numbers)),
                place / "cache",
                devices=1 if processes == 1 else 2,
                largest_file=largest_file if process in limited else None,
            )
            for process in range(processes)
        ]

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Number of processes → the folder of an undisturbed run."""
    made = {}

    def whole(processes=1):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("whole") / "run"
            train_on(start, made[processes], 0, processes=processes)
        return made[processes]

    return whole


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory):
    """(folder, number of processes) → a folder of a run that was killed after a save."""
    made = {}

    def begun(out, processes):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("begun") / "run"
            with ending(start(made[processes], "--save-every", 4, processes=processes)) as running:
                running[0].wait_until(lambda: committed(made[processes]))
                for process in running:
                    process.kill()
        shutil.copytree(made[processes], out)

    return begun


def train_on(start, out, step, **options):
    """Run to the end; check the step at which it resumes."""
    with ending(start(out, "--save-every", STEPS, **options)) as running:
        for process in running:
            assert process.finish() == 0, process.err()
        assert went_on_from(running[0]) == step


def went_on_from(process):
    """The step at which a process said it resumes."""
    said = re.search(r"CogLM: resumes at step (\d+)", process.err())
    return int(said[1]) if said else 0


def last_line(process):
    """The message of a process that was refused or gave up."""
    assert process.finish() == 2, process.err()
    assert "Traceback" not in process.err()
    return process.err().splitlines()[-1]


def stepped(process):
    return "first step done" in process.err()


def committed(out):
    """The newest complete checkpoint; 0 if there is none."""
    names = [path.name for path in out.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def unfinished(out):
    return list(out.glob("checkpoints/*tmp*"))


def assert_equal(out, other):
    """Parameters, optimiser and all, to the last bit."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def saved(path):
        with ocp.StandardCheckpointer() as reader:
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                reader.metadata(path).item_metadata.tree,
            )
            return jax.device_get(reader.restore(path, like))

    step = str(committed(other))
    for part in ("params", "rest"):
        found, expected = (saved(run / "checkpoints" / step / part) for run in (out, other))
        assert jax.tree.leaves(found)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.long)])
def test_kills_lose_nothing(kills, start, whole, tmp_path):
    """Killed while it starts, in steps and in saves, at random moments, and once started twice, in
    a folder with many special characters in its name.
    """
    rng = random.Random(7)
    out = tmp_path / "run [v2] *?#100%"
    known = cut_short = 0
    for number in range(kills):
        with ending(start(out, "--save-every", 2)) as (process,):
            if number % 3 == 0:
                time.sleep(rng.uniform(0.0, 3.0))
            elif number % 3 == 1:
                process.wait_until(lambda p=process: stepped(p))
                time.sleep(rng.uniform(0.0, 0.6))
            else:
                process.wait_until(lambda p=process, k=known: committed(out) > k)
                process.wait_until(lambda: unfinished(out))
            if number == 4:
                with ending(start(out)) as (second,):
                    assert f" is in use by another run (process {process.pid} " in last_line(second)
            assert process.running(), process.err()
            process.kill()
        if stepped(process):
            assert went_on_from(process) == known
        assert committed(out) >= known
        known = committed(out)
        cut_short += bool(unfinished(out))
    assert known and cut_short
    train_on(start, out, known)
    assert_equal(out.rename(tmp_path / "plain"), whole())


@pytest.mark.long
def test_sigterm_to_one_process_saves_in_all(start, whole, tmp_path):
    out = tmp_path / "run"
    step = 0
    for told in (1, 0):
        with ending(start(out, "--save-every", STEPS, processes=2)) as running:
            running[0].wait_until(lambda p=running[0]: stepped(p))
            running[told].signal(signal.SIGTERM)
            for process in running:
                assert process.finish() == 0, process.err()
            assert went_on_from(running[0]) == step
        assert step < committed(out) < STEPS // 2
        step = committed(out)
        assert f"CogLM: stopped and saved at step {step} of {STEPS // 2}: " in running[0].err()
    train_on(start, out, step, processes=2)
    assert_equal(out, whole(2))


def test_sigkill_of_one_process_ends_the_other(start, whole, tmp_path):
    out = tmp_path / "run"
    step = 0
    for victim in (1, 0):
        with ending(start(out, "--save-every", 3, processes=2)) as running:
            running[0].wait_until(lambda k=step: committed(out) > k)
            running[victim].kill()
            # It notices when the time is up, and needs some to write its last words.
            assert running[1 - victim].finish(PEER_TIMEOUT + 50) != 0
            assert went_on_from(running[0]) == step
        assert step < committed(out) < STEPS // 2
        step = committed(out)
    train_on(start, out, step, processes=2)
    assert_equal(out, whole(2))


@pytest.mark.long
def test_an_error_of_one_process_ends_the_other(start, tmp_path):
    """Only the first process writes metrics, and here it cannot."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("a file in the place of a folder")
    with ending(start(out, "--save-every", 3, processes=2)) as running:
        running[0].wait_until(lambda: "could not be written: File exists" in running[0].err())
        for process in running:
            assert process.finish(2 * PEER_TIMEOUT + 50) != 0
        assert "Traceback" not in running[0].err()


@pytest.mark.parametrize(
    ("processes", "limited"),
    [(1, [0]), *(pytest.param(2, which, marks=pytest.mark.long) for which in ([0, 1], [1]))],
)
def test_a_checkpoint_that_cannot_be_written(processes, limited, start, begun, whole, tmp_path):
    """Its files may have at most 30,000 bytes, and sooner or later one is larger: the checkpoint
    before it stays. Processes that could write their part do not wait for those that could not.
    """
    out = tmp_path / "run"
    begun(out, processes)
    step = committed(out)
    options = {"processes": processes, "largest_file": 30_000, "limited": limited}
    with ending(start(out, "--save-every", 4, **options)) as running:
        expected = f"cogview2: the last checkpoint in {out / 'checkpoints'} could not be written:"
        for process in running:
            assert process.finish(2 * PEER_TIMEOUT + 50) != 0
        for number in limited:  # what jax says of the end of the other may follow
            assert f"{expected} File too large\n" in running[number].err()
            assert "Traceback" not in running[number].err()
    assert committed(out) >= step  # arrays are put into files as they happen to come
    train_on(start, out, committed(out), processes=processes)
    assert_equal(out, whole(processes))


def test_a_model_that_cannot_be_written(start, tmp_path):
    """Training is done and saved, but there is no room for the model."""
    out = tmp_path / "run"
    with ending(start(out, "--save-every", STEPS, largest_file=300_000)) as (process,):
        expected = f"cogview2: bundle {out / 'model'} could not be written: "
        assert last_line(process).startswith(expected) and "File too large" in process.err()
    assert not (out / "model").exists()
    train_on(start, out, 0)  # nothing is left to train, so nothing is said
    assert (out / "model").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 900 kB, and a function that enlarges it. Only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", place]
    try:
        made = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("needs the right to mount a file system")
    larger = ["mount", "-o", "remount,size=9000k", place]
    try:
        yield place, lambda: subprocess.run(larger, check=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["umount", "-l", place], check=False)


def test_a_full_disk(small_disk, start, whole):
    disk, enlarge = small_disk
    out = disk / "run"
    no_space = rf"cogview2: (the last checkpoint in )?{out}\S* could not be written: No space.*"
    with ending(start(out, "--save-every", 4)) as (process,):
        assert re.fullmatch(no_space, last_line(process))
    step = committed(out)
    assert step
    # There is no room for the figures either.
    with (out / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with ending(start(out, "--save-every", 4)) as (process,):
        assert re.fullmatch(
            rf"cogview2: {out}\S* could not be written: No space.*", last_line(process)
        )
    assert committed(out) == step
    (out / "filler").unlink()
    enlarge()
    train_on(start, out, step)
    assert_equal(out, whole())
