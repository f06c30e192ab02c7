"""Train the hierarchical VQ-VAE on Scenes. A step is 10 whole scenes at 64 px and 6 crops of 192-px
ones.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from scipy.cluster.vq import kmeans2

from cogview2_jax import fit, objectives, train
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import image
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from experiments.scenes import perceptual
from experiments.scenes.presets import TOKENIZER

SIDE = 64
WHOLE, CROPS = 10, 6
OBJECT_WEIGHT = 5.0
MAIN_STRIDE = 8
# Learning-rate cycles, in steps. Fills at 64 px come last: the first cycle gets shapes and colours
# right only.
CYCLES = (1100, 800)
PLACE_AT = 132  # the step at which the codebook is placed; the networks settle unquantised before
REVIVE_EVERY, LAST_REVIVAL = 10, 1500


def batch(step: int, seed: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Pictures float32 [16, 64, 64, 3] in [0, 1] and pixel weights [16, 64, 64] of one step."""
    rng = np.random.default_rng((seed, step))
    pictures = []
    for index in range(WHOLE + CROPS):
        scene = scenes.sample_scene(rng)
        picture = scenes.draw(scene)
        if index < WHOLE:
            small = picture.reduce(3)
        else:
            item = scene.objects[rng.integers(len(scene.objects))]
            # Offsets are multiples of the stride, so that a crop has the cells the whole picture
            # has.
            corner = np.clip([item.x, item.y] + rng.integers(-64, 1, 2), 0, 128) // 8 * 8
            small = picture.crop((*corner, corner[0] + SIDE, corner[1] + SIDE))
        background = np.array(scenes.BACKGROUNDS[scene.background])
        pixels = np.asarray(small)
        on_object = np.abs(pixels.astype(np.int32) - background).max(axis=-1) > 4
        pictures.append((pixels, np.where(on_object, OBJECT_WEIGHT, 1.0)))
    images, weights = zip(*pictures, strict=True)
    return np.stack(images).astype(np.float32) / 255, np.stack(weights).astype(np.float32)


def _optimizer(cycles: tuple[int, ...]) -> optax.GradientTransformation:
    # Muon: at 120 steps its reconstruction loss was 0.10, AdamW's 0.14 at the best of two rates.
    schedules = [train.warmup_then_anneal(peak, cycles, 30) for peak in (0.02, 2e-3)]
    return train.muon_with_adamw(*schedules, weight_decay=0.0)


def _loss(params: Any, data: Any, stride: int, percept: Any, quantize: Any) -> Any:
    images, weights = data
    return objectives.hvqvae_loss(
        params,
        images,
        weights,
        stride,
        config=TOKENIZER,
        quantize=quantize,
        commitment=0.5,
        perceptual=functools.partial(perceptual.distance, percept),
        perceptual_weight=0.5,
    )


def _make_step(optimizer: optax.GradientTransformation, percept: Any) -> Any:
    """The step of the stride in use: gradient on the networks, moving average on the codebook."""

    def loss_fn(params: Any, data: Any, key: Any) -> Any:
        (*pictures, quantize) = data
        return _loss(params, pictures, MAIN_STRIDE, percept, quantize.any())

    return train.make_step(
        loss_fn,
        optimizer,
        seed=3,
        revise=objectives.codebook_revision(
            decay=0.97, begin=PLACE_AT, revive_every=REVIVE_EVERY, last_revival=LAST_REVIVAL
        ),
    )


def _place_codebook(state: train.TrainState, rng: np.random.Generator) -> train.TrainState:
    """k-means++ and a few Lloyd rounds over the vectors of fresh pictures."""
    vectors_of = jax.jit(
        lambda params, images: HVQVAE(TOKENIZER).apply({"params": params}, images, method="vectors")
    )
    level = TOKENIZER.strides.index(MAIN_STRIDE)
    found = [vectors_of(state.params, batch(i, seed=202)[0])[level] for i in range(24)]
    vectors = np.concatenate([np.asarray(v).reshape(-1, TOKENIZER.codebook_dim) for v in found])
    start = objectives.kmeans_plus_plus(rng, vectors, TOKENIZER.codebook_size)
    codebook, _ = kmeans2(vectors, start, iter=10, minit="matrix", missing="warn")
    codebook = jnp.asarray(codebook, jnp.float32)
    return state._replace(
        params=state.params | {"codebook": codebook}, extra=objectives.init_statistics(codebook)
    )


def _percept(directory: Path) -> Any:
    file = directory / "perceptual.msgpack"
    if not file.exists():
        params = jax.tree.map(np.asarray, perceptual.train(np.random.default_rng(77)))
        directory.mkdir(parents=True, exist_ok=True)
        file.write_bytes(serialization.msgpack_serialize(params))
    return serialization.msgpack_restore(file.read_bytes())


def _split(params: Any) -> tuple[Any, Any]:
    """What the stride in use needs, and what only the other strides do."""
    others = [f"decoder_{stride}" for stride in TOKENIZER.strides if stride != MAIN_STRIDE]
    return (
        {name: tree for name, tree in params.items() if name not in others},
        {name: params[name] for name in others},
    )


def run(directory: Path, cycles: tuple[int, ...] = CYCLES) -> Any:
    """Train the stride in use (or go on training it) under `directory`; returns all parameters."""
    percept = _percept(directory)
    params = jax.jit(lambda key: image.init_params(key, TOKENIZER))(jax.random.key(11))
    main, others = _split(params)
    optimizer = _optimizer(cycles)
    statistics = objectives.init_statistics(main["codebook"])
    state = train.init_state(main, optimizer, extra=statistics)
    step = _make_step(optimizer, percept)

    def step_fn(state: train.TrainState, data: Any) -> Any:
        if int(state.step) == PLACE_AT:
            state = _place_codebook(state, np.random.default_rng(5))
        return step(state, data)

    def batches(number: int) -> Any:
        return *batch(number), np.full(WHOLE + CROPS, number >= PLACE_AT)

    state = fit.fit(
        state, step_fn, batches, num_steps=sum(cycles), folder=directory, name="tokenizer"
    )
    return state.params | others


def run_other_strides(params: Any, directory: Path, num_steps: int = 300) -> Any:
    """Train the decoders (and down-sampler) of the other strides; encoder and codebook stay as they
    are.
    """
    percept = _percept(directory)
    strides = [stride for stride in TOKENIZER.strides if stride != MAIN_STRIDE]
    names = [f"decoder_{stride}" for stride in strides] + ["downsamplers_1"]
    trained = {name: params[name] for name in names}
    fixed = {name: tree for name, tree in params.items() if name not in names}

    def loss_fn(trained: Any, data: Any, key: Any) -> Any:
        total, metrics = jnp.zeros(()), {}
        for stride in strides:
            loss, parts, _ = _loss(trained | fixed, data, stride, percept, quantize=True)
            total += loss.total
            metrics[f"reconstruction_{stride}"] = parts["reconstruction"]
        return objectives.Mean(total, loss.weight), metrics, ()

    optimizer = _optimizer((num_steps,))
    state = fit.fit(
        train.init_state(trained, optimizer),
        train.make_step(loss_fn, optimizer),
        lambda step: batch(step, seed=303),
        num_steps=num_steps,
        folder=directory / "other_strides",
        name="strides 4 and 16",
    )
    return params | state.params
