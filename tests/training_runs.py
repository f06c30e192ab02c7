"""Trainings of tiny networks, to be run in processes of their own.

python tests/training_runs.py follow coglm|direct|iterative  one device and meshes of 8, compared
python tests/training_runs.py logits                         kernels and tokenizer on a mesh
python tests/training_runs.py train '{"folder": …}'          the real loop: see `Work`
"""

import functools
import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    Training,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.networks import attention, coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.sharding import Execution, Sharding, make_mesh
from cogview2_jax.tokenizer import image
from cogview2_jax.training.coglm_samples import TrainingSample
from cogview2_jax.training.loop import fit, process_rows, shard_batch
from cogview2_jax.training.losses import coglm_loss, direct_sr_loss, iterative_sr_loss
from cogview2_jax.training.options import LoopOptions
from cogview2_jax.training.step import (
    TrainState,
    adamw,
    init_params,
    init_state,
    make_step,
    shardings_of,
    warmup_cosine,
)
from tests.common import SMALL_TOKENIZER, random_params

STEPS, BATCH = 20, 16
SIZES = TransformerConfig(num_layers=2, hidden_size=64, num_heads=8)
VOCABULARY = Vocabulary(num_image=16, size=25, pad=19, unknown=16)
BASE = CogLMConfig(SIZES, VOCABULARY, (4, 4), max_text=7, num_positions=32, image_position=16)
DIRECT = DirectSRConfig(BASE, ratio=3, text_slots=6)
ITERATIVE = IterativeSRConfig(SIZES, VOCABULARY, (12, 12), text_slots=6, num_positions=16)
TRAINING = Training(dropout=0.1, remat="products")
# (data, fsdp, tensor), and parts that a batch is cut into.
MESHES = [((8, 1, 1), 1), ((1, 8, 1), 1), ((1, 1, 8), 2), ((2, 2, 2), 1), ((1, 4, 2), 2)]
HARDEST = [((1, 1, 8), 2), ((2, 2, 2), 1)]  # enough for networks made of the same blocks


def coglm_batch(rng: np.random.Generator) -> Any:
    shape = (BATCH, 24)
    tokens = rng.integers(16, size=shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), shape).copy()
    mask = np.broadcast_to(np.tril(np.ones((24, 24), bool)), (BATCH, 24, 24)).copy()
    kinds = rng.integers(6, size=shape).astype(np.int8)
    return TrainingSample(tokens, positions, np.roll(tokens, -1, 1), mask, kinds > 0, kinds)


def fine_batch(rng: np.random.Generator) -> Any:
    texts = [rng.integers(20, 22, size=rng.integers(1, 7)).tolist() for _ in range(BATCH)]
    text, is_text = inputs.left_padded(texts, 6, VOCABULARY)
    fine = rng.integers(16, size=(BATCH, 144)).astype(np.int32)
    coarse = rng.integers(16, size=(BATCH, 16)).astype(np.int32)
    return text, is_text, coarse, fine, rng.random((BATCH, 144)) < 0.5


def loss_of(network: str, sharding: Sharding | None) -> Any:
    def loss(params: Any, batch: Any, key: Any) -> Any:
        execution = Execution(training=TRAINING, sharding=sharding)
        options = {"execution": execution, "dropout_key": key}
        if network == "coglm":
            return *coglm_loss(params, batch, config=BASE, z_loss=1e-3, **options), ()
        text, is_text, coarse, fine, masked = batch
        ones = jnp.ones(fine.shape)
        if network == "direct":
            made = inputs.direct_super_resolution(text, is_text, coarse, DIRECT)
            found = direct_sr_loss(params, made, fine, ones, config=DIRECT, **options)
        else:
            shown = jnp.where(masked, VOCABULARY.start_of_image, fine)
            made = inputs.iterative_super_resolution(text, is_text, shown, ITERATIVE)
            found = iterative_sr_loss(params, made, fine, masked, ones, config=ITERATIVE, **options)
        return *found, ()

    return loss


NETWORKS = {
    "coglm": (coglm, BASE, coglm_batch),
    "direct": (direct_sr, DIRECT, fine_batch),
    "iterative": (iterative_sr, ITERATIVE, fine_batch),
}


def begin(network: str, sharding: Sharding | None, accumulate: int = 1) -> tuple[Any, Any, Any]:
    """A state at step 0, its step, and the shardings that its parameters should have."""
    module, config, _ = NETWORKS[network]
    # An epsilon well above rounding: Adam's first steps are signs of the gradient, and where that
    # is zero but for rounding, two runs would step apart by the whole rate.
    schedule = warmup_cosine(1e-3, STEPS, 4)
    optimizer = adamw(schedule, eps=1e-4)
    init = functools.partial(module.init_params, config=config)
    axes = module.parameter_axes(config)
    params = init_params(init, jax.random.key(0), axes, sharding)
    state = init_state(params, optimizer, average=True, sharding=sharding)
    expected = None
    if sharding is not None:
        expected = sharding.of_tree(params, axes)
        check_shardings(state, expected, sharding)
    step = make_step(
        loss_of(network, sharding),
        optimizer,
        accumulate=accumulate,
        average=0.9,
        sharding=sharding,
        shardings=shardings_of(state),
    )
    return state, step, expected


def batch(network: str, step: int) -> Any:
    return NETWORKS[network][2](np.random.default_rng((3, step)))


def run(network: str, sharding: Sharding | None, accumulate: int) -> tuple[Any, list[float]]:
    state, step, expected = begin(network, sharding, accumulate)
    losses = []
    for number in range(STEPS):
        rows = batch(network, number)
        state, metrics = step(state, rows if sharding is None else shard_batch(rows, sharding))
        losses.append(float(metrics["loss"]))
    if sharding is not None:
        check_shardings(state, expected, sharding)
    assert step._cache_size() == 1, "compiled more than once"
    return jax.device_get(state), losses


def check_shardings(state: TrainState, expected: Any, sharding: Sharding) -> None:
    moments = state.opt_state[1][0]
    for tree in (state.params, moments.mu, moments.nu, state.average):
        jax.tree.map(_check_sharding, tree, expected)
    table = state.params["word_embeddings"]
    held = table.addressable_shards[0].data.size
    assert held * sharding.parts("packed_embed") == table.size


def _check_sharding(leaf: Any, expected: Any) -> None:
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (leaf.shape, leaf.sharding)


def follow(network: str) -> None:
    meshes = MESHES if network == "coglm" else HARDEST
    alone = {parts: run(network, None, parts) for parts in {parts for _, parts in meshes}}
    for sizes, parts in meshes:
        state, losses = run(network, Sharding(make_mesh(*sizes)), parts)
        expected, expected_losses = alone[parts]
        np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5, err_msg=str(sizes))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
            state.params,
            expected.params,
        )
        print(sizes, parts, "follows; last loss", losses[-1])


def logits() -> None:
    interpreted = functools.partial(
        attention.local_attention_2d_with_lse, implementation="pallas_triton_interpret"
    )
    for network in ("direct", "iterative"):
        module, config, batch_of = NETWORKS[network]
        params = jax.jit(functools.partial(module.init_params, config=config))(jax.random.key(0))
        batch = batch_of(np.random.default_rng(3))
        expected = gradient(network, params, batch, None)
        sharding = Sharding(make_mesh(2, 2, 2))
        placed = jax.device_put(params, sharding.of_tree(params, module.parameter_axes(config)))
        with unittest.mock.patch.object(attention, "local_attention_2d_with_lse", interpreted):
            found = gradient(network, placed, shard_batch(batch, sharding), sharding)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
        )
        print(network, "on the kernels and a mesh: loss", float(found[0]))
    pictures_by_tokens()


def pictures_by_tokens() -> None:
    """The image tokenizer with its batch over the devices of a mesh."""
    params = random_params(image.init_params, SMALL_TOKENIZER)
    pictures = np.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    found = []
    for execution in (Execution(), Execution(sharding=Sharding(make_mesh(4, 2, 1)))):
        options = {"stride": 8, "config": SMALL_TOKENIZER, "execution": execution}
        tokens = image.to_tokens(params, pictures, **options)
        found.append((tokens, image.to_pixels(params, tokens, grid=(4, 4), **options)))
    (tokens, drawn), (tokens_of_mesh, drawn_on_mesh) = found
    assert len(drawn_on_mesh.sharding.device_set) == 8
    np.testing.assert_array_equal(tokens_of_mesh, tokens)
    # uint8: a value halfway between two may be rounded to either.
    np.testing.assert_allclose(drawn_on_mesh.astype(int), drawn.astype(int), rtol=0, atol=1)


def gradient(network: str, params: Any, batch: Any, sharding: Sharding | None) -> Any:
    def mean(params: Any, batch: Any) -> Any:
        return loss_of(network, sharding)(params, batch, None)[0].value

    return jax.device_get(jax.jit(jax.value_and_grad(mean))(params, batch))


class Work(NamedTuple):
    """The settings of one process of a training. `process` is None if it is the only one."""

    folder: str
    devices: int = 1
    mesh: tuple[int, int, int] | None = None
    process: int | None = None
    processes: int = 1
    port: int = 0
    steps: int = STEPS
    save_every: int = 10


def work(told: Work) -> None:
    """Train coglm in the real loop, with this process's rows, and print the loss of every step."""
    if told.process is not None:
        address = f"localhost:{told.port}"
        jax.distributed.initialize(address, told.processes, told.process)
    sharding = None if told.mesh is None else Sharding(make_mesh(*told.mesh))
    state, step, expected = begin("coglm", sharding)
    part, parts = process_rows(sharding, BATCH)
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)

    def read(number: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], batch("coglm", number))

    def printing(state: TrainState, batch: Any) -> Any:
        state, metrics = step(state, batch)
        print("loss", int(state.step), repr(float(metrics["loss"])), flush=True)
        return state, metrics

    state = fit(
        state,
        printing,
        read,
        num_steps=told.steps,
        folder=Path(told.folder),
        name="tiny",
        loop=LoopOptions(save_every=told.save_every),
        sharding=sharding,
    )
    if sharding is not None:
        check_shardings(state, expected, sharding)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    told = Work(**json.loads(rest[0])) if command == "train" else None
    jax.config.update("jax_num_cpu_devices", told.devices if told else 8)
    if told:
        work(told)
    elif command == "follow":
        follow(*rest)
    else:
        logits()
