"""The plan of memory: what the compiler says, and the setting that is chosen."""

import jax
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import Precision
from cogview2_jax.pipeline import memory
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.memory import NETWORK_OF, PRECISIONS, Usage
from cogview2_jax.sharding import Execution
from experiments.full_size.memory import PUBLISHED

GB = 10**9


@pytest.fixture(scope="module")
def description(tiny_folder):
    return bundles.read_description(tiny_folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_parameters_are_those_that_are_placed(dtype, tiny, description):
    cv = CogView(tiny, Execution(PRECISIONS[dtype]))
    for network in ("coglm", "direct", "iterative", "tokenizer"):
        found = memory.parameters(description, network, PRECISIONS[dtype])
        placed = cv.bundle.params(network)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), placed
        )


def test_parameters_of_the_published_size():
    """In bfloat16 39.2 GB, as UPSTREAM's parameter counts say, and int8 about half."""
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        for network in ("coglm", "direct", "iterative"):
            leaves = jax.tree.leaves(memory.parameters(PUBLISHED, network, PRECISIONS[dtype]))
            sizes[dtype, network] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / GB
    assert sizes["bfloat16", "direct"] == pytest.approx(15.45, abs=0.02)
    assert sizes["bfloat16", "iterative"] == pytest.approx(11.83, abs=0.02)
    for network in ("coglm", "direct", "iterative"):
        assert 0.5 < sizes["int8", network] / sizes["bfloat16", network] < 0.56


@pytest.mark.parametrize("stage", NETWORK_OF)
def test_the_compiler_is_asked_about_every_stage(stage, description):
    one, four = (memory.usage(description, stage, n, Precision()) for n in (1, 4))
    assert one.params == four.params > 0
    assert 0 < one.temporary < four.temporary < 8 * one.temporary


def usage_of(stage, batch, precision):
    """Three networks of 12, 15 and 11 GB in bfloat16, half of it in int8, 0.2 GB a picture."""
    params = {"coglm": 12, "direct": 15, "iterative": 11, "tokenizer": 1}[NETWORK_OF[stage]]
    halved = precision.matrices and stage != "pixels"
    return Usage(params * GB // (2 if halved else 1), batch * GB // 5)


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (100, ("bfloat16", 16, False)),
        (42.2, ("bfloat16", 16, False)),
        (42.1, ("bfloat16", 16, True)),
        (24, ("bfloat16", 16, True)),
        (17, ("bfloat16", 4, True)),
        (16, ("int8", 16, True)),
        (9, ("int8", 2, True)),
        (8, None),
    ],
)
def test_the_best_setting_that_fits_is_chosen(gigabytes, expected):
    chosen, looked = memory.best(PUBLISHED, int(gigabytes * GB), measure=usage_of)
    assert looked and (chosen and (chosen.dtype, chosen.batch, chosen.in_turn)) == expected
    if chosen:
        assert chosen.peak <= gigabytes * GB


def test_the_fullest_moment_in_turn_is_the_largest_network():
    used = {stage: usage_of(stage, 4, Precision()) for stage in NETWORK_OF}
    together, in_turn = (memory.peak(used, "bfloat16", 4, turns) for turns in (False, True))
    assert together.peak == (12 + 15 + 11 + 1) * GB + 4 * GB // 5
    assert in_turn.peak == (15 + 1) * GB + 4 * GB // 5 and in_turn.stage == "direct"
