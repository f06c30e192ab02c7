"""The benchmark measures what it says: equal functions, true counts, a complete record."""

import json

import jax
import numpy as np
import pytest

from experiments.local_attention import bounds, peers, run
from pallas_kernels import local_attention_2d
from pallas_kernels.local_attention.window import Window

CASES = [((6, 9), Window(3, 5)), ((6, 9), Window(3, 3, ratio=3)), ((5, 4), Window(9, 9))]


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_peers_compute_local_attention(grid, window, assert_close):
    setting = run.Setting(batch=1, heads=2, dim=8, dtype="float32", repeats=1, memory_limit=1e9)
    inputs = run.draw(grid, window, setting)

    @jax.jit
    def everyone(q, k, v):
        options = {"window": (window.rows, window.columns), "implementation": "reference"}
        return (
            local_attention_2d(q, k, v, **options),
            peers.gather_of_windows(q, k, v, window=window),
            peers.dense_masked(q, k, v, window=window),
        )

    expected, *others = everyone(*inputs)
    for other in others:
        assert_close(other, expected, "float32")


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_visible_keys_are_counted_exactly(grid, window):
    assert bounds.visible_keys(grid, window) == window.dense_mask(grid).sum()


def test_bound_is_the_larger_of_arithmetic_and_traffic():
    options = {"batch": 1, "heads": 1, "dim": 4, "itemsize": 4, "direction": "forward"}
    # 16 cells of 1 key each, two products of 2 * 4 operations; four arrays of 16 * 4 floats.
    for rates, expected in [
        (bounds.Rates(flops=1.0, bytes=np.inf), 16 * 16),
        (bounds.Rates(flops=np.inf, bytes=1.0), 4 * 16 * 16),
    ]:
        assert bounds.bound_seconds((4, 4), Window(1, 1), rates=rates, **options) == expected


def test_a_run_leaves_a_complete_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bounds, "measure_rates", lambda dtype: bounds.Rates(1e9, 1e9))
    run.main(["--acceptance", "--grids", "6", "--heads", "1", "--dim", "8", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert {r["implementation"] for r in record["results"]} == {"xla", "gather", "dense", "global"}
    assert all(r["median_ms"] > 0 and r["bound_ms"] > 0 for r in record["results"])
    printed = capsys.readouterr().out
    assert "6x6" in printed and "gather" in printed


def test_what_needs_too_much_memory_is_skipped_and_named():
    setting = run.Setting(batch=1, heads=1, dim=8, dtype="float32", repeats=1, memory_limit=3e4)
    skipped: list[str] = []
    rates = bounds.Rates(1e9, 1e9)
    results = run.measure((9, 9), Window(3, 3), "forward", setting, rates, skipped)
    assert "dense" not in {r.implementation for r in results}
    assert any(line.startswith("dense on 9x9, 3x3, forward: ") for line in skipped)
