"""The plan for the published sizes: its arithmetic, and its parsing of a compiled program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from experiments.scale_plan import estimate, run
from experiments.scale_plan.estimate import Collective, Machine

ROOT = Path(__file__).parents[2]
PROGRAM = """\
HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}
  %agd = bf16[32,8]{1,0} all-gather-done(%ag)
  %rs = ((f32[16], f32[32]), (f32[2], f32[4])) reduce-scatter-start(%a, %b), channel_id=2, \
replica_groups=[2,8]<=[16], dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"48"}}
  %ar = f32[100]{0} all-reduce(%y), channel_id=3, \
replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'data'}, to_apply=%add
  %a2a = f32[10]{0} all-to-all(%y), channel_id=4, replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_of_a_program_are_counted_with_their_loops():
    found = estimate.collectives(PROGRAM, 16)
    assert found == [
        Collective("all-gather", 48 * (32 - 4) * 8 * 2, False),
        Collective("reduce-scatter", 48 * (48 - 6) * 4, False),
        Collective("all-reduce", 2 * 400 / 2, True),  # devices 0 and 8 are on two hosts
        Collective("all-to-all", 40 / 2, False),
    ]


def test_a_step_waits_for_the_slowest_or_for_all():
    machine = Machine(peak=100.0, achieved=0.5, inside=10.0, between=2.0)
    moved = [Collective("all-gather", 30.0, False), Collective("all-reduce", 8.0, True)]
    seconds = estimate.step_seconds(100.0, moved, machine)
    assert seconds == (2.0, 3.0, 4.0)
    assert (seconds.overlapped, seconds.one_after_the_other) == (4.0, 9.0)
    assert estimate.days(86.4, 1000, pairs=1e6) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.long
def test_a_real_step_says_what_was_predicted_and_measured(tmp_path):
    options = ["--layers", 2, "--hidden", 64, "--batch-size", 2, "--steps", 2]
    file = tmp_path / "real.json"
    arguments = ["--real", *options, "--json", file]
    done = CliRunner().invoke(run.main, [str(word) for word in arguments])
    assert done.exit_code == 0, done.output
    results = json.loads(file.read_text())
    assert results["parameters"] > 150_003 * 64
    # CPUs do not count their memory.
    assert results["measured_bytes"] is None or jax.default_backend() != "cpu"
    for name in ("predicted_bytes", "predicted_seconds", "measured_seconds", "matrix_rate"):
        assert results[name] > 0
    assert 0 < results["utilisation_of_matrix_rate"] < 1


SMALL_PLAN = """
import dataclasses, math, sys
import jax
from experiments.scale_plan import run
from cogview2_jax.config import CogLMConfig, DirectSRConfig, TransformerConfig

sizes = TransformerConfig(num_layers=2, hidden_size=64, num_heads=8)
base = CogLMConfig(sizes, grid=(4, 4), max_text=15)
devices = run.devices_without_hardware("cpu", 8)
for config, module in ((base, run.coglm), (DirectSRConfig(base, text_slots=16), run.direct_sr)):
    network = run.Network("small", config, module, 2)
    for mesh in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
        row = run.row(network, mesh, devices)
        assert row["argument_bytes"] == row["argument_bytes_compiled"], row
        assert row["temporary_bytes"] > 0 and sum(row["collective_bytes"].values()) > 0
        print(run.line(row))
"""


@pytest.mark.long
@pytest.mark.multiprocess
def test_argument_bytes_are_those_of_the_compiler():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_PLAN],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| small |") == 6
