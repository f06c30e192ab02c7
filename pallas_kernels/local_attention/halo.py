"""Which cells a kernel's program owns, which cells it loads, and which pairs see each other.

A program owns a tile of one grid: queries, or keys for the gradients by keys and values. It walks
in blocks over the extent: the rectangle of the other grid that holds every cell its tile can see.
This file computes both by arithmetic on traced int32 indices, so that a kernel is only loads,
products and stores.

Each cell has a parent cell in the key grid. A key is its own parent; `ratio` x `ratio` queries
share one. Visibility depends on parents alone, except for a causal window's raster order.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.local_attention.window import Window

Pair = tuple[int, int]
Interval = tuple[jax.Array, jax.Array]  # first and last, both included


@dataclass(frozen=True)
class Halo:
    """Tiles of one grid, and the blocks of the other grid that each tile walks over.

    Build it with `query_tiles` or `key_tiles`.
    """

    tile: Pair  # rows and columns of cells that a program owns
    block: int  # cells of the other grid that it loads in a step
    grid: Pair  # the grid cut into tiles
    walked_grid: Pair  # the other grid
    ratio: int  # cells of `grid` that share a parent, along one axis
    walked_ratio: int  # the same for `walked_grid`
    sight: tuple[Pair, Pair]  # parents seen before and after a cell's own: rows, columns
    order: int  # causal: 1 hides walked cells later in raster order, -1 earlier ones, else 0

    @classmethod
    def query_tiles(cls, window: Window, grid: Pair, query_tile: Pair, key_block: int) -> "Halo":
        """Tiles of queries that walk over keys; `grid` is the queries'."""
        key_grid = grid[0] // window.ratio, grid[1] // window.ratio
        order = int(window.causal)
        return cls(query_tile, key_block, grid, key_grid, window.ratio, 1, window.sight, order)

    @classmethod
    def key_tiles(cls, window: Window, grid: Pair, key_tile: Pair, query_block: int) -> "Halo":
        """Tiles of keys that walk over queries, in the reflected window; `grid` is the queries'."""
        key_grid = grid[0] // window.ratio, grid[1] // window.ratio
        rows, columns = ((after, before) for before, after in window.sight)
        order = -int(window.causal)
        return cls(key_tile, query_block, key_grid, grid, 1, window.ratio, (rows, columns), order)

    @property
    def counts(self) -> Pair:
        """Tiles down and across the grid; the last ones may stick out of it."""
        return -(-self.grid[0] // self.tile[0]), -(-self.grid[1] // self.tile[1])

    @property
    def divides(self) -> bool:
        """Whether no tile sticks out of the grid."""
        return self.grid[0] % self.tile[0] == 0 and self.grid[1] % self.tile[1] == 0

    @property
    def parents(self) -> Pair:
        """Rows and columns of the grid of parents, which is the key grid."""
        return self.grid[0] // self.ratio, self.grid[1] // self.ratio

    @property
    def extent(self) -> Pair:
        """Rows and columns of parents that hold every cell a tile sees, for every tile."""
        rows, columns = (
            min(size, (side + self.ratio - 2) // self.ratio + 1 + before + after)
            for size, side, (before, after) in zip(self.parents, self.tile, self.sight, strict=True)
        )
        return rows, columns

    @property
    def num_walked(self) -> int:
        """Cells of the walked grid in the extent."""
        return math.prod(self.extent) * self.walked_ratio**2

    @property
    def steps(self) -> int:
        """Blocks that cover the extent."""
        return -(-self.num_walked // self.block)

    @property
    def pads(self) -> bool:
        """Whether the last block goes past the extent's end."""
        return self.num_walked % self.block != 0

    @property
    def fits_bits(self) -> bool:
        """Whether a bit for each row and column of the extent, and one for pads, fit in a word."""
        return sum(self.extent) + self.pads <= 32

    def place(self, program: jax.Array) -> "Place":
        """The tile with the number `program` (int32 scalar, raster order) and its extent."""
        first_cell = (
            _divide(program, self.counts[1]) * self.tile[0],
            _remainder(program, self.counts[1]) * self.tile[1],
        )
        # The extent is moved into the grid, where it still holds all cells in sight. So every cell
        # of it exists, and a load needs no check against the border.
        row, column = (
            jnp.clip(_divide(first_cell[axis], self.ratio) - self.sight[axis][0], 0, room)
            for axis in (0, 1)
            for room in [self.parents[axis] - self.extent[axis]]
        )
        return Place(self, first_cell, (row, column))


@dataclass(frozen=True)
class TileCells:
    """The cells that a program owns; arrays [tile rows * tile columns].

    `index` is the place in the flattened grid (int32), past its end where the cell does not exist
    (`exists`, bool). `rows` and `columns` are the parents seen, counted from the extent's first.
    """

    index: jax.Array
    exists: jax.Array
    rows: Interval
    columns: Interval
    unseen: jax.Array | None  # the same as bits, see `hidden`


@dataclass(frozen=True)
class BlockCells:
    """The cells that a step loads; arrays int32 [block].

    `index` is the place in the flattened walked grid, always inside it. `row` and `column` are the
    parent, counted from the extent's first; a cell past the extent's end has a row that no cell
    sees.
    """

    index: jax.Array
    row: jax.Array
    column: jax.Array
    bits: jax.Array | None  # the same as bits, see `hidden`


@dataclass(frozen=True)
class Place:
    """One tile of a halo: its first cell, and the first parent of its extent (int32 scalars)."""

    halo: Halo
    first_cell: tuple[jax.Array, jax.Array]
    first_parent: tuple[jax.Array, jax.Array]

    def tile(self) -> TileCells:
        """The cells of the tile."""
        halo = self.halo
        n = jnp.arange(math.prod(halo.tile), dtype=jnp.int32)
        row = self.first_cell[0] + _divide(n, halo.tile[1])
        column = self.first_cell[1] + _remainder(n, halo.tile[1])
        exists = (row < halo.grid[0]) & (column < halo.grid[1])
        index = jnp.where(exists, row * halo.grid[1] + column, math.prod(halo.grid))
        seen = []
        for axis, cell in enumerate((row, column)):
            before, after = halo.sight[axis]
            parent = _divide(cell, halo.ratio) - self.first_parent[axis]
            last = halo.extent[axis] - 1
            seen.append((jnp.maximum(parent - before, 0), jnp.minimum(parent + after, last)))
        rows, columns = seen
        unseen = None
        if halo.fits_bits:
            width = halo.extent[1]
            # Bits above the extent's rows stay set, so no cell sees pads.
            unseen = (~_ones(columns) & ((1 << width) - 1)) | (~_ones(rows) << width)
        return TileCells(index, exists, rows, columns, unseen)

    def block(self, step: jax.Array | int) -> BlockCells:
        """The cells of the extent that a step loads."""
        halo, ratio = self.halo, self.halo.walked_ratio
        n = step * halo.block + jnp.arange(halo.block, dtype=jnp.int32)
        width = halo.extent[1] * ratio
        row, column = _divide(n, width), _remainder(n, width)
        parent_row, parent_column = _divide(row, ratio), _divide(column, ratio)
        if halo.pads:
            # Pads load the extent's last row, but count as one row below it.
            parent_row = jnp.minimum(parent_row, halo.extent[0])
            row = jnp.minimum(row, halo.extent[0] * ratio - 1)
        corner = [parent * ratio for parent in self.first_parent]
        first = corner[0] * halo.walked_grid[1] + corner[1]
        index = first + row * halo.walked_grid[1] + column
        bits = None
        if halo.fits_bits:
            one = jnp.int32(1)
            bits = (one << parent_column) | (one << (halo.extent[1] + parent_row))
        return BlockCells(index, parent_row, parent_column, bits)


def hidden(halo: Halo, tile: TileCells, block: BlockCells) -> jax.Array:
    """Which pairs do not see each other: bool [tile cells, block cells].

    Bit masks, where they fit, cost one logic operation a pair instead of four comparisons. For
    sm_90a, bfloat16, heads of 64, 60x60, 9x9, the compile gate counts, as instructions in the loop
    and registers a thread:

    |          | forward   | dq       | dkv       |
    | bits     | 507 / 122 | 282 / 94 | 317 / 144 |
    | compared | 543 / 128 | 295 / 94 | 337 / 145 |
    """
    if tile.unseen is not None and block.bits is not None:
        out = (tile.unseen[:, None] & block.bits[None, :]) != 0
    else:
        out = _outside(block.row, tile.rows) | _outside(block.column, tile.columns)
    if halo.order:
        index, walked_index = tile.index[:, None], block.index[None, :]
        out |= (walked_index > index) if halo.order > 0 else (walked_index < index)
    return out


def _outside(cell: jax.Array, interval: Interval) -> jax.Array:
    """Which cells [block] are outside which intervals [tile]: bool [tile, block]."""
    first, last = interval
    return (cell[None, :] < first[:, None]) | (cell[None, :] > last[:, None])


def _ones(interval: Interval) -> jax.Array:
    """Words with the bits from first to last set; 0 <= first, last < 31."""
    first, last = interval
    one = jnp.int32(1)
    # A cell out of the grid may see nothing: its last parent is before its first.
    below = jnp.minimum(first, 31)
    return ((one << (last + 1)) - 1) & ~((one << below) - 1)


# jax.lax, because `//` and `%` of jnp add corrections for negative numbers.
def _divide(cells: jax.Array, by: int) -> jax.Array:
    return jax.lax.div(cells, np.int32(by))


def _remainder(cells: jax.Array, by: int) -> jax.Array:
    return jax.lax.rem(cells, np.int32(by))
