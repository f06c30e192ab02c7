"""Merged parts against one softmax over all their keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    local_attention_2d_with_lse,
    merge_attention,
    merge_attention_with_lse,
)
from pallas_kernels.local_attention.window import Window
from tests.pallas_kernels.common import cheaply

B, Y, X, H, D = 2, 6, 9, 2, 8


def draw(seed: int = 0):
    """Queries, fine and coarse keys and values, and a cotangent, as NumPy arrays."""
    normal = np.random.default_rng(seed).standard_normal
    fine, coarse = (B, Y, X, H, D), (B, Y // 3, X // 3, H, D)
    return [normal(shape).astype(np.float32) for shape in (*[fine] * 3, *[coarse] * 2, fine)]


# Compiled: run op by op, these tests take minutes.
attention = jax.jit(local_attention_2d_with_lse, static_argnames="window")
merge = jax.jit(merge_attention)
merge_with_lse = jax.jit(merge_attention_with_lse)


def empty_part(out):
    return np.full_like(out, np.nan), np.full((B, H, Y, X), -np.inf, np.float32)


@jax.jit
def merged(q, k, v, k0, v0):
    fine = local_attention_2d_with_lse(q, k, v, window=(5, 3))
    coarse = local_attention_2d_with_lse(q, k0, v0, window=(3, 3))
    return merge_attention_with_lse(fine, coarse)


@jax.jit
def one_softmax(q, k, v, k0, v0):
    """Both windows' scores in one row, softmaxed once."""
    masks = Window(5, 3).dense_mask((Y, X)), Window(3, 3, ratio=3).dense_mask((Y, X))
    scores = [
        jnp.where(mask, jnp.einsum("byxhd,btuhd->bhyxtu", q, key) * D**-0.5, -jnp.inf)
        for key, mask in zip((k, k0), masks, strict=True)
    ]
    scores = jnp.concatenate([s.reshape(B, H, Y, X, -1) for s in scores], axis=-1)
    values = jnp.concatenate([v.reshape(B, -1, H, D), v0.reshape(B, -1, H, D)], axis=1)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhyxt,bthd->byxhd", weights, values)
    return out, jax.nn.logsumexp(scores, axis=-1)


def test_two_windows_are_one_softmax(assert_close):
    *inputs, _ = draw()
    out, lse = merged(*inputs)
    expected_out, expected_lse = one_softmax(*inputs)
    assert_close(out, expected_out, "float32")
    assert_close(lse, expected_lse, "lse")


def test_gradients_through_the_merge(assert_close):
    *inputs, cotangent = draw()

    def loss(attend):
        return lambda *inputs: jnp.vdot(attend(*inputs)[0], cotangent) + attend(*inputs)[1].sum()

    everything = tuple(range(5))
    gradients = cheaply(jax.grad(loss(merged), everything))(*inputs)
    for got, expected in zip(
        gradients, cheaply(jax.grad(loss(one_softmax), everything))(*inputs), strict=True
    ):
        assert_close(got, expected, "float32")


def test_an_empty_part_adds_nothing_and_spreads_no_nan(assert_close):
    q, k, v, *_, cotangent = draw()
    part = attention(q, k, v, window=(3, 3))

    def loss(out, lse, others):
        return jnp.vdot(merge_attention((out, lse), *others), cotangent)

    gradients = cheaply(jax.grad(loss, (0, 1)))
    out, lse = merge_with_lse(part, empty_part(part[0]))
    assert_close(out, part[0], "float32")
    assert_close(lse, part[1], "lse")
    with_empty, alone = (gradients(*part, others) for others in ([empty_part(out)], []))
    for got, expected in zip(with_empty, alone, strict=True):
        assert_close(got, expected, "float32")


def test_an_empty_part_gets_a_zero_gradient():
    q, k, v, *_ = draw()
    part = attention(q, k, v, window=(3, 3))
    gradients = cheaply(jax.grad(lambda empty: merge(part, empty).sum()))(empty_part(part[0]))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_all_parts_empty_give_zero():
    nothing = empty_part(draw()[0])
    out, lse = merge_with_lse(nothing, nothing)
    np.testing.assert_array_equal(out, np.zeros_like(out))
    assert np.isneginf(lse).all()
    gradients = cheaply(jax.grad(lambda part: merge(part, nothing).sum()))(nothing)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_order_and_nesting_do_not_matter(assert_close):
    q, k, v, k0, v0, _ = draw()
    a = attention(q, k, v, window=(3, 3))
    b = attention(q, k0, v0, window=(1, 3))
    c = attention(q, v, k, window=(1, 1))
    expected = merge(a, b, c)
    assert_close(merge(c, a, b), expected, "float32")
    assert_close(merge(merge_with_lse(a, b), c), expected, "float32")


def test_scores_beyond_exp_do_not_overflow(assert_close):
    out = draw()[0]
    lse = np.full((B, H, Y, X), 1e4, np.float32)
    merged_out, merged_lse = merge_with_lse((out, lse), (3 * out, lse))
    assert_close(merged_out, 2 * out, "float32")
    assert_close(merged_lse, lse + np.log(2), "lse")


def test_low_precision_parts_are_summed_in_float32(assert_close):
    out = draw()[0].astype(jnp.bfloat16)
    lse = np.zeros((B, H, Y, X), np.float32)
    merged_out = merge(*[(out, lse)] * 64)
    assert merged_out.dtype == jnp.bfloat16
    assert_close(merged_out, out, "exact")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "needs at least one part, got 0"),
        ([((3, 4), "float32", (3,), "float32")], r"parts\[0\] out must be \[b, y, x, h, d\]"),
        (
            [((1, 2, 3, 4, 5), "float32", (1, 4, 2, 3), "float32")]
            + [((1, 2, 3, 4, 6), "float32", (1, 4, 2, 3), "float32")],
            r"parts\[1\] out has shape \(1, 2, 3, 4, 6\), parts\[0\] out \(1, 2, 3, 4, 5\)",
        ),
        (
            [((1, 2, 3, 4, 5), "float32", (1, 4, 2, 3), "float32")]
            + [((1, 2, 3, 4, 5), "bfloat16", (1, 4, 2, 3), "float32")],
            r"parts\[1\] out is bfloat16, parts\[0\] out is float32",
        ),
        (
            [((1, 2, 3, 4, 5), "float32", (1, 2, 3, 4), "float32")],
            r"parts\[0\] lse has shape \(1, 2, 3, 4\), its out needs \(1, 4, 2, 3\)",
        ),
        (
            [((1, 2, 3, 4, 5), "bfloat16", (1, 4, 2, 3), "bfloat16")],
            r"parts\[0\] lse is bfloat16, must be float32",
        ),
    ],
)
def test_wrong_parts_are_refused(parts, message):
    built = [(jnp.zeros(s, t), jnp.zeros(ls, lt)) for s, t, ls, lt in parts]
    with pytest.raises(ValueError, match=message):
        merge_attention(*built)
