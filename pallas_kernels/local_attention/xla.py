"""Local attention as matrix products over tiles of queries and the halo of keys around each.

The queries of a tile see one rectangle of keys: their parent cells and a halo. A tile's scores are
one product of its queries with that rectangle. So keys are copied once per tile, not once per
query, and distant cells have no scores. It is written in jnp, so it runs on any device, and jax
differentiates, maps and shards it.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.local_attention.window import Window

# Added to the scores of hidden keys: their weight underflows to exactly zero. With -inf, a padding
# query, which sees no key, would need a guard against nan.
_MASKED = -1e30

# The cost of one key copied into a tile, in scores: see `choose_tile`.
_COPY_COST = 64
_LONGEST_SIDE = 24


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: Window,
    scale: float | jax.Array,
    tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tiled local attention; `tile` is (rows, columns) of queries, chosen by `choose_tile` if None.

    q [b, y, x, h, d], k and v [b, key y, key x, h, d], inputs already checked by the dispatch.
    Computes in float32; returns out [b, y, x, h, d] in q's dtype and the log-sum-exp [b, h, y, x]
    in float32. Raises ValueError for a tile that is not a multiple of the window's ratio.
    """
    b, y, x, h, d = q.shape
    ty, tx = choose_tile((y, x), window) if tile is None else tile
    if ty % window.ratio or tx % window.ratio:
        raise ValueError(f"tile {(ty, tx)} must be a multiple of the key grid's {window.ratio}")
    # i and j count tiles down and across; s and t number the queries and keys of one tile.
    i, j = -(-y // ty), -(-x // tx)

    queries = jnp.einsum("byxhd->bhyxd", q.astype(jnp.float32))
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, i * ty - y), (0, j * tx - x), (0, 0)))
    queries = jnp.einsum("bhiyjxd->bhijyxd", queries.reshape(b, h, i, ty, j, tx, d))
    queries = queries.reshape(b, h, i, j, ty * tx, d)
    # Keys are d-major within a tile: then both products are row-major, which the CPU compiler of
    # jax 0.10 runs five times faster than a product with a transposed right side.
    keys = jnp.einsum("bhiyjxd->bhijdyx", _tiles_with_halo(k, window, (ty, tx), (i, j)))
    keys = keys.reshape(b, h, i, j, d, -1)
    values = jnp.einsum("bhiyjxd->bhijyxd", _tiles_with_halo(v, window, (ty, tx), (i, j)))
    values = values.reshape(b, h, i, j, -1, d)

    scores = scale * jnp.einsum("bhijsd,bhijdt->bhijst", queries, keys)
    out_of_window, out_of_grid = _masks(window, (ty, tx), (i, j), k.shape[1:3])
    scores = scores + out_of_window + out_of_grid
    # The result does not depend on what is subtracted, so no gradient flows through it.
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    # Dividing after the product costs d divisions a query instead of one for each key.
    out = jnp.einsum("bhijst,bhijtd->bhijsd", weights, values) / total
    lse = largest + jnp.log(total)

    out = jnp.einsum("bhijyxd->biyjxhd", out.reshape(b, h, i, j, ty, tx, d))
    out = out.reshape(b, i * ty, j * tx, h, d)[:, :y, :x]
    lse = jnp.einsum("bhijyx->bhiyjx", lse.reshape(b, h, i, j, ty, tx))
    lse = lse.reshape(b, h, i * ty, j * tx)[:, :, :y, :x]
    return out.astype(q.dtype), lse


@lru_cache(maxsize=256)
def choose_tile(grid: tuple[int, int], window: Window) -> tuple[int, int]:
    """The tile (rows, columns) of least estimated cost; its sides are multiples of the ratio.

    Large tiles compute scores that the window masks; small ones copy each key into many tiles. The
    estimate is queries (with padding) * keys in reach * (1 + 64 / queries in a tile): a score costs
    1, and a copied key, with its value and both gradients, 64. On a 2-core CPU the estimate ranked
    the shapes tried, from 4x4 to 24x24, as their measured times did. Near the optimum (6x6 to 10x10
    for a 9x9 window) both are flat.
    """
    ratio = window.ratio
    sides = [range(ratio, max(ratio, min(_LONGEST_SIDE, n + ratio - 1)) + 1, ratio) for n in grid]

    def cost(tile: tuple[int, int]) -> float:
        queries = np.prod([-(-n // side) * side for n, side in zip(grid, tile, strict=True)])
        return float(queries * np.prod(window.reach(tile)) * (1 + _COPY_COST / np.prod(tile)))

    return min(((rows, columns) for rows in sides[0] for columns in sides[1]), key=cost)


def _tiles_with_halo(
    keys: jax.Array, window: Window, tile: tuple[int, int], counts: tuple[int, int]
) -> jax.Array:
    """The keys in reach of every tile; cells out of the grid are zero.

    [b, key y, key x, h, d] to float32 [b, h, i, reach rows, j, reach columns, d].
    """
    # The gradient sums overlapping tiles; this makes it do so in float32.
    keys = jnp.einsum("byxhd->bhyxd", keys.astype(jnp.float32))
    reach = window.reach(tile)
    for axis, n in ((0, 2), (1, 4)):
        radius, side = window.radius[axis], tile[axis] // window.ratio
        keys = _overlapping_blocks(keys, n, counts[axis], side, radius, reach[axis])
    return keys


def _overlapping_blocks(
    a: jax.Array, axis: int, count: int, side: int, radius: int, length: int
) -> jax.Array:
    """Replaces one axis by (count, length): blocks that start at n * side - radius.

    Each block is a concatenation of cuts of length `side`, so the number of slices (and of
    additions in the gradient) depends on the halo and not on the grid.
    """
    cuts = -(-length // side)
    lengths = [(0, 0)] * a.ndim
    lengths[axis] = (radius, (count - 1 + cuts) * side - radius - a.shape[axis])
    a = jnp.pad(a, lengths)
    a = a.reshape(*a.shape[:axis], count - 1 + cuts, side, *a.shape[axis + 1 :])
    parts = []
    for cut in range(cuts):
        part = jax.lax.slice_in_dim(a, cut, cut + count, axis=axis)
        parts.append(jax.lax.slice_in_dim(part, 0, min(side, length - cut * side), axis=axis + 1))
    return jnp.concatenate(parts, axis=axis + 1)


def _masks(
    window: Window, tile: tuple[int, int], counts: tuple[int, int], key_grid: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """What to add to the scores: float32 [s, t] for the window, [i, j, 1, t] for the grid's border.

    They are separate because their sum would be as large as the scores of one head.
    """
    seen = window.tile_mask(tile).reshape(tile[0] * tile[1], -1)
    inside = []
    for axis in (0, 1):
        starts = np.arange(counts[axis])[:, None] * (tile[axis] // window.ratio)
        cells = starts + np.arange(window.reach(tile)[axis]) - window.radius[axis]
        inside.append((cells >= 0) & (cells < key_grid[axis]))
    in_grid = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    in_grid = in_grid.reshape(*counts, 1, -1)
    return (
        np.where(seen, 0.0, _MASKED).astype(np.float32),
        np.where(in_grid, 0.0, _MASKED).astype(np.float32),
    )
