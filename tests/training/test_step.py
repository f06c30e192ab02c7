"""A training step: accumulation, moving average, frozen parameters, errors; optimisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogview2_jax.config import CogLMConfig, Precision, Training, TransformerConfig, Vocabulary
from cogview2_jax.networks import coglm
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.sharding import Execution
from cogview2_jax.training.losses import weighted
from cogview2_jax.training.step import (
    adamw,
    freeze,
    init_state,
    make_step,
    muon_with_adamw,
    warmup_cosine,
)
from tests.common import random_params


def batch(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng((1, step))
    x = rng.standard_normal((16, 4)).astype(np.float32)
    # Rows that count more, and rows that do not count at all.
    return x, x @ np.arange(8, dtype=np.float32).reshape(4, 2), (np.arange(16) % 3).astype(float)


def loss(params, data, key):
    x, y, weights = data
    errors = jnp.mean((x @ params["w"] + params["b"] - y) ** 2, axis=-1)
    found = weighted(errors, weights)
    return found, {"again": found}, errors


def start(optimizer=None, **options):
    params = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    optimizer = optimizer or optax.sgd(0.1)
    return optimizer, init_state(params, optimizer, **options)


def run(num_steps, optimizer=None, options=None, **more):
    optimizer, state = start(optimizer, **(options or {}))
    step = make_step(loss, optimizer, **more)
    for number in range(num_steps):
        state, metrics = step(state, batch(number))
    return state, metrics


def test_it_learns():
    state, metrics = run(200, optax.adam(0.1))
    np.testing.assert_allclose(state.params["w"], np.arange(8).reshape(4, 2), atol=0.05)
    assert metrics["finite"] == 1 and int(state.step) == 200


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    whole, metrics = run(5)
    parts, metrics_of_parts = run(5, accumulate=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (whole.params, metrics),
        (parts.params, metrics_of_parts),
    )


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate must divide the batch of 16: got 3"):
        run(1, accumulate=3)


def test_the_average_follows_the_parameters():
    state, _ = run(3, options={"average": True}, average=0.9)
    expected = np.zeros((4, 2))
    for number in range(1, 4):
        decay = min(0.9, number / (9 + number))
        after, _ = run(number)
        expected = decay * expected + (1 - decay) * np.asarray(after.params["w"])
    np.testing.assert_allclose(state.average["w"], expected, rtol=1e-5)


def test_frozen_parameters_stay_and_have_no_moments():
    trained = {"w": True, "b": False}
    optimizer = freeze(optax.adamw(0.1, weight_decay=0.5), trained)
    state, metrics = run(3, optimizer, trained=trained)
    np.testing.assert_array_equal(state.params["b"], 0)
    assert np.abs(state.params["w"]).min() > 0
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2,)]
    assert not moments


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    optimizer, state = start(optax.adam(0.1), average=True)
    step = make_step(loss, optimizer, average=0.9)
    state, _ = step(state, batch(0))
    before = jax.device_get(state)
    x, y, weights = batch(1)
    state, metrics = step(state, (x, y * np.inf, weights))
    assert metrics["finite"] == 0 and int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before._replace(step=2), jax.device_get(state))


def test_a_parameter_that_becomes_too_large_is_not_kept():
    """Its loss and gradient were finite, so only the next step would show it."""
    optimizer, state = start(optax.sgd(1e38))
    step = make_step(loss, optimizer)
    x, y, weights = batch(0)
    before = jax.device_get(state.params)
    state, metrics = step(state, (x, 100 * y, weights))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert metrics["finite"] == 0 and not np.isfinite(metrics["parameter_norm"])
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_extra_is_revised_with_what_the_loss_function_saw():
    def revise(params, extra, aux, step, key):
        assert aux.shape == (2, 8)  # parts, rows
        return params, extra + aux.sum()

    optimizer, state = start(extra=jnp.zeros(()))
    step = make_step(loss, optimizer, accumulate=2, revise=revise)
    state, _ = step(state, batch(0))
    _, y, _ = batch(0)
    np.testing.assert_allclose(state.extra, (y**2).mean(axis=-1).sum(), rtol=1e-5)


def test_compute_in_bfloat16_keeps_float32_masters():
    def bf16_loss(params, data, key):
        assert params["w"].dtype == jnp.bfloat16
        return loss(params, data, key)

    optimizer, state = start(optax.adam(1e-4))
    step = make_step(bf16_loss, optimizer, precision=Precision(compute=jnp.bfloat16))
    for number in range(3):
        state, _ = step(state, batch(number))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    # Steps this small would be lost in bfloat16 weights.
    assert 2e-4 < np.abs(state.params["w"]).max() < 4e-4


SIZES = TransformerConfig(num_layers=2, hidden_size=16, num_heads=2)
VOCABULARY = Vocabulary(num_image=12, size=24, pad=15, unknown=12)
BASE = CogLMConfig(SIZES, VOCABULARY, grid=(4, 4), max_text=5, num_positions=32, image_position=8)


@functools.cache
def gradient_with(training: Training):
    """Parameters and a key or None → the loss and its gradient; compiled once for each kind."""
    tokens = np.arange(20)[None] % 12
    inputs = NetworkInput(tokens, tokens, np.tril(np.ones((1, 20, 20), bool)))

    def mean(params, key):
        execution = Execution(training=training)
        logits = coglm.apply(params, inputs, config=BASE, execution=execution, dropout_key=key)
        return jnp.mean(jax.nn.logsumexp(logits, -1))

    # Hardly optimised: so it is ready soonest.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(mean), compiler_options=options)


@pytest.fixture(scope="module")
def params():
    return random_params(coglm.init_params, BASE)


@pytest.mark.parametrize("remat", ["products", "all"])
def test_rematerialisation_changes_no_number(remat, params):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient_with(Training())(params, None),
        gradient_with(Training(remat=remat))(params, None),
    )


def test_dropout_is_drawn_from_its_key_and_off_without_one(params):
    dropped = gradient_with(Training(dropout=0.5))
    off, _ = gradient_with(Training())(params, None)
    np.testing.assert_array_equal(off, dropped(params, None)[0])
    one, again, other = (float(dropped(params, jax.random.key(k))[0]) for k in (1, 1, 2))
    assert one == again
    assert abs(one - float(off)) > 1e-4 and abs(one - other) > 1e-4


def test_training_options_are_checked():
    with pytest.raises(ValueError, match="dropout must be from 0 to below 1: got 1"):
        Training(dropout=1)
    with pytest.raises(ValueError, match="remat must be one of none, products, all: got 'some'"):
        Training(remat="some")


def test_adamw_decays_matrices_alone():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3)), "norm": {"scale": jnp.ones(3)}}
    optimizer = adamw(optax.constant_schedule(0.1), weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_warmup_cosine():
    schedule = warmup_cosine(2.0, 110, 10)
    found = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)]
    np.testing.assert_allclose(found, [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-5)


def test_warmup_cosine_ends_at_the_share_that_is_asked_for():
    schedule = warmup_cosine(2.0, 100, 10, final=0.25)
    np.testing.assert_allclose([schedule(0), schedule(10), schedule(100)], [0, 2, 0.5], atol=1e-6)
    assert schedule(55) == pytest.approx((2 + 0.5) / 2)


def test_muon_moves_matrices_by_orthogonal_steps():
    params = {"matrix": jnp.zeros((2, 6, 4)), "bias": jnp.zeros(3)}
    optimizer = muon_with_adamw(
        optax.constant_schedule(0.1), optax.constant_schedule(0.01), weight_decay=0.0
    )
    key = jax.random.key(0)
    grads = {"matrix": jax.random.normal(key, (2, 6, 4)), "bias": jnp.ones(3)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Every singular value of a layer's step is about the same; a raw gradient's are far apart.
    values = jnp.linalg.svd(updates["matrix"], compute_uv=False)
    assert float(values.max() / values.min()) < 2
    # The rest is Adam's: the step does not grow with the gradient.
    larger, _ = optimizer.update(
        {**grads, "bias": jnp.full(3, 9.0)}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["bias"], larger["bias"], rtol=1e-3)
    assert (updates["bias"] < 0).all()
