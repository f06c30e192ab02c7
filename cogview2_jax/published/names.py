"""Published tensor names → parameter trees. The only file that knows those names.

Tensors are NumPy arrays (or anything NumPy can read) with the names of the published state dicts;
linear weights are [out, in], convolutions [out, in, h, w]. Which parameters a network has, and in
which shapes, comes from its `init_params`; this file only has the names. A missing tensor, one of
another shape and one that the network does not have are each a ValueError with the tensor's name.
Dtypes are kept.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

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
Shaped = Mapping[str, Any]  # anything with a shape
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
HVQVAE_BUFFERS = ("quantize.cluster_size", "quantize.embed_avg")
WORD_TABLE = "transformer.word_embeddings.weight"
_INIT: dict[type, Any] = {
    CogLMConfig: coglm_network.init_params,
    DirectSRConfig: direct_sr_network.init_params,
    IterativeSRConfig: iterative_sr_network.init_params,
    HVQVAEConfig: image.init_params,
}


class Leaf(NamedTuple):
    """One array of a parameter tree, and the published tensors that it is made of."""

    path: str  # in the tree, "layers/attention/dense/kernel"
    shape: tuple[int, ...]
    names: tuple[str, ...]  # one tensor; where the tree stacks layers, one for each layer
    stacked: bool
    published_shape: tuple[int, ...]  # of each tensor
    axes: tuple[int, ...]  # that each tensor is transposed by: its axes in our order


@functools.lru_cache(maxsize=8)
def leaves(config: Any) -> tuple[Leaf, ...]:
    """Every parameter of the network of this configuration, with its published names."""
    init_params, rules = _INIT[type(config)], _TRANSFORMER
    if isinstance(config, HVQVAEConfig):
        # Published decoders are numbered in the order of `decoder_multipliers`, ours have strides.
        decoders = enumerate(config.strides[::-1])
        rules = (*((f"^decoder_{stride}", f"decs/{at}") for at, stride in decoders), *_HVQVAE)
    tree = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(
        _leaf(jax.tree_util.keystr(path, simple=True, separator="/"), like.shape, rules)
        for path, like in found
    )


def cut_of(name: str) -> str | None:
    """How a transformer's tensor is divided among model-parallel ranks.

    "rows"; "thirds", where each third of the rows (Q, K, V) is cut for itself; "columns"; or None:
    every rank has the whole.
    """
    if name == WORD_TABLE or ".dense_h_to_4h." in name:
        return "rows"
    if "query_key_value" in name:
        return "thirds"
    by_columns = r"(dense_4h_to_h|\.attention\.dense|\.attention_plus\.dense\.\d+)\.weight$"
    return "columns" if re.search(by_columns, name) else None


def coglm(tensors: Tensors, config: CogLMConfig) -> Params:
    """CogLM's parameters. Raises ValueError, with a tensor's name, for another checkpoint."""
    return _convert(tensors, config)


def direct_sr(tensors: Tensors, config: DirectSRConfig) -> Params:
    """Direct super-resolution's parameters: as `coglm`, with a second position table and a second
    attention in each layer.
    """
    return _convert(tensors, config)


def iterative_sr(tensors: Tensors, config: IterativeSRConfig) -> Params:
    """Iterative super-resolution's parameters: as `coglm`, with a second position table."""
    return _convert(tensors, config)


def hvqvae(tensors: Tensors, config: HVQVAEConfig) -> Params:
    """The image tokenizer's parameters. The codebook's moving averages are ignored."""
    return _convert(tensors, config, ignored=HVQVAE_BUFFERS)


def transformer_config(tensors: Shaped, num_heads: int) -> TransformerConfig:
    """The sizes of any of the three transformers. The number of heads is in no tensor's shape."""
    layers = "transformer.layers.{}.mlp.dense_h_to_4h.weight"
    mlp, hidden = _shape(tensors, layers.format(0))
    return TransformerConfig(
        num_layers=_count(tensors, layers),
        hidden_size=hidden,
        num_heads=num_heads,
        mlp_ratio=mlp // hidden,
    )


def table_sizes(tensors: Shaped) -> tuple[int, int]:
    """Rows of a transformer's word and (first) position tables."""
    words, positions = (
        _shape(tensors, f"transformer.{table}_embeddings.weight")[0]
        for table in ("word", "position")
    )
    return words, positions


def hvqvae_config(tensors: Shaped) -> HVQVAEConfig:
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


def _count(tensors: Shaped, name: str) -> int:
    """How many tensors have this `name` with 0, 1, … in its braces, until one is missing."""
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count


def _shape(tensors: Shaped, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing from the checkpoint")
    return tuple(tensors[name].shape)


def _convert(tensors: Tensors, config: Any, ignored: tuple[str, ...] = ()) -> Params:
    taken = set(ignored)
    params: Params = {}
    for leaf in leaves(config):
        taken.update(leaf.names)
        parts = [_take(tensors, name, leaf) for name in leaf.names]
        *parents, last = leaf.path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.stack(parts) if leaf.stacked else parts[0]
    if unknown := sorted(set(tensors) - taken):
        raise ValueError(f"tensor {unknown[0]!r} is not part of the network of this configuration")
    return params


def _leaf(path: str, shape: tuple[int, ...], rules: Rules) -> Leaf:
    name = path
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name = re.sub("/(kernel|scale)$", "/weight", name).replace("/", ".")
    stacked = "{layer}" in name
    names = tuple(name.format(layer=layer) for layer in range(shape[0])) if stacked else (name,)
    inner = shape[1:] if stacked else shape
    # Linear weights [out, in] and convolutions [out, in, h, w] become [in, out] and [h, w, in,
    # out]; tables of embeddings stay.
    axes = tuple(range(len(inner)))
    if "embed" not in name:
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(inner), axes)
    published = tuple(inner[axis] for axis in np.argsort(axes))
    return Leaf(path, shape, names, stacked, published, axes)


def _take(tensors: Tensors, name: str, leaf: Leaf) -> np.ndarray:
    """The tensor with our axes. Raises ValueError where it is missing or has another shape."""
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing from the checkpoint")
    tensor = np.asarray(tensors[name])
    if tensor.shape != leaf.published_shape:
        raise ValueError(
            f"tensor {name!r} must have shape {leaf.published_shape}: got {tensor.shape}"
        )
    return np.ascontiguousarray(tensor.transpose(leaf.axes))
