"""Do the kernels agree with XLA on this GPU, and are they faster? Writes the record for "auto".

    python -m experiments.local_attention.accept [--dtype bfloat16 float32] [--dim 64] [--minutes 9]

For each dtype and head dim, with keys on the same grid and on a coarser one: checks the kernels
against the XLA form and times both, forward and with gradients, on several grids and windows. The
outcome becomes a record for this kind of device in
`pallas_kernels/local_attention/accepted.json`. `implementation="auto"` takes the kernels where a
record says that they agree and are faster in every case. Exits with 1 if one disagrees or fails.

Needs an NVIDIA GPU.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax

from experiments.local_attention import bounds, report, run
from experiments.local_attention.report import Setting
from pallas_kernels.local_attention import pallas_triton
from pallas_kernels.local_attention.acceptance import ACCEPTED, Kind, Record, read_records
from pallas_kernels.local_attention.window import Window

SAME_GRID = [(64, Window(9, 9)), (64, Window(5, 5)), (32, Window(9, 9)), (60, Window(9, 5))]
COARSE_KEYS = [(60, Window(5, 5, ratio=3)), (48, Window(3, 3, ratio=2))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--dim", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9, help="start no kind of call later")
    parser.add_argument("--out", type=Path, default=ACCEPTED, help="the records to update")
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    obstacles = [pallas_triton.obstacle(device, dim) for dim in arguments.dim]
    obstacle = next(filter(None, obstacles), None)
    if obstacle:
        print(f"acceptance: {obstacle}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    problems: list[str] = []
    for dtype in arguments.dtype:
        rates = bounds.measure_rates(dtype)
        for dim in arguments.dim:
            setting = Setting(
                batch=1,
                heads=max(1, 48 * 64 // dim),
                dim=dim,
                dtype=dtype,
                repeats=arguments.repeats,
                memory_limit=run.default_memory_limit(),
            )
            for coarse_keys in (False, True):
                kind = Kind(device.device_kind, dtype, dim, coarse_keys)
                if time.monotonic() > deadline:
                    print(f"skipped: {kind}: {arguments.minutes:g} minutes were over")
                    continue
                record, found = judge(kind, setting, rates)
                problems += found
                print("\n".join([*found, as_json(record)]), flush=True)
                # At once: if this is ended early, the records found so far are kept.
                write_record(arguments.out, record)
    return int(bool(problems))


def judge(kind: Kind, setting: Setting, rates: bounds.Rates) -> tuple[Record, list[str]]:
    """The record of a kind of call, and what failed, disagreed or did not fit in memory."""
    problems: list[str] = []
    slowest = {}
    for direction in run.DIRECTIONS:
        ratios = []
        for grid, window in COARSE_KEYS if kind.coarse_keys else SAME_GRID:
            case = run.Case(grid, window, direction, setting.batch, (run.KERNEL, run.XLA))
            results = run.measure(case, setting, rates, problems, problems)
            if results:
                print(report.table(results), flush=True)
            times = {r.implementation: r.fastest_ms for r in results}
            measured = run.KERNEL in times and run.XLA in times
            ratios.append(times[run.XLA] / times[run.KERNEL] if measured else 0.0)
        slowest[direction] = min(ratios)
    forward, gradients = (slowest[direction] for direction in run.DIRECTIONS)
    return Record(kind, not problems, forward, gradients, jax.__version__), problems


def as_json(record: Record) -> str:
    """As `acceptance.read_records` reads it."""
    return json.dumps({**asdict(record), "kind": record.kind._asdict()})


def write_record(path: Path, record: Record) -> None:
    """Adds a record, in place of one for the same kind."""
    others = read_records(path) if path.exists() else []
    records = sorted([*(r for r in others if r.kind != record.kind), record], key=lambda r: r.kind)
    path.write_text("[\n" + ",\n".join(map(as_json, records)) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
