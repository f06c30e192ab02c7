"""Commands in processes of their own: tests wait for them, kill them, and leave none behind."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0  # seconds; far more than a busy machine needs


class Started:
    """A Python command that runs, with its two streams in `log`.out and `log`.err. A file that it
    writes can be no larger than `largest_file` bytes, as if a disk were full.
    """

    def __init__(
        self,
        command: Sequence[object],
        log: Path,
        cache: Path,
        *,
        devices: int = 1,
        largest_file: int | None = None,
    ) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            # All programs are kept, so that a later start is quick.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        out, err = log.with_suffix(".out"), log.with_suffix(".err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        if largest_file is not None:
            resource.prlimit(self._popen.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    def err(self) -> str:
        return self.log.with_suffix(".err").read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, reached: Callable[[], Any]) -> None:
        """Wait until `reached()`; fails if the process ends first."""
        end = time.monotonic() + PATIENCE
        while not reached():
            assert self.running(), f"ended with {self._popen.returncode}: {self.err()}"
            assert time.monotonic() < end, self.err()
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    def finish(self, timeout: float = PATIENCE) -> int:
        """Wait for the process to end; returns its exit code."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout} s: {self.err()}") from None

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._popen.wait(PATIENCE)


@contextlib.contextmanager
def ending(processes: Sequence[Started]) -> Iterator[Sequence[Started]]:
    """Kills all processes at the end, whatever happens inside."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port
