"""Logits → token: two-step cluster sampling, top-k, their greedy forms (section 3.3 and appendix of
the paper), and nucleus sampling, which the paper compares with.

Every function works over the last axis, for any leading dimensions, in float32. Row `i` of the
flattened leading dimensions has its own random key, which depends only on `key` and `i`. So the
first rows of a larger batch equal a smaller batch, and drawing in blocks changes no draw.

Settings that are Python or NumPy numbers are checked: a count must be a whole number from 1 on, a
temperature finite and at least 0, where 0 means greedy. Anything else raises ValueError. Traced
settings are taken as they are.

Published: `coglm_strategy.py` (base stage), `sr_pipeline/dsr_sampling.py` (direct SR),
`sr_pipeline/itersr_sampling.py` (iterative SR). Recorded numbers: `tests/golden/sampling.npz`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cogview2_jax.checks import check_count, check_temperature
from cogview2_jax.config import ClusterSampling
from cogview2_jax.keys import one_key


class Among(NamedTuple):
    """Rows of logits that are a part of a larger batch, and are drawn as they would be there."""

    numbers: jax.Array  # int32 [rows], of each in the flattened leading dimensions of the batch
    total: int  # rows of the batch


def cluster_sums(values: jax.Array, labels: jax.Array, num_clusters: int) -> jax.Array:
    """Sum `values` [..., v] over the members of each cluster: [..., num_clusters] float32.
    `labels` is int [v].

    An empty cluster sums to zero. Raises ValueError when `labels` is not one label for each value.
    """
    if labels.shape != values.shape[-1:]:
        raise ValueError(
            f"labels must be one per token: got {labels.shape} for logits of {values.shape[-1]}"
        )
    num_clusters = check_count("num_clusters", num_clusters)
    if num_clusters > labels.size:
        raise ValueError(f"num_clusters must be at most {labels.size} tokens: got {num_clusters}")
    return jax.lax.platform_dependent(
        values.astype(jnp.float32),
        cpu=lambda values: _summed_in_order(values, labels, num_clusters),
        default=lambda values: _summed_by_product(values, labels, num_clusters),
    )


def _summed_in_order(values: jax.Array, labels: jax.Array, num_clusters: int) -> jax.Array:
    """By a scatter, which on a CPU adds in the order of the tokens: one pass over the values."""
    sums = jax.ops.segment_sum(jnp.moveaxis(values, -1, 0), labels, num_clusters)
    return jnp.moveaxis(sums, 0, -1)


def _summed_by_product(values: jax.Array, labels: jax.Array, num_clusters: int) -> jax.Array:
    """By a product with a one-hot matrix: on a GPU the order of a scatter's additions changes from
    run to run, and with it, at near ties, the greedy cluster.
    """
    # The matrix has 40 MB for 20,000 × 500 float32, once for all rows. HIGHEST: TF32 would keep 10
    # bits of each addend.
    members = jax.nn.one_hot(labels, num_clusters, dtype=jnp.float32)
    return jnp.matmul(values, members, precision=jax.lax.Precision.HIGHEST)


def cluster_probabilities(
    logits: jax.Array, labels: jax.Array, num_clusters: int, sampling: ClusterSampling
) -> jax.Array:
    """The distribution that `sample_clusters` draws from: float32 [..., v], each row sums to 1.

    `logits` [..., v], `labels` int [v] in [0, num_clusters). With p = softmax(logits / T), the
    probability of a cluster is the sum of p over its members. The `top_clusters` most probable
    clusters are kept (all if there are fewer; of equal ones those with lower labels) and
    renormalised. Inside a cluster, the probabilities are softmax(logits / T / T₂) of its members.
    A temperature of 0 is the limit: T = 0 leaves the most probable token, T₂ = 0 the most probable
    token of each cluster (of equal ones, the lowest id).
    """
    if _is_zero(sampling.temperature):
        return _one_hot(greedy(logits), logits)
    _require_logits(logits)
    scaled = logits.astype(jnp.float32) / float(sampling.temperature)
    sums = cluster_sums(jax.nn.softmax(scaled), labels, num_clusters)
    kept, kept_labels = jax.lax.top_k(sums, min(sampling.top_clusters, num_clusters))
    kept = kept / kept.sum(-1, keepdims=True)
    of_cluster = jnp.put_along_axis(jnp.zeros_like(sums), kept_labels, kept, -1, inplace=False)

    if _is_zero(sampling.temperature * sampling.within_temperature):
        of_token = jnp.take(of_cluster, labels, axis=-1)
        return jnp.where(_first_of_cluster(scaled, labels, num_clusters), of_token, 0)
    within = scaled / float(sampling.within_temperature)
    # Subtract each cluster's own maximum: with the maximum of the row, all weights of an improbable
    # cluster could underflow to 0, and their normalised form would be 0 / 0.
    largest = jax.ops.segment_max(jnp.moveaxis(within, -1, 0), labels, num_clusters)
    weights = jnp.exp(within - jnp.moveaxis(largest[labels], 0, -1))
    total = cluster_sums(weights, labels, num_clusters)
    return jnp.take(of_cluster / jnp.where(total > 0, total, 1), labels, axis=-1) * weights


def sample_clusters(
    key: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    num_clusters: int,
    sampling: ClusterSampling,
    *,
    block: int | None = None,
    among: Among | None = None,
) -> jax.Array:
    """Draw a cluster, then a token inside it (see `cluster_probabilities`): int32 [...] from
    `logits` [..., v].

    `block` bounds how many rows are drawn at once (default: all). It bounds the memory and changes
    no draw: in addition to their logits, 3,600 rows of 20,000 take 1.2 GB at once and 0.14 GB in
    blocks of 300. `among` says which rows of a larger batch these are.
    """
    top = min(sampling.top_clusters, check_count("num_clusters", num_clusters))
    _require_logits(logits)
    if _is_zero(sampling.temperature):
        one_key(key)  # refused as at any other temperature
        return greedy(logits)

    def draw(key: jax.Array, row: jax.Array) -> jax.Array:
        cluster_key, token_key = jax.random.split(key)
        scaled = row.astype(jnp.float32) / float(sampling.temperature)
        sums, kept_labels = jax.lax.top_k(
            cluster_sums(jax.nn.softmax(scaled), labels, num_clusters), top
        )
        chosen = kept_labels[jax.random.categorical(cluster_key, jnp.log(sums))]
        if _is_zero(sampling.temperature * sampling.within_temperature):
            return jnp.argmax(jnp.where(labels == chosen, scaled, -jnp.inf))
        within = jnp.where(labels == chosen, scaled / float(sampling.within_temperature), -jnp.inf)
        return _draw_one(token_key, within)

    return _draw_rows(draw, key, logits, block, among)


def greedy_clusters(
    logits: jax.Array, labels: jax.Array, num_clusters: int, temperature: float = 1.0
) -> jax.Array:
    """The most probable member of the most probable cluster: int32 [...]. Of equal ones, the
    lowest id.

    It is the limit of `sample_clusters` with one kept cluster and T₂ → 0. `temperature` affects
    which cluster is the most probable; 0 takes the most probable token of all.
    """
    if _is_greedy(temperature):
        return greedy(logits)
    _require_logits(logits)
    scaled = logits.astype(jnp.float32) / _divisor(temperature)
    best = jnp.argmax(cluster_sums(jax.nn.softmax(scaled), labels, num_clusters), -1)
    return greedy(jnp.where(labels == best[..., None], scaled, -jnp.inf))


def greedy(logits: jax.Array) -> jax.Array:
    """The most probable token, int32 [...] from [..., v]. Of equal ones, the lowest id."""
    return jnp.argmax(logits, -1).astype(jnp.int32)


def top_k_probabilities(
    logits: jax.Array, k: int | jax.Array, temperature: float = 1.0, *, max_k: int | None = None
) -> jax.Array:
    """softmax(logits / temperature) over the `k` most probable tokens: [..., v] float32. See
    `top_k_logits`. Temperature 0 leaves the most probable token.
    """
    kept = top_k_logits(logits, k, max_k=max_k)
    if _is_greedy(temperature):
        return _one_hot(greedy(logits), logits)
    return jax.nn.softmax(kept / _divisor(temperature))


def top_k_logits(logits: jax.Array, k: int | jax.Array, *, max_k: int | None = None) -> jax.Array:
    """`logits` [..., v] as float32, with −inf below the k-th largest of each row.

    All tokens equal to the k-th largest are kept, as published, so more than `k` may remain. `k`
    may be a traced scalar (LoPAR changes it by round); then a static bound `max_k` avoids a full
    sort. A `k` above the vocabulary keeps everything. Raises ValueError for `k` or `max_k` below 1
    and for a static `k` above `max_k`.
    """
    _require_logits(logits)
    size = logits.shape[-1]
    if max_k is not None:
        max_k = check_count("max_k", max_k)
    if not _is_traced(k):
        k = check_count("k", _number(k))
        if max_k is not None and k > max_k:
            raise ValueError(f"k must not be above max_k: got {k} and {max_k}")
        max_k = k = min(k, size)
    logits = logits.astype(jnp.float32)
    largest, _ = jax.lax.top_k(logits, min(size, max_k or size))
    # The index is clamped into the array, so a traced k above the vocabulary means all of it.
    limit = jax.lax.dynamic_index_in_dim(largest, jnp.asarray(k, jnp.int32) - 1, axis=-1)
    return jnp.where(logits < limit, -jnp.inf, logits)


def sample_top_k(
    key: jax.Array,
    logits: jax.Array,
    k: int | jax.Array,
    temperature: float | jax.Array = 1.0,
    *,
    max_k: int | None = None,
    block: int | None = None,
    among: Among | None = None,
) -> jax.Array:
    """Draw one of the `k` most probable tokens (see `top_k_logits`): int32 [...] from `logits`
    [..., v].

    `block` bounds how many rows are drawn at once (default: all). It bounds the memory and changes
    no draw. `among` says which rows of a larger batch these are. Temperature 0 takes the most
    probable token.
    """
    if _is_greedy(temperature):
        one_key(key)  # refused as at any other temperature
        top_k_logits(logits, k, max_k=max_k)
        return greedy(logits)

    _require_logits(logits)

    def draw(key: jax.Array, row: jax.Array) -> jax.Array:
        return _draw_one(key, top_k_logits(row, k, max_k=max_k) / _divisor(temperature))

    return _draw_rows(draw, key, logits, block, among)


def top_p_probabilities(logits: jax.Array, p: float, temperature: float = 1.0) -> jax.Array:
    """softmax(logits / temperature) over the nucleus, the fewest most probable tokens with a sum of
    at least `p` (Holtzman et al., arXiv 1904.09751): [..., v] float32, each row sums to 1.

    Of equal tokens at its edge, those with lower ids are in it. Temperature 0 leaves the most
    probable token. Raises ValueError for `p` outside 0 < p ≤ 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be above 0 and at most 1: got {p}")
    _require_logits(logits)
    if _is_greedy(temperature):
        return _one_hot(greedy(logits), logits)
    whole = jax.nn.softmax(logits.astype(jnp.float32) / _divisor(temperature))
    order = jnp.argsort(-whole, axis=-1, stable=True)
    sorted_ = jnp.take_along_axis(whole, order, axis=-1)
    # A token is in if those before it do not reach p yet: the first one always is.
    inside = jnp.cumsum(sorted_, axis=-1) - sorted_ < p
    kept = jnp.put_along_axis(jnp.zeros_like(whole), order, sorted_ * inside, -1, inplace=False)
    return kept / kept.sum(-1, keepdims=True)


def sample_top_p(
    key: jax.Array,
    logits: jax.Array,
    p: float,
    temperature: float = 1.0,
    *,
    block: int | None = None,
    among: Among | None = None,
) -> jax.Array:
    """Draw from the nucleus (see `top_p_probabilities`): int32 [...] from `logits` [..., v]. It
    sorts every row. `block` and `among` are as in `sample_top_k`.
    """
    if _is_greedy(temperature):
        one_key(key)  # refused as at any other temperature
        top_p_probabilities(logits, p, temperature)
        return greedy(logits)

    def draw(key: jax.Array, row: jax.Array) -> jax.Array:
        return _draw_one(key, jnp.log(top_p_probabilities(row, p, temperature)))

    return _draw_rows(draw, key, logits, block, among)


def guided(
    draw: Callable[[jax.Array, jax.Array], jax.Array], guidance: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`draw` (logits [b, v], i) → [b] for classifier-free guidance (Ho and Salimans, arXiv
    2207.12598): logits [2b, v], the first half with the condition and the second without, → [2b],
    where both rows of a pair get one draw.
    """

    def drawn(logits: jax.Array, i: jax.Array) -> jax.Array:
        seen, unseen = jnp.split(logits, 2)
        ids = draw(unseen + guidance * (seen - unseen), i)
        return jnp.concatenate([ids, ids])

    return drawn


def _draw_one(key: jax.Array, logits: jax.Array) -> jax.Array:
    """A draw from softmax(logits [v]): a scalar.

    By the running sum of the weights and one random number. Noise for each of 20,000 logits, as in
    `jax.random.categorical`, would cost ten passes over them.
    """
    size = logits.shape[-1]
    side = math.isqrt(size - 1) + 1
    weights = jnp.exp(logits - jnp.maximum(logits.max(), jnp.finfo(logits.dtype).min))
    # Two short running sums, of rows and then inside one, in place of a long one.
    rows = jnp.pad(weights, (0, side * side - size)).reshape(side, side)
    sums = rows.sum(-1)
    point = jax.random.uniform(key) * sums.sum()
    row, before = _reached(sums, point)
    column, _ = _reached(rows[row], point - before)
    return row * side + column


def _reached(weights: jax.Array, point: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of `weights` [n] with which their running sum is above `point`, and the sum before
    it. It is never a weight of 0, also where sums are rounded.
    """
    ends = jnp.cumsum(weights)
    above = (ends > point) & (weights > 0)
    last = weights.size - 1 - jnp.argmax(weights[::-1] > 0)
    index = jnp.where(above.any(), jnp.argmax(above), last)
    return index, ends[index] - weights[index]


def _require_logits(logits: jax.Array) -> None:
    """Raises ValueError unless `logits` are real numbers [..., v], v at least 1."""
    real = jnp.floating, jnp.integer
    if not any(jnp.issubdtype(logits.dtype, kind) for kind in real):
        raise ValueError(f"logits must be real numbers: got {logits.dtype}")
    if not logits.shape or not logits.shape[-1]:
        raise ValueError(f"logits must be [..., v], v at least 1: got {list(logits.shape)}")


def _draw_rows(
    draw: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    logits: jax.Array,
    block: int | None,
    among: Among | None,
) -> jax.Array:
    rows = logits.reshape(-1, logits.shape[-1])
    if among is None:
        keys = jax.random.split(one_key(key), rows.shape[0])
    else:
        keys = jax.random.split(one_key(key), among.total)[among.numbers]
    block = block if block is None else check_count("block", block)
    if block is None or block >= rows.shape[0]:
        drawn = jax.vmap(draw)(keys, rows)
    else:
        drawn = jax.lax.map(lambda pair: draw(*pair), (keys, rows), batch_size=block)
    return drawn.astype(jnp.int32).reshape(logits.shape[:-1])


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _number(value: Any) -> Any:
    """A setting that is not traced, as a Python or NumPy number."""
    return value.item() if isinstance(value, jax.Array) and not value.shape else value


def _is_zero(temperature: float) -> bool:
    # float32 logits divided by less would overflow, and inf − inf is no probability.
    return temperature < 1e-30


def _divisor(temperature: Any) -> Any:
    """A whole number as a float, since jax takes none of 32 bits or more."""
    return temperature if _is_traced(temperature) else float(_number(temperature))


def _is_greedy(temperature: Any) -> bool:
    if _is_traced(temperature):
        return False
    return _is_zero(check_temperature("temperature", _number(temperature)))


def _one_hot(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.nn.one_hot(tokens, logits.shape[-1], dtype=jnp.float32)


def _first_of_cluster(values: jax.Array, labels: jax.Array, num_clusters: int) -> jax.Array:
    """The largest of `values` [..., v] in each cluster, of equal ones the first: bool [..., v]."""
    last = jnp.moveaxis(values, -1, 0)  # segments are along the first axis
    ids = jnp.arange(len(last)).reshape(-1, *[1] * (last.ndim - 1))
    largest = jax.ops.segment_max(last, labels, num_clusters)[labels]
    first = jax.ops.segment_min(jnp.where(last == largest, ids, len(last)), labels, num_clusters)
    return jnp.moveaxis(ids == first[labels], 0, -1)
