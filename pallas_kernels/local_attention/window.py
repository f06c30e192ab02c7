"""Which keys a query sees: the window's geometry as index arithmetic, without jax.

Cells are (row, column) pairs. The key grid is the query grid, or coarser by a whole `ratio`. The
window of the query (y, x) is centred on its parent cell (y // ratio, x // ratio) of the key grid.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A window of `rows` x `columns` key cells around the parent cell of each query.

    `causal` keeps the first floor(rows * columns / 2) + 1 cells of the window in raster order, so
    the query's own cell is the last one seen (the masked form of Image-Local-Attention). Raises
    ValueError for even or non-positive sides, and for a causal window on a coarser key grid, where
    a parent cell covers later queries too.
    """

    rows: int
    columns: int
    causal: bool = False
    ratio: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.rows % 2 == 0 or self.columns % 2 == 0:
            raise ValueError(
                f"window must have odd, positive sides, got {self.rows} rows x "
                f"{self.columns} columns"
            )
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}")
        if self.causal and self.ratio != 1:
            raise ValueError(
                "causal=True needs keys on the query grid, "
                f"got a key grid {self.ratio} times coarser"
            )

    @property
    def radius(self) -> tuple[int, int]:
        """How far the window reaches from its centre: (rows, columns)."""
        return self.rows // 2, self.columns // 2

    @property
    def sight(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(before, after): how many cells a query sees on each side of its parent, by axis.

        A causal window sees no later row. Swapped to (after, before), it is how many parents see a
        key.
        """
        row_radius, column_radius = self.radius
        return (row_radius, 0 if self.causal else row_radius), (column_radius, column_radius)

    @property
    def num_keys(self) -> int:
        """Keys that a query sees when its window is inside the grid."""
        return self.rows * self.columns // 2 + 1 if self.causal else self.rows * self.columns

    def contains(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """Whether offsets (key cell - parent cell) are in the window; broadcasts, returns bool."""
        row_radius, column_radius = self.radius
        inside = (np.abs(dy) <= row_radius) & (np.abs(dx) <= column_radius)
        if self.causal:
            inside &= (dy < 0) | ((dy == 0) & (dx <= 0))
        return inside

    def offsets(self) -> np.ndarray:
        """The seen offsets (dy, dx) in raster order, int [num_keys, 2]."""
        row_radius, column_radius = self.radius
        dy, dx = np.mgrid[-row_radius : row_radius + 1, -column_radius : column_radius + 1]
        return np.stack([dy.ravel(), dx.ravel()], axis=-1)[: self.num_keys]

    def reach(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of keys that a tile of queries sees: its parents and their halo.

        The tile's sides must be multiples of the ratio.
        """
        rows, columns = (n // self.ratio + sum(s) for n, s in zip(tile, self.sight, strict=True))
        return rows, columns

    def tile_mask(self, tile: tuple[int, int]) -> np.ndarray:
        """Which of the keys in reach each query of a tile sees.

        bool [tile rows, tile columns, reach rows, reach columns]; the first key in reach is
        `radius` cells above and left of the first query's parent. The same for every tile.
        """
        row_radius, column_radius = self.radius
        reach_rows, reach_columns = self.reach(tile)
        dy = np.arange(reach_rows) - row_radius - np.arange(tile[0])[:, None] // self.ratio
        dx = np.arange(reach_columns) - column_radius - np.arange(tile[1])[:, None] // self.ratio
        return self.contains(dy[:, None, :, None], dx[None, :, None, :])

    def dense_mask(self, grid: tuple[int, int]) -> np.ndarray:
        """Which keys each query of a whole grid sees: bool [y, x, key y, key x]."""
        y, x = (np.arange(size) for size in grid)
        dy = np.arange(grid[0] // self.ratio) - y[:, None] // self.ratio
        dx = np.arange(grid[1] // self.ratio) - x[:, None] // self.ratio
        return self.contains(dy[:, None, :, None], dx[None, :, None, :])
