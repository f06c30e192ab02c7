"""The Triton kernels beyond the common suite: blocks, merging, choice, and lowering for CUDA."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments.local_attention import compile_gate
from pallas_kernels import local_attention_2d, local_attention_2d_with_lse, merge_attention
from pallas_kernels.local_attention import dispatch, pallas_triton, reference
from pallas_kernels.local_attention.acceptance import (
    ACCEPTED,
    Kind,
    Record,
    read_records,
    shipped_records,
)
from pallas_kernels.local_attention.blocks import BlockSizes, Launch, block_sizes
from pallas_kernels.local_attention.devices import default_device
from pallas_kernels.local_attention.window import Window
from tests.pallas_kernels.common import KERNEL, cheaply, draw


@pytest.mark.parametrize(
    ("tile", "block", "window"),
    [
        ((2, 8), 32, Window(5, 3, causal=True)),
        ((8, 8), 64, Window(3, 3, ratio=3)),
        ((32, 4), 16, Window(19, 15)),
    ],
)
def test_does_not_depend_on_the_blocks(tile, block, window, assert_close):
    grid, key_grid = (9, 12), (9 // window.ratio, 12 // window.ratio)
    q, k, v, dout, dlse = draw(
        *[(1, *g, 1, 16) for g in (grid, key_grid, key_grid, grid)], (1, 1, *grid)
    )
    blocks = BlockSizes(*[Launch(tile, block, num_warps=4, num_stages=2)] * 3)

    def results(attend, **options):
        values, pull = jax.vjp(
            functools.partial(attend, window=window, scale=-0.7, **options), q, k, v
        )
        return *values, *pull((dout, dlse))

    interpreted = {"interpret": True, "blocks": blocks}
    got = cheaply(lambda: results(pallas_triton.local_attention, **interpreted))()
    expected = cheaply(lambda: results(reference.local_attention))()
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, "float32")


@pytest.mark.parametrize("tile", [(3, 5), (2, 4)])
def test_blocks_that_are_no_power_of_two_are_refused(tile):
    with pytest.raises(ValueError, match="tile must hold a power of two of at least 16 cells"):
        Launch(tile, 64, num_warps=4, num_stages=2)


def test_merged_parts_train_as_one_softmax(assert_close):
    """The second network's attention: fine and coarse windows, with gradients through both lse."""
    fine, coarse = (1, 9, 12, 2, 16), (1, 3, 4, 2, 16)
    *inputs, dout = draw(fine, fine, fine, coarse, coarse, fine)

    def loss(implementation, q, k, v, coarse_k, coarse_v):
        attend = functools.partial(local_attention_2d_with_lse, implementation=implementation)
        out = merge_attention(
            attend(q, k, v, window=(5, 3)), attend(q, coarse_k, coarse_v, window=(3, 3))
        )
        return jnp.vdot(out, dout), out

    def run(implementation):
        both = jax.value_and_grad(loss, argnums=(1, 2, 3, 4, 5), has_aux=True)
        return cheaply(functools.partial(both, implementation))(*inputs)

    (_, out), gradients = run(KERNEL)
    (_, expected), expected_gradients = run("reference")
    assert_close(out, expected, "float32")
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, "float32")


def gpu(kind="NVIDIA H200", capability="9.0"):
    return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


H200 = Kind("NVIDIA H200", "bfloat16", 64, coarse_keys=False)


def record(kind=H200, agrees=True, forward=1.5, gradients=1.2):
    return Record(kind, agrees, forward, gradients, "0.12.0")


@pytest.mark.parametrize(
    ("records", "call", "expected"),
    [
        ([], {}, "xla"),
        ([record()], {}, "pallas_triton"),
        ([record(agrees=False)], {}, "xla"),
        ([record(forward=0.9)], {}, "xla"),
        ([record(gradients=0.9)], {}, "xla"),
        # A record holds for its own kind of call and for no other.
        ([record()], {"dtype": "float32"}, "xla"),
        ([record()], {"dim": 32}, "xla"),
        ([record()], {"ratio": 3}, "xla"),
        ([record()], {"device": gpu("NVIDIA A100-SXM4-40GB", "8.0")}, "xla"),
        ([record()], {"device": SimpleNamespace(platform="cpu", device_kind="cpu")}, "xla"),
        ([record(agrees=False), record(H200._replace(dim=32))], {"dim": 32}, "pallas_triton"),
        ([record(H200._replace(coarse_keys=True))], {"ratio": 3}, "pallas_triton"),
        # A record cannot make the kernels run where they do not.
        ([record(H200._replace(dim=160))], {"dim": 160}, "xla"),
    ],
)
def test_auto_takes_the_kernels_where_a_record_says_so(records, call, expected):
    usual = {"dtype": "bfloat16", "dim": 64, "ratio": 1, "device": gpu()}
    assert dispatch.choose("auto", **{**usual, **call}, records=records) == expected


def test_the_shipped_records_can_be_read():
    assert list(shipped_records()) == read_records(ACCEPTED)


def test_auto_without_a_record_is_xla():
    (q,) = draw((1, 4, 4, 1, 16))
    texts = [
        jax.jit(functools.partial(local_attention_2d, window=(3, 3), implementation=name))
        .lower(q, q, q)
        .as_text()
        for name in ("auto", "xla", KERNEL)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("device", "dim", "message"),
    [
        (gpu(), 160, "its head dim may be at most 128, got 160"),
        (gpu("Tesla V100", "7.0"), 64, "it needs compute capability 8.0, 'Tesla V100' has 7.0"),
        (gpu("AMD Instinct MI300X", "gfx942"), 64, "it needs an NVIDIA GPU, the default device is"),
    ],
)
def test_the_named_kernels_are_not_replaced(device, dim, message):
    with pytest.raises(ValueError, match=message) as caught:
        dispatch.choose("pallas_triton", "bfloat16", dim, 1, device)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="serves there")
def test_the_named_kernels_are_refused_without_a_gpu():
    q = jnp.zeros((1, 4, 4, 1, 16))
    with pytest.raises(
        ValueError, match="cannot serve this call: it needs an NVIDIA GPU"
    ) as caught:
        local_attention_2d(q, q, q, window=(3, 3), implementation="pallas_triton")
    assert "\n" not in str(caught.value)


def test_the_default_device_is_what_jax_was_told():
    with jax.default_device(jax.devices("cpu")[0]):
        assert default_device().platform == "cpu"
    with jax.default_device("cpu"):
        assert default_device().platform == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [16, 40, 64, 128])
def test_every_head_dim_and_dtype_has_block_sizes(dtype, dim):
    for device in ("NVIDIA H200", "NVIDIA RTX 6000 Ada Generation"):
        for ratio in (1, 3):
            assert isinstance(block_sizes(device, jnp.dtype(dtype), dim, ratio), BlockSizes)


@pytest.mark.parametrize(
    ("grid", "window", "dim", "dtype"),
    [
        ((60, 60), Window(9, 9), 64, "bfloat16"),
        ((60, 60), Window(5, 5, ratio=3), 64, "bfloat16"),
        ((13, 7), Window(31, 5, causal=True), 40, "float32"),
        ((64, 64), Window(9, 5), 128, "float16"),
    ],
)
def test_lowers_for_cuda_without_a_gpu(grid, window, dim, dtype):
    blocks = block_sizes(compile_gate.DEVICE, jnp.dtype(dtype), dim, window.ratio)
    program = functools.partial(compile_gate.attention_and_gradients, window=window, blocks=blocks)
    key_grid = grid[0] // window.ratio, grid[1] // window.ratio
    queries, keys = (jax.ShapeDtypeStruct((2, *g, 3, dim), dtype) for g in (grid, key_grid))
    dlse = jax.ShapeDtypeStruct((2, 3, *grid), jnp.float32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with compile_gate.lowering_for_gpu():
        exported = jax.export.export(jax.jit(program), platforms=["cuda"], disabled_checks=allowed)(
            queries, keys, keys, queries, dlse
        )
    text = exported.mlir_module()
    for kernel in ("forward", "dq", "dkv"):
        assert f"local_attention_{kernel}" in text
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
    assert [a.shape for a in exported.out_avals][2:] == [queries.shape, keys.shape, keys.shape]


def test_the_compile_gate_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compile_gate, "find_tool", lambda name: None)
    assert compile_gate.main([]) == 2
    said = capsys.readouterr().err
    assert "pip install" in said and said.count("\n") == 1


def test_resident_programs_are_bound_by_the_scarcest_resource():
    needs = {"name": "dq", "programs": 1, "spilled": 0, "instructions": 0, "in_loop": 0}
    for threads, registers, shared, expected in [
        (128, 128, 0, 4),  # 65,536 registers
        (128, 16, 56 * 1024, 4),  # 228 KB, of which a program's first is the system's
        (256, 16, 0, 8),  # 2,048 threads
    ]:
        kernel = compile_gate.Kernel(threads=threads, registers=registers, shared=shared, **needs)
        assert kernel.resident == expected
