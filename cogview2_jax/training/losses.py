"""Losses of the networks, as pure functions of parameters and batch.

Every loss and metric is a `Mean`: a sum and the weight to divide it by. Sums and weights add up
over parts of a batch, so a batch in parts has exactly the loss of the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
)
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.sharding import Execution
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
    """The mean of `values`, weighted by `weights` of the same shape (bool or float32)."""
    counted = jnp.where(weights != 0, values, 0.0) * weights
    return Mean(jnp.sum(counted), jnp.sum(weights.astype(jnp.float32)))


Metrics = dict[str, Mean]


# --- The image tokenizer --------------------------------------------------------------------------


class Assigned(NamedTuple):
    """A batch's vectors and their codes, for the codebook's update."""

    vectors: Array  # float32 [n, d]
    ids: Array  # int32 [n], their nearest codes


def hvqvae_loss(
    params: Params,
    images: Array,
    weights: Array,
    strides: Sequence[int],
    *,
    config: HVQVAEConfig,
    execution: Execution = Execution(),
    quantize: bool | Array = True,
    commitment: float = 1.0,
    perceptual: Callable[[Array, Array], Array] | None = None,
    perceptual_weight: float = 1.0,
) -> tuple[Mean, Metrics, Assigned]:
    """Reconstruction and commitment loss, a mean over pixels and `strides`. The pictures are
    encoded once.

    In all parts of the loss, a picture's weight is the sum of its pixels' `weights`, so that the
    losses of a batch's parts add up to the loss of the whole. With weights of 1 all are the plain
    means of the published loss.

    Args:
        images: float32 [b, y, x, 3] in [0, 1].
        weights: float32 [b, y, x], the weight of each pixel.
        quantize: False passes the vectors on unquantised, as at the start of training; it may be
        traced.
        perceptual: (reconstruction, images) → scalar, added with `perceptual_weight`. Called for
        each picture, as [1, y, x, 3].

    Returns:
        The loss, its parts "reconstruction_8", "commitment_8" and, where there is one,
        "perceptual_8" of each stride, and what `update_codebook` needs.
    """
    model = HVQVAE(config, execution.precision)
    levels = model.apply({"params": params}, images, method="vectors")
    codebook = params["codebook"]
    counted = jnp.mean(weights, axis=(1, 2))  # [b]
    weight = jnp.sum(counted)
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
        errors = (vectors - jax.lax.stop_gradient(codes)) ** 2
        parts = {
            "reconstruction": jnp.sum(jnp.mean(squares, axis=(1, 2, 3))),
            "commitment": jnp.sum(counted * jnp.mean(errors, axis=(1, 2, 3))) * quantize,
        }
        total += parts["reconstruction"] + commitment * parts["commitment"]
        if perceptual:
            distances = jax.vmap(perceptual)(out[:, None], images[:, None])
            parts["perceptual"] = jnp.sum(counted * distances)
            total += perceptual_weight * parts["perceptual"]
        metrics |= {f"{name}_{stride}": Mean(part, weight) for name, part in parts.items()}
        flat = jax.lax.stop_gradient(vectors).reshape(-1, config.codebook_dim)
        assigned.append(Assigned(flat, ids.reshape(-1)))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *assigned)
    return Mean(total / len(strides), weight), metrics, joined


# --- The transformers -----------------------------------------------------------------------------


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
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p over the loss positions of a batch of pre-training samples, also split by `LossKind`
    (without the z-loss).
    """
    tokens, positions, labels, mask, loss_mask, kinds = map(jnp.asarray, sample)
    logits = coglm.apply(
        params,
        NetworkInput(tokens, positions, mask),
        config=config,
        execution=execution,
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
    inputs: NetworkInput,
    fine: Array,
    weights: Array,
    *,
    config: DirectSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p of the fine tokens int [b, cells], each cell counted by `weights` float32 [b,
    cells]; "image" and "accuracy" count every cell once.
    """
    logits = direct_sr.apply(
        params,
        inputs,
        config=config,
        execution=execution,
        dropout_key=dropout_key,
    )
    return _image_losses(logits, fine, weights, jnp.ones(fine.shape, bool), z_loss)


def iterative_sr_loss(
    params: Params,
    inputs: NetworkInput,
    fine: Array,
    masked: Array,
    weights: Array,
    *,
    config: IterativeSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
    z_loss: float = 0.0,
) -> tuple[Mean, Metrics]:
    """−log p of the masked cells (bool [b, cells]), weighted; fine tokens int [b, cells] are
    the labels. "image" and "accuracy" count every masked cell once.
    """
    logits = iterative_sr.apply(
        params,
        inputs,
        config=config,
        execution=execution,
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
