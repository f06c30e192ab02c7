"""The training loop: read, step, log, save, and resume after an interruption.

    <folder>/checkpoints/, metrics.jsonl, tensorboard/, samples/, lock

SIGTERM to any process saves and exits with 0, at the same step in all processes. In a run of one
process, SIGHUP and Ctrl-C save too; Ctrl-C then raises KeyboardInterrupt, and a second one does so
at once. No checkpoint is written after a step that was not finite, unless such steps are skipped.
"""

import contextlib
import ctypes
import math
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from cogview2_jax.sharding import Sharding
from cogview2_jax.training import checkpoint, lock
from cogview2_jax.training.checkpoint import Checkpoints
from cogview2_jax.training.metrics import Costs, Log, Speed, Watched
from cogview2_jax.training.options import LoopOptions
from cogview2_jax.training.progress import Progress
from cogview2_jax.training.step import TrainState

Batches = Callable[[int], Any]


@dataclass(frozen=True)
class Hooks:
    """Functions that a task adds to the loop. All processes call each of them, except `sample`.

    validate: figures, "loss" among them, at the start and at every save. The checkpoint of the
    lowest loss is kept in addition to the newest.
    sample: a picture, uint8 [y, x, 3].
    before_step: (steps done, state) → state, for rare changes outside the step.
    watch: (state, whether this is the last log) → further figures to log, and a warning or "".
    ids_of: step → the numbers of its records, for the message when a step is not finite.
    """

    validate: Callable[[TrainState], dict[str, float]] | None = None
    sample: Callable[[TrainState], np.ndarray] | None = None
    before_step: Callable[[int, TrainState], TrainState] | None = None
    watch: Callable[[TrainState, bool], Watched] | None = None
    ids_of: Callable[[int], Any] | None = None


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Batches,
    *,
    num_steps: int,
    folder: Path,
    name: str,
    settings: checkpoint.Settings | None = None,
    loop: LoopOptions = LoopOptions(),
    hooks: Hooks = Hooks(),
    costs: Costs = Costs(),
    schedule: optax.Schedule | None = None,
    on_stop: str = "",
    sharding: Sharding | None = None,
) -> TrainState:
    """Train until `num_steps` steps are done, resuming from the newest checkpoint in `folder`. Of a
    run that has more, the state after `num_steps`, if it is kept.

    Args:
        step_fn: as `make_step` gives it.
        batches: step → the rows of this process, as NumPy arrays [b, …]. Called in a thread, one
        step ahead.
        settings: JSON values that must not change when the run is resumed; saved with each
        checkpoint.
        schedule: the learning rate, to be logged.
        on_stop: how to get a model from a run that was stopped early, appended to the message then;
        "{step}" stands for the saved step.
        sharding: where batches are put; `batches` then gives this process's rows.

    Raises FloatingPointError for a step that is not finite, OSError for a folder that another run
    uses, and what `checkpoint` raises: each in one line.
    """
    folder, first = Path(folder).absolute(), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold(folder))
        checkpoints = stack.enter_context(
            checkpoint.open_folder(
                folder / "checkpoints", loop.keep, best=hooks.validate is not None
            )
        )
        state, start = checkpoint.restore(checkpoints, state, settings or {}, num_steps)
        if start >= num_steps:
            return state
        progress = stack.enter_context(Progress(name, start, num_steps, shown=first))
        if start:
            progress.say(f"resumes at step {start}")
        log = stack.enter_context(Log(folder, start)) if first else None
        report = _Report(log, progress, Speed(costs), schedule, hooks.watch)
        finite = _Finite(name, loop.skip_non_finite, hooks.ids_of, checkpoints)
        reader = stack.enter_context(_Reader(batches, num_steps, sharding))
        stopping = stack.enter_context(_stop_signals(name, checkpoints))
        run = _Run(num_steps, loop, hooks, settings or {}, on_stop, checkpoints, report, finite)
        state = run.steps(state, start, step_fn, reader, stopping)
        checkpoint.finish(checkpoints)
    return state


@dataclass(frozen=True)
class _Run:
    """A run: all that its steps need."""

    num_steps: int
    loop: LoopOptions
    hooks: Hooks
    settings: checkpoint.Settings
    on_stop: str
    checkpoints: Checkpoints
    report: "_Report"
    finite: "_Finite"

    def steps(
        self,
        state: TrainState,
        start: int,
        step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
        reader: "_Reader",
        stopping: "_Stopping",
    ) -> TrainState:
        """All steps after `start`."""
        loop, hooks, report = self.loop, self.hooks, self.report
        if hooks.validate and not start:
            report.validation(0, hooks.validate(state))
        report.progress.compiling()
        for step in range(start + 1, self.num_steps + 1):
            batch = reader.read(step - 1)
            if hooks.before_step:
                state = hooks.before_step(step - 1, state)
            state, values = step_fn(state, batch)
            report.stepped(values, first=step == start + 1)

            last = step == self.num_steps
            stop = stopping.now(step) and not last
            saves = last or stop or step % loop.save_every == 0
            logs = last or stop or step % loop.log_every == 0
            draws = loop.sample_every and (last or step % loop.sample_every == 0)
            self.finite.check(step, values, now=saves or logs)
            if logs:
                report.training(step, state, values, self.finite, last=last)
            if saves:
                self.save(step, state)
            if draws and hooks.sample:
                report.picture(step, hooks.sample, state)
            if logs or saves or draws:
                report.speed.restart()
            if stop:
                self.stopped(step)
                raise stopping.ending()
        return state

    def save(self, step: int, state: TrainState) -> None:
        figures = self.hooks.validate(state) if self.hooks.validate else {}
        self.report.validation(step, figures)
        loss = figures.get("loss", math.inf)
        checkpoint.save(self.checkpoints, step, state, self.settings, loss)

    def stopped(self, step: int) -> None:
        checkpoint.finish(self.checkpoints)
        self.report.progress.close()
        how = self.on_stop.replace("{step}", str(step))
        self.report.progress.say(
            f"stopped and saved at step {step} of {self.num_steps}: the same command resumes"
            f" there{how}"
        )


class _Reader:
    """Batches, on their devices, read in a thread one step ahead."""

    def __init__(self, batches: Batches, num_steps: int, sharding: Sharding | None) -> None:
        self._batches, self._num_steps, self._sharding = batches, num_steps, sharding
        self._pool = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[Any]] = {}

    def read(self, step: int) -> Any:
        future = self._ahead.pop(step, None) or self._pool.submit(self._load, step)
        if step + 1 < self._num_steps:
            self._ahead[step + 1] = self._pool.submit(self._load, step + 1)
        return future.result()

    def _load(self, step: int) -> Any:
        batch = self._batches(step)
        return batch if self._sharding is None else shard_batch(batch, self._sharding)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


@dataclass
class _Finite:
    """Checks that steps were finite. A step's metrics are read while the next one runs, so that the
    devices do not wait; `now` reads them at once, as before a save.
    """

    name: str
    skip: bool
    ids_of: Callable[[int], Any] | None
    checkpoints: Checkpoints
    skipped: int = 0
    pending: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def check(self, step: int, values: dict[str, Any], *, now: bool) -> None:
        """Raises FloatingPointError for a step that was not finite, unless those are skipped."""
        self.pending.append((step, values))
        while len(self.pending) > (0 if now else 1):
            number, found = self.pending.pop(0)
            if not float(found.get("finite", 1.0)):
                self.skipped += 1
                if not self.skip:
                    raise self._error(number, found)

    def _error(self, step: int, values: dict[str, Any]) -> FloatingPointError:
        names = ("loss", "gradient_norm", "parameter_norm")
        what = {name: float(values[name]) for name in names if name in values}
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in what.items())
        batch = f" on batch {self.ids_of(step - 1)}" if self.ids_of else ""
        good = self.checkpoints.latest_step()
        kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
        return FloatingPointError(
            f"{self.name}: not finite at step {step}{batch}: {figures}; {kept} in"
            f" {self.checkpoints.folder}: try a lower learning rate, or --skip-non-finite"
        )


@dataclass
class _Report:
    """Writes metrics to the log and to stderr."""

    log: Log | None
    progress: Progress
    speed: Speed
    schedule: optax.Schedule | None
    watch: Callable[[TrainState, bool], Watched] | None

    def stepped(self, values: dict[str, Any], *, first: bool) -> None:
        self.progress.advance()
        if not first:
            self.speed.step()
            return
        jax.block_until_ready(values)  # mostly compilation: not counted in the speed
        self.progress.compiled()
        self.speed.restart()

    def training(
        self,
        step: int,
        state: TrainState,
        values: dict[str, Any],
        finite: _Finite,
        *,
        last: bool,
    ) -> None:
        figures = {name: float(value) for name, value in values.items() if name != "finite"}
        figures |= self.speed.figures()
        if self.schedule is not None:
            figures["learning_rate"] = float(self.schedule(step - 1))
        if finite.skip:
            figures["skipped"] = finite.skipped
        if self.watch:
            watched = self.watch(state, last)
            figures |= watched.figures
            if watched.warning:
                self.progress.say(watched.warning)
        figures = _rounded(figures)
        if self.log:
            self.log.figures(step, figures)
        self.progress.figures(step, figures)

    def picture(
        self, step: int, sample: Callable[[TrainState], np.ndarray], state: TrainState
    ) -> None:
        if self.log:
            self.log.picture(step, sample(state))

    def validation(self, step: int, figures: dict[str, float]) -> None:
        if not math.isfinite(figures.get("loss", 0.0)):
            self.progress.say(f"the validation loss at step {step} is not finite and is not logged")
        if self.log and figures:
            self.log.figures(step, {f"validation_{k}": v for k, v in _rounded(figures).items()})


def shard_batch(batch: Any, sharding: Sharding) -> Any:
    """This process's rows of a global batch, each array [b, …], on their devices."""
    rows = sharding.named("batch")
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(rows, leaf), batch)


def process_rows(sharding: Sharding | None, batch_size: int) -> tuple[int, int]:
    """Which part of every global batch this process reads: its number, and the number of parts.

    Processes that share samples along "tensor" read the same part. Raises ValueError for a batch
    that the mesh cannot split evenly.
    """
    if sharding is None:
        return 0, 1
    parts = sharding.parts("batch")
    if batch_size % parts:
        raise ValueError(f"the batch must be a multiple of {parts} shards: got {batch_size}")
    rows = sharding.named("batch").addressable_devices_indices_map((batch_size,))
    slices = [index[0].indices(batch_size)[:2] for index in rows.values() if index]
    begin, end = min(a for a, _ in slices), max(b for _, b in slices)
    share = end - begin
    if sum(b - a for a, b in set(slices)) != share or begin % share or batch_size % share:
        raise ValueError("the mesh must give each process neighbouring rows of the batch")
    return begin // share, batch_size // share


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, in the whole process. To return a step's buffers to the system
    and to fault them in again takes a CPU a third of the step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    """Rounded to six digits, without those that are not finite (such as the mean loss of a kind
    that a batch lacks), which JSON cannot hold.
    """
    return {key: float(f"{v:.6g}") for key, v in figures.items() if math.isfinite(v)}


class _Stopping:
    """Whether a signal has asked the run to stop."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.signal: int | None = None
        self._checkpoints = checkpoints

    def now(self, step: int) -> bool:
        """Asked after each step, in every process."""
        if jax.process_count() > 1:  # jax listens for SIGTERM, and all processes agree on a step
            return self._checkpoints.reached_preemption(step)
        return self.signal is not None

    def ending(self) -> BaseException:
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(0)


@contextlib.contextmanager
def _stop_signals(name: str, checkpoints: Checkpoints) -> Iterator[_Stopping]:
    """SIGTERM, SIGHUP and Ctrl-C end the run after the current step; a second Ctrl-C ends it at
    once.

    Signals that the caller ignores (as under nohup) stay ignored. Outside the main thread no
    handler is installed.
    """
    stopping = _Stopping(checkpoints)

    def came(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if stopping.signal is not None:
                raise KeyboardInterrupt
            said = f"\n{name}: saves and stops after this step; Ctrl-C again stops at once\n"
            os.write(2, said.encode())  # print may have been interrupted itself
        stopping.signal = number

    previous: dict[int, Any] = {}
    try:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    with contextlib.suppress(ValueError):  # not the main thread
                        previous[number] = signal.signal(number, came)
        yield stopping
    finally:
        for came_before, handler in previous.items():
            signal.signal(came_before, handler)
