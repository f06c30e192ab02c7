"""Block sizes of the GPU kernels: one table, by device, dtype, head dim and ratio.

Nothing is tuned at import or in a call. `experiments/local_attention/tune.py` measures entries on a
device and writes them to `tuned.json`. The entries below were chosen by the register and
instruction counts of `experiments/local_attention/compile_gate.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

INTERPRETER = "interpreter"
TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Launch:
    """How one kernel runs.

    A program owns `tile` cells (rows, columns) and loads `block` cells of the other grid a step.
    It has `num_warps` warps of 32 threads and pipelines `num_stages` steps. Raises ValueError
    unless tile and block each hold a power of two of at least 16 cells.
    """

    tile: tuple[int, int]
    block: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, n in (("tile", math.prod(self.tile)), ("block", self.block)):
            if n < 16 or n & (n - 1):
                raise ValueError(f"{name} must hold a power of two of at least 16 cells, got {n}")


@dataclass(frozen=True)
class BlockSizes:
    """Launches of the three kernels: forward, dq (tiles of queries), dkv (tiles of keys)."""

    forward: Launch
    dq: Launch
    dkv: Launch


class Entry(NamedTuple):
    """Block sizes for calls up to a size."""

    device: str  # a prefix of the device kind; "" fits any
    itemsize: int  # at most so many bytes a number
    dim: int  # at most this head dim
    ratio: float  # at most this ratio of the query grid to the key grid
    blocks: BlockSizes


def read_entries(path: Path) -> list[Entry]:
    """Entries as `tune.py` writes them; a ratio of null fits any."""

    def launch(fields: dict[str, Any]) -> Launch:
        return Launch(**{**fields, "tile": tuple(fields["tile"])})

    return [
        Entry(
            entry["device"],
            entry["itemsize"],
            entry["dim"],
            math.inf if entry["ratio"] is None else entry["ratio"],
            BlockSizes(*(launch(entry[name]) for name in ("forward", "dq", "dkv"))),
        )
        for entry in json.loads(path.read_text())
    ]


def _same(launch: Launch) -> BlockSizes:
    return BlockSizes(launch, launch, launch)


_WIDE = Launch((8, 8), 64, num_warps=4, num_stages=2)
_NARROW = Launch((8, 8), 32, num_warps=4, num_stages=2)
# ratio² times as many queries see a key of a coarser grid. With large tiles of keys, most of a
# program's pairs are hidden, and there are too few programs.
_FEW_KEYS = Launch((4, 4), 32, num_warps=2, num_stages=2)
_MANY_WARPS = Launch((8, 8), 32, num_warps=8, num_stages=2)
# Small, so that small test cases have several tiles and steps.
_INTERPRETED = _same(Launch((4, 4), 16, num_warps=4, num_stages=2))
UNTUNED = [
    Entry("", 2, 64, 1, BlockSizes(forward=_WIDE, dq=_NARROW, dkv=_NARROW)),
    Entry("", 2, 64, math.inf, BlockSizes(forward=_WIDE, dq=_NARROW, dkv=_FEW_KEYS)),
    Entry("", 2, 128, 1, BlockSizes(forward=_NARROW, dq=_NARROW, dkv=_MANY_WARPS)),
    Entry("", 2, 128, math.inf, BlockSizes(forward=_NARROW, dq=_NARROW, dkv=_FEW_KEYS)),
    # Float32 is multiplied without tensor cores and fills twice the registers.
    Entry("", 4, 64, 1, _same(Launch((4, 8), 32, num_warps=4, num_stages=2))),
    Entry("", 4, 128, math.inf, _same(Launch((4, 4), 32, num_warps=4, num_stages=2))),
]


def ordered(entries: list[Entry]) -> list[Entry]:
    """Sorted: the smallest limits first, and a device's own entries before those for any device."""
    return sorted(entries, key=lambda e: (e.itemsize, e.dim, e.ratio, e.device == ""))


TABLE = ordered(read_entries(TUNED) + UNTUNED)


def block_sizes(
    device_kind: str, dtype: jnp.dtype, dim: int, ratio: int, table: list[Entry] = TABLE
) -> BlockSizes:
    """The first entry of the table that fits.

    `device_kind` is `jax.Device.device_kind`, or INTERPRETER. Raises ValueError for a dim over 128.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for entry in table:
        fits = itemsize <= entry.itemsize and dim <= entry.dim and ratio <= entry.ratio
        if fits and device_kind.startswith(entry.device):
            return _INTERPRETED if device_kind == INTERPRETER else entry.blocks
    raise ValueError(
        f"block sizes are for head dims up to 128, got {dim}, and for at most 4 bytes "
        f"a number, got {dtype}"
    )
