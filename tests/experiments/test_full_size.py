"""The table of memory at the published size: its limits, its lines, a compiler that is missing."""

from click.testing import CliRunner

from cogview2_jax.pipeline import memory as memories
from cogview2_jax.pipeline.memory import NETWORK_OF, Usage
from experiments.full_size import memory
from experiments.local_attention import compile_gate


def run(monkeypatch, gigabytes, *arguments):
    used = {stage: Usage(gigabytes << 30, 1 << 30) for stage in NETWORK_OF}
    monkeypatch.setattr(memory, "measured", lambda dtype, batch: used)
    monkeypatch.setattr(compile_gate, "missing_packages", lambda: "")
    return CliRunner().invoke(memory.main, [*map(str, arguments)])


def test_a_line_has_every_stage_and_both_peaks(monkeypatch):
    done = run(monkeypatch, 2, "--dtype", "int8", "--batch", 1)
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[-1].split()
    # Four networks of 2 GiB and 1 GiB more; in turn one of them and the tokenizer.
    assert line[:2] == ["int8", "1"] and line[-2:] == ["9.00", "5.00"]


def test_more_than_the_limit_is_said(monkeypatch):
    done = run(monkeypatch, 8, "--dtype", "int8", "--batch", 4)
    assert done.exit_code == 1 and "int8, batch 4: 17.00 GiB, at most 16" in done.output


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_gate, "missing_packages", lambda: "install this")
    done = CliRunner().invoke(memory.main, [])
    assert done.exit_code == 1 and "install this" in done.output


def test_the_published_description_is_that_of_a_converted_model():
    config = memory.PUBLISHED.coglm_config
    assert (config.transformer.num_layers, config.transformer.hidden_size) == (48, 3072)
    assert memories.NETWORK_OF.keys() == {"base", "score", "direct", "iterative", "pixels"}
