"""Losses of the networks, as pure functions of parameters and batch.

Every loss and metric is a `Mean`: a sum and the weight that it is to be divided by. Sums and
weights add up over parts of a batch, so that a batch in parts has the very loss of the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Precision,
    Training,
)
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.sharding import Sharding
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.tokenizer.image import nearest_code
from cogview2_jax.training.coglm_samples import LossKind, TrainingSample

Array = jax.Array
Params = Any


class Mean(NamedTuple):
    """`total` / `weight`, both float32 scalars, not yet divided."""

    total: Array
    weight: Array

    @property
    def value(self) -> Array:
        """The mean; NaN where nothing was counted."""
        return jnp.where(
            self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), jnp.nan
        )


def weighted(values: Array, weights: Array) -> Mean:
    """Of `values`, each counted by `weights` of the same shape (bool or float32)."""
    counted = jnp.where(weights != 0, values, 0.0) * weights
    return Mean(jnp.sum(counted), jnp.sum(weights.astype(jnp.float32)))


Metrics = dict[str, Mean]


# ------------------------------------------------------------------------------ the image tokenizer


class CodebookStatistics(NamedTuple):
    """Moving averages behind the codebook: how often each code is used, and the sum of what it
    stands for.
    """

    cluster_size: Array  # float32 [v]
    embed_avg: Array  # float32 [v, d]


class Assigned(NamedTuple):
    """What a batch's pictures became, for the codebook's update."""

    vectors: Array  # float32 [n, d]
    ids: Array  # int32 [n], their nearest codes


def init_statistics(codebook: Array) -> CodebookStatistics:
    # A copy: a donated state must not hold one buffer twice.
    return CodebookStatistics(jnp.ones(codebook.shape[0]), jnp.array(codebook))


def hvqvae_loss(
    params: Params,
    images: Array,
    weights: Array,
    strides: Sequence[int],
    *,
    config: HVQVAEConfig,
    precision: Precision = Precision(),
    quantize: bool | Array = True,
    commitment: float = 1.0,
    perceptual: Callable[[Array, Array], Array] | None = None,
    perceptual_weight: float = 1.0,
) -> tuple[Mean, Metrics, Assigned]:
    """Reconstruction and commitment loss, a mean over pictures and `strides`. The pictures are
    encoded once.

    Args:
        images: float32 [b, y, x, 3] in [0, 1].
        weights: float32 [b, y, x], how much each pixel counts.
        quantize: False lets the vectors pass unquantised, as while the encoder settles; it may be
        traced.
        perceptual: (reconstruction, images) → scalar, added with `perceptual_weight`.

    Returns:
        The loss, its parts "reconstruction_8", "commitment_8" and, where there is one,
        "perceptual_8" of each stride, and what `update_codebook` needs.
    """
    model = HVQVAE(config, precision)
    levels = model.apply({"params": params}, images, method="vectors")
    codebook = params["codebook"]
    count = jnp.float32(len(images))
    total = jnp.zeros(())
    metrics: Metrics = {}
    assigned = []
    for stride in strides:
        vectors = levels[config.strides.index(stride)].astype(jnp.float32)
        ids = nearest_code(vectors, codebook)
        codes = codebook[ids]
        # Straight through: the decoder sees codes, its gradient reaches the encoder unchanged.
        passed = vectors + jnp.where(quantize, jax.lax.stop_gradient(codes - vectors), 0.0)
        out = model.apply({"params": params}, passed, stride, method="reconstruct")
        difference = jnp.abs(out - images)
        squares = weights[..., None] * (difference + difference**2)
        reconstruction = jnp.mean(squares) / jnp.mean(weights)
        commit = jnp.mean((vectors - jax.lax.stop_gradient(codes)) ** 2) * quantize
        parts = {"reconstruction": reconstruction, "commitment": commit}
        total += reconstruction + commitment * commit
        if perceptual:
            parts["perceptual"] = perceptual(out, images)
            total += perceptual_weight * parts["perceptual"]
        metrics |= {f"{name}_{stride}": Mean(part * count, count) for name, part in parts.items()}
        flat = jax.lax.stop_gradient(vectors).reshape(-1, config.codebook_dim)
        assigned.append(Assigned(flat, ids.reshape(-1)))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *assigned)
    return Mean(total / len(strides) * count, count), metrics, joined


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


def codebook_revision(
    *, decay: float = 0.99, begin: int = 0, revive_every: int = 0, last_revival: int = 0
) -> Callable[[Params, Any, Any, Array, Array], tuple[Params, CodebookStatistics]]:
    """What `train.make_step` does with the codebook after each gradient step, from step `begin`.

    It moves by its average, and every `revive_every` steps (0: never) before `last_revival` dead
    codes are moved onto vectors. `hvqvae_loss`'s `Assigned` is what it sees of the batch.
    """

    def revise(
        params: Params, statistics: CodebookStatistics, assigned: Assigned, step: Array, key: Array
    ) -> tuple[Params, CodebookStatistics]:
        vectors, ids = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in assigned)
        started = step >= begin

        def revived(codebook: Array, statistics: CodebookStatistics) -> Any:
            return revive_dead_codes(key, codebook, statistics, vectors)

        moved = update_codebook(statistics, vectors, ids, decay=decay)
        if revive_every:
            due = (step % revive_every == 0) & (step < last_revival)
            moved = jax.lax.cond(due, revived, lambda *same: same, *moved)
        codebook, statistics = jax.tree.map(
            lambda new, old: jnp.where(started, new, old), moved, (params["codebook"], statistics)
        )
        return params | {"codebook": codebook}, statistics

    return revise


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


def _cross_entropy(logits: Array, labels: Array, z_loss: float) -> tuple[Array, Array]:
    """−log p of each label, and that with `z_loss` times the squared log normaliser, which keeps
    logits from drifting: logits float32 [..., v], labels int [...] → two of [...].
    """
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - chosen
    return losses, losses + z_loss * normaliser**2


def coglm_loss(
    params: Params,
    sample: TrainingSample,
    *,
    config: CogLMConfig,
    precision: Precision = Precision(),
    training: Training = Training(),
    sharding: Sharding | None = None,
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p over the loss positions of a batch of pre-training samples, also split by `LossKind`
    (without the z-loss).
    """
    tokens, positions, labels, mask, loss_mask, kinds = map(jnp.asarray, sample)
    logits = coglm.apply(
        params,
        tokens,
        positions,
        mask,
        config=config,
        precision=precision,
        training=training,
        sharding=sharding,
        dropout_key=dropout_key,
    )
    losses, penalised = _cross_entropy(logits, labels, z_loss)
    by_kind = {
        kind.name.lower(): weighted(losses, kinds == kind)
        for kind in LossKind
        if kind != LossKind.NONE
    }
    return weighted(penalised, loss_mask), by_kind


def direct_sr_loss(
    params: Params,
    layout: NetworkInput,
    fine: Array,
    weights: Array,
    *,
    config: DirectSRConfig,
    precision: Precision = Precision(),
    training: Training = Training(),
    sharding: Sharding | None = None,
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p of the fine tokens int [b, cells], each cell counted by `weights` float32 [b,
    cells]; "image" and "accuracy" count all cells alike.
    """
    logits = direct_sr.apply(
        params,
        layout.tokens,
        layout.positions,
        layout.mask,
        config=config,
        precision=precision,
        training=training,
        sharding=sharding,
        dropout_key=dropout_key,
    )
    return _image_losses(logits, fine, weights, jnp.ones(fine.shape, bool), z_loss)


def iterative_sr_loss(
    params: Params,
    layout: NetworkInput,
    fine: Array,
    masked: Array,
    weights: Array,
    *,
    config: IterativeSRConfig,
    precision: Precision = Precision(),
    training: Training = Training(),
    sharding: Sharding | None = None,
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p of the masked cells (bool [b, cells]), weighted; fine tokens int [b, cells] are
    the labels. "image" and "accuracy" count all masked cells alike.
    """
    logits = iterative_sr.apply(
        params,
        layout.tokens,
        layout.positions,
        layout.mask,
        config=config,
        precision=precision,
        training=training,
        sharding=sharding,
        dropout_key=dropout_key,
    )
    return _image_losses(logits, fine, weights, masked, z_loss)


def _image_losses(
    logits: Array, labels: Array, weights: Array, counted: Array, z_loss: float
) -> tuple[Mean, Metrics]:
    losses, penalised = _cross_entropy(logits, labels, z_loss)
    right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    metrics = {"image": weighted(losses, counted), "accuracy": weighted(right, counted)}
    return weighted(penalised, jnp.where(counted, weights, 0.0)), metrics
