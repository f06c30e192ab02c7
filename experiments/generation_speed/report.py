"""The record of a run: seconds, and how they compare; as a table and as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGES = ["stage1_batch1", "stage1_batch4", "stage1_batch16", "direct", "iterative", "whole"]
PEERS = ["published", "best_torch", "one_token_at_a_time", "sliding_window"]
ROWS = ["ours", *PEERS]
# These make the fine cells, in place of direct and iterative super-resolution together.
_ONE_BY_ONE = ("one_token_at_a_time", "sliding_window")
_OF_A_PICTURE = ("stage1_batch1", "direct", "iterative")


def record(
    found: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, float], attention: dict[str, float]
) -> dict[str, Any]:
    """Figures of `run.measure`, None where there is none.

    `seconds`, `cpu_seconds`: by row and stage; `whole` is a picture, one stage after another. What
    decodes one by one has `whole` only: all cells, one token at a time; with the sliding window the
    fine cells, after our stage 1. `times_faster`: a row's seconds over ours; against those two,
    `direct` and `iterative` are our stage alone, which makes as many cells. `times_bound`: ours
    over the bound.
    """
    wall = {row: _whole(row, {s: t.wall for s, t in found[row].items()}, found) for row in ROWS}
    ours = wall["ours"]

    def times_faster(row: str, stage: str) -> float | None:
        theirs = wall[row][stage]
        if row in _ONE_BY_ONE and stage in ("direct", "iterative"):
            theirs = found[row]["whole"].wall
        mine = ours[stage]
        return None if theirs is None or mine is None else round(theirs / mine, 2)

    return {
        "seconds": wall,
        "cpu_seconds": {
            row: {stage: round(times.cpu, 3) for stage, times in found[row].items()} for row in ROWS
        },
        "bound_seconds": {stage: round(bounds[stage], 3) for stage in STAGES},
        "times_faster": {row: {s: times_faster(row, s) for s in STAGES} for row in PEERS},
        "times_bound": {
            stage: None if seconds is None else round(seconds / bounds[stage], 2)
            for stage, seconds in ours.items()
        },
        "local_attention_ms": attention,
        "local_attention_times_faster": {
            name: round(theirs / attention["ours"], 2)
            for name, theirs in attention.items()
            if name != "ours"
        },
    }


def _whole(
    row: str, seconds: dict[str, float], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    whole = seconds.get("whole")
    if whole is None and all(stage in seconds for stage in _OF_A_PICTURE):
        whole = sum(seconds[stage] for stage in _OF_A_PICTURE)
    if row == "sliding_window" and whole is not None:
        base = found["ours"].get("stage1_batch1")
        whole = None if base is None else whole + base.wall
    of_each: dict[str, float | None] = {stage: seconds.get(stage) for stage in STAGES}
    of_each["whole"] = whole
    return {s: None if t is None else round(t, 3) for s, t in of_each.items()}


def table(found: dict[str, Any]) -> str:
    """Seconds (CPU seconds) of each row and stage, then ours against each."""

    def line(name: str, cells: Any) -> str:
        return f"{name:<22}" + "".join(f"{cell:>17}" for cell in cells)

    def show(value: float | None, form: str = "{:.2f}") -> str:
        return "-" if value is None else form.format(value)

    rates = found["rates"]
    lines = [
        f"{found['device']}, jax {found['jax']}, PyTorch {found['torch'] or '-'}, float32,"
        f" {rates['gigabytes_a_second']} GB/s, {rates['gigaflops']} GFLOP/s",
        line("seconds (of CPU)", STAGES),
    ]
    for row, of_row in found["seconds"].items():
        cpu = found["cpu_seconds"][row]
        cells = (
            show(of_row[s]) + (f" ({cpu[s]:.1f})" if s in cpu and s in of_row else "")
            for s in STAGES
        )
        lines.append(line(row, cells))
    lines.append(line("bound", (show(found["bound_seconds"][s]) for s in STAGES)))
    lines.append("times faster than")
    for row, of_row in found["times_faster"].items():
        lines.append(line(row, (show(of_row[s]) for s in STAGES)))
    lines.append(line("times the bound", (show(found["times_bound"][s]) for s in STAGES)))
    attention = ", ".join(f"{name} {ms} ms" for name, ms in found["local_attention_ms"].items())
    return "\n".join([*lines, f"local attention, 9x9: {attention}"])


def plot(found: dict[str, Any], path: Path) -> None:
    """Seconds of each stage, a bar for each row and one for the bound, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = found["seconds"] | {"bound": found["bound_seconds"]}
    figure, axes = pyplot.subplots(figsize=(10, 4))
    width = 0.8 / len(rows)
    for number, (row, of_row) in enumerate(rows.items()):
        bars = [(at, of_row[s]) for at, s in enumerate(STAGES) if of_row[s] is not None]
        places = [at + width * (number - (len(rows) - 1) / 2) for at, _ in bars]
        axes.bar(places, [seconds for _, seconds in bars], width, label=row.replace("_", " "))
    axes.set_xticks(range(len(STAGES)), [stage.replace("_", " ") for stage in STAGES])
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
