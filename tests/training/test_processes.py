"""Training by several processes, and on one mesh after another: the results are equal."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from cogview2_jax.training import checkpoint, lock
from tests import training_runs
from tests.processes import ROOT, Started, ending, free_port
from tests.training_runs import STEPS, Work

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
FSDP, MIXED = (1, 8, 1), (2, 2, 2)
HALF = STEPS // 2


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a training in a folder, in 1 process or in 2 of 4 devices."""
    place = tmp_path_factory.mktemp("processes")
    numbers = itertools.count()

    def start(folder, mesh=None, processes=1, save_every=HALF):
        devices = 1 if mesh is None else 8 // processes
        told = Work(str(folder), devices, mesh, save_every=save_every)
        if processes > 1:
            told = told._replace(processes=processes, port=free_port())
        works = [told._replace(process=i) if processes > 1 else told for i in range(processes)]
        script = ROOT / "tests" / "training_runs.py"
        commands = [(script, "train", json.dumps(work._asdict())) for work in works]
        return [Started(each, place / str(next(numbers)), place / "cache") for each in commands]

    return start


@pytest.fixture(scope="module")
def train(start):
    """The same, until the end; returns each process's losses by step."""

    def train(*where, **options):
        with ending(start(*where, **options)) as running:
            for process in running:
                assert process.finish() == 0, process.err()
            return [losses_in(process.out()) for process in running]

    return train


def losses_in(out):
    whole = out[: out.rfind("\n") + 1]  # a kill may cut the last line short
    lines = [line.split() for line in whole.splitlines() if line.startswith("loss ")]
    return {int(step): float(loss) for _, step, loss in lines}


@pytest.fixture(scope="module")
def state_in():
    """The newest state of a folder, on this process's one device."""
    like, _, _ = training_runs.begin("coglm", None)

    def state_in(folder):
        with checkpoint.open_folder(folder / "checkpoints") as checkpoints:
            state, step = checkpoint.restore(checkpoints, like, {})
        assert step == STEPS
        return state

    return state_in


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The training in one process on one device: folder, and losses."""
    folder = tmp_path_factory.mktemp("alone")
    (losses,) = train(folder)
    assert list(losses) == list(range(1, STEPS + 1))
    return folder, losses


def assert_same(found, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)

    jax.tree.map(close, found, expected)


def half_of(folder, to):
    """A run that was stopped after its first save."""
    shutil.copytree(folder / "checkpoints" / str(HALF), to / "checkpoints" / str(HALF))
    return to


@pytest.mark.parametrize(
    ("mesh", "resumed_on"), [pytest.param(FSDP, None, marks=pytest.mark.long), (MIXED, FSDP)]
)
def test_two_processes_follow_one_device(mesh, resumed_on, train, state_in, alone, tmp_path):
    """2 processes × 4 devices, each with its own rows; then one process, of 1 device or 8,
    resumes in the middle.
    """
    folder, expected = alone
    for losses in train(tmp_path / "two", mesh, processes=2):
        assert_same(losses, expected)
    assert_same(state_in(tmp_path / "two"), state_in(folder))
    one = half_of(tmp_path / "two", tmp_path / "one")
    (losses,) = train(one, resumed_on)
    assert_same(losses, {step: expected[step] for step in range(HALF + 1, STEPS + 1)})
    assert_same(state_in(one), state_in(folder))


@pytest.mark.long
def test_two_processes_go_on_from_one(train, state_in, alone, tmp_path):
    """Also along "tensor", where two processes share each sample."""
    folder, expected = alone
    for losses in train(half_of(folder, tmp_path), (1, 1, 8), processes=2):
        assert_same(losses, {step: expected[step] for step in range(HALF + 1, STEPS + 1)})
    assert_same(state_in(tmp_path), state_in(folder))


def test_killed_on_one_mesh_it_goes_on_with_another(start, train, state_in, alone, tmp_path):
    folder, expected = alone
    losses, known = {}, 0
    for mesh in (None, MIXED, None, MIXED):
        with ending(start(tmp_path, mesh, save_every=1)) as (process,):
            process.wait_until(lambda p=process: len(losses_in(p.out())) > 2)
            process.kill()
        found = losses_in(process.out())
        assert min(found) == known + 1
        losses |= found
        names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        known = max(int(name) for name in names if name.isdigit())
    (last,) = train(tmp_path)
    assert min(last) == known + 1
    assert_same(losses | last, expected)
    assert_same(state_in(tmp_path), state_in(folder))


def test_all_processes_are_refused_where_another_run_trains(start, tmp_path):
    with lock.hold(tmp_path), ending(start(tmp_path, FSDP, processes=2)) as running:
        for process in running:
            assert process.finish() == 1
            expected = f"OSError: {tmp_path} is in use by another run (process {os.getpid()} on "
            assert expected in process.err()
    assert not any(tmp_path.iterdir())
