"""The table of memory at the published size: its limits, its lines, a compiler that is missing."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from cogview2_jax.pipeline import memory as memories
from cogview2_jax.pipeline.memory import NETWORK_OF, Usage
from experiments.full_size import memory
from experiments.full_size import run as speed
from experiments.local_attention import compile_gate


def memory_of(monkeypatch, gigabytes, *arguments):
    used = {stage: Usage(gigabytes << 30, 1 << 30) for stage in NETWORK_OF}
    monkeypatch.setattr(memory, "measured", lambda dtype, batch: used)
    monkeypatch.setattr(compile_gate, "missing_packages", lambda: "")
    return CliRunner().invoke(memory.main, [*map(str, arguments)])


def test_a_line_has_every_stage_and_both_peaks(monkeypatch):
    done = memory_of(monkeypatch, 2, "--dtype", "int8", "--batch", 1)
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[-1].split()
    # Four networks of 2 GiB and 1 GiB more; in turn one of them and the tokenizer.
    assert line[:2] == ["int8", "1"] and line[-2:] == ["9.00", "5.00"]


def test_more_than_the_limit_is_said(monkeypatch):
    done = memory_of(monkeypatch, 8, "--dtype", "int8", "--batch", 4)
    assert done.exit_code == 1 and "int8, batch 4: 17.00 GiB, at most 16" in done.output


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_gate, "missing_packages", lambda: "install this")
    done = CliRunner().invoke(memory.main, [])
    assert done.exit_code == 1 and "install this" in done.output


def test_the_published_description_is_that_of_a_converted_model():
    config = memory.PUBLISHED.coglm_config
    assert (config.transformer.num_layers, config.transformer.hidden_size) == (48, 3072)
    assert memories.NETWORK_OF.keys() == {"base", "score", "direct", "iterative", "pixels"}


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_way_with_small_networks(tmp_path):
    file = tmp_path / "results.json"
    arguments = "--small", "--dtype", "int8", "--batch", 2, "--repeats", 1
    done = CliRunner().invoke(speed.main, [*map(str, arguments), "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert [(row["stage"], row["batch"]) for row in found["stages"]] == [
        (stage, 2) for stage in NETWORK_OF
    ]
    for row in found["stages"]:
        assert row["planned"] > 0 and row["seconds"] > 0
        if row["stage"] in speed.LIMITS:
            assert row["times_bound"] == pytest.approx(row["seconds"] / row["bound"])
    assert found["whole_seconds"]["2"] == pytest.approx(
        sum(row["seconds"] for row in found["stages"] if row["batch"] == 2)
    )
    assert found["one_token_at_a_time_seconds"] > 0
    assert "pictures a minute" in done.output


def test_random_parameters_have_the_dtypes_that_are_planned():
    params = speed.random_params(speed.SMALL, "coglm", "int8")
    layer = params["layers"][0]["attention"]["dense"]
    assert layer["kernel"].dtype == np.int8 and int(np.abs(layer["kernel"]).max()) == 127
    assert params["word_embeddings"].dtype == "bfloat16"
    assert float(params["final_layernorm"]["scale"].min()) == 1
