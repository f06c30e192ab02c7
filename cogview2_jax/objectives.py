"""Losses of the networks, as pure functions of parameters and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax import coglm, direct_sr, iterative_sr
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Precision,
)
from cogview2_jax.pretraining import LossKind, TrainingSample
from cogview2_jax.sequence import Layout
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.tokenizer.image import nearest_code

Array = jax.Array
Params = Any


# ------------------------------------------------------------------------------ the image tokenizer


class CodebookStatistics(NamedTuple):
    """Moving averages behind the codebook: how often each code is used, and the sum of what it
    stands for.
    """

    cluster_size: Array  # float32 [v]
    embed_avg: Array  # float32 [v, d]


def init_statistics(codebook: Array) -> CodebookStatistics:
    # A copy: a donated state must not hold one buffer twice.
    return CodebookStatistics(jnp.ones(codebook.shape[0]), jnp.array(codebook))


def hvqvae_loss(
    params: Params,
    images: Array,
    weights: Array,
    stride: int,
    *,
    config: HVQVAEConfig,
    precision: Precision = Precision(),
    quantize: bool = True,
    commitment: float = 1.0,
    perceptual: Callable[[Array, Array], Array] | None = None,
    perceptual_weight: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Reconstruction and commitment loss of one stride.

    Args:
        images: float32 [b, y, x, 3] in [0, 1].
        weights: float32 [b, y, x], how much each pixel counts.
        quantize: False lets the vectors pass unquantised, as while the encoder settles.
        perceptual: (reconstruction, images) → scalar, added with `perceptual_weight`.

    Returns:
        The loss, and a dict with "reconstruction", "commitment", "perceptual" and, for the
        codebook's update, "vectors" [n, d] and "ids" [n].
    """
    model = HVQVAE(config, precision)
    level = config.strides.index(stride)
    vectors = model.apply({"params": params}, images, method="vectors")[level].astype(jnp.float32)
    codebook = params["codebook"]
    ids = nearest_code(vectors, codebook)
    codes = codebook[ids]
    # Straight through: the decoder sees codes, its gradient reaches the encoder unchanged.
    passed = vectors + jax.lax.stop_gradient(codes - vectors) if quantize else vectors
    out = model.apply({"params": params}, passed, stride, method="reconstruct")
    difference = jnp.abs(out - images)
    reconstruction = jnp.mean(weights[..., None] * (difference + difference**2)) / jnp.mean(weights)
    commit = (
        jnp.mean((vectors - jax.lax.stop_gradient(codes)) ** 2)
        if quantize
        else 0.0 * jnp.sum(codes)
    )
    percept = perceptual(out, images) if perceptual else jnp.zeros(())
    loss = reconstruction + commitment * commit + perceptual_weight * percept
    metrics = {
        "reconstruction": reconstruction,
        "commitment": commit,
        "perceptual": percept,
        "vectors": vectors.reshape(-1, config.codebook_dim),
        "ids": ids.reshape(-1),
    }
    return loss, metrics


def update_codebook(
    statistics: CodebookStatistics,
    vectors: Array,
    ids: Array,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> tuple[Array, CodebookStatistics]:
    """One step of the codebook's moving average: the new codebook [v, d] and its statistics."""
    size = statistics.cluster_size.shape[0]
    counts = jnp.zeros(size).at[ids].add(1.0)
    sums = jnp.zeros_like(statistics.embed_avg).at[ids].add(vectors)
    cluster_size = decay * statistics.cluster_size + (1 - decay) * counts
    embed_avg = decay * statistics.embed_avg + (1 - decay) * sums
    total = cluster_size.sum()
    smoothed = (cluster_size + epsilon) / (total + size * epsilon) * total
    return embed_avg / smoothed[:, None], CodebookStatistics(cluster_size, embed_avg)


def revive_dead_codes(
    key: Array,
    codebook: Array,
    statistics: CodebookStatistics,
    vectors: Array,
    *,
    threshold: float = 0.02,
) -> tuple[Array, CodebookStatistics]:
    """Move codes used less than `threshold` times a step onto vectors of the batch.

    Vectors far from their code are likelier to be taken: they are the ones the codebook serves
    worst.
    """
    errors = jnp.sum((vectors - codebook[nearest_code(vectors, codebook)]) ** 2, axis=-1)
    dead = statistics.cluster_size < threshold
    chosen = jax.random.categorical(key, jnp.log(errors + 1e-12), shape=(codebook.shape[0],))
    fresh = vectors[chosen]
    codebook = jnp.where(dead[:, None], fresh, codebook)
    cluster_size = jnp.where(dead, 5 * threshold, statistics.cluster_size)
    embed_avg = jnp.where(dead[:, None], fresh * 5 * threshold, statistics.embed_avg)
    return codebook, CodebookStatistics(cluster_size, embed_avg)


def kmeans_plus_plus(rng: np.random.Generator, vectors: np.ndarray, num_codes: int) -> np.ndarray:
    """Start codes: each next one is drawn in proportion to its squared distance from those before.
    [n, d] → [k, d].
    """
    codes = [vectors[rng.integers(len(vectors))]]
    nearest = np.full(len(vectors), np.inf)
    for _ in range(num_codes - 1):
        nearest = np.minimum(nearest, ((vectors - codes[-1]) ** 2).sum(axis=-1))
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(vectors), 1 / len(vectors))
        codes.append(vectors[rng.choice(len(vectors), p=share)])
    return np.stack(codes)


# -------------------------------------------------------------------------------- the transformers


def _cross_entropy(logits: Array, labels: Array) -> Array:
    """−log p of each label: logits float32 [..., v], labels int [...] → [...]."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _mean(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def coglm_loss(
    params: Params,
    sample: TrainingSample,
    *,
    config: CogLMConfig,
    precision: Precision = Precision(),
) -> tuple[Array, dict[str, Array]]:
    """Mean −log p over the loss positions of a batch of pre-training samples, also split by
    `LossKind`.
    """
    tokens, positions, labels, mask, loss_mask, kinds = map(jnp.asarray, sample)
    logits = coglm.apply(params, tokens, positions, mask, config=config, precision=precision)
    losses = _cross_entropy(logits, labels)
    by_kind = {
        kind.name.lower(): _mean(losses, kinds == kind)
        for kind in LossKind
        if kind != LossKind.NONE
    }
    return _mean(losses, loss_mask), by_kind


def direct_sr_loss(
    params: Params,
    layout: Layout,
    fine: Array,
    weights: Array,
    *,
    config: DirectSRConfig,
    precision: Precision = Precision(),
) -> tuple[Array, dict[str, Array]]:
    """Mean −log p of the fine tokens int [b, cells], each cell counted by `weights` float32 [b,
    cells].
    """
    logits = direct_sr.apply(
        params, layout.tokens, layout.positions, layout.mask, config=config, precision=precision
    )
    losses = _cross_entropy(logits, fine)
    accuracy = jnp.mean(logits.argmax(axis=-1) == fine)
    return jnp.sum(losses * weights) / jnp.sum(weights), {
        "image": jnp.mean(losses),
        "accuracy": accuracy,
    }


def iterative_sr_loss(
    params: Params,
    layout: Layout,
    fine: Array,
    masked: Array,
    weights: Array,
    *,
    config: IterativeSRConfig,
    precision: Precision = Precision(),
) -> tuple[Array, dict[str, Array]]:
    """Mean −log p of the masked cells (bool [b, cells]), weighted; fine tokens int [b, cells] are
    the labels.
    """
    logits = iterative_sr.apply(
        params, layout.tokens, layout.positions, layout.mask, config=config, precision=precision
    )
    losses = _cross_entropy(logits, fine)
    counted = jnp.where(masked, weights, 0.0)
    right = logits.argmax(axis=-1) == fine
    metrics = {"image": _mean(losses, masked), "accuracy": _mean(right, masked)}
    return jnp.sum(losses * counted) / jnp.sum(counted), metrics
