"""Shards by the processes of a Ray cluster of this machine, some of which die."""

import functools
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data.engine import ATTEMPTS, Cluster, on_cluster
from tests.data import engine_work
from tests.data.engine_work import SHARD_SIZE, prepare_troubled
from tests.processes import ROOT

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """400 pictures, every 33rd damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(400):
        file = folder / f"{number:04d}.png"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
        if number % 33 == 0:
            file.write_bytes(file.read_bytes()[:100])
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def writers():
    """The numbers of the cluster's processes."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::_Writer" in line]


def test_a_killed_process_and_one_out_of_memory_lose_nothing(pictures, tmp_path):
    report = prepare_troubled(pictures, tmp_path / "alone", tmp_path, {})
    assert report.refused == {"truncated picture": 13} or sum(report.refused.values()) == 13
    out, seen = tmp_path / "cluster", []
    killed = threading.Event()

    def kill_one():
        while not killed.is_set():
            if len(list(out.glob("*.array_record"))) >= 5 and (found := writers()):
                os.kill(found[0], signal.SIGKILL)
                killed.set()
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    call = functools.partial(prepare_troubled, pictures, out, tmp_path, {"hungry": 333})
    try:
        made = on_cluster(call, Cluster(processes=3), seen.append)
    finally:
        was_killed = killed.is_set()
        killed.set()
        thread.join()
    assert was_killed and (tmp_path / "fed").exists()
    assert made == report and sum(seen) == 400
    assert contents(out) == contents(tmp_path / "alone")


def test_an_input_that_kills_its_process_costs_one_shard(pictures, tmp_path):
    out = tmp_path / "out"
    call = functools.partial(prepare_troubled, pictures, out, tmp_path, {"deadly": 47})
    with pytest.raises(OSError, match=f"ended their process {ATTEMPTS} times.* inputs 40 to 49"):
        on_cluster(call, Cluster(processes=2))
    assert len((tmp_path / "deaths").read_text().splitlines()) == ATTEMPTS
    assert len(list(out.glob("*.array_record"))) == 400 // SHARD_SIZE - 1
    # What made it so is gone: the rest is done, without a cluster too.
    assert prepare_troubled(pictures, out, tmp_path, {}).complete


def test_what_is_wrong_with_the_work_or_the_cluster_is_said(pictures, tmp_path):
    assert engine_work.prepare_troubled(pictures, tmp_path / "out", tmp_path, {}).complete
    call = functools.partial(prepare_troubled, pictures.parent, tmp_path / "out", tmp_path, {})
    with pytest.raises(ValueError, match="was begun with"):
        on_cluster(call, Cluster(processes=1))
    call = functools.partial(prepare_troubled, pictures, tmp_path / "other", tmp_path, {})
    with pytest.raises(ValueError, match="no Ray cluster at 127.0.0.1:1"):
        on_cluster(call, Cluster("127.0.0.1:1"))
    with pytest.raises(ValueError, match="has 0 GPUs: each process needs 0.5"):
        on_cluster(call, Cluster(gpus=0.5))
    call = functools.partial(call.func, *call.args[:3], "at the door")
    with pytest.raises(OSError, match=f"{ATTEMPTS} processes of the cluster ended while"):
        on_cluster(call, Cluster(processes=1))
    assert len((tmp_path / "deaths").read_text().splitlines()) == ATTEMPTS
