"""What a kernel's program owns, loads and hides, together, against the dense mask."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.local_attention.halo import Halo, hidden
from pallas_kernels.local_attention.window import Window

# grid of queries, window, tile, block
CASES = {
    "tiles_divide": ((16, 8), Window(9, 5), (8, 4), 64),
    "tiles_stick_out": ((13, 7), Window(5, 3), (4, 4), 16),
    "grid_in_the_halo": ((3, 2), Window(11, 11), (8, 8), 32),
    "causal": ((12, 10), Window(5, 7, causal=True), (4, 8), 16),
    "ratio_3": ((15, 9), Window(3, 5, ratio=3), (4, 4), 16),
    "ratio_3_large_tile": ((24, 12), Window(5, 5, ratio=3), (8, 8), 64),
    "no_pads_and_all_bits": ((24, 24), Window(9, 9), (8, 8), 64),
    "too_wide_for_bits": ((40, 12), Window(31, 9), (8, 4), 64),
    "too_wide_and_causal": ((36, 30), Window(15, 19, causal=True), (8, 8), 64),
}


def pairs_seen(halo: Halo) -> np.ndarray:
    """How often each pair is loaded and not hidden, int [cells, walked cells]."""
    cells, walked_cells = np.prod(halo.grid), np.prod(halo.walked_grid)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def load(program, step):
        place = halo.place(program)
        tile, block = place.tile(), place.block(step)
        return tile.index, tile.exists, block.index, hidden(halo, tile, block)

    programs, steps = np.prod(halo.counts), halo.steps
    loaded = load(np.arange(programs, dtype=np.int32), np.arange(steps, dtype=np.int32))
    seen = np.zeros((cells, walked_cells), int)
    owned = np.zeros(cells, int)
    for program, step in np.ndindex(programs, steps):
        index, exists, walked, hides = (np.asarray(a[program, step]) for a in loaded)
        # Only cells that exist are loaded, so that a kernel needs no check first.
        assert (walked >= 0).all() and (walked < walked_cells).all()
        assert (index[~exists] >= cells).all()
        rows, columns = np.nonzero(~hides & exists[:, None])
        np.add.at(seen, (index[rows], walked[columns]), 1)
        owned[index[exists]] += 1
    assert (owned == steps).all()
    return seen


@pytest.mark.parametrize("name", CASES)
def test_each_pair_in_the_window_is_seen_once(name):
    grid, window, tile, block = CASES[name]
    dense = window.dense_mask(grid)
    expected = dense.reshape(grid[0] * grid[1], -1)
    queries = Halo.query_tiles(window, grid, tile, block)
    np.testing.assert_array_equal(pairs_seen(queries), expected)
    keys = Halo.key_tiles(window, grid, tile, block)
    np.testing.assert_array_equal(pairs_seen(keys), expected.T)


def test_both_ways_to_hide_pairs_are_tested():
    fits = {
        name: Halo.query_tiles(window, grid, tile, block).fits_bits
        for name, (grid, window, tile, block) in CASES.items()
    }
    assert fits["no_pads_and_all_bits"] and not fits["too_wide_for_bits"]
    assert not fits["too_wide_and_causal"]


def test_the_published_shape_walks_over_as_few_keys_as_a_tile_sees():
    halo = Halo.query_tiles(Window(9, 9), (60, 60), (8, 8), 64)
    assert (halo.extent, halo.num_walked, halo.steps, halo.pads) == ((16, 16), 256, 4, False)
    halo = Halo.query_tiles(Window(5, 5, ratio=3), (60, 60), (8, 8), 64)
    assert (halo.extent, halo.steps) == ((8, 8), 1)
    # Queries of the reflected window: three times as many along each axis as parents.
    halo = Halo.key_tiles(Window(5, 5, ratio=3), (60, 60), (4, 4), 32)
    assert (halo.extent, halo.num_walked) == ((8, 8), 24 * 24)
