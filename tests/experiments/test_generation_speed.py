"""The measurement of generation speed: its counts, its record, and its peers where PyTorch is."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generation_speed import bounds, one_by_one, peers, report, run, traffic, workload
from experiments.local_attention.bounds import Rates

SIZES = workload.SMALL

LOOP = """HloModule jit_f

%fused_slice (p0: f32[8,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  ROOT %s = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={1,4}
}

%fused_write (p0: f32[8,4], p1: f32[1,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %c = s32[] constant(0)
  ROOT %u = f32[8,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %c)
}

%body (t: (s32[], f32[8,4], bf16[4,4])) -> (s32[], f32[8,4], bf16[4,4]) {
  %t = (s32[], f32[8,4]{1,0}, /*index=2*/bf16[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %w = bf16[4,4]{1,0} get-tuple-element(%t), index=2
  %row = f32[1,4]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused_slice
  %dot = f32[1,4]{1,0} custom-call(%row, %w), custom_call_target="gemm"
  %new = f32[8,4]{1,0} fusion(%a, %dot, %i), kind=kLoop, calls=%fused_write
  ROOT %out = (s32[], f32[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%i, %new, %w)
}

%condition (t: (s32[], f32[8,4], bf16[4,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  ROOT %y = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8,4], bf16[4,4])) -> (s32[], f32[8,4], bf16[4,4]) {
  %p = (s32[], f32[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[8,4]{1,0}, bf16[4,4]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_moves_its_slices_and_its_weights():
    # The slice: index 4, read 16, written 16. The product: 16 + 32 read, 16 written. The write in
    # place: index 4, row 16 read and 16 written.
    assert traffic.loop_bytes(LOOP) == 36 + 64 + 36
    assert traffic.largest(LOOP, 1) == [(64, "dot f32[1,4]{1,0}")]
    assert traffic.size("(f32[2,3]{1,0}, bf16[4]{0:T(8)}, pred[], token[])") == 24 + 8 + 1


def test_a_loop_that_copies_its_weights_is_seen():
    """What the count is for, in real programs: of a stack, a matrix is copied at each step."""

    def loop(weights, x):
        def body(i, x):
            return jnp.tanh(x @ (weights[i % 2] if weights.ndim == 3 else weights))

        return jax.lax.fori_loop(0, 9, body, x)

    def moved(*shape):
        given = (jax.ShapeDtypeStruct(of, jnp.float32) for of in (shape, (8, 256)))
        return traffic.loop_bytes(jax.jit(loop).lower(*given).compile().as_text())

    matrix = 4 * 256 * 256
    assert matrix <= moved(256, 256) < 1.2 * matrix
    assert moved(2, 256, 256) >= 3 * matrix  # read, written, read


def test_the_sliding_window_takes_more_steps_than_cells():
    steps, window = one_by_one.window_steps(20, 3)
    assert window == 30 * 30 and 3600 < steps < 9 * window
    # By hand: the first window is 17 lines; the second of the first row starts at its 16th column.
    assert steps == 5325


def test_bounds_are_bytes_or_products_over_the_rates():
    sizes = workload.Sizes()
    config = sizes.coglm.transformer
    weights = 8 * 12 * 512**2
    read = bounds.bytes_a_token(config, 20_000, 511, 1, itemsize=4)
    assert read == 4 * (weights + 20_000 * 512 + 2 * 8 * 511 * 512)
    slow = bounds.bounds(sizes, Rates(flops=math.inf, bytes=1e9))
    assert slow["stage1_batch1"] == pytest.approx(400 * read / 1e9)
    assert slow["direct"] == slow["iterative"] == 0 and slow["whole"] == slow["stage1_batch1"]
    small = bounds.bounds(sizes, Rates(flops=1e9, bytes=math.inf))
    assert small["stage1_batch4"] == pytest.approx(4 * small["stage1_batch1"])
    # 3,600 cells, six times, of which no product may be left out.
    assert small["iterative"] > 6 * 2 * 3600 * (weights + 20_000 * 512) / 1e9


def check_record(record, with_torch):
    assert list(record["times_faster"]) == report.PEERS
    for of_row in [*record["times_faster"].values(), record["times_bound"]]:
        assert list(of_row) == report.STAGES
    timed = {stage for stage, times in record["times_bound"].items() if times is not None}
    assert timed == {"stage1_batch1", "direct", "iterative", "whole"}
    assert all(record["times_bound"][stage] > 0 for stage in timed)
    made = record["times_faster"]
    assert made["one_token_at_a_time"]["whole"] > 0 and made["sliding_window"]["direct"] > 0
    for row in ("published", "best_torch"):
        assert all((made[row][stage] is not None) == with_torch for stage in timed)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_without_torch(tmp_path, capsys):
    files = tmp_path / "found.json", tmp_path / "plot.png"
    given = ["--small", "--no-torch", "--repeats", "1", "--json", files[0], "--plot", files[1]]
    given += ["--stages", "stage1_batch1", "direct", "iterative"]
    assert run.main([str(one) for one in given]) == 0
    record = json.loads(files[0].read_text())
    check_record(record, with_torch=False)
    assert list(record["local_attention_ms"]) == ["ours"] and files[1].stat().st_size
    said = capsys.readouterr()
    assert "times the bound" in said.out and "PyTorch is left out" in said.err


@pytest.mark.slow
def test_the_published_algorithm_has_our_logits():
    """`measure` refuses a peer whose logits are not ours."""
    pytest.importorskip("torch")
    made = workload.networks(SIZES)
    peer = peers.Published(made.labels, SIZES.clusters)
    stages = ("stage1_batch4", "direct", "iterative")
    assert [name for name, _ in run.peer_stages(peer, made, stages)] == list(stages)
    wrong = made._replace(coglm=jax.tree.map(np.negative, made.coglm))
    model = peers.weights(wrong.coglm)
    with pytest.raises(SystemExit, match="no peer"), peers.inference():
        logits, _ = peer.begin(model, made.text, 1, SIZES.coglm, 1.4)
        run.compare(
            "stage1", peer, workload.first_logits(made, jnp.zeros((1, 0), jnp.int32)), logits
        )
