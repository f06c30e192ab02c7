"""jax's transformations of every implementation: each gives what it gives of the reference."""

import contextlib
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.local_attention import compile_gate
from pallas_kernels import local_attention_2d, local_attention_2d_with_lse
from pallas_kernels.local_attention import pallas_triton
from pallas_kernels.local_attention.window import Window
from tests.pallas_kernels.common import IMPLEMENTATIONS, KERNEL, cheaply, draw

SHAPE = (2, 3, 4, 1, 4)  # [b, y, x, h, d]
P = jax.sharding.PartitionSpec


def attend(implementation, q, k, v, scale):
    return local_attention_2d_with_lse(
        q, k, v, window=(3, 3), scale=scale, implementation=implementation
    )


def loss(implementation, q, k, v, scale):
    out, lse = attend(implementation, q, k, v, scale)
    return (out.astype(jnp.float32) ** 2).sum() + jnp.sin(lse).sum()


def gradients(implementation, q, k, v, scale):
    of_loss = functools.partial(loss, implementation)
    return jax.value_and_grad(of_loss, argnums=(0, 1, 2, 3))(q, k, v, scale)


def agree(assert_close, transformed, *calls, dtype="float32", implementations=(KERNEL,)):
    """`transformed(implementation, *inputs)` is the reference's, for each call's inputs."""
    reference = cheaply(functools.partial(transformed, "reference"))
    for implementation in implementations:
        function = cheaply(functools.partial(transformed, implementation))
        for inputs in calls:
            got, expected = function(*inputs), reference(*inputs)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                assert a.dtype == b.dtype
                assert_close(a, b, dtype)


def test_a_learned_scale(assert_close):
    inputs = draw(*[SHAPE] * 3)
    calls = [(*inputs, np.float32(scale)) for scale in (0.6, -0.3, 0.0)]
    agree(assert_close, gradients, *calls, implementations=IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_learned_scale_in_low_precision(dtype, assert_close):
    inputs = draw(*[SHAPE] * 3, dtype=dtype)
    wide = [a.astype(np.float32) for a in inputs]

    # With its own tangents as cotangents, the gradient by the scale is a sum of squares: nothing
    # cancels, so its rounding can be judged.
    @cheaply
    def tangents(scale):
        function = functools.partial(attend, "reference", *wide)
        return jax.jvp(function, (scale,), (jnp.ones_like(scale),))[1]

    scale = np.float32(0.6)
    cotangents = tangents(scale)

    def pulled(implementation, inputs):
        (out, lse), pull = jax.vjp(functools.partial(attend, implementation), *inputs, scale)
        return out, lse, *pull((cotangents[0].astype(out.dtype), cotangents[1]))

    got = cheaply(functools.partial(pulled, KERNEL))(inputs)
    expected = cheaply(functools.partial(pulled, "reference"))(wide)
    assert [a.dtype for a in got] == [dtype, "float32", *[dtype] * 3, "float32"]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_real_number_is_a_scale(implementation, assert_close):
    inputs = draw(*[SHAPE] * 3)
    numbers = [2, np.float64(2), np.float32(2), np.int32(2), np.array(2.0)]
    numbers += [jnp.bfloat16(2), jnp.float32(2), jnp.int32(2)]

    @cheaply
    def everyone(inputs):
        return [attend(implementation, *inputs, scale) for scale in (2.0, *numbers)]

    expected, *results = everyone(inputs)
    for got in results:
        assert [a.dtype for a in got] == [a.dtype for a in expected]
        jax.tree.map(functools.partial(assert_close, kind="float32"), got, expected)


@pytest.mark.parametrize("scale", [np.ones(2), 1j, True, jnp.ones((1, 1))])
def test_what_is_no_real_number_is_no_scale(scale):
    q, *_ = draw(SHAPE)
    with pytest.raises(ValueError, match="scale must be one real number, got .* of shape"):
        local_attention_2d(q, q, q, window=(3, 3), scale=scale)


def test_the_gradient_by_a_low_precision_scale_keeps_its_dtype():
    inputs = [*draw(*[SHAPE] * 3), jnp.bfloat16(0.6)]
    _, found = jax.eval_shape(functools.partial(gradients, KERNEL), *inputs)
    assert [a.dtype for a in found] == [a.dtype for a in inputs]


def test_vmap(assert_close):
    """Of a gradient and under one, over any axes and over the scale alone."""
    q, k, v, more = draw(*[SHAPE] * 4)

    def transformed(implementation, q, k, v, scales):
        each = jax.vmap(functools.partial(gradients, implementation), (2, None, 0, 0))
        by_scale = jax.vmap(functools.partial(loss, implementation), (None, None, None, 0))
        together = jax.grad(lambda q, s: by_scale(q, k, k, s).sum(), argnums=(0, 1))
        return each(q, k, v, scales), together(q[:, :, 0], scales)

    inputs = np.stack([q, more], axis=2), k, np.stack([v, q]), np.array([0.3, -0.7], np.float32)
    agree(assert_close, transformed, inputs)


def test_forward_mode(assert_close):
    def transformed(implementation, q, k, v, scale):
        function = functools.partial(attend, implementation)
        _, tangents = jax.jvp(function, (q, k, v, scale), (k, v, q, jnp.float32(0.5)))
        # With a constant scale, linearized, over several tangents.
        _, linear = jax.linearize(lambda q: function(q, k, v, 0.6), q)
        return tangents, jax.vmap(linear)(jnp.stack([k, v]))

    agree(assert_close, transformed, (*draw(*[SHAPE] * 3), np.float32(0.3)))


def test_recomputation_and_scan(assert_close):
    """A stack of layers, each recomputed in the backward pass, with a scale for each."""

    def transformed(implementation, q, k, v, scales):
        @jax.checkpoint
        def layer(x, scale):
            return attend(implementation, x, k, v, scale)[0], None

        return jax.grad(
            lambda q, scales: (jax.lax.scan(layer, q, scales)[0] ** 2).sum(), argnums=(0, 1)
        )(q, scales)

    agree(assert_close, transformed, (*draw(*[SHAPE] * 3), np.array([0.3, -0.7], np.float32)))


def test_a_derivative_in_the_cotangent_is_no_second_order(assert_close):
    def transformed(implementation, q, k, v, scale):
        def pulled(cotangent):
            return jax.vjp(lambda q: attend(implementation, q, k, v, scale)[0], q)[1](cotangent)

        return jax.jvp(pulled, (q,), (v,))

    agree(assert_close, transformed, (*draw(*[SHAPE] * 3), np.float32(0.3)))


@pytest.mark.parametrize(
    "transform",
    [
        jax.hessian,
        lambda f: jax.grad(jax.grad(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jit(jax.hessian(f)),
    ],
    ids=["hessian", "reverse_reverse", "forward_forward", "reverse_forward", "jitted"],
)
def test_second_order_is_refused_in_one_line(transform):
    q, k, v = draw(*[SHAPE] * 3)
    with pytest.raises(NotImplementedError) as caught:
        jax.eval_shape(transform(lambda scale: loss(KERNEL, q, k, v, scale)), 0.3)
    assert str(caught.value) == (
        f"implementation={KERNEL!r} has no second-order derivatives; use implementation='xla'"
    )


def test_in_64_bit_mode(assert_close):
    q, k, v = draw(*[SHAPE] * 3)

    def transformed(implementation, q, k, v, scale):
        tangents = jax.jvp(functools.partial(attend, implementation, q, k, v), (scale,), (scale,))
        return gradients(implementation, q, k, v, scale), tangents

    with jax.enable_x64(True):
        inputs = q, k, v, np.float64(0.3)
        agree(assert_close, transformed, inputs, implementations=IMPLEMENTATIONS)


def test_inside_shard_map(assert_close):
    """With its checks on; some inputs vary over a mesh axis and some do not."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "b")
    specs = P("b"), P(), P("b"), P()

    def transformed(implementation, q, k, v, scale):
        def local_gradients(q, k, v, scale):
            def total(q, k, scale):
                return jax.lax.psum(loss(implementation, q, k, v, scale), "b")

            return jax.grad(total, argnums=(0, 1, 2))(q, k, scale)

        def pushed(q, k, v, scale):
            return jax.jvp(lambda k: attend(implementation, q, k, v, scale)[0], (k,), (k,))

        inside = jax.shard_map(
            local_gradients, mesh=mesh, in_specs=specs, out_specs=(P("b"), P(), P())
        )
        forward = jax.shard_map(pushed, mesh=mesh, in_specs=specs, out_specs=P("b"))
        plain = jax.shard_map(
            functools.partial(attend, implementation),
            mesh=mesh,
            in_specs=specs,
            out_specs=P("b"),
        )
        outside = jax.grad(lambda k: (plain(q, k, v, scale)[0] ** 2).sum())(k)
        return inside(q, k, v, scale), forward(q, k, v, scale), outside

    agree(assert_close, transformed, (*draw(*[SHAPE] * 3), np.float32(0.3)))


_ON_TWO_DEVICES = """
import functools, jax, numpy as np
from pallas_kernels import local_attention_2d

jax.config.update("jax_num_cpu_devices", 2)
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, 4, 2, 4)).astype(np.float32)
mesh, P = jax.sharding.Mesh(np.array(jax.devices()), "m"), jax.sharding.PartitionSpec

def attend(q, k, v, scale):
    implementation = "pallas_triton_interpret"
    return local_attention_2d(q, k, v, window=(3, 3), scale=scale, implementation=implementation)

def gradients(spec):
    over = jax.shard_map(attend, mesh=mesh, in_specs=(*[spec] * 3, P()), out_specs=spec)
    return jax.grad(lambda *inputs: (over(*inputs) ** 2).sum(), argnums=(0, 1, 2, 3))

@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def everyone(*inputs):
    return [gradients(spec)(*inputs) for spec in (P(), P("m"), P(None, None, None, "m"))]

expected, *sharded = everyone(q, k, v, 0.3)
for got in sharded:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, abs(b).max()))
"""


@pytest.mark.multiprocess
def test_gradients_on_two_devices_are_those_on_one():
    """Over batch and over heads; the scale's gradient sums over devices."""
    done = subprocess.run(
        [sys.executable, "-c", _ON_TWO_DEVICES],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def lowered(function, *inputs):
    """The program's text for CUDA; needs no GPU."""
    return str(jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("bits", [32, 64])
def test_transformations_lower_for_cuda_without_a_gpu(bits):
    def kernel(q, scale):
        return pallas_triton.local_attention(q, q, q, window=Window(3, 3), scale=scale)

    q = jax.ShapeDtypeStruct((1, 6, 7, 2, 16), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def everything(q, scale):
        by_both = jax.grad(lambda q, s: kernel(q, s)[1].sum(), argnums=(0, 1))(q, scale)
        mapped = jax.vmap(kernel, (None, 0))(q, jnp.stack([scale, -scale]))
        return by_both, mapped, jax.jvp(lambda q: kernel(q, 0.3), (q,), (q,))

    wide = jax.enable_x64(True) if bits == 64 else contextlib.nullcontext()
    with wide, compile_gate.lowering_for_gpu():
        text = lowered(everything, q, scale)
    # Three kernels of the gradients, one over both scales, one before the tangents.
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 5


def test_shard_map_lowers_for_cuda_without_a_gpu():
    device = getattr(jax.sharding, "AbstractDevice", None)
    options = {}
    if device:  # jax 0.10 does not ask for the device
        options = {"abstract_device": device(compile_gate.DEVICE, num_cores=132, platform="gpu")}
    mesh = jax.sharding.AbstractMesh((2,), ("b",), (jax.sharding.AxisType.Auto,), **options)

    def attend(q, scale):
        return pallas_triton.local_attention(q, q, q, window=Window(3, 3), scale=scale)[0]

    def total(q, scale):
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))
        return mapped(q, scale).sum()

    q = jax.ShapeDtypeStruct((2, 6, 7, 2, 16), jnp.bfloat16)
    with compile_gate.lowering_for_gpu():
        text = lowered(jax.grad(total, (0, 1)), q, jax.ShapeDtypeStruct((), jnp.float32))
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
