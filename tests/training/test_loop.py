"""The training loop: resuming, messages, checkpoints and logs."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogview2_jax.training.loop import Hooks, fit
from cogview2_jax.training.losses import weighted
from cogview2_jax.training.metrics import Costs, MatrixRate, Watched
from cogview2_jax.training.options import LoopOptions
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


OPTIMIZER = optax.adam(0.1)
STEP = make_step(loss, OPTIMIZER, seed=3)  # compiled once for all tests


def run(folder, num_steps, read=batches, *, loop=LoopOptions(save_every=5, log_every=5), **options):
    state = init_state({"w": jnp.zeros((4, 2))}, OPTIMIZER)
    return fit(
        state, STEP, read, num_steps=num_steps, folder=folder, name="test", loop=loop, **options
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def sends(number, at, read=batches):
    """A signal arrives while the batch after `at` steps is read."""

    def reads(step):
        if step == at:
            os.kill(os.getpid(), number)
        return read(step)

    return reads


def test_it_learns_and_logs(tmp_path):
    schedule = optax.constant_schedule(0.1)
    costs = Costs(tokens=160, flops=1e6, matrix_rate=MatrixRate())
    state = run(
        tmp_path, 200, schedule=schedule, costs=costs, loop=LoopOptions(save_every=200, log_every=5)
    )
    np.testing.assert_allclose(state.params["w"], np.arange(8).reshape(4, 2), atol=0.05)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(5, 201, 5))
    assert found[-1]["loss"] < 0.01 * found[0]["loss"]
    last = found[-1]
    assert last["learning_rate"] == 0.1 and last["gradient_norm"] > 0
    np.testing.assert_allclose(last["tokens_per_second"], 160 / last["step_seconds"], rtol=1e-4)
    rate = costs.matrix_rate.highest
    np.testing.assert_allclose(last["utilisation"], 1e6 / last["step_seconds"] / rate, rtol=1e-4)
    assert list((tmp_path / "tensorboard").iterdir())


def test_resumed_equals_uninterrupted(tmp_path):
    whole = run(tmp_path / "whole", 20)

    def dies_at_13(step):
        if step == 13:
            raise RuntimeError("no more")
        return batches(step)

    with pytest.raises(RuntimeError):
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


# --- Steps that are not finite --------------------------------------------------------------------


def bad_from_7(step):
    x, y = batches(step)
    return (x, y * np.nan) if step >= 6 else (x, y)


def test_non_finite_stops_and_names_step_batch_and_checkpoint(tmp_path):
    expected = r"step 7 on batch \[6\]: loss nan, .*; the last good checkpoint is step 5"
    with pytest.raises(FloatingPointError, match=expected):
        run(tmp_path, 20, bad_from_7, hooks=Hooks(ids_of=lambda step: [step]))
    assert run(tmp_path, 20).step == 20  # goes on with better data


def test_non_finite_steps_are_skipped_if_asked(tmp_path):
    state = run(tmp_path, 10, bad_from_7, loop=LoopOptions(5, log_every=5, skip_non_finite=True))
    before = run(tmp_path / "six", 6)
    np.testing.assert_array_equal(state.params["w"], before.params["w"])
    assert lines(tmp_path)[-1]["skipped"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_does_not_save_a_step_that_is_not_finite(number, tmp_path):
    # Batch 7 is read while step 7, the first bad one, is done: the run stops after it.
    read = sends(number, 7, bad_from_7)
    with pytest.raises(FloatingPointError, match="step 7: .* checkpoint is step 5"):
        run(tmp_path, 20, read)
    assert saved(tmp_path) == [5]
    with pytest.raises(SystemExit):
        run(
            tmp_path,
            20,
            sends(signal.SIGTERM, 7, bad_from_7),
            loop=LoopOptions(5, log_every=5, skip_non_finite=True),
        )
    assert max(saved(tmp_path)) > 6  # it changed nothing


def test_a_validation_loss_that_is_not_finite_is_said_and_never_the_best(tmp_path, capsys):
    losses = iter([9.0, 3.0, float("nan"), 4.0, float("-inf"), 5.0])
    hooks = Hooks(validate=lambda state: {"loss": next(losses), "image": 1.0})
    run(tmp_path, 25, hooks=hooks)
    assert saved(tmp_path) == [5, 20, 25]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    validated = [line for line in lines(tmp_path) if "validation_image" in line]
    assert [line.get("validation_loss") for line in validated] == [9, 3, None, 4, None, 5]
    said = capsys.readouterr().err
    assert "test: the validation loss at step 10 is not finite and is not logged\n" in said


# --- Stops ----------------------------------------------------------------------------------------


def test_sigterm_saves_and_exits_with_0(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            tmp_path / "parts",
            20,
            sends(signal.SIGTERM, 7),
            on_stop="; with --steps {step} it writes the model",
        )
    assert stopped.value.code == 0
    (step,) = set(saved(tmp_path / "parts")) - {5}
    assert step in (7, 8)
    assert (
        f"test: stopped and saved at step {step} of 20: the same command resumes there;"
        f" with --steps {step} it writes the model\n"
    ) in capsys.readouterr().err
    assert lines(tmp_path / "parts")[-1]["step"] == step  # the last figures are not lost
    whole = run(tmp_path / "whole", 20)
    jax.tree.map(np.testing.assert_array_equal, whole, run(tmp_path / "parts", 20))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def hears_ctrl_c():
    """Programs in the background, and the workers of pytest-xdist, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path, capfd, hears_ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 20, sends(signal.SIGINT, 7))
    assert max(saved(tmp_path)) in (7, 8)
    said = capfd.readouterr().err
    assert "test: saves and stops after this step; Ctrl-C again stops at once\n" in said
    before = saved(tmp_path)

    def impatient(step):
        if step == 12:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return batches(step)

    # Handlers run in the main thread, so the hook of a step is where they are met.
    hooks = Hooks(before_step=lambda step, state: (impatient(step), state)[1])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 20, loop=LoopOptions(save_every=100, log_every=5), hooks=hooks)
    assert saved(tmp_path) == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_it_runs_in_a_thread_that_hears_no_signals(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, 5))
    thread.start()
    thread.join()
    assert saved(tmp_path) == [5]


def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(tmp_path):
    refused = []

    def read(step):
        if step == 7:  # in the reader's thread
            with pytest.raises(OSError, match=f"in use by another run .process {os.getpid()} on"):
                run(tmp_path, 20)
            refused.append(step)
        return batches(step)

    run(tmp_path, 10, read)
    assert refused == [7]
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]
    assert run(tmp_path, 20).step == 20


# --- Checkpoints and logs -------------------------------------------------------------------------


def test_the_best_is_kept_in_addition_to_the_last(tmp_path):
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    run(tmp_path, 25, hooks=Hooks(validate=lambda state: {"loss": next(losses)}))
    assert saved(tmp_path) == [10, 20, 25]
    found = [line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line]
    assert found == [9, 3, 1, 2, 4, 5]


def test_pictures_are_drawn_as_training_goes(tmp_path):
    def sample(state):
        return np.full((8, 8, 3), int(state.step), np.uint8)

    run(
        tmp_path,
        10,
        loop=LoopOptions(save_every=5, log_every=5, sample_every=4),
        hooks=Hooks(sample=sample),
    )
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step_{step:08d}.png" for step in (4, 8, 10)]


def test_watched_figures_are_logged_and_warnings_said(tmp_path, capsys):
    def watch(state, last):
        return Watched({"used": int(state.step) / 10}, "only few are used" if last else "")

    run(tmp_path, 10, hooks=Hooks(watch=watch))
    assert [line["used"] for line in lines(tmp_path)] == [0.5, 1.0]
    assert capsys.readouterr().err.count("test: only few are used\n") == 1


def test_a_run_with_other_settings_is_refused(tmp_path):
    run(tmp_path, 5, settings={"batch": {"size": 16}})
    with pytest.raises(ValueError, match="was begun with batch.size 16, now it is 8"):
        run(tmp_path, 10, settings={"batch": {"size": 8}})


# --- Messages -------------------------------------------------------------------------------------


def test_without_a_terminal_it_says_plain_lines(tmp_path, capsys):
    run(tmp_path, 10)
    said = capsys.readouterr().err
    assert "\r" not in said
    compiling, compiled, middle, end = said.splitlines()
    assert compiling == "test: compiling the first step, which can take minutes"
    assert compiled.startswith("test: compiled, first step done in ")
    assert middle.startswith("test: step 5/10, loss ")
    assert middle.endswith(" s left") and " s a step, " in middle
    assert end.startswith("test: step 10/10, loss ") and end.endswith(" s a step")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_a_bar_says_that_it_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    during: list[str] = []

    def before_step(step: int, state: Any) -> Any:
        during.append(terminal.getvalue())
        return state

    run(tmp_path, 10, hooks=Hooks(before_step=before_step))
    assert "test, compiling:   0%" in during[0]
    assert "compiling" not in terminal.getvalue().split("\r")[-1]
    assert "100%" in terminal.getvalue() and "loss=" in terminal.getvalue()


def test_time_to_compile_is_no_time_of_a_step(tmp_path):
    def slow_at_first(state: Any, batch: Any) -> Any:
        if int(state.step) == 0:
            time.sleep(1)
        return STEP(state, batch)

    state = init_state({"w": jnp.zeros((4, 2))}, OPTIMIZER)
    options: dict[str, Any] = {"name": "test", "loop": LoopOptions(log_every=1)}
    fit(state, slow_at_first, batches, num_steps=2, folder=Path(tmp_path), **options)
    first, second = lines(tmp_path)
    assert "step_seconds" not in first and second["step_seconds"] < 0.9
