"""How fast is local attention on this device, beside what one would write instead?

    python -m experiments.local_attention.run [--quick | --acceptance] [--out DIR]

Prints a table; --out also writes results.json and plot.png there. See README.md for what to expect.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.local_attention import bounds, peers
from pallas_kernels import local_attention_2d
from pallas_kernels.local_attention import pallas_triton
from pallas_kernels.local_attention.window import Window

IMPLEMENTATIONS = ("xla",)
DIRECTIONS = ["forward", "forward+backward"]
WINDOWS = [Window(5, 5), Window(9, 5), Window(9, 9), Window(11, 11), Window(5, 5, ratio=3)]
GRIDS = [32, 48, 60, 64, 96, 128]


@dataclass(frozen=True)
class Setting:
    batch: int
    heads: int
    dim: int
    dtype: str
    repeats: int
    memory_limit: float  # bytes that an implementation may need beside its inputs and outputs


@dataclass(frozen=True)
class Result:
    grid: int
    window: str
    direction: str
    implementation: str
    median_ms: float
    fastest_ms: float
    cpu_ms: float  # of all threads, median: hardly moves when others use the machine
    temporary_mb: float
    bound_ms: float

    @property
    def case(self) -> tuple[int, str, str]:
        return self.grid, self.window, self.direction


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two small grids, two windows")
    size.add_argument("--acceptance", action="store_true", help="9x9 on 48, 60 and 96, forward")
    parser.add_argument("--grids", type=int, nargs="+", help="sides, instead of the usual ones")
    parser.add_argument("--out", type=Path, help="write results.json and plot.png in this folder")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--memory-limit-gb", type=float, default=2.0)
    arguments = parser.parse_args(argv)

    grids, windows, directions, repeats = GRIDS, WINDOWS, DIRECTIONS, 5
    if arguments.quick:
        grids, windows, repeats = [24, 36], [Window(9, 9), Window(5, 5, ratio=3)], 3
    if arguments.acceptance:
        grids, windows, directions, repeats = [48, 60, 96], [Window(9, 9)], ["forward"], 15
    grids = arguments.grids or grids
    on_cpu = jax.default_backend() == "cpu"
    setting = Setting(
        batch=arguments.batch,
        heads=arguments.heads,
        dim=arguments.dim,
        dtype=arguments.dtype or ("float32" if on_cpu else "bfloat16"),
        repeats=arguments.repeats or repeats,
        memory_limit=arguments.memory_limit_gb * 2**30,
    )
    rates = bounds.measure_rates(setting.dtype)
    print(
        f"{device_name()}, jax {jax.__version__}, {setting.dtype}, batch {setting.batch}, ", end=""
    )
    print(f"{setting.heads} heads of {setting.dim}, {setting.repeats} repeats")
    print(f"measured: {rates.flops / 1e9:.0f} GFLOP/s, copies {rates.bytes / 1e9:.1f} GB/s\n")

    results: list[Result] = []
    skipped: list[str] = []
    print(HEADER)
    for window in windows:
        for grid in grids:
            grid -= grid % window.ratio
            for direction in directions:
                measured = measure((grid, grid), window, direction, setting, rates, skipped)
                if measured:
                    print(table(measured), flush=True)
                results += measured
    for line in skipped:
        print(f"skipped: {line}")
    verdicts = acceptance(results)
    for name, (value, wanted) in verdicts.items():
        print(f"{name}: {value:.2f} (wanted {wanted})")
    if arguments.out:
        write(arguments.out, setting, rates, results, skipped, verdicts)


def measure(
    grid: tuple[int, int],
    window: Window,
    direction: str,
    setting: Setting,
    rates: bounds.Rates,
    skipped: list[str],
) -> list[Result]:
    """One case: every implementation compiled, checked against the first, then timed in turn."""
    inputs = draw(grid, window, setting)
    bound = bounds.bound_seconds(
        grid,
        window,
        batch=setting.batch,
        heads=setting.heads,
        dim=setting.dim,
        itemsize=jnp.dtype(setting.dtype).itemsize,
        direction=direction,
        rates=rates,
    )
    compiled = {}
    for name, attend in implementations(window).items():
        case = f"{name} on {grid[0]}x{grid[1]}, {window_name(window)}, {direction}"
        # Counted first: the compiler itself would need a mask of that size.
        needed = least_temporaries(name, grid, window, setting)
        if needed <= setting.memory_limit:
            candidate = compile_one(attend, direction, inputs)
            needed = temporaries(candidate)
        if needed <= setting.memory_limit:
            compiled[name] = candidate
        else:
            skipped.append(f"{case}: {needed / 2**30:.1f} GiB of temporaries")
    check_equal(compiled, inputs, setting.dtype)
    wall, cpu = time_in_turn(compiled, inputs, setting.repeats)
    return [
        Result(
            grid=grid[0],
            window=window_name(window),
            direction=direction,
            implementation=name,
            median_ms=1e3 * statistics.median(wall[name]),
            fastest_ms=1e3 * min(wall[name]),
            cpu_ms=1e3 * statistics.median(cpu[name]),
            temporary_mb=temporaries(program) / 2**20,
            bound_ms=1e3 * bound,
        )
        for name, program in compiled.items()
    ]


def implementations(window: Window) -> dict[str, Callable[..., jax.Array]]:
    """Ours first, then the peers, by the name they are printed under."""
    on_nvidia = pallas_triton.compute_capability(jax.devices()[0]) is not None
    kernels = ["pallas_triton"] if on_nvidia else []
    ours = {
        name: functools.partial(
            local_attention_2d, window=(window.rows, window.columns), implementation=name
        )
        for name in (*IMPLEMENTATIONS, *kernels)
    }
    return {
        **ours,
        "gather": functools.partial(peers.gather_of_windows, window=window),
        "dense": functools.partial(peers.dense_masked, window=window),
        "global": peers.global_attention,
    }


def least_temporaries(name: str, grid: tuple[int, int], window: Window, setting: Setting) -> float:
    """Bytes that a peer certainly writes: scores and weights, or the windows of keys and values."""
    queries = setting.batch * setting.heads * grid[0] * grid[1]
    if name in ("dense", "global"):
        return 2.0 * queries * (grid[0] * grid[1] // window.ratio**2) * 4
    if name == "gather":
        return 2.0 * queries * window.num_keys * setting.dim * jnp.dtype(setting.dtype).itemsize
    return 0.0


def draw(
    grid: tuple[int, int], window: Window, setting: Setting
) -> tuple[jax.Array, jax.Array, jax.Array]:
    normal = np.random.default_rng(0).standard_normal
    key_grid = grid[0] // window.ratio, grid[1] // window.ratio
    shapes = [(setting.batch, *g, setting.heads, setting.dim) for g in (grid, key_grid, key_grid)]
    q, k, v = (jnp.asarray(normal(shape, np.float32), setting.dtype) for shape in shapes)
    return q, k, v


def compile_one(
    attend: Callable[..., jax.Array], direction: str, inputs: tuple
) -> jax.stages.Compiled:
    """The attention alone, or its value and its gradients by all three inputs."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(out)

    return jax.jit(attend if direction == "forward" else both).lower(*inputs).compile()


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes that the program needs beside its inputs and outputs, as its compiler counts them."""
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{jax.default_backend()} does not tell how much memory a program needs")
    return int(analysis.temp_size_in_bytes)


def check_equal(compiled: dict, inputs: tuple, dtype: str) -> None:
    """Nobody is timed for another function: all but the global one must agree."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    expected = None
    for name, program in compiled.items():
        if name == "global":
            continue
        got = [np.asarray(a, np.float32) for a in jax.tree.leaves(program(*inputs))]
        expected = expected or got
        for a, e in zip(got, expected, strict=True):
            error = np.abs(a - e).max() / max(1.0, np.abs(e).max())
            if not error <= tolerance:
                raise RuntimeError(f"{name} is off by {error:.1e}, allowed are {tolerance:.1e}")


def time_in_turn(
    compiled: dict, inputs: tuple, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds by the clock and of all threads, a call; in turn, so that all share the weather."""
    calls = {}
    for name, program in compiled.items():
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        # Enough calls for some milliseconds, or a GPU's launches are what is timed.
        calls[name] = max(1, min(50, int(5e-3 / (time.perf_counter() - start))))
    wall: dict[str, list[float]] = {name: [] for name in compiled}
    cpu: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, program in compiled.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready([program(*inputs) for _ in range(calls[name])])
            wall[name].append((time.perf_counter() - start) / calls[name])
            cpu[name].append((time.process_time() - cpu_start) / calls[name])
    return wall, cpu


HEADER = (
    f"{'grid':>7} {'window':>9} {'direction':<17}{'':<14}{'fastest':>10} {'median':>10} "
    f"{'CPU':>10} {'of xla':>7} {'of bound':>9} {'temporary':>11}"
)


def table(results: list[Result]) -> str:
    """The ratios are of the fastest calls, which others on the machine disturb least."""
    first = results[0]
    return "\n".join(
        f"{r.grid:>3}x{r.grid:<3} {r.window:>9} {r.direction:<17}{r.implementation:<14}"
        f"{r.fastest_ms:>7.1f} ms {r.median_ms:>7.1f} ms {r.cpu_ms:>7.1f} ms "
        f"{r.fastest_ms / first.fastest_ms:>6.1f}x {r.fastest_ms / r.bound_ms:>8.1f}x "
        f"{r.temporary_mb:>8.0f} MB"
        for r in results
    )


def acceptance(results: list[Result]) -> dict[str, tuple[float, str]]:
    """The promised ratios, as far as this run has their cases: name -> (value, wanted)."""
    times = {(r.grid, r.implementation): r for r in results if r.case[1:] == ("9x9", "forward")}
    verdicts = {}
    for peer, wanted in (("gather", 5), ("dense", 3)):
        if (60, "xla") in times and (60, peer) in times:
            ratio = times[60, peer].fastest_ms / times[60, "xla"].fastest_ms
            verdicts[f"60x60, 9x9, forward: {peer} over xla"] = (ratio, f">= {wanted}")
    if (48, "xla") in times and (96, "xla") in times:
        ratio = times[96, "xla"].fastest_ms / times[48, "xla"].fastest_ms / 4
        verdicts["9x9, forward: xla's time a token at 96x96 over 48x48"] = (ratio, "<= 2")
    return verdicts


def write(
    folder: Path,
    setting: Setting,
    rates: bounds.Rates,
    results: list[Result],
    skipped: list[str],
    verdicts: dict[str, tuple[float, str]],
) -> None:
    record = {
        "device": device_name(),
        "jax": jax.__version__,
        "setting": asdict(setting),
        "rates": asdict(rates),
        "acceptance": {name: {"value": v, "wanted": w} for name, (v, w) in verdicts.items()},
        "results": [asdict(result) for result in results],
        "skipped": skipped,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {folder / 'results.json'}")
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [d for d in DIRECTIONS if any(r.direction == d for r in results)]
    size = (5 * len(measured) + 1, 4)
    figure, (axes,) = plt.subplots(
        1, len(measured), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, direction in zip(axes, measured, strict=True):
        rows = [r for r in results if r.window == "9x9" and r.direction == direction]
        for name in dict.fromkeys(r.implementation for r in rows):
            points = [(r.grid, r.fastest_ms) for r in rows if r.implementation == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        floor = sorted({(r.grid, r.bound_ms) for r in rows})
        if floor:
            axis.plot(*zip(*floor, strict=True), "k:", label="bound")
        axis.set(xscale="log", yscale="log", title=f"9x9, {direction}", xlabel="side of the grid")
        axis.set_xticks([g for g, _ in floor], [str(g) for g, _ in floor], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{device_name()}, {setting.dtype}, {setting.heads} heads of {setting.dim}")
    figure.savefig(folder / "plot.png", dpi=120)
    plt.close(figure)
    print(f"wrote {folder / 'plot.png'}")


def window_name(window: Window) -> str:
    return f"{window.rows}x{window.columns}" + (f" / {window.ratio}" if window.ratio > 1 else "")


def device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


if __name__ == "__main__":
    main()
