"""The training loop: it goes on where it stopped, says what went wrong, keeps what it should."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogview2_jax.training.loop import fit
from cogview2_jax.training.losses import weighted
from cogview2_jax.training.step import init_state, make_step


def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((1, step))
    x = rng.standard_normal((16, 4)).astype(np.float32)
    return x, x @ np.arange(8, dtype=np.float32).reshape(4, 2)


def loss(params, batch, key):
    x, y = batch
    # A little noise from the key, so that resuming must restore the key's position as well.
    noise = 1e-3 * jax.random.normal(key, y.shape)
    errors = jnp.mean((x @ params["w"] + noise - y) ** 2, axis=-1)
    return weighted(errors, jnp.ones(16)), {}, ()


def run(folder, num_steps, read=batches, **options):
    optimizer = optax.adam(0.1)
    state = init_state({"w": jnp.zeros((4, 2))}, optimizer)
    step = make_step(loss, optimizer, seed=3)
    made = {"save_every": 5, "log_every": 5} | options
    return fit(state, step, read, num_steps=num_steps, folder=folder, name="test", **made)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_logs(tmp_path):
    schedule = optax.constant_schedule(0.1)
    state = run(
        tmp_path,
        200,
        schedule=schedule,
        tokens_per_step=160,
        flops_per_step=1e6,
        peak_flops=1e9,
    )
    np.testing.assert_allclose(state.params["w"], np.arange(8).reshape(4, 2), atol=0.05)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(5, 201, 5))
    assert found[-1]["loss"] < 0.01 * found[0]["loss"]
    last = found[-1]
    assert last["learning_rate"] == 0.1 and last["gradient_norm"] > 0
    np.testing.assert_allclose(last["tokens_per_second"], 160 / last["step_seconds"], rtol=1e-4)
    np.testing.assert_allclose(last["utilisation"], 1e-3 / last["step_seconds"], rtol=1e-4)
    assert list((tmp_path / "tensorboard").iterdir())


def test_resumed_equals_uninterrupted(tmp_path):
    whole = run(tmp_path / "whole", 20)

    def dies_at_13(step):
        if step == 13:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 20, dies_at_13)
    resumed = run(tmp_path / "parts", 20)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    # Steps that are taken again are logged once.
    assert [line["step"] for line in lines(tmp_path / "parts")] == [5, 10, 15, 20]


def test_a_finished_run_is_not_trained_on(tmp_path):
    state = run(tmp_path, 10)

    def never(step):
        raise AssertionError("asked for a batch")

    again = run(tmp_path, 10, never)
    np.testing.assert_array_equal(state.params["w"], again.params["w"])


def bad_from_7(step):
    x, y = batches(step)
    return (x, y * np.nan) if step >= 6 else (x, y)


def test_non_finite_stops_and_names_step_batch_and_checkpoint(tmp_path):
    expected = r"step 7 on batch \[6\]: loss nan, .*; the last good checkpoint is step 5"
    with pytest.raises(FloatingPointError, match=expected):
        run(tmp_path, 20, bad_from_7, ids_of=lambda step: [step])
    assert run(tmp_path, 20).step == 20  # goes on with better data


def test_non_finite_steps_are_skipped_if_asked(tmp_path):
    state = run(tmp_path, 10, bad_from_7, skip_non_finite=True)
    before = run(tmp_path / "six", 6)
    np.testing.assert_array_equal(state.params["w"], before.params["w"])
    assert lines(tmp_path)[-1]["skipped"] == 4


def test_sigterm_saves_and_exits_with_0(tmp_path, capsys):
    def stops_at_7(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "parts", 20, stops_at_7)
    assert stopped.value.code == 0
    assert "stopped and saved at step" in capsys.readouterr().err
    saved = [int(path.name) for path in (tmp_path / "parts" / "checkpoints").iterdir()]
    assert max(saved) in (7, 8)
    whole = run(tmp_path / "whole", 20)
    jax.tree.map(np.testing.assert_array_equal, whole, run(tmp_path / "parts", 20))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_it_runs_in_a_thread_that_hears_no_signals(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, 5))
    thread.start()
    thread.join()
    assert (tmp_path / "checkpoints" / "5").exists()


def test_the_best_is_kept_besides_the_last(tmp_path):
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    run(tmp_path, 25, validate=lambda state: {"loss": next(losses)})
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [10, 20, 25]
    found = [line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line]
    assert found == [9, 3, 1, 2, 4, 5]


def test_pictures_are_drawn_as_training_goes(tmp_path):
    def sample(state):
        return np.full((8, 8, 3), int(state.step), np.uint8)

    run(tmp_path, 10, sample=sample, sample_every=4)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step_{step:08d}.png" for step in (4, 8, 10)]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path, 5, settings={"batch": {"size": 16}})
    with pytest.raises(ValueError, match="was begun with batch.size 16, now it is 8"):
        run(tmp_path, 10, settings={"batch": {"size": 8}})
