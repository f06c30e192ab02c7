"""Tuning tries candidates, refuses wrong ones, and writes entries that the kernels then use."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.local_attention import tune
from pallas_kernels.local_attention import blocks
from pallas_kernels.local_attention.blocks import BlockSizes, Entry, Launch

LAUNCHES = [Launch((4, 4), block, num_warps=2, num_stages=1) for block in (16, 32, 64)]


def entry(device="NVIDIA H200", itemsize=2, dim=64, ratio=1, launch=LAUNCHES[0]):
    return Entry(device, itemsize, dim, ratio, BlockSizes(launch, launch, launch))


def test_the_whole_way_interpreted_writes_nothing(capsys):
    before = blocks.TUNED.read_text()
    arguments = ["--interpret", "--dtype", "float32", "--dim", "16", "--repeats", "1"]
    assert tune.main(arguments) == 0
    said = capsys.readouterr().out
    for kernel in tune.KERNELS:
        assert said.count(f"\n{kernel} ") == 1
    # Of each kernel the launch in use and one more.
    assert said.count("(in use)") == 3 and len(re.findall(r"\d us\b", said)) == 6
    assert said.count('best: {"device": "interpreter"') == 1 and "wrote" not in said
    assert blocks.TUNED.read_text() == before


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="serves there")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert tune.main([]) == 2
    said = capsys.readouterr().err
    assert "it needs an NVIDIA GPU" in said and said.count("\n") == 1


def test_wrong_and_failing_candidates_are_refused():
    def failing(a):
        raise ValueError("too many registers\nand more")

    works, wrong, fails = LAUNCHES
    functions = {wrong: lambda a: a + 2, fails: failing, works: lambda a: 2 * a}
    ones = jnp.ones(4)
    first, *refused = tune.try_all(functions, [(ones,)], [2 * ones], 1e-5, repeats=1)
    assert first.launch == works and first.microseconds > 0
    assert {trial.launch: trial.refused for trial in refused} == {
        wrong: "off by 5.0e-01",
        fails: "ValueError: too many registers",
    }
    said = tune.table("dq", [first, *refused], used=works)
    assert "ValueError: too many registers" in said and "us  (in use)" in said


def test_entries_are_read_as_written_and_replaced(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("[]\n")
    coarse, same, other = entry(ratio=math.inf), entry(), entry(device="NVIDIA H100")
    for new in (coarse, same, other):
        tune.write_entry(path, new)
    assert sorted(blocks.read_entries(path)) == sorted([coarse, same, other])
    faster = entry(launch=LAUNCHES[1])
    tune.write_entry(path, faster)
    found = blocks.read_entries(path)
    assert faster in found and same not in found and len(found) == 3


def test_a_tuned_entry_serves_its_device_and_kind_alone():
    untuned = blocks.block_sizes("NVIDIA H100", jnp.dtype("bfloat16"), 64, 1)
    # Wider than the kind asked for: the narrower untuned one is nearer.
    tuned = [entry(), entry(itemsize=4, dim=128, ratio=math.inf, launch=LAUNCHES[1])]
    table = blocks.ordered([*tuned, *blocks.UNTUNED])

    def chosen(device="NVIDIA H200", dtype="bfloat16", dim=64, ratio=1):
        return blocks.block_sizes(device, jnp.dtype(dtype), dim, ratio, table)

    assert chosen().dq == LAUNCHES[0]
    assert chosen(device="NVIDIA H100") == untuned
    assert chosen(ratio=3).dq not in LAUNCHES
    assert chosen(dim=128).dq not in LAUNCHES
    assert chosen(dtype="float32", dim=128).dq == LAUNCHES[1]
    interpreted = chosen(device=blocks.INTERPRETER)
    assert interpreted not in (tuned[0].blocks, tuned[1].blocks)


@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("dim", [64, 128])
def test_there_are_candidates_but_not_too_many(kernel, dim):
    found = tune.candidates(kernel, dim, interpret=False)
    assert 50 < len(found) == len(set(found)) < 150
