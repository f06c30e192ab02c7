"""Published names → trees: what is transposed, what is refused, and sizes read off the tensors."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.published import names
from cogview2_jax.tokenizer import image

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES, VOCABULARY = TransformerConfig(2, 64, 4), Vocabulary(256, 360, 259, 256)
BASE = CogLMConfig(SIZES, VOCABULARY)
NETWORKS = {
    "coglm": (names.coglm, coglm, BASE),
    "direct_sr": (names.direct_sr, direct_sr, DirectSRConfig(BASE)),
    "iterative_sr": (names.iterative_sr, iterative_sr, IterativeSRConfig(SIZES, VOCABULARY)),
    "hvqvae": (
        names.hvqvae,
        image,
        HVQVAEConfig(channels=32, z_channels=32, codebook_size=96, codebook_dim=24),
    ),
}


def published(name: str) -> dict[str, np.ndarray]:
    """The recorded state dict's names and shapes, holding 0, 1, 2, …"""
    with np.load(GOLDEN / f"{name}.npz") as file:
        spec = json.loads(str(file["weights_spec"]))["tensors"]
    return {
        key: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for key, shape, *_ in spec
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tree_is_the_networks_own(name):
    converter, network, config = NETWORKS[name]
    tensors = published(name)
    made = converter(tensors, config)
    fresh = jax.eval_shape(lambda key: network.init_params(key, config), jax.random.key(0))
    assert jax.tree.map(np.shape, made) == jax.tree.map(lambda leaf: leaf.shape, fresh)
    # Nothing is lost and nothing read twice.
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == sum(t.size for t in tensors.values())


def test_linear_weights_are_transposed_and_layers_stacked():
    tensors = published("direct_sr")
    made = names.direct_sr(tensors, DirectSRConfig(BASE))
    attention = made["layers"]["attention"]
    for layer in range(2):
        prefix = f"transformer.layers.{layer}.attention."
        np.testing.assert_array_equal(
            attention["dense"]["kernel"][layer], tensors[prefix + "dense.weight"].T
        )
        np.testing.assert_array_equal(
            attention["qkv_plus"]["query_key_value"]["kernel"][layer],
            tensors[f"mixins.attention_plus.query_key_value.{layer}.weight"].T,
        )
    # Tables of embeddings are not, square ones neither.
    table = tensors["transformer.word_embeddings.weight"]
    np.testing.assert_array_equal(made["word_embeddings"], table)


def test_convolutions_become_height_width_in_out():
    tensors = published("hvqvae")
    made = names.hvqvae(tensors, NETWORKS["hvqvae"][2])
    kernel = tensors["decs.0.up.4.upsample.conv.weight"]
    ours = made["decoder_16"]["up_4_upsample"]["kernel"]
    assert ours.flags.c_contiguous
    for o, i, y, x in [(0, 0, 0, 0), (3, 5, 2, 1), (1, 2, 0, 2)]:
        assert ours[y, x, i, o] == kernel[o, i, y, x]
    np.testing.assert_array_equal(made["codebook"], tensors["quantize.embed.weight"])
    first = tensors["decs.2.conv_in.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(made["decoder_4"]["conv_in"]["kernel"], first)


def test_numbers_keep_their_dtype():
    halves = {
        name: np.zeros(tensor.shape, np.float16) for name, tensor in published("coglm").items()
    }
    made = names.coglm(halves, BASE)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype(np.float16)}


def test_the_codebooks_averages_are_passed_over():
    tensors = published("hvqvae")
    tensors |= {"quantize.cluster_size": np.ones(96), "quantize.embed_avg": np.ones((96, 24))}
    assert "codebook" in names.hvqvae(tensors, NETWORKS["hvqvae"][2])


WRONG = [
    ("coglm", "transformer.layers.1.mlp.dense_4h_to_h.bias"),
    ("coglm", "transformer.position_embeddings.weight"),
    ("direct_sr", "mixins.attention_plus.dense.1.weight"),
    ("iterative_sr", "mixins.extra_position_embedding.position_embeddings.weight"),
    ("hvqvae", "enc.down.1.block.0.nin_shortcut.weight"),
    ("hvqvae", "down_samplers.1.conv_down_sampler.conv.bias"),
]


def refusal(name, tensors) -> str:
    converter, _, config = NETWORKS[name]
    with pytest.raises(ValueError) as caught:
        converter(tensors, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "tensor"), WRONG)
def test_a_missing_tensor_is_named(name, tensor):
    tensors = published(name)
    del tensors[tensor]
    assert refusal(name, tensors) == f"tensor {tensor!r} is missing from the checkpoint"


@pytest.mark.parametrize(("name", "tensor"), WRONG)
def test_a_tensor_of_another_shape_is_named(name, tensor):
    tensors = published(name)
    shape = tensors[tensor].shape
    tensors[tensor] = np.zeros((shape[0] + 1, *shape[1:]), np.float32)
    expected = f"tensor {tensor!r} must have shape {shape}: got {(shape[0] + 1, *shape[1:])}"
    assert refusal(name, tensors) == expected


@pytest.mark.parametrize(
    ("name", "extra"),
    [("coglm", "transformer.layers.2.input_layernorm.weight"), ("hvqvae", "decs.3.conv_in.weight")],
)
def test_a_tensor_too_many_is_named(name, extra):
    """A deeper network than asked for would otherwise lose its last layers in silence."""
    tensors = published(name) | {extra: np.zeros(3)}
    assert (
        refusal(name, tensors)
        == f"tensor {extra!r} is not part of the network of this configuration"
    )


def test_sizes_are_read_off_the_tensors():
    tensors = published("coglm")
    assert names.transformer_config(tensors, num_heads=4) == SIZES
    assert names.table_sizes(tensors) == (360, 1024)
    assert names.hvqvae_config(published("hvqvae")) == NETWORKS["hvqvae"][2]
    with pytest.raises(ValueError, match=r"tensor 'enc.conv_in.weight' is missing"):
        names.hvqvae_config(tensors)


class Shapes(Mapping):
    """The published presets' state dicts without their numbers: a tensor is one broadcast zero."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return np.broadcast_to(np.float16(0), self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_sizes_of_other_networks():
    wide = {
        "transformer.word_embeddings.weight": (900, 96),
        "transformer.position_embeddings.weight": (700, 96),
        **{f"transformer.layers.{i}.mlp.dense_h_to_4h.weight": (192, 96) for i in range(5)},
    }
    assert names.transformer_config(Shapes(wide), 6) == TransformerConfig(5, 96, 6, mlp_ratio=2)
    assert names.table_sizes(Shapes(wide)) == (900, 700)

    multipliers = {"enc.down": (1, 2), "decs.0.up": (1, 1, 3), "decs.1.up": (2, 4)}
    tokenizer = {
        "enc.conv_in.weight": (64, 3, 3, 3),
        "enc.conv_out.weight": (48, 128, 3, 3),
        "quantize.embed.weight": (512, 40),
        "enc.down.0.block.1.conv1.weight": (64, 64, 3, 3),
        "enc.down.0.block.2.conv1.weight": (64, 64, 3, 3),
        "decs.0.conv_in.weight": (192, 40, 3, 3),
        "decs.1.conv_in.weight": (256, 40, 3, 3),
        "decs.0.up.2.attn.0.q.weight": (192, 192, 1, 1),
        **{
            f"{part}.{level}.block.0.conv1.weight": (64 * multiplier, 64, 3, 3)
            for part, levels in multipliers.items()
            for level, multiplier in enumerate(levels)
        },
    }
    expected = HVQVAEConfig(
        channels=64,
        encoder_multipliers=(1, 2),
        encoder_blocks=3,
        decoder_multipliers=((1, 1, 3), (2, 4)),
        z_channels=48,
        codebook_size=512,
        codebook_dim=40,
        attention_resolution=64,
    )
    assert names.hvqvae_config(Shapes(tokenizer)) == expected


# The recorded sizes → the published ones: width, its triple and fourfold, the vocabulary.
AT_FULL_SIZE = {64: 3072, 192: 9216, 256: 12_288, 360: 150_003}


@pytest.mark.parametrize(
    "name, config, parameters",
    [
        ("coglm", CogLMConfig(), 5_902_285_824),
        ("direct_sr", DirectSRConfig(), 7_725_874_176),
        ("iterative_sr", IterativeSRConfig(), 5_913_345_024),
    ],
)
def test_the_published_sizes_are_the_recorded_names_with_48_layers(name, config, parameters):
    expected = {}
    for key, tensor in published(name).items():
        shape = tuple(AT_FULL_SIZE.get(side, side) for side in tensor.shape)
        layered = re.fullmatch(r"(.*\.)0(\..*)", key)
        if layered is None and re.search(r"\.1\.", key):
            continue
        for layer in range(48 if layered else 1):
            expected[f"{layered[1]}{layer}{layered[2]}" if layered else key] = shape
    leaves = names.leaves(config)
    assert {key: leaf.published_shape for leaf in leaves for key in leaf.names} == expected
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    assert sum(math.prod(shape) for shape in expected.values()) == parameters
