"""Checks of the four networks, one function for each recorded file.

Inputs (texts, images, masks, weights) come from the file; layouts, numbers and tokens are ours.
With a `bundle`, the weights are those of that folder (see `stored`).
Every network runs under jit, in few shapes.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import CogLMConfig, Sampling, TransformerConfig
from cogview2_jax.decoding import loops, sampling
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.published import names
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.training.losses import hvqvae_loss
from experiments.parity import configs
from experiments.parity.golden import (
    TOLERANCES,
    Golden,
    Outcome,
    close,
    equal,
    guarded,
    seeded_weights,
)
from experiments.parity.stored import params_of

Params = dict


# --- coglm.npz ------------------------------------------------------------------------------------


def check_coglm(golden: Golden, bundle: Path | None = None) -> Iterator[Outcome]:
    """Text → image by one pass and by the cache, captioning, infilling."""
    tensors = seeded_weights(golden)
    config = configs.coglm(golden, tensors)
    yield equal("config", _sizes(config.transformer), golden["config"][:3])
    params, checks = params_of("coglm", names.coglm(tensors, config), bundle)
    yield from checks
    params = jax.device_put(params)
    for name, needs, check in (
        ("text to image", _TEXT_TO_IMAGE, _text_to_image),
        ("cached decode", ("decode_tokens", "decode_step_logits"), _cached_decode),
        ("captioning", _CAPTION, _captioning),
        ("infilling", _INFILL, _infilling),
    ):
        yield from guarded(name, golden, needs, check, params, config)


def _named(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{name}" for name in names.split())


_TEXT_TO_IMAGE = _named("t2i", "tokens position_ids mask attn_plus logits")
_CAPTION = _named("caption", "tokens mask position_ids loss_mask scores")
_INFILL = _named("comp", "mask20 text image seq position_ids attention_mask") + _named(
    "comp", "log_attention_weight step_logits filled_seq result"
)


def _sizes(config: TransformerConfig) -> list[int]:
    return [config.num_layers, config.hidden_size, config.num_heads]


def _text_to_image(golden: Golden, params: Params, config: CogLMConfig) -> Iterator[Outcome]:
    text, image = configs.split_text(golden["t2i_tokens"], config.vocabulary)
    words = jnp.ones(text.shape, bool)
    network_input = inputs.text_to_image(jnp.asarray(text), words, jnp.asarray(image), config)
    yield equal("text to image: tokens", network_input.tokens, golden["t2i_tokens"])
    yield equal("text to image: positions", network_input.positions, golden["t2i_position_ids"])
    yield equal("text to image: mask", network_input.mask, golden["t2i_mask"])
    upweight = golden["t2i_attn_plus"].item()
    bias = inputs.text_key_bias(network_input.is_text, upweight)
    at_text = np.where(np.arange(bias.shape[-1]) < text.shape[1], np.float32(upweight), 0)
    yield equal("text to image: up-weighting", bias, at_text)

    recorded = golden["t2i_logits"]
    ours = jax.jit(partial(coglm.apply, config=config, ids=(0, recorded.shape[-1])))(
        params, network_input, bias=bias
    )
    yield close("text to image: logits", ours, recorded, "logits")


def _cached_decode(golden: Golden, params: Params, config: CogLMConfig) -> Iterator[Outcome]:
    text, image = configs.split_text(golden["decode_tokens"], config.vocabulary)
    slots = config.max_text
    padded = inputs.right_padded(text.tolist(), slots, config.vocabulary)
    words, is_text = (jnp.asarray(part) for part in padded)
    network_input = inputs.text_to_image(words, is_text, jnp.asarray(image), config)
    ours = _logits_by_cache(
        params, network_input, slots + 1, _upweight(golden, "t2i_attn_plus"), config
    )
    recorded = golden["decode_step_logits"]
    steps = recorded.shape[1]
    yield close(f"cached decode: logits before each of {steps} tokens", ours, recorded, "logits")


def _upweight(golden: Golden, name: str) -> float:
    return float(golden[name].item()) if name in golden else Sampling().text_upweight


def _logits_by_cache(
    params: Params,
    network_input: inputs.NetworkInput,
    start: int,
    upweight: float,
    config: CogLMConfig,
) -> jax.Array:
    """Logits [b, s − start, num_image] before each token from slot `start` on, the tokens given: a
    prefill of the slots before, then one cached step a token in `loops.decode`.
    """
    batch, length = network_input.tokens.shape
    ids = (0, config.vocabulary.num_image)
    bias = inputs.text_key_bias(network_input.is_text, upweight)

    @jax.jit
    def run(params: Params, network_input: inputs.NetworkInput, bias: jax.Array) -> jax.Array:
        def extend(
            cache: coglm.Cache, first: jax.Array, tokens: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, coglm.Cache]:
            count = tokens.shape[1]
            positions = jax.lax.dynamic_slice_in_dim(network_input.positions, first, count, 1)
            part = inputs.NetworkInput(tokens, positions, mask)
            hidden, cache = coglm.extend(params, cache, part, first, config=config, bias=bias)
            return coglm.logits(params, hidden[:, -1], config=config, ids=ids), cache

        def step(carry: Any, tokens: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            # `decode` returns only tokens, so the logits are carried along with the cache.
            cache, seen = carry
            visible = jax.lax.dynamic_slice_in_dim(network_input.mask, start + i, 1, axis=1)
            logits, cache = extend(cache, start + i, tokens[:, None], visible)
            return logits, (cache, seen.at[:, i + 1].set(logits))

        def given(logits: jax.Array, i: jax.Array) -> jax.Array:
            return network_input.tokens[:, start + i]

        before = network_input.mask[:, :start] & (jnp.arange(length) < start)
        logits, cache = extend(
            coglm.init_cache(config, batch, length),
            jnp.int32(0),
            network_input.tokens[:, :start],
            before,
        )
        seen = jnp.zeros((batch, length - start, logits.shape[-1])).at[:, 0].set(logits)
        steps = length - start
        _, (_, seen) = loops.decode(step, given, logits, (cache, seen), steps)
        return seen

    return run(params, network_input, bias)


def _captioning(golden: Golden, params: Params, config: CogLMConfig) -> Iterator[Outcome]:
    tokens, cells = jnp.asarray(golden["caption_tokens"]), config.num_image_tokens
    text = tokens[:, cells + 1 :]
    english = tokens[:, cells] == config.vocabulary.start_of_english
    words = jnp.ones(text.shape, bool)
    network_input, loss_mask = inputs.captioning(tokens[:, :cells], text, words, english, config)
    yield equal("captioning: tokens", network_input.tokens, tokens)
    yield equal("captioning: positions", network_input.positions, golden["caption_position_ids"])
    yield equal("captioning: mask", network_input.mask, golden["caption_mask"])
    yield equal("captioning: loss mask", loss_mask, golden["caption_loss_mask"])

    @jax.jit
    def score(params: Params) -> jax.Array:
        logits = coglm.apply(params, network_input, config=config)
        likelihoods = jax.nn.log_softmax(logits[:, :-1])
        of_next = jnp.take_along_axis(likelihoods, network_input.tokens[:, 1:, None], -1)[..., 0]
        return jnp.mean(of_next, axis=-1, where=loss_mask[:, 1:])

    yield close("captioning: scores", score(params), golden["caption_scores"], "likelihood")


def _infilling(golden: Golden, params: Params, config: CogLMConfig) -> Iterator[Outcome]:
    mask, text = golden["comp_mask20"], golden["comp_text"].reshape(-1).tolist()
    cells = golden["comp_image"].reshape(-1, config.num_image_tokens)[0]
    exact = inputs.infill(mask, text, cells, config, slots=len(text))
    yield equal("infilling: sequence", exact.tokens, golden["comp_seq"])
    yield equal("infilling: positions", exact.positions, golden["comp_position_ids"])
    yield equal("infilling: mask", exact.mask, golden["comp_attention_mask"])

    filled = golden["comp_filled_seq"]
    kept = exact.tokens >= 0
    kept_tokens = np.broadcast_to(exact.tokens[kept], filled[:, kept].shape)
    yield equal("infilling: kept tokens of the filled sequence", kept_tokens, filled[:, kept])
    yield equal("infilling: grid", filled[:, exact.slot_of_cell], golden["comp_result"])

    # Through the cache with the text in as many slots as a decoder has.
    slots = config.max_text
    made = inputs.infill(mask, text, cells, config, slots=slots)
    tokens = np.broadcast_to(made.tokens, (len(filled), len(made.tokens))).copy()
    tokens[:, slots + 1 :] = filled[:, len(text) + 1 :]
    network_input = inputs.NetworkInput(
        jnp.asarray(tokens),
        jnp.asarray(made.positions)[None],
        jnp.asarray(made.mask)[None],
        jnp.asarray(made.is_text)[None],
    )
    upweight = _upweight(golden, "comp_log_attention_weight")
    ours = _logits_by_cache(params, network_input, made.start, upweight, config)
    sampled = made.tokens[made.start :] < 0
    recorded = golden["comp_step_logits"]
    yield close("infilling: logits of each sampled step", ours[:, sampled], recorded, "logits")


# --- direct_sr.npz --------------------------------------------------------------------------------


def check_direct_sr(golden: Golden, bundle: Path | None = None) -> Iterator[Outcome]:
    """Layout, logits of the recorded queries and the most probable token of every query."""
    tensors = seeded_weights(golden)
    config = configs.direct_sr(golden, tensors)
    yield equal("config", _sizes(config.coglm.transformer), golden["config"][:3])
    params, checks = params_of("direct", names.direct_sr(tensors, config), bundle)
    yield from checks
    params = jax.device_put(params)

    coarse = golden["low_res_tokens"]
    texts = _texts(golden["text"], len(coarse), config.text_slots)
    padded = inputs.left_padded(texts, config.text_slots, config.coglm.vocabulary)
    text, is_text = (jnp.asarray(part) for part in padded)
    network_input = inputs.direct_super_resolution(text, is_text, jnp.asarray(coarse), config)
    yield equal("tokens", network_input.tokens, golden["tokens"])
    yield equal("positions", network_input.positions, golden["position_ids"])
    yield equal("mask", network_input.mask, golden["attention_mask"])

    logits = jax.jit(partial(direct_sr.apply, config=config))(params, network_input)
    rows, labels = golden["logit_rows"], jnp.asarray(golden["cluster_labels"])
    yield close("logits", logits[:, rows], golden["logits"], "logits")
    most_probable = jax.jit(sampling.greedy_clusters, static_argnums=2)
    tokens = most_probable(logits, labels, int(golden["config"][5]))
    yield equal("most probable tokens", tokens, golden["greedy_tokens"])


def _texts(recorded: np.ndarray, batch: int, slots: int) -> list[list[int]]:
    """A text for each row, from one for all or one for each, cut to the slots."""
    texts: list[list[int]] = np.atleast_2d(recorded)[:, :slots].tolist()
    return texts * batch if len(texts) == 1 else texts


# --- iterative_sr.npz -----------------------------------------------------------------------------


def check_iterative_sr(golden: Golden, bundle: Path | None = None) -> Iterator[Outcome]:
    """Layout and order, logits of two rounds, tokens after every round of `loops.lopar`."""
    tensors = seeded_weights(golden)
    config = configs.iterative_sr(golden, tensors)
    yield equal("config", _sizes(config.transformer), golden["config"][:3])
    params, checks = params_of("iterative", names.iterative_sr(tensors, config), bundle)
    yield from checks
    params = jax.device_put(params)

    start, after = golden["start_tokens"], golden["step_tokens"]
    mask_token = config.vocabulary.start_of_image
    texts = _texts(golden["text"], len(start), config.text_slots)
    padded = inputs.left_padded(texts, config.text_slots, config.vocabulary)
    text, is_text = (jnp.asarray(part) for part in padded)
    reset = inputs.lopar_schedule(config)

    def network_input(cells: jax.Array) -> inputs.NetworkInput:
        return inputs.iterative_super_resolution(text, is_text, cells, config)

    first = network_input(jnp.where(reset[0], mask_token, start))
    yield equal("tokens of the first round", first.tokens, golden["first_input_tokens"])
    yield equal("positions", first.positions, golden["position_ids"])
    yield equal("mask", first.mask, golden["attention_mask"])
    order = golden["lopar_order_6x6"]
    tiled = inputs.lopar_order(config)[: order.shape[0], : order.shape[1]]
    yield equal("order", tiled, order)

    @jax.jit
    def predict(params: Params, cells: jax.Array) -> jax.Array:
        return iterative_sr.apply(params, network_input(cells), config=config)

    rows = golden["logit_rows"]
    last = np.where(reset[-1], mask_token, after[-2] if len(after) > 1 else start)
    for name, cells in (
        ("first", first.tokens[:, config.text_slots :]),
        ("last", jnp.asarray(last)),
    ):
        ours = predict(params, cells)[:, rows]
        yield close(f"logits of the {name} round", ours, golden[f"{name}_logits"], "logits")

    # The most probable of the k kept is the most probable of all; k by round is data all the same.
    top_k = jnp.asarray(golden["topk_per_step"])
    max_k = min(int(top_k.max()), config.vocabulary.num_image)

    @jax.jit
    def refine(params: Params, cells: jax.Array, reset: jax.Array, begin: int) -> jax.Array:
        def most_probable(logits: jax.Array, round_: jax.Array) -> jax.Array:
            k = jnp.minimum(top_k[begin + round_], max_k)
            return sampling.greedy(sampling.top_k_logits(logits, k, max_k=max_k))

        return loops.lopar(partial(predict, params), most_probable, cells, reset, mask_token)

    cells = jnp.asarray(start, jnp.int32)
    for number, recorded in enumerate(after):
        part = slice(number, number + 1)
        made = refine(params, cells, reset[part], number)
        logits = predict(params, jnp.where(reset[number], mask_token, cells))
        made = _without_ties(np.asarray(made), recorded, np.asarray(logits))
        yield equal(f"tokens after round {number + 1}", made, recorded)
        cells = jnp.asarray(recorded, jnp.int32)  # each round from the recorded tokens
    cells = refine(params, jnp.asarray(start, jnp.int32), reset, 0)
    yield equal(f"tokens after {len(after)} rounds in one loop", cells, after[-1])


def _without_ties(made: np.ndarray, recorded: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """`made` [b, cells] with the recorded token where the logits [b, cells, v] of both are equal up
    to their tolerance: there the order of additions, which differs between processors, decides.
    """
    of_made, of_recorded = (
        np.take_along_axis(logits, ids[..., None].astype(int), axis=-1)[..., 0]
        for ids in (made, recorded)
    )
    ties = np.abs(of_made - of_recorded) <= TOLERANCES["logits"]
    return np.where(ties, recorded, made)


# --- hvqvae.npz -----------------------------------------------------------------------------------


def check_hvqvae(golden: Golden, bundle: Path | None = None) -> Iterator[Outcome]:
    """Features, and at every stride ids, commitment loss and pictures."""
    tensors = seeded_weights(golden)
    config = names.hvqvae_config(tensors)
    sizes = [config.channels, config.z_channels, config.codebook_size, config.codebook_dim]
    yield equal("config", sizes, golden["config"])
    # The published file also has these; the converter must ignore them.
    buffers = json.loads(str(golden["buffers"])) if "buffers" in golden else {}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in buffers.items()}
    params, checks = params_of("tokenizer", names.hvqvae(tensors, config), bundle)
    yield from checks
    params = jax.device_put(params)
    images = jnp.asarray(golden["images"].transpose(0, 2, 3, 1))
    recorded = {
        stride: jnp.asarray(golden[f"ids_rate{stride}"])
        for stride in config.strides
        if f"ids_rate{stride}" in golden
    }

    @jax.jit
    def run(params: Params, images: jax.Array, recorded: dict[int, jax.Array]) -> tuple[Any, Any]:
        """The finest features, and (ids, commitment loss, pictures of the recorded ids) by stride.

        All in one function: the strides' encoders are then compiled as one.
        """
        everywhere = jnp.ones(images.shape[:3])
        features = HVQVAE(config).apply({"params": params}, images, method="features")
        made = {}
        _, parts, _ = hvqvae_loss(params, images, everywhere, tuple(recorded), config=config)
        for stride, ids in recorded.items():
            made[stride] = (
                image_tokenizer.encode(params, images, stride, config=config),
                parts[f"commitment_{stride}"].value,
                image_tokenizer.decode(params, ids, stride, config=config),
            )
        return features[0], made

    features, made = run(params, images, recorded)
    of_recorded = golden["encoder_features"].transpose(0, 2, 3, 1)
    yield close("features", features, of_recorded, "features")
    for stride in config.strides:
        needs = tuple(f"{name}_rate{stride}" for name in ("ids", "commit_loss", "decoded"))
        yield from guarded(f"stride {stride}", golden, needs, _tokenizer_stride, stride, made)


def _tokenizer_stride(golden: Golden, stride: int, made: dict[int, Any]) -> Iterator[Outcome]:
    ids, commitment, pictures = made[stride]
    yield equal(f"stride {stride}: ids", ids, golden[f"ids_rate{stride}"])
    recorded_loss = golden[f"commit_loss_rate{stride}"]
    yield close(f"stride {stride}: commitment loss", commitment, recorded_loss, "likelihood")
    decoded = golden[f"decoded_rate{stride}"].transpose(0, 2, 3, 1)
    yield close(f"stride {stride}: pictures", pictures, decoded, "images")
