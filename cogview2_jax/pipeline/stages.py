"""The stages as pure, jitted functions of parameters, arrays and keys.

The configuration is static: one compilation serves every prompt up to the limit and every seed; a
new batch size compiles again. Image i of a batch is drawn from `keys[i]` alone, so it does not
depend on the rest of the batch (except for the last bits of float32, which may differ between batch
sizes). `keys` has a key for each image, [b]; older keys are uint32 [b, 2]. The base model's stages
take several keys for each row of their input, one after another: their images share its prefill.

Paper (arXiv 2204.14217) section 3; released `cogview2_text2image.py`, `cogview2_completion.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cogview2_jax import config as configs
from cogview2_jax.decoding import loops
from cogview2_jax.decoding.sampling import Among, greedy, guided, sample_clusters, sample_top_k
from cogview2_jax.keys import fold_in_all, key_batch
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.networks.transformer import tied_logits, word_rows
from cogview2_jax.sharding import Execution

Array = jax.Array
Params = dict

_ROWS_AT_ONCE = 120  # of logits of fine cells, over all pictures


class CaptionIds(NamedTuple):
    """Which text ids a caption may have: bool [num_text] each, or [b, num_text].

    `first` holds for the first slot, `words` from then on until the caption has a word, and `later`
    after that. With the pad and end pieces in `later` only, no caption is empty.
    """

    first: Any
    words: Any
    later: Any


# --- The base model -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters", "execution"))
def decode_image(
    params: Params,
    text: Array,
    is_text: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.CogLMConfig,
    sampling: configs.Sampling,
    num_clusters: int,
    execution: Execution = Execution(),
) -> Array:
    """Coarse image tokens of prompts.

    Args:
        text, is_text: int32, bool [b, max_text], from `inputs.right_padded`.
        keys: key array [b · n], n for the images of the first prompt, then of the next.
        cluster_labels: int32 [num_image], each below `num_clusters`.

    Returns:
        int32 [b · n, cells], raster order.
    """
    return image_tokens(
        params,
        text,
        is_text,
        _cluster_sampler(keys, cluster_labels, num_clusters, sampling.base),
        _copies(keys, text),
        config=config,
        text_upweight=sampling.text_upweight,
        guidance=sampling.guidance,
        execution=execution,
    )


def image_tokens(
    params: Params,
    text: Array,
    is_text: Array,
    draw: Callable[[Array, Array], Array],
    num_images: int = 1,
    *,
    config: configs.CogLMConfig,
    text_upweight: float | Array = 0.0,
    guidance: float = 1.0,
    execution: Execution = Execution(),
) -> Array:
    """Coarse image tokens of prompts by any sampler: int32 [b · num_images, cells], raster order.

    `draw` is (logits [b · num_images, num_image] of cell i, i) → int32 [b · num_images]. Of the
    images, those of the first prompt come first. `text` and `is_text` are as in `decode_image`,
    which is this with cluster sampling, jitted; here the caller owns jit. Any `guidance` (see
    `Sampling`) but 1 takes twice the rows.
    """
    unknown = jnp.full((text.shape[0], config.num_image_tokens), -1)
    given = inputs.text_to_image(text, is_text, unknown, config)
    if guidance != 1:
        given, draw = inputs.with_and_without_text(given), guided(draw, guidance)
    bias = inputs.text_key_bias(given.is_text, text_upweight)
    begin, ids, images = text.shape[1] + 1, _image_ids(config), text.shape[0] * num_images
    drawn = _fill(params, given, bias, begin, begin, num_images, draw, ids, config, execution)
    return drawn[:images]


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters", "execution"))
def decode_infilling(
    params: Params,
    given: inputs.NetworkInput,
    slot_of_cell: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.CogLMConfig,
    sampling: configs.Sampling,
    num_clusters: int,
    execution: Execution = Execution(),
) -> Array:
    """Coarse image tokens with the masked cells redrawn: one compilation for all masks.

    `given` [b, s] and `slot_of_cell` [b, cells] are those of `inputs.infill`, stacked; `keys` are
    [b · n], as in `decode_image`. Returns int32 [b · n, cells], raster order; kept cells are
    unchanged.
    """
    length, copies = given.tokens.shape[1], _copies(keys, given.tokens)
    first, ids = length - config.num_image_tokens, _image_ids(config)
    draw = _cluster_sampler(keys, cluster_labels, num_clusters, sampling.base)
    if sampling.guidance != 1:
        given, draw = inputs.with_and_without_text(given), guided(draw, sampling.guidance)
    bias = inputs.text_key_bias(given.is_text, sampling.text_upweight)
    # The whole sequence is the prefix: its context is bidirectional. The loop keeps known slots.
    filled = _fill(params, given, bias, first, length, copies, draw, ids, config, execution)
    slots = jnp.repeat(slot_of_cell, copies, axis=0) - first
    return jnp.take_along_axis(filled[: len(keys)], slots, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "top_k", "temperature", "execution"))
def decode_caption(
    params: Params,
    image: Array,
    english: Array,
    allowed: CaptionIds,
    keys: Array,
    *,
    config: configs.CogLMConfig,
    top_k: int = 1,
    temperature: float = 1.0,
    execution: Execution = Execution(),
) -> Array:
    """Text ids of captions, int32 [b, max_text].

    `top_k` 1 or `temperature` 0 take the most probable token each time. The caption ends before its
    first pad or end piece.

    Args:
        image: int32 [b, cells].
        english: bool [b]; the others are Chinese.
        allowed: which ids each caption may have.
        keys: key array [b], one for each caption.
    """
    batch, vocabulary = image.shape[0], config.vocabulary
    keys = key_batch(keys)
    unknown = jnp.full((batch, config.max_text), -1)
    given, _ = inputs.captioning(image, unknown, jnp.ones(unknown.shape, bool), english, config)
    ids = (vocabulary.num_image, vocabulary.num_image + vocabulary.num_text)
    first, words, later = (
        jnp.broadcast_to(jnp.asarray(part), (batch, vocabulary.num_text)) for part in allowed
    )

    def draw(logits: Array, i: Array) -> Array:
        if top_k == 1:
            return greedy(logits)
        one = functools.partial(sample_top_k, k=top_k, temperature=temperature)
        return jax.vmap(one)(fold_in_all(keys, i), logits)

    def restrict(logits: Array, said: Array, token: Array) -> tuple[Array, Array]:
        here = jnp.take_along_axis(words, token[:, None] - vocabulary.num_image, axis=1)
        said = said | here[:, 0]
        return jnp.where(jnp.where(said[:, None], later, words), logits, -jnp.inf), said

    bias = jnp.zeros((1, given.tokens.shape[1]))
    begin = config.num_image_tokens + 1
    limits = first, restrict
    return _fill(params, given, bias, begin, begin, 1, draw, ids, config, execution, limits)


@functools.partial(jax.jit, static_argnames=("config", "execution"))
def caption_score(
    params: Params,
    image: Array,
    text: Array,
    is_text: Array,
    english: Array,
    *,
    config: configs.CogLMConfig,
    execution: Execution = Execution(),
) -> Array:
    """Mean log-likelihood of the text after its start token, given the image: float32 [b].

    `image` int32 [b, cells]; `text`, `is_text` [b, max_text] from `inputs.right_padded`;
    `english` bool [b]. Higher is better. Over the whole vocabulary and without up-weighting, as
    published.
    """
    given, _ = inputs.captioning(image, text, is_text, english, config)
    hidden = coglm.hidden_states(params, given, config=config, execution=execution)
    # The slot before each text slot predicts it.
    before = hidden[:, config.num_image_tokens : -1]
    log_probability = jax.nn.log_softmax(
        coglm.logits(params, before, config=config, execution=execution)
    )
    of_text = jnp.take_along_axis(log_probability, text[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(is_text, of_text, 0), axis=-1) / jnp.sum(is_text, axis=-1)


def _fill(
    params: Params,
    given: inputs.NetworkInput,
    bias: Array,
    first: int,
    prefix: int,
    copies: int,
    draw: Callable[[Array, Array], Array],
    ids: tuple[int, int],
    config: configs.CogLMConfig,
    execution: Execution,
    restriction: tuple[Array, Callable[[Array, Array, Array], tuple[Array, Array]]] | None = None,
) -> Array:
    """The slots from `first` on, int32 [b · copies, s − first]; those that hold −1 are drawn in
    order.

    Slots before `prefix` (at least `first`) run at once under the mask of `given`, then the slots
    from `first` on run one at a time over the cache, `copies` of each row, which draw apart. `draw`
    is (logits [b · copies, v] of `ids`, i) → [b · copies], counted from 0.

    A `restriction` says which ids may be drawn: those in the first slot, bool [b, v], and for every
    later one (logits [b, v], state [b], the token before [b]) → (logits, state); the state begins
    as False.
    """
    params = coglm.unstacked(params)
    tokens = jnp.maximum(given.tokens, 0)  # the placeholder of an unknown token is never visible
    batch, length = tokens.shape
    cache = coglm.init_cache(config, batch, length, execution)
    hidden, cache = coglm.extend(
        params,
        cache,
        inputs.NetworkInput(
            tokens[:, :prefix], given.positions[..., :prefix], given.mask[:, :prefix]
        ),
        0,
        config=config,
        bias=bias,
        execution=execution,
    )
    rows = word_rows(params, ids)
    logits = functools.partial(coglm.next_logits, rows=rows, execution=execution)
    start = logits(hidden[:, first - 1])
    given, bias, cache, start = jax.tree.map(
        lambda array: jnp.repeat(array, copies, axis=0) if len(array) == batch else array,
        (given, bias, cache, start),
    )
    batch *= copies

    def step(
        carry: tuple[coglm.Cache, Array], tokens: Array, i: Array
    ) -> tuple[Array, tuple[coglm.Cache, Array]]:
        cache, state = carry
        slot = first + i
        hidden, cache = coglm.extend(
            params,
            cache,
            inputs.NetworkInput(
                tokens[:, None],
                jax.lax.dynamic_slice_in_dim(given.positions, slot, 1, axis=-1),
                jax.lax.dynamic_slice_in_dim(given.mask, slot, 1, axis=1),
            ),
            slot,
            config=config,
            bias=bias,
            execution=execution,
        )
        found = logits(hidden[:, 0])
        if restriction is not None:
            found, state = restriction[1](found, state, tokens)
        return found, (cache, state)

    def sample(logits: Array, i: Array) -> Array:
        drawn = draw(logits, i) + ids[0]
        here = jax.lax.dynamic_index_in_dim(given.tokens, first + i, axis=1, keepdims=False)
        return jnp.where(here < 0, drawn, here)

    if restriction is not None:
        start = jnp.where(restriction[0], start, -jnp.inf)
    carry = cache, jnp.zeros(batch, bool)
    return loops.decode(step, sample, start, carry, length - first)[0]


def _copies(keys: Array, rows: Array) -> int:
    """How many images each row of the input gets."""
    number, rest = divmod(len(keys), len(rows))
    if rest or not number:
        raise ValueError(f"keys must be as many for each of {len(rows)} rows: got {len(keys)}")
    return number


def _cluster_sampler(
    keys: Array, labels: Array, num_clusters: int, settings: configs.ClusterSampling
) -> Callable[[Array, Array], Array]:
    keys = key_batch(keys)

    def one(key: Array, logits: Array) -> Array:
        return sample_clusters(key, logits, labels, num_clusters, settings)

    return lambda logits, i: jax.vmap(one)(fold_in_all(keys, i), logits)


def _image_ids(config: configs.CogLMConfig) -> tuple[int, int]:
    return 0, config.vocabulary.num_image


# --- Super-resolution -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters", "execution"))
def super_resolve_direct(
    params: Params,
    text: Array,
    is_text: Array,
    coarse: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.DirectSRConfig,
    sampling: configs.Sampling,
    num_clusters: int,
    execution: Execution = Execution(),
) -> Array:
    """All fine tokens from the coarse ones in one pass: [b, coarse cells] → int32 [b, fine cells].

    `text`, `is_text` [b, text_slots] from `inputs.left_padded`; the rest as `decode_image`.
    """
    given = inputs.direct_super_resolution(text, is_text, coarse, config)
    hidden = direct_sr.hidden_states(params, given, config=config, execution=execution)
    # As in decoding, the first draw of these keys.
    keys = fold_in_all(key_batch(keys), jnp.zeros((), jnp.int32))

    def draw(key: Array, logits: Array, among: Among) -> Array:
        labels, how = cluster_labels, sampling.direct
        return sample_clusters(key, logits, labels, num_clusters, how, among=among)

    cells = jnp.arange(hidden.shape[1])
    rows = word_rows(params, _image_ids(config.coglm))
    return _draw_cells(draw, keys, hidden, rows, cells, hidden.shape[1], execution)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"))
def super_resolve_iterative(
    params: Params,
    text: Array,
    is_text: Array,
    fine: Array,
    may_change: Array,
    keys: Array,
    rounds: tuple[Array | int, Array | int] | None = None,
    *,
    config: configs.IterativeSRConfig,
    sampling: configs.Sampling,
    execution: Execution = Execution(),
) -> Array:
    """Fine tokens refined in rounds of local parallel auto-regression: int32 [b, fine cells].

    `text`, `is_text` [b, text_slots] from `inputs.left_padded`; `fine` int32 [b, fine cells];
    `may_change` bool [b, fine cells], the cells that a round may reset: all of them, except in
    infilling. `rounds` are the first one to run and the one before which to stop; one compilation
    serves any, and another one None, which is all of them.
    """
    keys = key_batch(keys)
    if len(sampling.iterative_top_k) != config.rounds:
        raise ValueError(
            f"iterative_top_k must be one for each of {config.rounds} rounds:"
            f" got {sampling.iterative_top_k}"
        )
    reset = jnp.asarray(inputs.lopar_schedule(config))[:, None] & may_change
    # More than there are is all of them, and may be more than an int32 holds.
    top_ks = [min(top_k, config.vocabulary.num_image) for top_k in sampling.iterative_top_k]

    rows = word_rows(params, (0, config.vocabulary.num_image))
    wanted = reset.any(axis=1)  # by some picture: the others are not drawn
    # The cells of each round, in raster order, before the others.
    cells, number = jnp.argsort(~wanted, axis=1, stable=True), wanted.sum(axis=1)

    def predict(tokens: Array) -> Array:
        given = inputs.iterative_super_resolution(text, is_text, tokens, config)
        return iterative_sr.hidden_states(params, given, config=config, execution=execution)

    def draw(round_: Array, key: Array, logits: Array, among: Among) -> Array:
        return sample_top_k(
            key,
            logits,
            jnp.asarray(top_ks)[round_],
            sampling.iterative_temperature,
            max_k=max(top_ks),
            among=among,
        )

    def sample(hidden: Array, round_: Array) -> Array:
        one = functools.partial(draw, round_)
        drawn = fold_in_all(keys, round_)
        return _draw_cells(one, drawn, hidden, rows, cells[round_], number[round_], execution)

    mask_token = config.vocabulary.start_of_image
    return loops.lopar(predict, sample, fine, reset, mask_token, rounds)


def _draw_cells(
    draw: Callable[[Array, Array, Among], Array],
    keys: Array,
    hidden: Array,
    rows: Array,
    cells: Array,
    number: Array | int,
    execution: Execution,
) -> Array:
    """Tokens of the first `number` of `cells` [c], drawn from hidden states [b, c, e] and `rows`
    [v, e] of the word table: int32 [b, c], zeros in the other cells.

    Logits are made and drawn from a few rows at a time: they stay in a CPU's cache, and take little
    memory. `draw` is (key, logits [n, v], which cells) → [n], for each picture with its own key.
    """
    batch, total = hidden.shape[:2]
    size = min(total, -(-_ROWS_AT_ONCE // batch))
    blocks = -(-total // size)
    # Past the end: read as the last cell, and not written.
    cells = jnp.pad(cells, (0, blocks * size - total), constant_values=total)

    def body(block: Array, tokens: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(cells, block * size, size)
        among = Among(jnp.minimum(here, total - 1), total)
        logits = tied_logits(hidden[:, among.numbers], rows, execution.sharding)
        drawn = jax.vmap(lambda key, logits: draw(key, logits, among))(keys, logits)
        return tokens.at[:, here].set(drawn, mode="drop")

    tokens = jnp.zeros((batch, total), jnp.int32)
    return jax.lax.fori_loop(0, -(-number // size), body, tokens)
