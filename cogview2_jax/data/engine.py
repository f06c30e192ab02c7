"""Shards on a Ray cluster: many processes, on one machine or on many, with a GPU or a share of one.

Ray starts the processes, places them on devices and says when one has died; everything else is
`shards`: each process writes whole shards into the shared folder, and only their numbers travel. So
the records are those of one process, and runs without a cluster may share the folder.

A shard whose process dies (killed, out of memory, a lost machine) is given to a new one, at the end
of the queue, at most `ATTEMPTS` times; the others are done first.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cogview2_jax.data import shards
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.shards import Progress, Report, Work

ATTEMPTS = 3  # for each shard
STARTED_IN = 3600  # seconds until the first shard must be done: a cluster may lack room for any
# Of its processes: not all of a device's memory for the first one.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Cluster(NamedTuple):
    """Where the work is done. `address` is a running cluster's ("auto", "ray://…"); without one, a
    cluster of this machine lasts as long as the work. `processes` is by default one for each CPU,
    or with `gpus`, the share of a GPU that each process gets, as many as the GPUs hold.
    """

    address: str | None = None
    processes: int | None = None
    gpus: float = 0.0


def on_cluster(
    call: Callable[..., Report], cluster: Cluster, progress: Progress = lambda inputs: None
) -> Report:
    """`call`, with its shards written by the processes of a cluster.

    `call` takes `run` and `progress`, as `prepare.prepare_tokens` does with all else given, and can
    be pickled: each process calls it to open the data and the model there, and the process that
    this function runs in opens neither. Raises as `call`; ValueError if no cluster is at the
    address, and OSError, in one line, for shards whose processes die again and again: the same call
    then continues.
    """
    with _Connected(cluster) as pool:
        return _Queue(pool, call, progress).work_off()


class _Writer:
    """A process of the cluster: it has the data and the model, and writes shards."""

    def __init__(self, call: Callable[..., Any], folder: str) -> None:
        self._call, self._folder = call, folder

    @functools.cached_property
    def _run(self) -> tuple[Work, Path, int]:
        try:
            os.chdir(self._folder)  # paths mean the same
        except OSError as error:
            raise ValueError(
                f"{socket.gethostname()} cannot enter {self._folder} ({error.strerror}): start the"
                " command in a folder that all machines of the cluster see"
            ) from error
        taken: tuple[Work, Path, int] = self._call(run=_taken)
        return taken

    def begin(self) -> tuple[Manifest, list[int]]:
        work, folder, _ = self._run
        return work.manifest, shards.begin(work, folder, lambda inputs: None)

    def write(self, shard: int) -> None:
        work, folder, workers = self._run
        shards.write_some(work, folder, [shard], workers, lambda inputs: None)

    def summarise(self) -> Report:
        work, folder, _ = self._run
        return shards.summarise(work, folder)


def _taken(work: Work, folder: Path, workers: int, progress: Progress) -> Any:
    return work, folder, workers


class _Connected:
    """A connection to a cluster, and the processes that it gives."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __enter__(self) -> _Connected:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        import ray

        local = self._cluster.address is None
        if local and " " in sys.executable:
            raise ValueError(f"Ray starts no process of {sys.executable}: its path has a space")
        how: dict[str, Any] = {"include_dashboard": False} if local else {}
        if local and self._cluster.processes and not self._cluster.gpus:
            how["num_cpus"] = self._cluster.processes
        try:
            _require_reachable(self._cluster.address)
            with warnings.catch_warnings():
                # JAX warns of every fork; Ray's are followed by exec at once, which is harmless.
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                ray.init(
                    self._cluster.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": _ENVIRONMENT},
                    **how,
                )
        except (OSError, ValueError, RuntimeError) as error:
            where = self._cluster.address or "this machine"
            raise ValueError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from error
        there = ray.cluster_resources()
        gpus = self._cluster.gpus
        fits = int(there.get("GPU", 0) / gpus) if gpus else int(there.get("CPU", 1))
        if not fits:
            ray.shutdown()
            raise ValueError(
                f"the cluster has {there.get('GPU', 0):g} GPUs: each process needs {gpus:g}"
            )
        self.processes = min(self._cluster.processes or fits, fits)
        self._writer = ray.remote(_Writer).options(num_cpus=0 if gpus else 1, num_gpus=gpus)
        return self

    def process(self, call: Any) -> Any:
        """A new process."""
        return self._writer.remote(call, os.getcwd())

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()


def _require_reachable(address: str | None) -> None:
    """Raises OSError for a host and port that does not answer: Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Queue:
    """The shards that are to be written, one at a time in each process of a cluster."""

    def __init__(self, pool: _Connected, call: Callable[..., Any], progress: Progress) -> None:
        import ray

        self._pool, self._call, self._progress = pool, ray.put(call), progress
        self._spare: list[Any] = []  # processes without work

    def work_off(self) -> Report:
        """Begins or continues the folder, writes what it lacks, and counts."""
        manifest, missing = self._ask("begin", STARTED_IN)
        sizes = [len(manifest.inputs(shard)) for shard in range(manifest.num_shards)]
        self._progress(sum(sizes) - sum(sizes[shard] for shard in missing))
        ended = self._write(deque(missing), sizes)
        report: Report = self._ask("summarise")
        if ended:
            shard, why = next(iter(ended.items()))
            inputs = manifest.inputs(shard)
            raise OSError(
                f"{len(ended)} shards ended their process {ATTEMPTS} times, first that of inputs"
                f" {inputs.start} to {inputs.stop - 1} ({why}): the others are done"
            )
        return report

    def _ask(self, what: str, seconds: float | None = None) -> Any:
        """What a process answers; one that dies is replaced, `ATTEMPTS` times in all."""
        import ray

        for _ in range(ATTEMPTS):
            process = self._process()
            answer = getattr(process, what).remote()
            if not ray.wait([answer], timeout=seconds)[0]:
                raise OSError(f"no process of the cluster began within {seconds} seconds")
            try:
                found = ray.get(answer)
            except ray.exceptions.RayError as error:
                died = _death(error)
                ray.kill(process)
            else:
                self._spare.append(process)
                return found
        raise OSError(
            f"{ATTEMPTS} processes of the cluster ended while they opened the data and the model"
            f" ({died})"
        )

    def _write(self, todo: deque[int], sizes: list[int]) -> dict[int, str]:
        """Writes shards of these numbers of inputs. Those that ended their process again and again,
        and how.
        """
        import ray

        attempts = Counter[int]()
        running: dict[Any, tuple[Any, int]] = {}
        ended: dict[int, str] = {}
        while todo or running:
            while todo and len(running) < self._pool.processes:
                process, shard = self._process(), todo.popleft()
                running[process.write.remote(shard)] = process, shard
            (done,), _ = ray.wait(list(running), num_returns=1)
            process, shard = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                died = _death(error)
                ray.kill(process)
                attempts[shard] += 1
                if attempts[shard] < ATTEMPTS:
                    todo.append(shard)
                else:
                    ended[shard] = died
            else:
                self._spare.append(process)
                self._progress(sizes[shard])
        return ended

    def _process(self) -> Any:
        return self._spare.pop() if self._spare else self._pool.process(self._call)


def _death(error: Exception) -> str:
    """How the process of a failed call died. Raises the error of the work, if it was that."""
    from ray.exceptions import RayActorError, RayTaskError

    if not isinstance(error, RayTaskError):
        if isinstance(error, RayActorError):
            return type(error).__name__
        raise error
    if isinstance(error.cause, MemoryError) or "RESOURCE_EXHAUSTED" in str(error.cause):  # jax's
        return "out of memory"
    raise error.cause from error
