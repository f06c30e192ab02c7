"""A transformer's training step as one would write it by hand: plain functions and optax.

It has the matrix products of CogLM in the same shapes and the same parameters, but for the two
LayerNorms a layer that CogLM's sandwich has after attention and MLP. Nothing else is added: no
mesh, no dropout, no losses by kind, no check that the numbers are finite.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cogview2_jax.config import CogLMConfig
from cogview2_jax.training.coglm_samples import TrainingSample

Array = jax.Array
Params = dict[str, Any]
MASKED_SCORE = -10000.0


def init_params(key: Array, config: CogLMConfig) -> Params:
    """Normal(0.02) matrices and tables, all float32; a list of layers."""
    sizes = config.transformer
    e, f = sizes.hidden_size, sizes.mlp_ratio * sizes.hidden_size
    keys = iter(jax.random.split(key, 2 + 4 * sizes.num_layers))

    def table(*shape: int) -> Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def dense(inputs: int, outputs: int) -> Params:
        return {"kernel": table(inputs, outputs), "bias": jnp.zeros(outputs)}

    def norm() -> Params:
        return {"scale": jnp.ones(e), "bias": jnp.zeros(e)}

    def layer() -> Params:
        return {
            "norm1": norm(),
            "qkv": dense(e, 3 * e),
            "out": dense(e, e),
            "norm2": norm(),
            "up": dense(e, f),
            "down": dense(f, e),
        }

    return {
        "words": table(config.vocabulary.size, e),
        "positions": table(config.num_positions, e),
        "layers": [layer() for _ in range(sizes.num_layers)],
        "norm": norm(),
    }


def _dense(params: Params, x: Array) -> Array:
    return x @ params["kernel"] + params["bias"]


def _norm(params: Params, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]


def _attention(params: Params, x: Array, mask: ArrayLike, heads: int) -> Array:
    b, s, e = x.shape
    q, k, v = jnp.moveaxis(_dense(params["qkv"], x).reshape(b, s, 3, heads, -1), 2, 0)
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * (e // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.asarray(mask)[:, None], scores, MASKED_SCORE))
    out = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(b, s, e)
    return _dense(params["out"], out)


def loss(params: Params, sample: TrainingSample, heads: int) -> Array:
    """Mean −log p over the loss positions."""
    x = params["words"][sample.tokens] + params["positions"][sample.positions]
    for layer in params["layers"]:
        x = x + _attention(layer, _norm(layer["norm1"], x), sample.mask, heads)
        x = x + _dense(layer["down"], jax.nn.gelu(_dense(layer["up"], _norm(layer["norm2"], x))))
    logits = _norm(params["norm"], x) @ params["words"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, sample.labels)
    return jnp.sum(losses * sample.loss_mask) / jnp.sum(sample.loss_mask)


def make_step(config: CogLMConfig, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """(params, opt_state, sample) → (params, opt_state, loss), jitted; donates the first two."""
    heads = config.transformer.num_heads

    def step(params: Params, opt_state: Any, sample: TrainingSample) -> Any:
        value, grads = jax.value_and_grad(loss)(params, sample, heads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))
