"""The window's index arithmetic, against loops over cells."""

import itertools

import numpy as np
import pytest

from pallas_kernels.local_attention.window import Window

WINDOWS = [
    Window(1, 1),
    Window(9, 5),
    Window(5, 3, causal=True),
    Window(9, 9, causal=True),
    Window(5, 5, ratio=3),
    Window(3, 7, ratio=2),
]


def sees(window: Window, query: tuple[int, int], key: tuple[int, int]) -> bool:
    """The published rule, cell by cell: a place in the raster order of the window."""
    row = key[0] - query[0] // window.ratio + window.rows // 2
    column = key[1] - query[1] // window.ratio + window.columns // 2
    if not (0 <= row < window.rows and 0 <= column < window.columns):
        return False
    return (
        not window.causal or row * window.columns + column < window.rows * window.columns // 2 + 1
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_dense_mask_is_the_published_rule(window):
    grid = (4 * window.ratio, 5 * window.ratio)
    mask = window.dense_mask(grid)
    assert mask.shape == (*grid, 4, 5)
    for y, x, t, u in itertools.product(*(range(n) for n in mask.shape)):
        assert mask[y, x, t, u] == sees(window, (y, x), (t, u))


@pytest.mark.parametrize("window", WINDOWS)
def test_offsets_are_the_seen_cells_in_raster_order(window):
    offsets = window.offsets()
    assert offsets.shape == (window.num_keys, 2)
    assert window.contains(offsets[:, 0], offsets[:, 1]).all()
    assert sorted(map(tuple, offsets)) == list(map(tuple, offsets))
    if window.causal:
        assert tuple(offsets[-1]) == (0, 0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("parents", [(1, 1), (2, 3), (4, 1)])
def test_tile_mask_is_the_dense_mask_seen_from_a_tile(window, parents):
    tile = (parents[0] * window.ratio, parents[1] * window.ratio)
    rows, columns = window.reach(tile)
    mask = window.tile_mask(tile)
    assert mask.shape == (*tile, rows, columns)
    # Place the tile so far inside a grid that its whole reach is in the grid.
    start = (window.rows // 2, window.columns // 2)
    grid = tuple((s + r) * window.ratio for s, r in zip(start, (rows, columns), strict=True))
    first = tuple(s * window.ratio for s in start)
    dense = window.dense_mask(grid)[first[0] : first[0] + tile[0], first[1] : first[1] + tile[1]]
    np.testing.assert_array_equal(mask, dense[:, :, :rows, :columns])
    # And the reach is no larger than it must be.
    seen = mask.any(axis=(0, 1))
    assert seen.any(axis=1).all() and seen.any(axis=0).all()
    assert dense.sum() == mask.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 4, "columns": 5}, "window must have odd, positive sides, got 4 rows x 5 columns"),
        ({"rows": 5, "columns": -1}, "odd, positive sides, got 5 rows x -1 columns"),
        ({"rows": 5, "columns": 5, "ratio": 0}, "ratio must be at least 1, got 0"),
        (
            {"rows": 5, "columns": 5, "ratio": 3, "causal": True},
            "causal=True needs .*, got a key grid 3 times coarser",
        ),
    ],
)
def test_a_wrong_window_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(**arguments)
