"""Shards on a Ray cluster: many processes, on one machine or on many, with a GPU or a share of one.

Ray starts the processes, places them on devices and says when one has died; everything else is
`shards`: each process writes whole shards into the shared folder, and only their numbers travel. So
the records are those of one process, and runs without a cluster may share the folder.

A shard whose process dies (killed, out of memory, a lost machine) is given to a new one, at the end
of the queue, at most `ATTEMPTS` times; the others are done first.
"""

from __future__ import annotations

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
    be pickled: each process calls it to open the data and the model there. Raises as `call`;
    ValueError if no cluster is at the address, and OSError, in one line, for shards whose processes
    die again and again: the same call then continues.
    """

    def drive(work: Work, folder: Path, workers: int, progress: Progress) -> Report:
        missing = shards.begin(work, folder, progress)
        if missing:
            with _Connected(cluster) as pool:
                _write_all(pool, call, work, missing, progress)
        return shards.summarise(work, folder)

    return call(run=drive, progress=progress)


class _Writer:
    """A process of the cluster: it has the data and the model, and writes shards."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._run: tuple[Work, Path, int] = call(run=_taken)

    def write(self, shard: int) -> None:
        work, folder, workers = self._run
        shards.write_some(work, folder, [shard], workers, lambda inputs: None)


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
        return self._writer.remote(call)

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()


def _require_reachable(address: str | None) -> None:
    """Raises OSError for a host and port that does not answer: Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _write_all(
    pool: _Connected, call: Callable[..., Any], work: Work, missing: list[int], progress: Progress
) -> None:
    """Every missing shard, one at a time in each process."""
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    todo, attempts = deque(missing), Counter[int]()
    spare: list[Any] = []
    running: dict[Any, tuple[Any, int]] = {}
    ended: dict[int, str] = {}
    shared, begun = ray.put(call), False
    while todo or running:
        while todo and len(running) < pool.processes:
            process, shard = spare.pop() if spare else pool.process(shared), todo.popleft()
            running[process.write.remote(shard)] = process, shard
        ready, _ = ray.wait(list(running), num_returns=1, timeout=None if begun else STARTED_IN)
        if not ready:
            raise OSError(f"no process of the cluster began within {STARTED_IN} seconds")
        begun, (done,) = True, ready
        process, shard = running.pop(done)
        try:
            ray.get(done)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, (RayActorError, MemoryError)):
                raise cause if isinstance(cause, (OSError, ValueError)) else error from None
            ray.kill(process)
            attempts[shard] += 1
            if attempts[shard] < ATTEMPTS:
                todo.append(shard)
            else:
                ended[shard] = type(cause).__name__
        else:
            spare.append(process)
            progress(len(work.manifest.inputs(shard)))
    if ended:
        shard, why = next(iter(ended.items()))
        inputs = work.manifest.inputs(shard)
        raise OSError(
            f"{len(ended)} shards ended their process {ATTEMPTS} times, first that of inputs"
            f" {inputs.start} to {inputs.stop - 1} ({why}): the others are done"
        )
