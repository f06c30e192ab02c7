"""Is the train step as fast as a bare one, compiled only once, and how soon does it start?

    python -m experiments.step_time.run [--part step|cold] [--out DIR]

Prints a table and verdicts; --out also writes results.json there. Exits with 1 if a verdict does
not hold. See README.md for what to expect.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from cogview2_jax import bundle as bundles
from cogview2_jax.data.sources import Scenes
from cogview2_jax.training import metrics
from cogview2_jax.training.coglm import coglm_task
from cogview2_jax.training.loop import keep_freed_memory
from cogview2_jax.training.options import CogLMOptions, LoopOptions, Options
from cogview2_jax.training.run import run as run_task
from cogview2_jax.training.step import (
    TrainState,
    adamw,
    init_params,
    init_state,
    make_step,
    warmup_cosine,
)
from cogview2_jax.training.task import Task
from experiments.local_attention.report import device_name
from experiments.scenes import prepared
from experiments.step_time import bare

SCENES = 32  # two records each: enough for the largest batch
BATCHES = (16, 64)
LARGEST_RATIO = 1.3
LONGEST_START = 60.0  # seconds
# Seconds after which a command without a first step is given up.
COLD_LIMIT = 300.0
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Verdict:
    name: str
    seen: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.seen <= self.limit

    def __str__(self) -> str:
        said = "holds" if self.holds else "DOES NOT HOLD"
        return f"{self.name:<58} expected <= {self.limit:<5g} seen {self.seen:<7.3g} {said}"


class Times(NamedTuple):
    """Seconds of each step, by the clock and of all threads of the process."""

    wall: list[float]
    cpu: list[float]

    def figures(self) -> dict[str, float]:
        return {
            "fastest_s": round(min(self.wall), 4),
            "median_s": round(statistics.median(self.wall), 4),
            "cpu_s": round(statistics.median(self.cpu), 4),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("step", "cold"), help="one of the two; default: both")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path, help="write results.json here")
    arguments = parser.parse_args(argv)

    keep_freed_memory()  # as the command does, and for both
    record: dict[str, Any] = {"device": device_name(), "jax": jax.__version__}
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = bundles.load(None, ("tokenizer",))
        records = prepared.tokens(folder / "records", bundle, Scenes(SCENES))
        if arguments.part != "cold":
            record["matrix_rate_gflops"] = round(metrics.matrix_rate() / 1e9, 1)
            for batch in arguments.batches:
                found = compare(bundle, records, batch, arguments.repeats)
                record[f"batch_{batch}"] = found
                print(table(batch, found), flush=True)
                verdicts += step_verdicts(batch, found)
        if arguments.part != "step":
            pictures = prepared.pictures(folder / "pictures", Scenes(SCENES))
            record["cold"] = {}
            for network, given in cold_commands(pictures, records).items():
                found = cold_start(network, given, folder / network)
                record["cold"][network] = found
                print(
                    f"{network:<14} first step after {found['wall_s']:6.1f} s, "
                    f"{found['cpu_s']:6.1f} s of CPU",
                    flush=True,
                )
                name = f"{network}: seconds to the first step, cold"
                verdicts.append(Verdict(name, found["wall_s"], LONGEST_START))
    for verdict in verdicts:
        print(verdict)
    if arguments.out:
        record["verdicts"] = [asdict(v) | {"holds": v.holds} for v in verdicts]
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / "results.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {file}")
    return int(not all(verdict.holds for verdict in verdicts))


# --- The step -------------------------------------------------------------------------------------


class Compilations:
    """Counts what XLA compiles from now on."""

    def __init__(self) -> None:
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **details: str | int) -> None:
        self.number += event == COMPILED


def compare(bundle: bundles.Bundle, records: Path, batch_size: int, repeats: int) -> dict[str, Any]:
    """The task's CogLM step and the bare one, on the same batches, alternating."""
    options = Options(num_steps=1000, batch_size=batch_size)
    task = coglm_task(bundle, records, options, CogLMOptions("nothing"))
    schedule = warmup_cosine(options.learning_rate, options.num_steps, 100)

    optimizer = adamw(schedule, weight_decay=options.weight_decay, clip=options.clip)
    ours = make_step(task.loss, optimizer, precision=task.execution.precision)
    params = init_params(task.init, jax.random.key(0), task.axes)
    state = init_state(params, optimizer)
    sizes = {"ours": count(params)}

    config = bundle.coglm_config
    bare_params = jax.jit(functools.partial(bare.init_params, config=config))(jax.random.key(0))
    plain = bare.make_step(config, optimizer)
    bare_state = bare_params, jax.jit(optimizer.init)(bare_params)
    sizes["bare"] = count(bare_params)

    def our_step(batch: Any) -> Any:
        nonlocal state
        compiled.append(-compilations.number)
        state, values = ours(state, batch)
        compiled[-1] += compilations.number
        return values["loss"]

    def bare_step(batch: Any) -> Any:
        nonlocal bare_state
        *now, value = plain(*bare_state, batch)
        bare_state = now[0], now[1]
        return value

    steps: dict[str, Callable[[Any], Any]] = {"ours": our_step, "bare": bare_step}
    batches = [task.read(number) for number in range(repeats + 2)]
    compilations = Compilations()
    compiled: list[int] = []  # in each of our steps
    times = {name: Times([], []) for name in steps}
    for number, batch in enumerate(tqdm(batches, desc=f"batch {batch_size}")):
        # Each goes first every other time.
        for name in list(steps)[:: 1 if number % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(steps[name](batch))
            if number >= 2:  # the first compiles, the second warms up
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    found: dict[str, Any] = {
        name: one.figures() | {"parameters": sizes[name]} for name, one in times.items()
    }
    flops = batch_size * task.flops_per_sample
    found["matrix_gflop_a_step"] = round(flops / 1e9, 2)
    rate = metrics.matrix_rate()
    for name in steps:
        achieved = flops / found[name]["fastest_s"]
        found[name]["gflops"] = round(achieved / 1e9, 1)
        found[name]["utilisation"] = round(achieved / rate, 3)
    found["programs_of_the_step"] = ours._cache_size()
    found["compiled_after_the_first_step"] = sum(compiled[1:])
    found["compiled_in_the_loop"] = compiled_in_the_loop(task, options)
    return found


def compiled_in_the_loop(task: Task, options: Options, steps: int = 6) -> int:
    """Programs that `training.run.run` compiles from its second step to its last, logging each."""
    compilations = Compilations()
    numbers: list[int] = []

    def before_step(step: int, state: TrainState) -> TrainState:
        numbers.append(compilations.number)
        return state

    with tempfile.TemporaryDirectory() as folder:
        few = Options(num_steps=steps, batch_size=options.batch_size)
        run_task(
            task._replace(before_step=before_step), few, Path(folder), LoopOptions(log_every=1)
        )
    # Before step 3, step 1 has been logged; programs compiled for logging do not count.
    return numbers[-1] - numbers[2]


def count(params: Any) -> int:
    return int(sum(np.size(leaf) for leaf in jax.tree.leaves(params)))


def table(batch: int, found: dict[str, Any]) -> str:
    lines = [f"\nbatch {batch}   fastest    median       CPU   GFLOP/s  utilisation  parameters"]
    for name in ("ours", "bare"):
        one = found[name]
        lines.append(
            f"{name:<8}{one['fastest_s']:>9.3f} s{one['median_s']:>8.3f} s{one['cpu_s']:>8.3f} s"
            f"{one['gflops']:>10.1f}{one['utilisation']:>13.3f}{one['parameters']:>12,}"
        )
    return "\n".join(lines)


def step_verdicts(batch: int, found: dict[str, Any]) -> list[Verdict]:
    def ratio(figure: str) -> float:
        return round(found["ours"][figure] / found["bare"][figure], 3)

    return [
        Verdict(
            f"batch {batch}: fastest step over the bare one's", ratio("fastest_s"), LARGEST_RATIO
        ),
        Verdict(
            f"batch {batch}: CPU time over the bare one's, median", ratio("cpu_s"), LARGEST_RATIO
        ),
        Verdict(f"batch {batch}: programs of the step", found["programs_of_the_step"], 1),
        Verdict(
            f"batch {batch}: compilations after the first step",
            found["compiled_after_the_first_step"],
            0,
        ),
        Verdict(
            f"batch {batch}: compilations in the loop after its start",
            found["compiled_in_the_loop"],
            0,
        ),
    ]


# --- The first step -------------------------------------------------------------------------------


def cold_commands(pictures: Path, records: Path) -> dict[str, Path]:
    """Each training command and its data, in the order of training."""
    return {
        "tokenizer": pictures,
        "coglm": records,
        "direct-sr": records,
        "iterative-sr": records,
    }


def cold_start(network: str, given: Path, out: Path) -> dict[str, float]:
    """Seconds from the start of `cogview2 train …` in a fresh process, with an empty compilation
    cache, to its first step's line of metrics: by the clock and of its threads.
    """
    command = [sys.executable, "-m", "cogview2_jax.cli", "train", network, str(given)]
    command += ["--start", "nothing", "--log-every", "1", "--out", str(out / "run")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "cache")}
    figures = out / "run" / "metrics.jsonl"
    begin = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | cache, stderr=subprocess.DEVNULL)
    try:
        while not (figures.exists() and figures.read_bytes().count(b"\n")):
            if process.poll() is not None or time.monotonic() - begin > COLD_LIMIT:
                raise SystemExit(f"no first step of: {' '.join(command)}")
            time.sleep(0.05)
        wall = time.monotonic() - begin
    finally:
        if process.poll() is None:
            process.kill()
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = -9  # it has been waited for
    return {"wall_s": round(wall, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}


if __name__ == "__main__":
    sys.exit(main())
