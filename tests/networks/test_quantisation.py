"""Matrices in int8: near the values they stand for, in every network, and the rest untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import Precision
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.networks.quantisation import is_quantised, quantise
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.sharding import Execution, Sharding, make_mesh
from tests.common import SMALL, random_params

INT8 = Execution(Precision(matrices="int8"))


def restored(tree):
    """A tree of `quantise` with the matrices that its int8 ones stand for."""
    if not isinstance(tree, dict):
        return tree
    made = {name: restored(leaf) for name, leaf in tree.items() if name != "kernel_scale"}
    if "kernel_scale" in tree:
        scale = np.asarray(tree["kernel_scale"])[..., None, :]
        made["kernel"] = np.asarray(tree["kernel"], np.float32) * scale
    return made


def test_every_value_is_within_half_a_step_of_its_column():
    rng = np.random.default_rng(0)
    kernel = (rng.standard_normal((3, 40, 7)) * 10.0 ** rng.integers(-9, 9, (3, 1, 7))).astype("f4")
    kernel[1, :, 2] = 0
    made = quantise({"a": {"kernel": kernel, "bias": kernel[0, 0]}, "scale": kernel[0, 0]})
    assert made["a"]["kernel"].dtype == np.int8 and made["a"]["kernel_scale"].shape == (3, 7)
    error = np.abs(restored(made)["a"]["kernel"] - kernel)
    assert (error <= 0.5001 * made["a"]["kernel_scale"][:, None]).all()
    assert np.abs(made["a"]["kernel"]).max(1)[made["a"]["kernel_scale"] != 1 / 127].min() == 127
    np.testing.assert_array_equal(made["a"]["bias"], kernel[0, 0])
    assert is_quantised(made) and not is_quantised({"a": {"kernel": kernel}})
    again = quantise(made)
    jax.tree.map(np.testing.assert_array_equal, again, made)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_refused(value):
    kernel = np.ones((2, 3, 4), np.float32)
    kernel[1, 2, 0] = value
    with pytest.raises(ValueError, match="not finite cannot be kept in int8"):
        quantise({"kernel": kernel})


def test_an_unknown_dtype_of_matrices_is_refused():
    with pytest.raises(ValueError, match="matrices must be int8 or None: got 'int4'"):
        Precision(matrices="int4")


def test_host_and_device_round_alike():
    params = jax.device_get(random_params(coglm.init_params, SMALL))
    # A division may differ in its last bit, and a value halfway between two go to either.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=a.dtype == np.int8),
        quantise(params),
        jax.jit(quantise)(params),
    )


@pytest.mark.parametrize("decoding", [False, True])
def test_the_network_computes_with_what_the_matrices_stand_for(decoding):
    params = jax.device_get(random_params(coglm.init_params, SMALL))
    made = quantise(params)
    cells = SMALL.num_image_tokens
    tokens = jnp.arange(SMALL.max_text + 1 + cells)[None] % SMALL.vocabulary.num_image
    mask = jnp.tril(jnp.ones((1, tokens.size, tokens.size), bool))
    given = inputs.NetworkInput(tokens, jnp.arange(tokens.size)[None], mask)

    def hidden(params):
        if not decoding:
            return coglm.hidden_states(params, given, config=SMALL)
        bias = jnp.zeros((1, tokens.size))
        cache = coglm.init_cache(SMALL, 1, tokens.size)
        params = coglm.unstacked(params)
        return coglm.extend(params, cache, given, 0, config=SMALL, bias=bias)[0]

    found, expected = hidden(made), hidden(restored(made))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert float(jnp.abs(found - hidden(params)).max()) > 1e-3  # the rounding, not nothing


def test_a_bundle_in_int8_draws_captions_and_edits(tiny):
    cv = CogView(tiny, INT8)
    for name in ("coglm", "direct", "iterative"):
        tree = cv.bundle.params(name)
        assert is_quantised(tree) and tree["word_embeddings"].dtype == np.float32
    assert not is_quantised(cv.bundle.params("tokenizer"))
    restored_bundle = tiny._replace(
        **{
            name: restored(quantise(getattr(tiny, name)))
            for name in ("coglm", "direct", "iterative")
        }
    )
    expected = CogView(restored_bundle)
    arguments = "a red circle above a striped blue square", 2
    drawn = cv.generate(*arguments, key=jax.random.key(0))
    np.testing.assert_array_equal(drawn, expected.generate(*arguments, key=jax.random.key(0)))
    scores = cv.scores([arguments[0]], [drawn[0]])
    np.testing.assert_allclose(scores, expected.scores([arguments[0]], [drawn[0]]), atol=1e-4)
    assert (
        CogView(cv.bundle, INT8).bundle.coglm["layers"][0]["attention"]["dense"]["kernel"].dtype
        == np.int8
    )  # placed once more


def test_int8_on_a_mesh_is_refused(tiny):
    execution = Execution(Precision(matrices="int8"), sharding=Sharding(make_mesh(1, 1, 1)))
    with pytest.raises(ValueError, match="int8 run on one device: leave the mesh or int8 out"):
        bundles.place(tiny, execution)
