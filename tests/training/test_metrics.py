"""Metrics of a run: what TensorBoard reads, errors when nothing can be written, and the FLOPs of
utilisation against those that XLA counts.
"""

import functools
import json
import resource
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cogview2_jax.config import CogLMConfig, TransformerConfig, Vocabulary
from cogview2_jax.networks import coglm
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.tokenizer import image
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.training import metrics
from cogview2_jax.training.metrics import Costs, Log, MatrixRate, Speed
from tests.common import SMALL_TOKENIZER


def events(folder):
    """The events of every file in the folder, as TensorBoard reads them."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_figures_and_pictures_are_there_at_once(tmp_path):
    log = Log(tmp_path, start=4)
    log.figures(5, {"loss": 0.5, "accuracy": 0.25})
    picture = log.picture(6, np.zeros((2, 3, 3), np.uint8))
    # Before it is closed: a kill loses none.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 5,
        "loss": 0.5,
        "accuracy": 0.25,
    }
    version, began, *rest = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert began.session_log.status == SessionLog.START and began.step == 5
    found = [(event.step, event.summary.value[0]) for event in rest]
    assert [(step, value.tag) for step, value in found] == [
        (5, "loss"),
        (5, "accuracy"),
        (6, "samples"),
    ]
    assert [value.simple_value for _, value in found[:2]] == [0.5, 0.25]
    assert (found[2][1].image.height, found[2][1].image.width) == (2, 3)
    assert picture.exists()
    log.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("most", "write", "file"),
    [
        (50, lambda log: log.figures(1, {"loss": 1 / 3, "gradient_norm": 1 / 3}), "metrics.jsonl"),
        (150, lambda log: log.figures(1, {str(i): 0.5 for i in range(9)}), "tensorboard"),
        (
            50,
            lambda log: log.picture(1, np.zeros((9, 9, 3), np.uint8)),
            "samples/step_00000001.png",
        ),
    ],
)
def test_a_full_disk_is_one_line(most, write, file, tmp_path):
    expected = f"{tmp_path / file} could not be written: File too large"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as caught, Log(tmp_path) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            write(log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == expected


def test_lines_after_the_start_are_dropped_and_others_stay(tmp_path):
    """Also one that a kill has truncated."""
    with Log(tmp_path) as log:
        for step in (5, 10, 10, 15):
            log.figures(step, {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    with Log(tmp_path, start=10) as log:
        log.figures(15, {"loss": 0.25})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [
        (5, 0.5),
        (10, 0.5),
        (10, 0.5),
        (15, 0.25),
    ]


# --- Speed ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_speed_is_of_the_steps_since_the_restart(clock):
    speed = Speed(Costs(tokens=60))
    assert speed.figures() == {}
    for _ in range(4):
        speed.step()
    clock[0] += 2
    assert speed.figures() == {"step_seconds": 0.5, "tokens_per_second": 120}
    speed.restart()
    assert speed.figures() == {}


def test_utilisation_is_a_share_of_the_highest_rate_seen(clock, monkeypatch):
    """The first measurement is on a busy machine; the result is never above 1."""
    rates = iter([100.0, 400.0, 50.0])
    monkeypatch.setattr(metrics, "matrix_rate", lambda dtype: next(rates))
    rate = MatrixRate(again_after=60)
    assert rate.utilisation(50) == 0.5
    assert rate.utilisation(126) == 1  # the run itself is the fastest seen
    assert rate.utilisation(63) == 0.5
    clock[0] += 60
    assert rate.utilisation(100) == 0.25
    clock[0] += 60
    assert rate.utilisation(100) == 0.25  # a busy moment lowers nothing


def test_no_time_is_no_speed(clock):
    speed = Speed(Costs(tokens=60, flops=1e9, matrix_rate=MatrixRate()))
    speed.step()
    assert speed.figures() == {}


def counted(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_flops_of_coglm_are_those_of_its_matrix_products():
    config = CogLMConfig(
        TransformerConfig(num_layers=3, hidden_size=256, num_heads=4, unroll=3),
        Vocabulary(num_image=1000, size=1200, pad=1003, unknown=1000),
        grid=(8, 8),
        max_text=30,
        num_positions=128,
        image_position=32,
    )
    length = config.text_slots + 1 + config.num_image_tokens
    params = jax.eval_shape(lambda key: coglm.init_params(key, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length, length), jnp.bool_)
    given = NetworkInput(tokens, tokens, mask)
    forward = counted(functools.partial(coglm.apply, config=config), params, given)
    # XLA counts the norms, the softmax and the activations too.
    assert 3 * forward == pytest.approx(metrics.flops_per_sample(config), rel=0.06)
    assert 3 * forward > metrics.flops_per_sample(config)


def test_flops_of_the_tokenizer_are_three_forward_passes():
    config, strides = SMALL_TOKENIZER, (4, 8)
    params = jax.eval_shape(lambda key: image.init_params(key, config), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def total(params, images):
        model = HVQVAE(config)
        levels = model.apply({"params": params}, images, method="vectors")
        made = [
            model.apply({"params": params}, level, stride, method="reconstruct")
            for level, stride in zip(levels[:2], strides, strict=True)
        ]
        return sum(map(jnp.sum, made))

    both = counted(jax.grad(total), params, images)
    found = metrics.tokenizer_flops_per_sample(config, 64, strides)
    assert found == pytest.approx(both, rel=0.1)
    assert metrics.tokenizer_flops_per_sample(config, 64, (4,)) < found
    # Four times the pixels, and sixteen times the pairs of its attention.
    assert 4 * found < metrics.tokenizer_flops_per_sample(config, 128, strides) < 6 * found
