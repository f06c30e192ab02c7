"""The benchmark measures what it says: equal functions, true counts, a complete record."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.local_attention import accept, bounds, flex, peers, programs, report, run
from pallas_kernels import local_attention_2d
from pallas_kernels.local_attention.acceptance import Kind, Record, read_records
from pallas_kernels.local_attention.window import Window
from tests.pallas_kernels.common import cheaply

CASES = [((6, 9), Window(3, 5)), ((6, 9), Window(3, 3, ratio=3)), ((5, 4), Window(9, 9))]
SIZES = {"batch": 1, "heads": 2, "dim": 8}
RATES = bounds.Rates(1e9, 1e9)


def setting(memory_limit=1e9):
    return report.Setting(**SIZES, dtype="float32", repeats=1, memory_limit=memory_limit)


def case(grid=9, names=("xla", "gather", "dense", "naive_global"), direction="forward"):
    return run.Case(grid, Window(3, 3), direction, 1, names)


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_peers_compute_local_attention(grid, window, assert_close):
    inputs = programs.draw(grid, window, **SIZES, dtype="float32")[:3]

    @cheaply
    def everyone(q, k, v):
        options = {"window": (window.rows, window.columns), "implementation": "reference"}
        everything = {**options, "window": (19, 19)}
        return (
            local_attention_2d(q, k, v, **options),
            peers.gather_of_windows(q, k, v, window=window),
            peers.dense_masked(q, k, v, window=window),
            local_attention_2d(q, k, v, **everything),
            peers.naive_global(q, k, v),
        )

    expected, gather, dense, expected_global, naive = everyone(*inputs)
    for actual, wanted in [(gather, expected), (dense, expected), (naive, expected_global)]:
        assert_close(actual, wanted, "float32")


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_flex_attention_is_given_the_same_mask(grid, window):
    expected = window.dense_mask(grid)
    queries, keys = np.arange(grid[0] * grid[1]), np.arange(expected[0, 0].size)
    mask = flex.mask_of(window, grid)(None, None, queries[:, None], keys[None, :])
    np.testing.assert_array_equal(mask, expected.reshape(mask.shape))


@pytest.mark.parametrize(("grid", "window"), CASES)
def test_visible_keys_are_counted_exactly(grid, window):
    assert bounds.visible_keys(grid, window) == window.dense_mask(grid).sum()


def test_floors_are_of_traffic_and_of_arithmetic():
    options = {"batch": 1, "heads": 1, "dim": 4, "itemsize": 4, "rates": bounds.Rates(1.0, 1.0)}
    # Four arrays of 16 * 4 floats; 16 cells of 1 key each, two products of 2 * 4 operations.
    forward = bounds.floors((4, 4), Window(1, 1), direction="forward", **options)
    assert forward == (4 * 16 * 4 * 4, 16 * 2 * 2 * 4)
    # And backward reads those four and a cotangent, writes three, with four more products.
    both = bounds.floors((4, 4), Window(1, 1), direction="forward+backward", **options)
    assert both == (12 * 16 * 4 * 4, 16 * 6 * 2 * 4)


def test_a_program_attends_as_often_as_it_says():
    inputs = programs.draw((4, 4), Window(1, 1), **SIZES, dtype="float32")[:3]
    calls = []

    def attend(q, k, v):
        jax.debug.callback(lambda x: calls.append(x), q[0, 0, 0, 0, 0])
        return peers.naive_global(q, k, v)

    program = programs.compile_jax(attend, programs.copies(inputs, 3))
    program.run(2)
    jax.effects_barrier()
    assert program.applications == 3 and len(calls) == 6


def test_an_error_that_is_not_a_number_is_noticed():
    assert not programs.largest_error([jnp.array([jnp.nan])], [jnp.zeros(1)]) <= 1.0
    assert programs.largest_error(
        [jnp.array([0.5, 8.0])], [jnp.array([0.0, 10.0])]
    ) == pytest.approx(0.2)


def test_a_run_leaves_a_complete_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bounds, "measure_rates", lambda dtype: RATES)
    monkeypatch.setattr(run, "WINDOWS", [Window(9, 9)])
    arguments = ["--grids", "6", "--heads", "1", "--dim", "8", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    names = {"xla", "gather", "dense", "naive_global"}
    assert {(r["implementation"], r["direction"]) for r in record["results"]} == {
        (name, direction) for name in names for direction in run.DIRECTIONS
    }
    assert all(r["median_ms"] > 0 and r["bound_ms"] > 0 for r in record["results"])
    assert record["failed"] == record["skipped"] == []
    assert {"pallas_triton", "flex_attention", "cudnn_global"} == set(record["absent"])
    assert (tmp_path / "plot.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "6x6" in printed and "gather" in printed
    assert "absent: cudnn_global: it needs an NVIDIA GPU" in printed


def test_what_comes_too_late_is_skipped_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bounds, "measure_rates", lambda dtype: RATES)
    assert run.main(["--acceptance", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["acceptance.json"]
    said = capsys.readouterr().out
    assert "skipped: 48x48, 9x9, forward: 0 minutes were over" in said
    assert "skipped: 96x96, 9x9, forward" in said


def test_what_needs_too_much_memory_is_skipped_and_named():
    skipped: list[str] = []
    failed: list[str] = []
    results = run.measure(case(), setting(memory_limit=3e4), RATES, skipped, failed)
    assert "dense" not in {r.implementation for r in results}
    assert any(line.startswith("dense on 9x9, 3x3, forward: ") for line in skipped)
    assert not failed


def test_what_disagrees_or_raises_is_not_timed(monkeypatch):
    def broken(q, k, v):
        raise RuntimeError("no such algorithm\nand more")

    monkeypatch.setattr(peers, "gather_of_windows", lambda q, k, v, window: q)
    monkeypatch.setattr(peers, "naive_global", broken)
    failed: list[str] = []
    results = run.measure(case(direction="forward+backward"), setting(), RATES, [], failed)
    assert {r.implementation for r in results} == {"xla", "dense"}
    wrong, raised = failed
    assert wrong.startswith("gather on 9x9, 3x3, forward+backward: off by ")
    assert raised.endswith("RuntimeError: no such algorithm")


def test_a_gpu_measures_what_the_verdicts_need():
    names = (run.KERNEL, run.XLA, *run.GLOBAL, run.FLEX)
    planned = run.acceptance_cases(names, batch=1)
    assert [(c.grid, c.batch) for c in planned if c.direction == "forward"] == [
        *[(64, 1), (32, 16), (48, 8), (64, 4), (96, 2), (128, 1)]
    ]
    assert all(run.KERNEL in c.names and c.window == Window(9, 9) for c in planned)
    # PyTorch's compiler is slow: it sees each grid with one window, and each window on one grid.
    flexed = [c for c in run.cases(run.GRIDS, run.WINDOWS, names, 1) if run.FLEX in c.names]
    assert {c.grid for c in flexed} == {32, 48, 60, 63, 64, 96, 128}
    assert {c.window for c in flexed} == set(run.WINDOWS)
    assert len(flexed) == 2 * (len(run.GRIDS) + len(run.WINDOWS) - 1)


def results_of_a_gpu(slower_at=0):
    """Results of a GPU that keeps every promise; numbers made up for this test."""

    def row(grid, batch, name, direction, ms, megabytes):
        return report.Result(
            grid, "9x9", direction, batch, name, 1, ms, ms, ms, megabytes, 0.03, 0.03
        )

    rows = []
    for direction, naive in (("forward", 2.0), ("forward+backward", 1.3)):
        rows += [
            row(64, 1, "pallas_triton", direction, 0.05, 1.0),
            row(64, 1, "naive_global", direction, naive, 1600.0),
            row(64, 1, "cudnn_global", direction, 0.4, 1.0),
        ]
        for grid, batch in ((32, 16), (48, 8), (64, 4), (96, 2), (128, 1)):
            cells = batch * grid**2 * (1.2 if grid == slower_at else 1.0)
            rows.append(row(grid, batch, "pallas_triton", direction, 1e-5 * cells, 1.0))
    return rows


def test_verdicts_of_the_kernels():
    verdicts = report.verdicts(results_of_a_gpu(), run.FLAT_GRIDS)
    assert [(round(v.value, 2), v.wanted) for v in verdicts] == [
        (40.0, ">= 40"),
        (0.06, "<= 1"),
        (8.0, ">= 6"),
        (1.67, "<= 2"),
        (26.0, ">= 25"),
        (0.06, "<= 1"),
        (8.0, ">= 6"),
        (1.67, "<= 3"),
        (1.0, "<= 1.1"),
        (1.0, "<= 1.1"),
    ]
    assert all(v.holds for v in verdicts)
    flat = report.verdicts(results_of_a_gpu(slower_at=48), run.FLAT_GRIDS)[-1]
    assert not flat.holds and "DOES NOT HOLD" in str(flat)


@pytest.mark.parametrize(
    ("kernels_ms", "failure", "expected"),
    [
        (lambda case: 0.5, None, (True, 2.0, 2.0)),
        # One slow case of many is enough.
        (lambda case: 4.0 if case.grid == 32 else 0.5, None, (True, 0.25, 0.25)),
        (lambda case: 0.5 if case.direction == "forward" else 2.0, None, (True, 2.0, 0.5)),
        (lambda case: 0.5, "pallas_triton on 60x60: off by 1.0e-01", (False, 2.0, 2.0)),
        (lambda case: None, None, (True, 0.0, 0.0)),
    ],
)
def test_a_record_is_of_the_worst_case(kernels_ms, failure, expected, monkeypatch):
    def measure(case, setting, rates, skipped, failed):
        if failure and case.grid == 60:
            failed.append(failure)
        ms = {"pallas_triton": kernels_ms(case), "xla": 1.0}
        return [
            report.Result(case.grid, "", case.direction, 1, name, 1, t, t, t, 1.0, 1.0, 1.0)
            for name, t in ms.items()
            if t is not None
        ]

    monkeypatch.setattr(run, "measure", measure)
    kind = Kind("NVIDIA H200", "bfloat16", 64, coarse_keys=False)
    record, problems = accept.judge(kind, setting(), RATES)
    assert record == Record(kind, *expected, jax.__version__)
    assert record.accepted == (expected[0] and min(expected[1:]) > 1)
    assert set(problems) == ({failure} if failure else set())


def test_records_are_read_as_written(tmp_path):
    path = tmp_path / "accepted.json"
    kind = Kind("NVIDIA H200", "bfloat16", 64, coarse_keys=False)
    records = [
        Record(kind, True, 1.5, 1.2, "0.12.0"),
        Record(kind._replace(dim=128), False, 1.5, 1.2, "0.12.0"),
    ]
    for record in records:
        accept.write_record(path, record)
    assert read_records(path) == records
    # A new record of the same kind replaces the old one.
    slower = Record(kind, True, 0.5, 1.2, "0.12.0")
    accept.write_record(path, slower)
    assert read_records(path) == [slower, records[1]]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs there")
def test_acceptance_without_a_gpu_says_so_in_one_line(capsys):
    assert accept.main([]) == 2
    said = capsys.readouterr().err
    assert "it needs an NVIDIA GPU" in said and said.count("\n") == 1
