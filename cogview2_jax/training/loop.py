"""The training loop: read, step, log, save, and go on after whatever stopped it.

<folder>/checkpoints/, metrics.jsonl, tensorboard/, samples/
"""

import contextlib
import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from cogview2_jax.sharding import Sharding
from cogview2_jax.training import checkpoint, metrics
from cogview2_jax.training.step import TrainState

Batches = Callable[[int], Any]


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Batches,
    *,
    num_steps: int,
    folder: Path,
    name: str,
    settings: checkpoint.Settings | None = None,
    save_every: int = 200,
    log_every: int = 20,
    keep: int = 2,
    validate: Callable[[TrainState], dict[str, float]] | None = None,
    sample: Callable[[TrainState], np.ndarray] | None = None,
    sample_every: int = 0,
    schedule: optax.Schedule | None = None,
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
    ids_of: Callable[[int], Any] | None = None,
    before_step: Callable[[int, TrainState], TrainState] | None = None,
    skip_non_finite: bool = False,
    sharding: Sharding | None = None,
) -> TrainState:
    """Train to `num_steps` steps, going on from the newest checkpoint in `folder` if there is one.

    Args:
        step_fn: as `train.make_step` gives it.
        batches: step → the rows of this process, as NumPy arrays [b, …]. Called in a thread, one
        step ahead.
        settings: JSON values that every start of this run must agree on, saved with each step.
        validate: gives figures at the start and every save, "loss" among them; the checkpoint of
        the lowest one is kept besides the newest `keep`.
        sample: gives a picture, uint8 [y, x, 3], every `sample_every` steps.
        schedule: the learning rate, to be logged.
        tokens_per_step, flops_per_step, peak_flops: of all devices, for tokens per second and
        utilisation.
        ids_of: step → what names its batch, for the message when a loss is not finite.
        before_step: (steps done, state) → state, for what happens outside the step, rarely.
        skip_non_finite: pass over such a step, and count it, instead of stopping.
        sharding: where batches are laid; `batches` then gives this process's rows.

    SIGTERM (of any process) saves and exits with 0, at the same step in all processes. Raises
    FloatingPointError for a loss or gradient that is not finite, and what `checkpoint` raises: each
    in one line.
    """
    folder = Path(folder).absolute()
    settings = settings or {}
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(
            checkpoint.open_folder(folder / "checkpoints", keep, best=validate is not None)
        )
        state, start = checkpoint.restore(manager, state, settings)
        if start >= num_steps:
            return state
        if start and first:
            print(f"{name}: goes on from step {start}", file=sys.stderr)
        log = stack.enter_context(metrics.Log(folder, start)) if first else None
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stopping = stack.enter_context(_on_sigterm())
        bar = stack.enter_context(
            tqdm(initial=start, total=num_steps, desc=name, disable=not first, file=sys.stderr)
        )

        def read(step: int) -> Any:
            batch = batches(step)
            return batch if sharding is None else shard_batch(batch, sharding)

        def save(step: int) -> None:
            figures = validate(state) if validate else {}
            if log and figures:
                log.figures(step, _validation(figures))
            checkpoint.save(manager, step, state, settings, figures.get("loss", float("inf")))

        if validate and not start and (figures := validate(state)) and log:
            log.figures(0, _validation(figures))
        skipped, since, counted = 0, time.monotonic(), 0
        pending = pool.submit(read, start)
        before: tuple[int, Any] | None = None  # the last step's metrics: read while this one runs
        for step in range(start + 1, num_steps + 1):
            batch = pending.result()
            if step < num_steps:
                pending = pool.submit(read, step)
            if before_step:
                state = before_step(step - 1, state)
            state, values = step_fn(state, batch)
            counted += 1
            last = step == num_steps
            checked = [before] if before else []
            if last or step % save_every == 0:
                checked.append((step, values))  # never save past a step that went wrong unseen
                before = None
            else:
                before = (step, values)
            for number, found in checked:
                if not float(found.get("finite", 1.0)):
                    skipped += 1
                    if not skip_non_finite:
                        raise _not_finite(name, number, found, ids_of, manager)
            if last or step % log_every == 0:
                figures = {key: float(value) for key, value in values.items()}
                seconds = (time.monotonic() - since) / counted
                figures |= _speed(seconds, tokens_per_step, flops_per_step, peak_flops)
                if schedule is not None:
                    figures["learning_rate"] = float(schedule(step - 1))
                if skip_non_finite:
                    figures["skipped"] = skipped
                figures.pop("finite", None)
                if log:
                    log.figures(step, _counted(figures))
                shown = ("loss", "tokens_per_second", "utilisation")
                bar.set_postfix({k: f"{figures[k]:.4g}" for k in shown if k in figures})
                since, counted = time.monotonic(), 0
            bar.update()
            stop = _all_stop(manager, step, stopping)
            if last or stop or step % save_every == 0:
                save(step)
                since, counted = time.monotonic(), 0
            if sample and log and sample_every and (last or step % sample_every == 0):
                log.picture(step, sample(state))
                since, counted = time.monotonic(), 0
            if stop and not last:
                checkpoint.finish(manager)
                bar.close()
                if first:
                    print(f"{name}: stopped and saved at step {step}", file=sys.stderr)
                raise SystemExit(0)
        checkpoint.finish(manager)
    return state


def shard_batch(batch: Any, sharding: Sharding) -> Any:
    """This process's rows of a global batch, each array [b, …], on their devices."""
    rows = sharding.named("batch")
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(rows, leaf), batch)


def process_rows(sharding: Sharding | None, batch_size: int) -> tuple[int, int]:
    """Which part of every global batch this process reads: its number, and how many parts there
    are.

    Processes that share samples along "tensor" read the same part. Raises ValueError for a batch
    that the mesh cannot share.
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
    """Have glibc keep what is freed: a step's buffers, handed back and faulted in again at every
    step, cost a CPU a third of its time. For the whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def _counted(figures: dict[str, float]) -> dict[str, float]:
    """To six digits, without those of which a batch had none."""
    return {key: float(f"{v:.6g}") for key, v in figures.items() if not math.isnan(v)}


def _validation(figures: dict[str, float]) -> dict[str, float]:
    return {f"validation_{key}": value for key, value in _counted(figures).items()}


def _speed(seconds: float, tokens: int, flops: float, peak: float) -> dict[str, float]:
    figures = {"step_seconds": seconds}
    if tokens:
        figures["tokens_per_second"] = tokens / seconds
    if flops and peak:
        figures["utilisation"] = flops / seconds / peak
    return figures


def _not_finite(
    name: str, step: int, values: dict[str, Any], ids_of: Any, manager: Any
) -> FloatingPointError:
    what = {key: float(values[key]) for key in ("loss", "gradient_norm") if key in values}
    figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in what.items())
    batch = f" on batch {ids_of(step - 1)}" if ids_of else ""
    good = manager.latest_step()
    kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
    return FloatingPointError(
        f"{name}: not finite at step {step}{batch}: {figures}; {kept} in {manager.directory}"
    )


@contextlib.contextmanager
def _on_sigterm() -> Iterator[list[bool]]:
    """A list that is not empty once SIGTERM has come. With several processes jax listens for it."""
    came: list[bool] = []
    if jax.process_count() > 1:
        yield came
        return
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not the main thread: signals are the caller's
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, previous)


def _all_stop(manager: Any, step: int, stopping: list[bool]) -> bool:
    if jax.process_count() > 1:
        return bool(manager.reached_preemption(step))
    return bool(stopping)
