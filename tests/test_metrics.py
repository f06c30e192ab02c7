"""The FLOPs that utilisation is made of, against what XLA counts."""

import functools

import jax
import jax.numpy as jnp
import pytest

from cogview2_jax import coglm, metrics
from cogview2_jax.config import CogLMConfig, TransformerConfig, Vocabulary
from cogview2_jax.tokenizer import image
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from tests.common import SMALL_TOKENIZER


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
    forward = counted(functools.partial(coglm.apply, config=config), params, tokens, tokens, mask)
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
