"""How fast is local attention on this device, compared with the usual alternatives?

    python -m experiments.local_attention.run [--quick | --acceptance] [--out DIR]

Prints a table; --out also writes results.json and plot.png there, or acceptance.json. Exits with 1
if an implementation failed or disagreed, and with --acceptance if a verdict does not hold.
See README.md for what to expect.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.local_attention import bounds, flex, peers, report
from experiments.local_attention.programs import (
    Inputs,
    Program,
    busy_applications,
    compile_jax,
    copies,
    draw,
    largest_error,
    time_in_turn,
    tolerance,
    with_gradients,
)
from experiments.local_attention.report import Result, Setting
from pallas_kernels import local_attention_2d
from pallas_kernels.local_attention import pallas_triton
from pallas_kernels.local_attention.devices import compute_capability
from pallas_kernels.local_attention.window import Window

DIRECTIONS = ("forward", "forward+backward")
WINDOWS = [Window(9, 9), Window(5, 5), Window(9, 5), Window(11, 11), Window(5, 5, ratio=3)]
GRIDS = [32, 48, 60, 64, 96, 128]
# One 32x32 grid has too few tiles for a GPU of 132 multiprocessors. Time a token is compared on
# batches with as many cells as the largest grid. 60x60 is left out because tiles stick out of it.
FLAT_GRIDS = [32, 48, 64, 96, 128]
KERNEL, XLA, FLEX = "pallas_triton", "xla", "flex_attention"
GLOBAL = ("naive_global", "cudnn_global")  # no window: other numbers
CPU_PEERS = ("gather", "dense", "naive_global")


@dataclass(frozen=True)
class Case:
    grid: int
    window: Window
    direction: str
    batch: int
    names: tuple[str, ...]  # of the implementations


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)

    on_cpu = jax.default_backend() == "cpu"
    setting = Setting(
        batch=arguments.batch,
        heads=arguments.heads or (8 if on_cpu else 48),
        dim=arguments.dim,
        dtype=arguments.dtype or ("float32" if on_cpu else "bfloat16"),
        repeats=arguments.repeats or (15 if arguments.acceptance else 3 if arguments.quick else 5),
        memory_limit=2.0**30 * arguments.memory_limit_gb
        if arguments.memory_limit_gb
        else default_memory_limit(),
    )
    minutes = arguments.minutes
    if minutes is None:
        minutes = math.inf if on_cpu else 9
    deadline = time.monotonic() + 60 * minutes
    rates = bounds.measure_rates(setting.dtype)
    print(report.heading(setting, rates))
    absent = obstacles(setting)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    print(f"\n{report.HEADER}")

    present = tuple(name for name in (KERNEL, XLA, *GLOBAL, FLEX) if name not in absent)
    if on_cpu:
        present = (XLA, *CPU_PEERS)
    needed = acceptance_cases(present, setting.batch)
    if arguments.acceptance:
        planned = needed
    elif arguments.quick:
        planned = cases([24, 36], [Window(9, 9), Window(5, 5, ratio=3)], present, setting.batch)
    else:
        planned = cases(arguments.grids or GRIDS, WINDOWS, present, setting.batch)
        if KERNEL in present and not arguments.grids:
            # The verdicts' cases come first, in case the time runs out.
            planned = list(dict.fromkeys(needed + planned))
    results: list[Result] = []
    skipped: list[str] = []
    failed: list[str] = []
    for case in planned:
        if time.monotonic() > deadline:
            skipped.append(f"{describe(case)}: {minutes:g} minutes were over")
            continue
        measured = measure(case, setting, rates, skipped, failed)
        if measured:
            print(report.table(measured), flush=True)
        results += measured
    for line in skipped:
        print(f"skipped: {line}")
    for line in failed:
        print(f"failed: {line}")
    verdicts = report.verdicts(results, FLAT_GRIDS)
    for verdict in verdicts:
        print(verdict)
    if arguments.out:
        record = report.record(setting, rates, results, skipped, failed, absent, verdicts)
        name = "acceptance.json" if arguments.acceptance else "results.json"
        report.write_record(arguments.out / name, record)
        if not arguments.acceptance:
            report.write_plot(arguments.out / "plot.png", setting, results)
    unmet = arguments.acceptance and not all(verdict.holds for verdict in verdicts)
    return int(bool(failed) or unmet)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two small grids, two windows")
    size.add_argument("--acceptance", action="store_true", help="what the verdicts need")
    size.add_argument("--grids", type=int, nargs="+", help="sides, instead of the usual ones")
    parser.add_argument("--out", type=Path, help="write the record and the plot here")
    parser.add_argument("--repeats", type=int, help="5 of each; in acceptance 15, quickly 3")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="8 on a CPU, else 48")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", help="float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--memory-limit-gb",
        type=float,
        help="leave out what needs more, apart from inputs and outputs; 2 on a CPU, else 80 %% of "
        "the device's memory",
    )
    parser.add_argument(
        "--minutes", type=float, help="start no case later; 9 on a GPU, else no limit"
    )
    return parser.parse_args(argv)


def cases(
    grids: list[int], windows: list[Window], names: tuple[str, ...], batch: int
) -> list[Case]:
    """All grids and windows, in both directions."""
    planned = []
    for window in windows:
        for grid in grids:
            # PyTorch compiles slowly: it gets windows after the first on one grid only.
            leave_out = {FLEX} if window != windows[0] and grid != 64 else set()
            some = tuple(name for name in names if name not in leave_out)
            for direction in DIRECTIONS:
                planned.append(Case(grid - grid % window.ratio, window, direction, batch, some))
    return planned


def acceptance_cases(names: tuple[str, ...], batch: int) -> list[Case]:
    """What the verdicts on this device need: see `report.verdicts`."""
    window = WINDOWS[0]
    if KERNEL not in names:
        return [Case(grid, window, "forward", batch, names) for grid in (48, 60, 96)]
    planned = [Case(64, window, direction, batch, names) for direction in DIRECTIONS]
    for direction in DIRECTIONS:
        for grid in FLAT_GRIDS:
            full = math.ceil(max(FLAT_GRIDS) ** 2 / grid**2)
            if full != batch:  # else it is one of the cases above or below
                planned.append(Case(grid, window, direction, full, (KERNEL, XLA)))
            elif grid != 64:
                planned.append(Case(grid, window, direction, full, names))
    return planned


def default_memory_limit() -> float:
    """Bytes: 2 GiB on a CPU, which may be shared; else most of what jax has of the device."""
    statistics_ = jax.devices()[0].memory_stats() or {}
    of_device = statistics_.get("bytes_limit")
    return 0.8 * of_device if of_device and jax.default_backend() != "cpu" else 2.0 * 2**30


def obstacles(setting: Setting) -> dict[str, str]:
    """Implementations that cannot run here, with the reason."""
    device = jax.devices()[0]
    found = {KERNEL: pallas_triton.obstacle(device, setting.dim), FLEX: flex.obstacle()}
    if compute_capability(device) is None:
        found["cudnn_global"] = "it needs an NVIDIA GPU"
    elif setting.dtype not in ("bfloat16", "float16"):
        found["cudnn_global"] = f"it takes bfloat16 and float16, not {setting.dtype}"
    return {name: reason for name, reason in found.items() if reason}


def measure(
    case: Case, setting: Setting, rates: bounds.Rates, skipped: list[str], failed: list[str]
) -> list[Result]:
    """Every implementation compiled, checked against the XLA form, then timed in turn.

    Implementations that need too much memory are listed in `skipped`, and those that raise or
    disagree in `failed`.
    """
    grid = case.grid, case.grid
    sizes = {"batch": case.batch, "heads": setting.heads, "dim": setting.dim}
    inputs = draw(grid, case.window, **sizes, dtype=setting.dtype)
    affordable = []
    for name in case.names:
        # Counted before compiling: the compiler itself would need a mask of that size.
        needed = least_temporaries(name, case, setting)
        if needed <= setting.memory_limit:
            affordable.append(name)
        else:
            skipped.append(f"{name} on {describe(case)}: {needed / 2**30:.1f} GiB of temporaries")

    prepared = compile_all(affordable, case, inputs)
    programs: dict[str, Program] = {}
    expected = None
    # The XLA form first: the others are compared with it.
    for name in sorted(prepared, key=lambda name: name != XLA):
        program = prepared[name]
        where = f"{name} on {describe(case)}"
        try:
            if isinstance(program, Exception):
                raise program
            if program.temporary > setting.memory_limit:
                needed = program.temporary / 2**30
                skipped.append(f"{where}: {needed:.1f} GiB of temporaries")
                continue
            if name not in GLOBAL:
                got = program.outputs()
                expected = expected or got
                error = largest_error(got, expected)
                # What disagrees is not timed. Written so that nan disagrees.
                if not error <= tolerance(setting.dtype):
                    failed.append(f"{where}: off by {error:.1e}")
                    continue
            applications = 1 if name == FLEX else busy_applications(program)
            if applications > 1:
                sets = copies(needed_of(inputs, case), applications)
                longer = compile_jax(function_of(name, case), sets)
                # The memory reported is that of one application.
                program = Program(longer.run, longer.outputs, applications, program.temporary)
            programs[name] = program
        except Exception as error:
            failed.append(f"{where}: {report.first_line(error)}")
    wall, cpu = time_in_turn(programs, setting.repeats)
    floors = bounds.floors(
        grid,
        case.window,
        **sizes,
        itemsize=jnp.dtype(setting.dtype).itemsize,
        direction=case.direction,
        rates=rates,
    )
    return [
        Result(
            grid=case.grid,
            window=report.window_name(case.window),
            direction=case.direction,
            batch=case.batch,
            implementation=name,
            applications=programs[name].applications,
            median_ms=1e3 * statistics.median(wall[name]),
            fastest_ms=1e3 * min(wall[name]),
            cpu_ms=1e3 * statistics.median(cpu[name]),
            temporary_mb=programs[name].temporary / 2**20,
            traffic_ms=1e3 * floors.traffic,
            bound_ms=1e3 * max(floors),
        )
        for name in case.names
        if name in programs
    ]


def compile_all(names: list[str], case: Case, inputs: Inputs) -> dict[str, Program | Exception]:
    """Each implementation compiled, or what it raised."""

    def prepare(name: str) -> Program | Exception:
        try:
            return compile_one(name, case, inputs)
        except Exception as error:  # of any kind: the other implementations are still measured
            return error

    # jax compiles in parallel, except on a CPU, where one compilation already uses many threads.
    by_jax = [name for name in names if name != FLEX]
    workers = 1 if jax.default_backend() == "cpu" else len(by_jax)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        prepared = dict(zip(by_jax, pool.map(prepare, by_jax), strict=True))
    return prepared | {name: prepare(name) for name in names if name not in by_jax}


def compile_one(name: str, case: Case, inputs: Inputs) -> Program:
    if name == FLEX:
        return flex.compile_flex(inputs, case.window, case.direction)
    return compile_jax(function_of(name, case), [needed_of(inputs, case)])


def function_of(name: str, case: Case) -> Callable[..., jax.Array]:
    """The attention, or the attention with its gradients by all three inputs."""
    window = case.window
    by_name: dict[str, Callable[..., jax.Array]] = {
        KERNEL: _ours(KERNEL, window),
        XLA: _ours(XLA, window),
        "gather": functools.partial(peers.gather_of_windows, window=window),
        "dense": functools.partial(peers.dense_masked, window=window),
        "naive_global": peers.naive_global,
        "cudnn_global": peers.cudnn_global,
    }
    attend = by_name[name]
    return attend if case.direction == "forward" else with_gradients(attend)


def _ours(implementation: str, window: Window) -> Callable[..., jax.Array]:
    sides = window.rows, window.columns
    return functools.partial(local_attention_2d, window=sides, implementation=implementation)


def needed_of(inputs: Inputs, case: Case) -> Inputs:
    """The inputs, without the cotangent where there is no backward pass."""
    return inputs[:3] if case.direction == "forward" else inputs


def least_temporaries(name: str, case: Case, setting: Setting) -> float:
    """Bytes that a peer writes at least: scores and weights, or the windows of keys and values."""
    cells, itemsize = case.grid**2, jnp.dtype(setting.dtype).itemsize
    queries = case.batch * setting.heads * cells
    if name in ("dense", "naive_global"):
        # The dense one masks its scores in float32.
        scores = 4 if name == "dense" else itemsize
        return float(queries * (cells // case.window.ratio**2) * (scores + itemsize))
    if name == "gather":
        return 2.0 * queries * case.window.num_keys * setting.dim * itemsize
    return 0.0


def describe(case: Case) -> str:
    name = f"{case.grid}x{case.grid}, {report.window_name(case.window)}, {case.direction}"
    return name if case.batch == 1 else f"{name}, batch {case.batch}"


if __name__ == "__main__":
    sys.exit(main())
