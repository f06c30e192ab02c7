"""Which cells one program of a kernel owns, which it must meet, and which pairs see each other.

A kernel's program owns a tile of cells of one grid (queries; or keys, for their gradients) and
walks over the box of cells of the other grid that any of its own can see. Both are told by index
arithmetic on traced integers here, so that a kernel is only loads, products and stores.

Cells of either grid have a parent cell in the key grid: a key is its own, and `ratio` x `ratio`
queries share one. Who sees whom depends on parents alone, but for a causal window's raster order.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention.window import Window

Pair = tuple[int, int]
_FIELD = 16  # bits of a row or column in a packed pair


@dataclass(frozen=True)
class Halo:
    """A tile of `grid` and the cells of `other_grid` round it; built by `of_queries`, `of_keys`.

    `ratio` and `other_ratio` are the cells a side that share a parent. `sight` is how many parents
    before and after its own a cell sees, for rows and columns. `order` is 1 where the others must
    not come later in raster order, -1 where not earlier, and 0 without a causal window. The
    box is walked over in `steps` of `block` cells.
    """

    tile: Pair
    block: int
    grid: Pair
    other_grid: Pair
    ratio: int
    other_ratio: int
    sight: tuple[Pair, Pair]
    order: int

    @classmethod
    def of_queries(cls, window: Window, grid: Pair, tile: Pair, block: int) -> "Halo":
        """The keys round a tile of queries; `grid` is the queries'."""
        key_grid = grid[0] // window.ratio, grid[1] // window.ratio
        order = int(window.causal)
        return cls(tile, block, grid, key_grid, window.ratio, 1, window.sight, order)

    @classmethod
    def of_keys(cls, window: Window, grid: Pair, tile: Pair, block: int) -> "Halo":
        """The queries round a tile of keys, by the reflected window; `grid` is the queries'."""
        key_grid = grid[0] // window.ratio, grid[1] // window.ratio
        rows, columns = ((after, before) for before, after in window.sight)
        order = -int(window.causal)
        return cls(tile, block, key_grid, grid, 1, window.ratio, (rows, columns), order)

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
        """The grid of parents: the key grid."""
        return self.grid[0] // self.ratio, self.grid[1] // self.ratio

    @property
    def box(self) -> Pair:
        """Rows and columns of parents that hold all that a tile sees, wherever the tile lies."""
        rows, columns = (
            min(size, (side + self.ratio - 2) // self.ratio + 1 + before + after)
            for size, side, (before, after) in zip(self.parents, self.tile, self.sight, strict=True)
        )
        return rows, columns

    @property
    def num_others(self) -> int:
        """Cells of the other grid in the box."""
        return self.box[0] * self.box[1] * self.other_ratio**2

    @property
    def steps(self) -> int:
        return -(-self.num_others // self.block)

    @property
    def pads(self) -> bool:
        """Whether the last step goes past the box's end."""
        return self.num_others % self.block != 0

    def place(self, program: jax.Array) -> "Place":
        """Where tile number `program` (int32 scalar, raster order) and its box lie."""
        first = (
            jax.lax.div(program, self.counts[1]) * self.tile[0],
            jax.lax.rem(program, self.counts[1]) * self.tile[1],
        )
        # The box is pushed into the grid, where it still holds all cells in sight: so every cell
        # of it exists, and none must be checked against the border.
        box = [
            jnp.clip(jax.lax.div(first[axis], self.ratio) - self.sight[axis][0], 0, room)
            for axis in (0, 1)
            for room in [self.parents[axis] - self.box[axis]]
        ]
        return Place(self, first, (box[0], box[1]))


@dataclass(frozen=True)
class Place:
    """One tile of a halo: its first cell, and the first parent of its box (int32 scalars)."""

    halo: Halo
    first: tuple[jax.Array, jax.Array]
    box: tuple[jax.Array, jax.Array]

    def own(self) -> tuple[jax.Array, jax.Array, "Codes"]:
        """The tile's cells: their place in the flattened grid (int32), whether they are in the
        grid (bool), and their codes, all [tile rows * tile columns].

        A cell that is not in the grid has a place past the grid's end.
        """
        halo = self.halo
        n = jnp.arange(math.prod(halo.tile), dtype=jnp.int32)
        row = self.first[0] + jax.lax.div(n, halo.tile[1])
        column = self.first[1] + jax.lax.rem(n, halo.tile[1])
        exists = (row < halo.grid[0]) & (column < halo.grid[1])
        index = jnp.where(exists, row * halo.grid[1] + column, math.prod(halo.grid))
        # The first and the last parent that each cell sees, counted from the box's.
        seen = []
        for axis, cell in enumerate((row, column)):
            before, after = halo.sight[axis]
            parent = jax.lax.div(cell, halo.ratio) - self.box[axis]
            last = halo.box[axis] - 1
            seen.append((jnp.maximum(parent - before, 0), jnp.minimum(parent + after, last)))
        return index, exists, Codes(index, *_own_codes(halo, *seen))

    def others(self, step: jax.Array | int) -> tuple[jax.Array, "Codes"]:
        """The cells of the box that a step meets: their place in the flattened other grid (int32)
        and their codes, both [block].

        Past the box's end they are places in the grid that nobody sees.
        """
        halo = self.halo
        n = step * halo.block + jnp.arange(halo.block, dtype=jnp.int32)
        width, ratio = halo.box[1] * halo.other_ratio, halo.other_ratio
        row, column = jax.lax.div(n, width), jax.lax.rem(n, width)
        parent = jax.lax.div(row, ratio), jax.lax.div(column, ratio)
        if halo.pads:
            # They count as in the row below the box, which nobody sees.
            parent = jnp.minimum(parent[0], halo.box[0]), parent[1]
            row = jnp.minimum(row, halo.box[0] * ratio - 1)
        code = _other_code(halo, parent)
        first = self.box[0] * ratio * halo.other_grid[1] + self.box[1] * ratio
        index = first + row * halo.other_grid[1] + column
        return index, Codes(index, code, code)


@dataclass(frozen=True)
class Codes:
    """Cells [n] in the form in which pairs of them are compared; see `hidden`."""

    index: jax.Array
    low: jax.Array
    high: jax.Array


def hidden(halo: Halo, own: Codes, other: Codes) -> jax.Array:
    """Which pairs do not see each other: bool [own, other]."""
    code = other.low[None, :]
    if _fits_bits(halo):
        out = (own.low[:, None] & code) != 0
    else:
        # A difference of packed pairs is negative in one of its fields where that coordinate is
        # out of range; what one field borrows from the next then no longer matters.
        signs = jnp.int32((1 << (_FIELD - 1)) - (1 << 31))
        out = (((code - own.low[:, None]) | (own.high[:, None] - code)) & signs) != 0
    if halo.order:
        index, other_index = own.index[:, None], other.index[None, :]
        out |= (other_index > index) if halo.order > 0 else (other_index < index)
    return out


def _fits_bits(halo: Halo) -> bool:
    """Whether a bit for each row and column of the box, and a row of pads, fit in a word."""
    return sum(halo.box) + halo.pads <= 32


def _own_codes(
    halo: Halo, rows: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Codes of own cells from the first and last row and column that each sees."""
    if _fits_bits(halo):
        # A bit for each column, then for each row, of the box that the cell does not see. With
        # all higher bits set, pads are unseen too. One logic operation then compares a pair.
        width = halo.box[1]
        unseen_columns = ~_ones(columns) & ((1 << width) - 1)
        code = unseen_columns | (~_ones(rows) << width)
        return code, code
    low, high = ((rows[i] << _FIELD) | columns[i] for i in (0, 1))
    return low, high


def _ones(interval: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Words with the bits from first to last set; 0 <= first, last < 31."""
    first, last = interval
    one = jnp.int32(1)
    # A cell out of the grid may see nothing: its last parent is before its first.
    below = jnp.minimum(first, 31)
    return ((one << (last + 1)) - 1) & ~((one << below) - 1)


def _other_code(halo: Halo, parent: tuple[jax.Array, jax.Array]) -> jax.Array:
    row, column = parent
    if _fits_bits(halo):
        return (jnp.int32(1) << column) | (jnp.int32(1) << (halo.box[1] + row))
    return (row << _FIELD) | column
