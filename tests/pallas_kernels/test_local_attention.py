"""One suite for every implementation x dtype x window x grid, against the reference in float32."""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import local_attention_2d, local_attention_2d_with_lse
from pallas_kernels.local_attention import xla
from pallas_kernels.local_attention.window import Window
from tests.pallas_kernels.common import IMPLEMENTATIONS, KERNEL, cheaply

GOLDEN = Path(__file__).parents[1] / "golden" / "local_attention.npz"


class Case(NamedTuple):
    grid: tuple[int, int]
    window: tuple[int, int]
    ratio: int = 1
    causal: bool = False
    heads: int = 2
    dim: int = 8


CASES = {
    "9x9": Case((12, 12), (9, 9)),
    "9x5_odd_grid": Case((13, 7), (9, 5), dim=16),
    "5x9_many_tiles": Case((25, 17), (5, 9), heads=1),
    "1x1": Case((4, 5), (1, 1)),
    "11x11_grid_in_the_halo": Case((3, 2), (11, 11)),
    "single_cell": Case((1, 1), (3, 3)),
    "single_row": Case((1, 19), (5, 3)),
    "causal_9x9": Case((12, 10), (9, 9), causal=True),
    "causal_5x3_odd_grid": Case((7, 9), (5, 3), causal=True),
    "cross3_5x5": Case((24, 24), (5, 5), ratio=3, heads=1),
    "cross3_9x5_odd_grid": Case((9, 15), (9, 5), ratio=3),
    "cross2_3x3": Case((10, 8), (3, 3), ratio=2),
    "19x15_wide_halo": Case((17, 21), (19, 15), heads=1, dim=24),
}


# The dtype changes the rounding, not the geometry: one case of each kind, and float16, which the
# code treats as bfloat16, in one.
LOW_PRECISION_CASES = ("9x5_odd_grid", "causal_9x9", "11x11_grid_in_the_halo", "cross3_5x5")
# Other tests and cases cover their geometry, so these run with `-m slow` only.
SLOW_CASES = ("9x9", "causal_5x3_odd_grid", "single_cell")


def draw(case: Case, dtype: str = "float32", batch: int = 2, seed: int = 0):
    """q, k, v and cotangents for the output and the log-sum-exp, as NumPy arrays."""
    b, (y, x), h, d = batch, case.grid, case.heads, case.dim
    normal = np.random.default_rng(seed).standard_normal
    key_shape = (b, y // case.ratio, x // case.ratio, h, d)
    q, k, v = (normal(s).astype(jnp.dtype(dtype)) for s in ((b, y, x, h, d), key_shape, key_shape))
    cotangents = normal(q.shape).astype(np.float32), normal((b, h, y, x)).astype(np.float32)
    return (q, k, v), cotangents


@functools.cache
def compiled(function, **options):
    """Run op by op, the suite takes minutes."""
    return cheaply(functools.partial(function, **options))


def attention(q, k, v, **options):
    return compiled(local_attention_2d_with_lse, **options)(q, k, v)


def values_and_gradients(inputs, cotangents, **options):
    return compiled(_values_and_gradients, **options)(inputs, cotangents)


def _values_and_gradients(inputs, cotangents, *, window, causal, implementation):
    def loss(q, k, v):
        out, lse = local_attention_2d_with_lse(
            q, k, v, window=window, causal=causal, implementation=implementation
        )
        weighed = jnp.vdot(out.astype(jnp.float32), cotangents[0]) + jnp.vdot(lse, cotangents[1])
        return weighed, (out, lse)

    (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return values, gradients


def by_loops(q, k, v, window: Window, scale: float):
    """Float64 loops over cells, to hold the reference itself to something."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, lse = np.zeros(q.shape), np.zeros((q.shape[0], q.shape[3], *q.shape[1:3]))
    for b, y, x, h in itertools.product(*(range(n) for n in q.shape[:4])):
        cells = window.offsets() + (y // window.ratio, x // window.ratio)
        cells = cells[((cells >= 0) & (cells < k.shape[1:3])).all(axis=1)]
        rows, columns = cells.T
        scores = k[b, rows, columns, h] @ q[b, y, x, h] * scale
        lse[b, h, y, x] = np.log(np.exp(scores).sum())
        out[b, y, x, h] = np.exp(scores - lse[b, h, y, x]) @ v[b, rows, columns, h]
    return out, lse


@pytest.mark.parametrize("name", ["9x5_odd_grid", "causal_5x3_odd_grid", "cross3_9x5_odd_grid"])
def test_reference_is_a_loop_over_cells(name, assert_close):
    case = CASES[name]
    inputs, _ = draw(case, batch=1)
    out, lse = attention(
        *inputs, window=case.window, causal=case.causal, scale=0.7, implementation="reference"
    )
    window = Window(*case.window, causal=case.causal, ratio=case.ratio)
    expected_out, expected_lse = by_loops(*inputs, window, 0.7)
    assert_close(out, expected_out, "float32")
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[
            pytest.param(name, "float32", marks=[pytest.mark.slow] * (name in SLOW_CASES))
            for name in CASES
        ],
        *[(name, "bfloat16") for name in LOW_PRECISION_CASES],
        ("causal_9x9", "float16"),
    ],
)
def test_values_lse_and_gradients(name, dtype, implementation, assert_close):
    case = CASES[name]
    inputs, cotangents = draw(case, dtype)
    options = {"window": case.window, "causal": case.causal}
    (out, lse), gradients = values_and_gradients(
        inputs, cotangents, **options, implementation=implementation
    )
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.dtype(dtype)] * 3
    (expected_out, expected_lse), expected_gradients = values_and_gradients(
        tuple(a.astype(jnp.float32) for a in inputs),
        cotangents,
        **options,
        implementation="reference",
    )
    assert_close(out, expected_out, dtype)
    assert_close(lse, expected_lse, "lse")
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, dtype)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
@pytest.mark.parametrize(
    "name",
    ["self_9x5", "self_9x9", "causal_9x9", "causal_5x3", "cross3_5x5", "cross2_3x3"],
)
def test_golden(name, implementation, assert_close):
    with np.load(GOLDEN) as file:
        case = {key: file[f"{name}/{key}"] for key in ("window", "causal", "lse", "out")}
        # Recorded as [n, c, y, x]; n becomes the batch, with one head.
        q, k, v = (
            np.einsum("bdyx->byxd", file[f"{name}/{key}"])[:, :, :, None]
            for key in ("q_scaled", "k", "v")
        )
    # With the compiler's usual optimisation, as users have it.
    attend = functools.partial(
        local_attention_2d_with_lse,
        window=tuple(case["window"].tolist()),
        causal=bool(case["causal"]),
        scale=1.0,
        implementation=implementation,
    )
    out, lse = jax.jit(attend)(q, k, v)
    assert_close(np.einsum("byxhd->bhdyx", out)[:, 0], case["out"], "golden")
    assert_close(lse[:, 0], case["lse"], "golden")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["9x5_odd_grid", "causal_5x3_odd_grid", "cross3_9x5_odd_grid"])
def test_a_cell_sees_its_window_and_nothing_else(name, implementation):
    case = CASES[name]
    (q, k, v), _ = draw(case, batch=1)
    window = Window(*case.window, causal=case.causal, ratio=case.ratio)
    mask = window.dense_mask(case.grid)

    @cheaply
    def reached(y, x):
        def cell(k, v):
            out = local_attention_2d(
                q, k, v, window=case.window, causal=case.causal, implementation=implementation
            )
            return out[0, y, x].sum()

        return [jnp.abs(g[0]).sum(axis=(-2, -1)) > 0 for g in jax.grad(cell, (0, 1))(k, v)]

    bottom, right = case.grid[0] - 1, case.grid[1] - 1
    for y, x in [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]:
        by_key, by_value = reached(y, x)
        np.testing.assert_array_equal(by_value, mask[y, x])
        # One visible key alone has weight 1 whatever its score.
        if mask[y, x].sum() > 1:
            np.testing.assert_array_equal(by_key, mask[y, x])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_sum_to_one_at_the_borders(implementation, assert_close):
    (q, k, v), _ = draw(CASES["9x9"])
    out, _ = attention(q, k, np.ones_like(v), window=(9, 9), implementation=implementation)
    assert_close(out, np.ones_like(out), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_scores_count_the_keys_in_the_grid(implementation, assert_close):
    case = CASES["9x5_odd_grid"]
    (q, k, v), _ = draw(case)
    _, lse = attention(np.zeros_like(q), k, v, window=case.window, implementation=implementation)
    counted = Window(*case.window).dense_mask(case.grid).sum(axis=(-2, -1))
    assert_close(lse, np.broadcast_to(np.log(counted), lse.shape), "lse")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_beyond_exp_neither_overflow_nor_leak(causal, implementation, assert_close):
    case = CASES["causal_5x3_odd_grid"]
    inputs, cotangents = draw(case)
    q, k, v = inputs
    options = {"window": case.window, "causal": causal, "implementation": implementation}
    # Keys of the last rows score thousands.
    k = np.concatenate([k[:, :5], 3e3 * k[:, 5:]], axis=1)
    (out, lse), gradients = values_and_gradients((q, k, v), cotangents, **options)
    for array in (out, lse, *gradients):
        assert np.isfinite(array).all()
    _, expected_lse = values_and_gradients(
        (q, k, v), cotangents, **{**options, "implementation": "reference"}
    )[0]
    assert_close(lse, expected_lse, "lse")
    # Cells that do not see those rows must not notice, even in the same tile.
    (untouched_out, untouched_lse), _ = values_and_gradients(inputs, cotangents, **options)
    rows = 5 if causal else 3
    assert_close(out[:, :rows], untouched_out[:, :rows], "exact")
    assert_close(lse[:, :, :rows], untouched_lse[:, :, :rows], "exact")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_inputs_same_bits(implementation):
    case = CASES["5x9_many_tiles"]
    inputs, cotangents = draw(case)
    runs = [
        values_and_gradients(
            inputs, cotangents, window=case.window, causal=False, implementation=implementation
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_vmap_and_scan(implementation, assert_close):
    case = CASES["cross2_3x3"]
    (q, k, v), _ = draw(case, batch=3)
    attend = functools.partial(
        local_attention_2d, window=case.window, implementation=implementation
    )
    expected = cheaply(attend)(q, k, v)
    stacked = tuple(a[:, None] for a in (q, k, v))
    mapped = cheaply(jax.vmap(attend))(*stacked)
    assert_close(mapped[:, 0], expected, "float32")
    over = cheaply(lambda *stacked: jax.lax.map(lambda s: attend(*s), stacked))
    scanned = over(*stacked)
    assert_close(scanned[:, 0], expected, "float32")


@pytest.mark.parametrize("tile", [(2, 2), (4, 6), (24, 24)])
@pytest.mark.parametrize("name", ["cross2_3x3", "causal_9x9"])
def test_xla_does_not_depend_on_the_tile(name, tile, assert_close):
    case = CASES[name]
    (q, k, v), _ = draw(case)
    window = Window(*case.window, causal=case.causal, ratio=case.ratio)
    tiled = functools.partial(xla.local_attention, window=window, scale=0.3, tile=tile)
    out, lse = jax.jit(tiled)(q, k, v)
    expected = attention(
        q, k, v, window=case.window, causal=case.causal, scale=0.3, implementation="reference"
    )
    assert_close(out, expected[0], "float32")
    assert_close(lse, expected[1], "lse")


def test_xla_tiles_are_multiples_of_the_ratio():
    for side, window in [(24, Window(9, 9)), (7, Window(9, 5)), (60, Window(5, 5, ratio=3))]:
        tile = xla.choose_tile((side, side), window)
        assert all(t % window.ratio == 0 and t <= side + window.ratio for t in tile)
    (q, k, v), _ = draw(CASES["cross3_5x5"])
    with pytest.raises(ValueError, match=r"tile \(6, 4\) must be a multiple of the key grid's 3"):
        xla.local_attention(q, k, v, window=Window(5, 5, ratio=3), scale=1.0, tile=(6, 4))


def test_xla_memory_grows_with_the_cells_and_not_with_their_square():
    def temporary_bytes(side: int) -> int:
        a = jax.ShapeDtypeStruct((1, side, side, 2, 16), jnp.float32)
        attend = jax.jit(functools.partial(local_attention_2d, window=(9, 9), implementation="xla"))
        return attend.lower(a, a, a).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(32), temporary_bytes(64)
    assert 0 < large <= 4.4 * small  # four times the cells, and borders
    assert large < 0.5 * 2 * 64**4 * 4  # far from the 2 heads' full score matrices


def zeros(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def keys(*shape: int):
    return zeros(*shape), zeros(*shape)


GRID = (1, 6, 6, 2, 4)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (
            zeros(6, 6, 2, 4),
            zeros(*GRID),
            zeros(*GRID),
            {},
            r"q must be \[b, y, x, h, d\], got shape \(6, 6, 2, 4\)",
        ),
        (
            zeros(*GRID),
            zeros(*GRID),
            zeros(1, 6, 6),
            {},
            r"v must be \[b, y, x, h, d\], got shape \(1, 6, 6\)",
        ),
        (zeros(*GRID), *keys(2, 6, 6, 2, 4), {}, "k has batch 2 but q has batch 1"),
        (zeros(*GRID), *keys(1, 6, 6, 3, 4), {}, "k has heads 3 but q has heads 2"),
        (zeros(*GRID), *keys(1, 6, 6, 2, 8), {}, "k has head dim 8 but q has head dim 4"),
        (
            zeros(*GRID),
            zeros(*GRID),
            zeros(1, 3, 3, 2, 4),
            {},
            r"v has shape \(1, 3, 3, 2, 4\) but k has shape \(1, 6, 6, 2, 4\)",
        ),
        (zeros(*GRID), *keys(1, 4, 4, 2, 4), {}, "k has grid 4x4 but q has grid 6x6"),
        (zeros(*GRID), *keys(1, 3, 2, 2, 4), {}, "k has grid 3x2 but q has grid 6x6"),
        (zeros(*GRID), *keys(1, 12, 12, 2, 4), {}, "k has grid 12x12 but q has grid 6x6"),
        (
            zeros(*GRID),
            *keys(1, 0, 6, 2, 4),
            {},
            r"k must not be empty, got shape \(1, 0, 6, 2, 4\)",
        ),
        (
            zeros(*GRID),
            zeros(*GRID, dtype=jnp.bfloat16),
            zeros(*GRID),
            {},
            "k is bfloat16 but q is float32",
        ),
        (
            zeros(*GRID),
            zeros(*GRID),
            zeros(*GRID, dtype=jnp.float16),
            {},
            "v is float16 but q is float32",
        ),
        (
            *[zeros(*GRID, dtype=jnp.int32)] * 3,
            {},
            "q is int32; the dtype must be one of float32, bfloat16, float16",
        ),
        (
            *[zeros(*GRID)] * 3,
            {"window": (4, 5)},
            "window must have odd, positive sides, got 4 rows x 5 columns",
        ),
        (
            *[zeros(*GRID)] * 3,
            {"window": (5, -3)},
            "window must have odd, positive sides, got 5 rows x -3 columns",
        ),
        (
            *[zeros(*GRID)] * 3,
            {"window": (5, 5, 5)},
            r"window must be \(rows, columns\), two integers, got \(5, 5, 5\)",
        ),
        (*[zeros(*GRID)] * 3, {"window": 5}, "window must be .* two integers, got 5"),
        (*[zeros(*GRID)] * 3, {"window": (5.0, 5)}, r"two integers, got \(5.0, 5\)"),
        (
            zeros(*GRID),
            *keys(1, 3, 3, 2, 4),
            {"causal": True},
            "causal=True needs keys on the query grid, got a key grid 2 times coarser",
        ),
        (
            *[zeros(*GRID)] * 3,
            {"implementation": "mosaic"},
            "implementation='mosaic' does not exist; there are 'auto', 'pallas_triton', ",
        ),
        (
            *[zeros(1, 6, 6, 1, 136)] * 3,
            {"implementation": KERNEL},
            "cannot serve this call: its head dim may be at most 128, got 136",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(q, k, v, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        local_attention_2d(q, k, v, **{"window": (5, 5), **options})
    assert "\n" not in str(caught.value)
