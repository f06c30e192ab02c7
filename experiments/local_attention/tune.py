"""Which block sizes are fastest on this GPU? Tries many and writes the best to the kernels' table.

    python -m experiments.local_attention.tune [--dtype bfloat16] [--dim 64 128] [--minutes 9]

For each kind of call (dtype, head dim, keys on the same grid or on a coarser one) and each of the
three kernels: compiles every candidate, discards those that fail or disagree with the XLA form,
times the rest in turn, and prints them. The best become an entry for this kind of device in
`pallas_kernels/local_attention/tuned.json`, which is read at import; nothing is tuned in a call.

Needs an NVIDIA GPU. `--interpret` runs the same steps on any device, on tiny grids, and writes
nothing.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.local_attention import report
from experiments.local_attention.programs import (
    Inputs,
    Program,
    compile_jax,
    copies,
    draw,
    largest_error,
    time_in_turn,
    tolerance,
)
from pallas_kernels.local_attention import blocks, pallas_triton, xla
from pallas_kernels.local_attention.blocks import BlockSizes, Entry, Launch
from pallas_kernels.local_attention.window import Window

KERNELS = ("forward", "dq", "dkv")
TILES = [(4, 4), (4, 8), (8, 8), (8, 16), (16, 8), (16, 16)]
# Applications in a call: enough for the fastest kernel to take longer than its launch.
_APPLICATIONS = 6


@dataclass(frozen=True)
class Kind:
    """What one entry of the table is for, and the call it is tuned on."""

    dtype: str
    dim: int
    window: Window
    grid: int
    heads: int

    def __str__(self) -> str:
        keys = "the same grid" if self.window.ratio == 1 else "a coarser grid"
        return (
            f"{self.dtype}, {self.heads} heads of {self.dim}, keys on {keys}: "
            f"{self.grid}x{self.grid}, {report.window_name(self.window)}"
        )

    def entry(self, device: str, best: BlockSizes) -> Entry:
        ratio = 1 if self.window.ratio == 1 else math.inf
        return Entry(device, jnp.dtype(self.dtype).itemsize, self.dim, ratio, best)


@dataclass(frozen=True)
class Trial:
    launch: Launch
    microseconds: float | None  # of the fastest repeat
    refused: str = ""  # why it was not timed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9, help="start no kind of call later")
    parser.add_argument("--out", type=Path, default=blocks.TUNED, help="the table to update")
    parser.add_argument(
        "--interpret", action="store_true", help="try the steps anywhere, write nothing"
    )
    arguments = parser.parse_args(argv)
    obstacles = [pallas_triton.obstacle(jax.devices()[0], dim) for dim in arguments.dim]
    obstacle = next(filter(None, obstacles), None)
    if obstacle and not arguments.interpret:
        print(f"tuning: {obstacle}; --interpret tries the steps without one", file=sys.stderr)
        return 2

    device = blocks.INTERPRETER if arguments.interpret else jax.devices()[0].device_kind
    print(f"{report.device_name()}, jax {jax.__version__}, {arguments.repeats} repeats", end="")
    print(", interpreted: these times mean nothing" if arguments.interpret else "")
    deadline = time.monotonic() + 60 * arguments.minutes
    for kind in kinds(arguments.dtype, arguments.dim, arguments.interpret):
        if time.monotonic() > deadline:
            print(f"\nskipped: {kind}: {arguments.minutes:g} minutes were over")
            continue
        print(f"\n{kind}")
        inputs, expected = data(kind)
        now = blocks.block_sizes(device, jnp.dtype(kind.dtype), kind.dim, kind.window.ratio)
        best = {}
        for kernel in KERNELS:
            used: Launch = getattr(now, kernel)
            launches = [used, *candidates(kernel, kind.dim, arguments.interpret)]
            sets = copies(inputs[kernel], 1 if arguments.interpret else _APPLICATIONS)
            trials = try_all(
                {
                    launch: function_of(kernel, kind, launch, arguments.interpret)
                    for launch in launches
                },
                sets,
                list(expected[kernel]),
                tolerance(kind.dtype),
                arguments.repeats,
            )
            print(table(kernel, trials, used), flush=True)
            if trials[0].microseconds is not None:
                best[kernel] = trials[0].launch
        if len(best) < len(KERNELS):
            print("no entry: a kernel has no candidate that works")
            continue
        entry = kind.entry(device, BlockSizes(**best))
        print(f"best: {as_json(entry)}")
        if not arguments.interpret:
            # At once: if this is ended early, the entries found so far are kept.
            write_entry(arguments.out, entry)
            print(f"wrote {arguments.out}")
    return 0


def kinds(dtypes: list[str], dims: list[int], interpret: bool) -> list[Kind]:
    """The published shapes: 48 heads of 64, or the same width in heads of another size."""
    if interpret:
        return [Kind(dtype, dim, Window(3, 3, ratio=2), 8, 1) for dtype in dtypes for dim in dims]
    return [
        Kind(dtype, dim, window, grid, max(1, 48 * 64 // dim))
        for dtype in dtypes
        for dim in dims
        for window, grid in ((Window(9, 9), 64), (Window(5, 5, ratio=3), 60))
    ]


def candidates(kernel: str, dim: int, interpret: bool) -> list[Launch]:
    """Launches with 16 to 128 scores and sums a thread, of its 255 registers."""
    if interpret:
        return [Launch(tile, 16, num_warps=4, num_stages=2) for tile in ((4, 4), (4, 8))]
    sums = 2 if kernel == "dkv" else 1
    found = []
    for tile in TILES:
        for block in (16, 32, 64, 128):
            for warps in (2, 4, 8):
                held = math.prod(tile) * (block + sums * dim) / (32 * warps)
                if 16 <= held <= 128:
                    found += [Launch(tile, block, warps, stages) for stages in (1, 2, 3)]
    return found


def data(kind: Kind) -> tuple[dict[str, Inputs], dict[str, Inputs]]:
    """Each kernel's inputs, and its outputs by the XLA form."""
    q, k, v, dout = draw(
        (kind.grid, kind.grid),
        kind.window,
        batch=1,
        heads=kind.heads,
        dim=kind.dim,
        dtype=kind.dtype,
    )
    attend = functools.partial(xla.local_attention, window=kind.window, scale=kind.dim**-0.5)

    @jax.jit
    def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        (out, lse), pull = jax.vjp(attend, q, k, v)
        dlse = jnp.zeros_like(lse)
        return out, lse, pull((dout, dlse)), pallas_triton.score_offsets(out, dout, dlse)

    out, lse, (dq, dk, dv), delta = by_xla(q, k, v, dout)
    backward = (q, k, v, dout, lse, delta)
    return (
        {"forward": (q, k, v), "dq": backward, "dkv": backward},
        {"forward": (out, lse), "dq": (dq,), "dkv": (dk, dv)},
    )


def function_of(kernel: str, kind: Kind, launch: Launch, interpret: bool) -> Callable[..., Any]:
    """One kernel with a launch."""
    by_name: dict[str, Callable[..., Any]] = {
        "forward": pallas_triton.forward,
        "dq": pallas_triton.query_gradient,
        "dkv": pallas_triton.key_gradients,
    }
    call = pallas_triton.Call(
        kind.window, kind.dim**-0.5, BlockSizes(launch, launch, launch), interpret
    )
    return functools.partial(by_name[kernel], call=call)


def try_all(
    functions: dict[Launch, Callable[..., Any]],
    sets: list[Inputs],
    expected: list[jax.Array],
    allowed: float,
    repeats: int,
) -> list[Trial]:
    """The fastest first; last those that fail or have a larger error than allowed."""

    def prepare(function: Callable[..., Any]) -> Program | str:
        try:
            program = compile_jax(function, sets)
            error = largest_error(program.outputs(), expected)
        except Exception as problem:  # of any kind: the others are still tried
            return report.first_line(problem)
        # Written so that nan is refused.
        return program if error <= allowed else f"off by {error:.1e}"

    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else 8) as pool:
        prepared = dict(zip(functions, pool.map(prepare, functions.values()), strict=True))
    working = {k: program for k, program in prepared.items() if isinstance(program, Program)}
    wall, _ = time_in_turn(working, repeats)
    trials = [Trial(launch, 1e6 * min(times)) for launch, times in wall.items()]
    refused = [Trial(k, None, why) for k, why in prepared.items() if isinstance(why, str)]
    return sorted(trials, key=lambda trial: trial.microseconds or 0) + refused


def table(kernel: str, trials: list[Trial], used: Launch) -> str:
    """A line a trial; the launch in use now is marked."""
    lines = [f"{kernel:<8}{'tile':>8} {'block':>6} {'warps':>6} {'stages':>7}"]
    for trial in trials:
        launch = trial.launch
        took = trial.refused or f"{trial.microseconds:.1f} us"
        mark = "  (in use)" if launch == used else ""
        lines.append(
            f"{'':<8}{launch.tile[0]:>5}x{launch.tile[1]:<2} {launch.block:>6} "
            f"{launch.num_warps:>6} {launch.num_stages:>7}  {took:>12}{mark}"
        )
    return "\n".join(lines)


def as_json(entry: Entry) -> str:
    """As `blocks.read_entries` reads it; a ratio of null fits any."""
    fields = entry._asdict()
    launches = asdict(fields.pop("blocks"))
    ratio = None if math.isinf(entry.ratio) else entry.ratio
    return json.dumps({**fields, "ratio": ratio, **launches})


def write_entry(path: Path, entry: Entry) -> None:
    """Adds an entry to the table, in place of one for the same kind."""
    others = [old for old in blocks.read_entries(path) if old[:4] != entry[:4]]
    lines = ",\n".join(as_json(e) for e in blocks.ordered([*others, entry]))
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    sys.exit(main())
