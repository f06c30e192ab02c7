"""What is generated, and with which networks: sizes, random parameters, and our programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax import config as configs
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.pipeline.stages import (
    decode_image,
    super_resolve_direct,
    super_resolve_iterative,
)

Array = jax.Array
WORDS = 12  # of the prompt


@dataclass(frozen=True)
class Sizes:
    """The published pipeline at a width that a CPU runs; float32."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    image_tokens: int = 20_000
    clusters: int = 500
    vocabulary: int = 150_016
    coarse: int = 20  # cells a side
    max_text: int = 110

    @property
    def coglm(self) -> configs.CogLMConfig:
        return configs.CogLMConfig(
            configs.TransformerConfig(self.layers, self.width, self.heads),
            configs.Vocabulary(
                self.image_tokens,
                self.vocabulary,
                pad=self.image_tokens + 3,
                unknown=self.image_tokens,
                first_chinese=self.vocabulary - 3,
            ),
            (self.coarse, self.coarse),
            self.max_text,
        )

    @property
    def direct(self) -> configs.DirectSRConfig:
        return configs.DirectSRConfig(self.coglm)

    @property
    def iterative(self) -> configs.IterativeSRConfig:
        base, fine = self.coglm, self.direct.grid
        return configs.IterativeSRConfig(base.transformer, base.vocabulary, fine)


SMALL = Sizes(64, 2, 2, 256, 16, 320, 8, 20)  # seconds, for a test


class Networks(NamedTuple):
    """Random parameters of the three networks, and the clusters of the image tokens."""

    sizes: Sizes
    coglm: Any
    direct: Any
    iterative: Any
    labels: np.ndarray
    text: list[int]  # ids
    sampling: configs.Sampling


def networks(sizes: Sizes) -> Networks:
    base = jax.jit(coglm.init_params, static_argnums=1)(jax.random.key(0), sizes.coglm)
    random = np.random.default_rng(0)
    return Networks(
        sizes,
        base,
        direct_sr.from_coglm(base, sizes.direct),
        iterative_sr.from_coglm(base, sizes.coglm, sizes.iterative),
        random.integers(0, sizes.clusters, sizes.image_tokens).astype(np.int32),
        random.integers(sizes.image_tokens + 4, sizes.vocabulary - 3, WORDS).tolist(),
        configs.Sampling(),
    )


def coarse_cells(made: Networks) -> Array:
    """Tokens of one coarse picture, int32 [1, cells]."""
    shape = (1, made.sizes.coglm.num_image_tokens)
    return jax.random.randint(jax.random.key(1), shape, 0, made.sizes.image_tokens)


def fine_cells(made: Networks) -> Array:
    """Tokens of one fine picture, int32 [1, cells]."""
    shape = (1, made.sizes.direct.num_image_tokens)
    return jax.random.randint(jax.random.key(2), shape, 0, made.sizes.image_tokens)


def left_padded(made: Networks, slots: int) -> tuple[Array, Array]:
    """The prompt before super-resolution: tokens and is_text [1, slots]."""
    padded = inputs.left_padded([made.text], slots, made.sizes.coglm.vocabulary)
    return jnp.asarray(padded[0]), jnp.asarray(padded[1])


def direct_input(made: Networks) -> inputs.NetworkInput:
    config = made.sizes.direct
    text, is_text = left_padded(made, config.text_slots)
    return inputs.direct_super_resolution(text, is_text, coarse_cells(made), config)


def iterative_input(made: Networks) -> inputs.NetworkInput:
    """That of the first round."""
    config = made.sizes.iterative
    text, is_text = left_padded(made, config.text_slots)
    reset = inputs.lopar_schedule(config)[0]
    shown = jnp.where(reset, config.vocabulary.start_of_image, fine_cells(made))
    return inputs.iterative_super_resolution(text, is_text, shown, config)


def first_logits(made: Networks, tokens: Array) -> Array:
    """Ours of cells 0 to n, given the tokens [1, n] of those before: [n + 1, v], by one pass."""
    config = made.sizes.coglm
    padded = inputs.right_padded([made.text], config.max_text, config.vocabulary)
    text, is_text = (jnp.asarray(part) for part in padded)
    given = inputs.text_to_image(text, is_text, tokens, config)
    bias = inputs.text_key_bias(given.is_text, made.sampling.text_upweight)
    ids = (0, config.vocabulary.num_image)
    return coglm.apply(made.coglm, given, config=config, bias=bias, ids=ids)[0, config.max_text :]


def batch_of(stage: str) -> int:
    """Pictures at once in a stage: `stage1_batch4` has 4."""
    return int(stage.rpartition("batch")[2])


def our_stages(made: Networks, names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Stages of these names (`report.STAGES`) as calls that compile nothing."""
    sizes, sampling = made.sizes, made.sampling
    labels, key = jnp.asarray(made.labels), jax.random.key(1)
    shared = {"sampling": sampling, "num_clusters": sizes.clusters}
    layers = jax.jit(coglm.unstacked)(made.coglm)
    stages: dict[str, Callable[[], Any]] = {}

    def add(name: str, function: Any, *arguments: Any, **static: Any) -> None:
        arguments = jax.device_put(arguments)
        program = function.lower(*arguments, **static).compile()
        stages[name] = lambda: jax.block_until_ready(program(*arguments))

    for name in names:
        if name.startswith("stage1"):
            batch = batch_of(name)
            padded = inputs.right_padded([made.text], sizes.max_text, sizes.coglm.vocabulary)
            keys = jax.random.split(key, batch)
            add(name, decode_image, layers, *padded, keys, labels, config=sizes.coglm, **shared)
    keys = jax.random.split(key, 1)
    direct, iterative = sizes.direct, sizes.iterative
    if "direct" in names:
        text, is_text = left_padded(made, direct.text_slots)
        given = (made.direct, text, is_text, coarse_cells(made), keys, labels)
        add("direct", super_resolve_direct, *given, config=direct, **shared)
    if "iterative" in names:
        text, is_text = left_padded(made, iterative.text_slots)
        fine = fine_cells(made)
        given = (made.iterative, text, is_text, fine, jnp.ones(fine.shape, bool), keys)
        add("iterative", super_resolve_iterative, *given, config=iterative, sampling=sampling)
    return stages
