"""The benchmark's table, verdicts, record and plot."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.local_attention import bounds
from pallas_kernels.local_attention.window import Window


@dataclass(frozen=True)
class Setting:
    batch: int
    heads: int
    dim: int
    dtype: str
    repeats: int
    memory_limit: float  # bytes an implementation may need, apart from inputs and outputs


@dataclass(frozen=True)
class Result:
    grid: int
    window: str
    direction: str
    batch: int
    implementation: str
    applications: int  # in one call; the times are those of one
    median_ms: float
    fastest_ms: float
    cpu_ms: float  # of all threads, median: hardly depends on what else the machine does
    temporary_mb: float
    traffic_ms: float  # each array touched once, at the measured copy rate
    bound_ms: float  # the larger of traffic_ms and visible products at the measured matrix rate


@dataclass(frozen=True)
class Verdict:
    name: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"

    def __str__(self) -> str:
        said = "holds" if self.holds else "DOES NOT HOLD"
        return f"{self.name}: {self.value:.3g} (wanted {self.wanted}): {said}"


def heading(setting: Setting, rates: bounds.Rates) -> str:
    return (
        f"{device_name()}, jax {jax.__version__}, {setting.dtype}, batch {setting.batch}, "
        f"{setting.heads} heads of {setting.dim}, {setting.repeats} repeats\n"
        f"measured: {rates.flops / 1e9:.0f} GFLOP/s, copies {rates.bytes / 1e9:.1f} GB/s"
    )


HEADER = (
    f"{'grid':>7} {'window':>9} {'direction':<17}{'batch':>5} {'':<15}{'fastest':>12} "
    f"{'median':>12} {'CPU':>12} {'of first':>8} {'of bound':>9} {'temporary':>11}"
)


def table(results: list[Result]) -> str:
    """Ratios are between the fastest calls, which other work on the machine disturbs least."""
    first = results[0]
    return "\n".join(
        f"{r.grid:>3}x{r.grid:<3} {r.window:>9} {r.direction:<17}{r.batch:>5} "
        f"{r.implementation:<15}{r.fastest_ms:>9.3f} ms {r.median_ms:>9.3f} ms "
        f"{r.cpu_ms:>9.3f} ms {r.fastest_ms / first.fastest_ms:>7.1f}x "
        f"{r.fastest_ms / r.bound_ms:>8.1f}x {r.temporary_mb:>8.0f} MB"
        for r in results
    )


def verdicts(results: list[Result], flat_grids: list[int]) -> list[Verdict]:
    """The promised ratios for which this run has the cases; all 9x9.

    With the kernels they are those for an H200 with 48 heads of 64 in bfloat16, else a CPU's.
    """
    kernels = any(r.implementation == "pallas_triton" for r in results)
    return _of_kernels(results, flat_grids) if kernels else _of_xla(results)


def _of_kernels(results: list[Result], flat_grids: list[int]) -> list[Verdict]:
    rows = [r for r in results if r.window == "9x9"]
    found = []
    for direction, naive_times, floors in (("forward", 40, 2), ("forward+backward", 25, 3)):
        # A grid may occur again with a larger batch: the first one counts.
        at_64 = [r for r in rows if (r.grid, r.direction) == (64, direction)]
        of = {r.implementation: r for r in reversed(at_64)}
        case = f"64x64, 9x9, {direction}"
        ours = of.get("pallas_triton")
        if ours is None:
            continue
        if naive := of.get("naive_global"):
            ratio = naive.fastest_ms / ours.fastest_ms
            found.append(Verdict(f"{case}: naive global over ours", ratio, naive_times))
            memory = 100 * ours.temporary_mb / naive.temporary_mb
            found.append(Verdict(f"{case}: our memory, % of naive's", memory, 1, at_most=True))
        if cudnn := of.get("cudnn_global"):
            ratio = cudnn.fastest_ms / ours.fastest_ms
            found.append(Verdict(f"{case}: cuDNN global over ours", ratio, 6))
        floor = ours.fastest_ms / ours.traffic_ms
        found.append(Verdict(f"{case}: ours over the traffic floor", floor, floors, at_most=True))
    for direction in ("forward", "forward+backward"):
        cells = max(flat_grids) ** 2
        times = {
            r.grid: r.fastest_ms / (r.batch * r.grid**2)
            for r in rows
            if (r.implementation, r.direction) == ("pallas_triton", direction)
            and r.grid in flat_grids
            and r.batch * r.grid**2 >= cells
        }
        if len(times) == len(flat_grids):
            spread = max(times.values()) / min(times.values())
            sides = f"{min(flat_grids)}x{min(flat_grids)} to {max(flat_grids)}x{max(flat_grids)}"
            name = f"{sides}, 9x9, {direction}: slowest token over fastest"
            found.append(Verdict(name, spread, 1.1, at_most=True))
    return found


def _of_xla(results: list[Result]) -> list[Verdict]:
    rows = [r for r in results if (r.window, r.direction) == ("9x9", "forward")]
    times = {(r.grid, r.implementation): r.fastest_ms for r in rows}
    found = []
    for peer, wanted in (("gather", 5), ("dense", 3)):
        if (60, "xla") in times and (60, peer) in times:
            ratio = times[60, peer] / times[60, "xla"]
            found.append(Verdict(f"60x60, 9x9, forward: {peer} over xla", ratio, wanted))
    if (48, "xla") in times and (96, "xla") in times:
        ratio = times[96, "xla"] / times[48, "xla"] / 4
        name = "9x9, forward: xla's time a token at 96x96 over 48x48"
        found.append(Verdict(name, ratio, 2, at_most=True))
    return found


def record(
    setting: Setting,
    rates: bounds.Rates,
    results: list[Result],
    skipped: list[str],
    failed: list[str],
    absent: dict[str, str],
    verdicts: list[Verdict],
) -> dict[str, Any]:
    """All measurements, and the reasons for those that are missing."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "setting": asdict(setting),
        "rates": asdict(rates),
        "verdicts": [
            {"name": v.name, "value": v.value, "wanted": v.wanted, "holds": v.holds}
            for v in verdicts
        ],
        "results": [asdict(result) for result in results],
        "absent": absent,
        "skipped": skipped,
        "failed": failed,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


def write_plot(path: Path, setting: Setting, results: list[Result]) -> None:
    title = f"{device_name()}, {setting.dtype}, {setting.heads} heads of {setting.dim}"
    if plot([r for r in results if r.batch == setting.batch], title, path):
        print(f"wrote {path}")
    else:
        print("no plot: matplotlib is not installed")


# Each implementation has one colour in every plot; dashed lines may cover another.
_LOOKS = {
    "pallas_triton": ("C3", "o-"),
    "xla": ("C0", "o-"),
    "gather": ("C2", "o-"),
    "dense": ("C1", "o-"),
    "naive_global": ("C4", "s--"),
    "cudnn_global": ("C5", "s--"),
    "flex_attention": ("C6", "^-"),
}


def plot(results: list[Result], title: str, path: Path) -> bool:
    """Times above, memory below, at 9x9 by grid; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in results if r.window == "9x9"]
    directions = list(dict.fromkeys(r.direction for r in rows)) or ["forward"]
    figure, axes = plt.subplots(
        2,
        len(directions),
        figsize=(4.5 * len(directions) + 2, 6.5),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    grids = sorted({r.grid for r in rows})
    for column, direction in enumerate(directions):
        above, below = axes[:, column]
        shown = [r for r in rows if r.direction == direction]
        for name in [name for name in _LOOKS if any(r.implementation == name for r in shown)]:
            mine = sorted(
                (r.grid, r.fastest_ms, r.temporary_mb) for r in shown if r.implementation == name
            )
            sides, times, memory = zip(*mine, strict=True)
            colour, line = _LOOKS[name]
            above.plot(sides, times, line, color=colour, label=name.replace("_", " "))
            # The axis is logarithmic, so zero cannot be drawn.
            below.plot(sides, [max(m, 0.01) for m in memory], line, color=colour)
        floor = sorted({(r.grid, r.bound_ms) for r in shown})
        if floor:
            above.plot(*zip(*floor, strict=True), "k:", label="bound")
        above.set_title(f"9x9, {direction}")
        below.set_xlabel("side of the grid")
        for axis in (above, below):
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.set_xticks(grids, [str(g) for g in grids], fontsize=8)
            axis.minorticks_off()
            axis.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("extra memory, MB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def window_name(window: Window) -> str:
    return f"{window.rows}x{window.columns}" + (f" / {window.ratio}" if window.ratio > 1 else "")


def first_line(error: Exception) -> str:
    """One line of at most 160 characters."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
