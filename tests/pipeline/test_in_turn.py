"""Networks on the device one after another: the same results, in the memory of the largest."""

import dataclasses

import jax
import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import Precision
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.sharding import Execution

PROMPT = "a red circle above a striped blue square"


@pytest.mark.parametrize("matrices", [None, "int8"])
def test_results_are_those_of_networks_that_stay(matrices, tiny):
    execution = Execution(Precision(matrices=matrices))
    stays, turns = CogView(tiny, execution), CogView(tiny, execution, in_turn=True)
    key = jax.random.key(0)
    pictures = stays.generate(PROMPT, 2, key=key)
    np.testing.assert_array_equal(turns.generate(PROMPT, 2, key=key), pictures)
    box = {"box": (0, 0, 0.5, 1)}
    edited = [cv.edit(PROMPT, pictures[0], key=key, num_images=1, **box) for cv in (stays, turns)]
    np.testing.assert_array_equal(*edited)
    assert turns.caption(pictures[0]) == stays.caption(pictures[0])


def test_one_transformer_is_on_the_device_at_a_time(tiny):
    cv = CogView(tiny, in_turn=True)
    for name in ("coglm", "direct", "iterative", "tokenizer"):
        leaves = jax.tree.leaves(cv.bundle.params(name))
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    seen = []
    for part, _ in cv.watch(PROMPT, 1, key=jax.random.key(0)):
        seen.append((part, {name for name in cv._held if name != "tokenizer"}))
    assert seen[0] == ("candidate", {"coglm"})
    assert ("direct", {"direct"}) in seen and seen[-1] == ("round", {"iterative"})
    assert all(len(held) == 1 for _, held in seen)


def test_coglm_is_on_the_device_once(tiny):
    cv = CogView(tiny)
    assert isinstance(cv.bundle.coglm["layers"], tuple)
    assert cv._params("coglm") is cv.bundle.coglm
    again = dataclasses.replace(cv, bundle=cv.bundle._replace(styles=()))
    for one, other in zip(
        *map(jax.tree.leaves, (cv.bundle.coglm, again.bundle.coglm)), strict=True
    ):
        assert one is other


def test_a_bundle_on_the_host_is_placed_later(tiny, tiny_folder):
    loaded = bundles.load(tiny_folder, on_host=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded.direct))
    placed = bundles.place(loaded, Execution(Precision("bfloat16", "bfloat16")))
    assert isinstance(placed.direct["word_embeddings"], jax.Array)
    assert placed.direct["word_embeddings"].dtype == jax.numpy.bfloat16
    assert placed.tokenizer["codebook"].dtype == jax.numpy.float32
