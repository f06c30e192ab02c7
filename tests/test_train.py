"""The training loop: what it learns, that a resumed run is an uninterrupted one, how it fails."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogview2_jax import train


def _batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((1, step))
    x = rng.standard_normal((16, 4)).astype(np.float32)
    return x, x @ np.arange(8, dtype=np.float32).reshape(4, 2)


def _loss(params, batch, key):
    x, y = batch
    # A little noise from the key, so that resuming must restore the key's position as well.
    noise = 1e-3 * jax.random.normal(key, y.shape)
    loss = jnp.mean((x @ params["w"] + noise - y) ** 2)
    return loss, {"loss_again": loss}


def _run(directory, num_steps, batches=_batch, loss=_loss):
    optimizer = optax.adam(0.1)
    state = train.init_state({"w": jnp.zeros((4, 2))}, optimizer)
    return train.fit(
        state,
        train.make_step(loss, optimizer, seed=3),
        batches,
        num_steps=num_steps,
        directory=directory,
        name="test",
        save_every=5,
        log_every=5,
    )


def test_fit_learns_and_logs(tmp_path):
    state = _run(tmp_path, 200)
    expected = np.arange(8).reshape(4, 2)
    np.testing.assert_allclose(state.params["w"], expected, atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 201, 5))
    assert lines[-1]["loss"] < 0.01 * lines[0]["loss"]


def test_resumed_equals_uninterrupted(tmp_path):
    whole = _run(tmp_path / "whole", 20)

    def dies_at_13(step):
        if step == 13:
            raise KeyboardInterrupt
        return _batch(step)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "parts", 20, dies_at_13)
    resumed = _run(tmp_path / "parts", 20)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_trained_on(tmp_path):
    state = _run(tmp_path, 10)

    def never(step):
        raise AssertionError("asked for a batch")

    again = _run(tmp_path, 10, never)
    np.testing.assert_array_equal(state.params["w"], again.params["w"])


def test_non_finite_loss_stops_and_names_step_and_checkpoint(tmp_path):
    def bad(step):
        x, y = _batch(step)
        return (x, y * np.nan) if step >= 7 else (x, y)

    with pytest.raises(FloatingPointError, match=r"step 10; the last good checkpoint is step 5"):
        _run(tmp_path, 20, bad)


def test_warmup_then_anneal():
    schedule = train.warmup_then_anneal(2.0, (100, 40), 10)
    assert float(schedule(0)) == 0
    assert float(schedule(10)) == float(schedule(49)) == 2.0
    np.testing.assert_allclose(float(schedule(75)), 1.0)
    # The next cycle starts where the first has come to zero.
    assert float(schedule(100)) == float(schedule(140)) == 0
    assert float(schedule(110)) == float(schedule(119)) == 2.0
    np.testing.assert_allclose(float(schedule(130)), 1.0)


def test_muon_moves_matrices_by_orthogonal_steps():
    params = {"matrix": jnp.zeros((2, 6, 4)), "bias": jnp.zeros(3)}
    optimizer = train.muon_with_adamw(
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
