"""Published tensor names → parameter trees. The only file that knows those names.

Tensors are NumPy arrays (or anything NumPy can read) with the names of the published state dicts;
linear weights are [out, in], convolutions [out, in, h, w]. Which parameters a network has, and in
which shapes, comes from its `init_params`; this file only has the names. A missing tensor, one of
another shape and one that the network does not have are each a ValueError with the tensor's name.
Dtypes are kept.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.networks import coglm as coglm_network
from cogview2_jax.networks import direct_sr as direct_sr_network
from cogview2_jax.networks import iterative_sr as iterative_sr_network
from cogview2_jax.tokenizer import image

Tensors = Mapping[str, np.ndarray]
Params = dict
Rules = tuple[tuple[str, str], ...]

# Applied in this order to a leaf's path in the tree, such as `layers/attention/dense/kernel`.
# `{layer}` stands for the number of a layer; the tree has one stacked leaf for all layers.
_TRANSFORMER: Rules = (
    (
        r"^layers/attention/(qkv_plus/query_key_value|dense_plus)",
        r"mixins/attention_plus/\1/{layer}",
    ),
    (r"(qkv|qkv_plus)/query_key_value", "query_key_value"),
    (r"dense_plus", "dense"),
    (r"^layers", "transformer/layers/{layer}"),
    (r"^final_layernorm", "transformer/final_layernorm"),
    (r"^(word|position)_embeddings$", r"transformer/\1_embeddings/weight"),
    (
        r"^extra_position_embeddings$",
        "mixins/extra_position_embedding/position_embeddings/weight",
    ),
)
_HVQVAE: Rules = (
    (r"^encoder", "enc"),
    (r"^downsamplers_(\d+)/conv", r"down_samplers/\1/conv_down_sampler/conv"),
    (r"^projection", "quantize/proj"),
    (r"^codebook$", "quantize/embed/weight"),
    (r"/(down|up)_(\d+)_(block|attn)_(\d+)", r"/\1/\2/\3/\4"),
    (r"/(down|up)_(\d+)_(downsample|upsample)", r"/\1/\2/\3/conv"),
    (r"/shortcut", "/nin_shortcut"),
    (r"/norm/(scale|bias)$", r"/\1"),  # flax's GroupNorm is one level deeper
)
# Training state of the published codebook, not used by encoding or decoding.
_HVQVAE_BUFFERS = ("quantize.cluster_size", "quantize.embed_avg")


def coglm(tensors: Tensors, config: CogLMConfig) -> Params:
    """CogLM's parameters. Raises ValueError, with a tensor's name, for another checkpoint."""
    return _convert(tensors, coglm_network.init_params, config, _TRANSFORMER)


def direct_sr(tensors: Tensors, config: DirectSRConfig) -> Params:
    """Direct super-resolution's parameters: as `coglm`, with a second position table and a second
    attention in each layer.
    """
    return _convert(tensors, direct_sr_network.init_params, config, _TRANSFORMER)


def iterative_sr(tensors: Tensors, config: IterativeSRConfig) -> Params:
    """Iterative super-resolution's parameters: as `coglm`, with a second position table."""
    return _convert(tensors, iterative_sr_network.init_params, config, _TRANSFORMER)


def hvqvae(tensors: Tensors, config: HVQVAEConfig) -> Params:
    """The image tokenizer's parameters. The codebook's moving averages are ignored."""
    # Published decoders are numbered in the order of `decoder_multipliers`, ours named by stride.
    decoders = tuple(
        (f"^decoder_{stride}", f"decs/{index}") for index, stride in enumerate(config.strides[::-1])
    )
    return _convert(tensors, image.init_params, config, decoders + _HVQVAE, ignored=_HVQVAE_BUFFERS)


def transformer_config(tensors: Tensors, num_heads: int) -> TransformerConfig:
    """The sizes of any of the three transformers. The number of heads is in no tensor's shape."""
    layers = "transformer.layers.{}.mlp.dense_h_to_4h.weight"
    mlp, hidden = _shape(tensors, layers.format(0))
    return TransformerConfig(
        num_layers=_count(tensors, layers),
        hidden_size=hidden,
        num_heads=num_heads,
        mlp_ratio=mlp // hidden,
    )


def table_sizes(tensors: Tensors) -> tuple[int, int]:
    """Rows of a transformer's word and (first) position tables."""
    words, positions = (
        _shape(tensors, f"transformer.{table}_embeddings.weight")[0]
        for table in ("word", "position")
    )
    return words, positions


def hvqvae_config(tensors: Tensors) -> HVQVAEConfig:
    """The image tokenizer's sizes, from its tensors: `ice_image.pt` has no configuration."""
    channels = _shape(tensors, "enc.conv_in.weight")[0]

    def multipliers(levels: str) -> tuple[int, ...]:
        first = levels + ".block.0.conv1.weight"
        widths = [_shape(tensors, first.format(i))[0] for i in range(_count(tensors, first))]
        return tuple(width // channels for width in widths)

    decoders = range(_count(tensors, "decs.{}.conv_in.weight"))
    codebook_size, codebook_dim = _shape(tensors, "quantize.embed.weight")
    # Level i has the nominal resolution of level 0 divided by 2^i; one resolution has attention.
    found = {
        int(level) for name in tensors for level in re.findall(r"(?:down|up)\.(\d+)\.attn", name)
    }
    nominal = HVQVAEConfig.nominal_resolution
    return HVQVAEConfig(
        channels=channels,
        encoder_multipliers=multipliers("enc.down.{}"),
        encoder_blocks=_count(tensors, "enc.down.0.block.{}.conv1.weight"),
        decoder_multipliers=tuple(multipliers(f"decs.{index}.up.{{}}") for index in decoders),
        decoder_blocks=_count(tensors, "decs.0.up.0.block.{}.conv1.weight"),
        z_channels=_shape(tensors, "enc.conv_out.weight")[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        # No level has resolution 0: then only the middle blocks have attention.
        attention_resolution=nominal >> max(found) if found else 0,
    )


def _count(tensors: Tensors, name: str) -> int:
    """How many tensors have this `name` with 0, 1, … in its braces, until one is missing."""
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing from the checkpoint")
    return tuple(tensors[name].shape)


def _convert(
    tensors: Tensors,
    init_params: Callable[..., Params],
    config: Any,
    rules: Rules,
    ignored: Iterable[str] = (),
) -> Params:
    expected = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    taken = set(ignored)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _published_name(jax.tree_util.keystr(path, simple=True, separator="/"), rules)
        if "{layer}" not in name:
            taken.add(name)
            return _take(tensors, name, like.shape)
        names = [name.format(layer=layer) for layer in range(like.shape[0])]
        taken.update(names)
        return np.stack([_take(tensors, name, like.shape[1:]) for name in names])

    params: Params = jax.tree_util.tree_map_with_path(leaf, expected)
    if unknown := sorted(set(tensors) - taken):
        raise ValueError(f"tensor {unknown[0]!r} is not part of the network of this configuration")
    return params


def _published_name(path: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return re.sub("/(kernel|scale)$", "/weight", path).replace("/", ".")


def _take(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor with our axes, of this `shape`: linear [in, out], convolution [h, w, in, out]."""
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing from the checkpoint")
    tensor = np.asarray(tensors[name])
    # Linear weights are transposed, tables of embeddings are not.
    to_ours: tuple[int, ...] = {2: (1, 0), 4: (2, 3, 1, 0)}.get(
        len(shape), tuple(range(len(shape)))
    )
    if "embed" in name:
        to_ours = tuple(range(len(shape)))
    published_shape = tuple(shape[axis] for axis in np.argsort(to_ours))
    if tensor.shape != published_shape:
        raise ValueError(f"tensor {name!r} must have shape {published_shape}: got {tensor.shape}")
    return np.ascontiguousarray(tensor.transpose(to_ours))
