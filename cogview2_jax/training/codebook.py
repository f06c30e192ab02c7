"""Training of the codebook: placing it by k-means++, moving averages, reviving dead codes.

Published: EMA with decay 0.99 and eps 1e-5 (VQ-VAE-2's update), commitment cost 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import HVQVAEConfig
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.tokenizer.image import nearest_code
from cogview2_jax.training.losses import Assigned
from cogview2_jax.training.metrics import Watched
from cogview2_jax.training.step import TrainState

Array = jax.Array
Params = Any


# Idle time is counted in uses of a code of average use. After this time without use a code is out
# of use, and after twice this time it is dead and is moved. A code with a tenth of the average use
# is moved by chance once in 60 such spans.
_HORIZON = 20.0
# At least this many steps pass before a code is out of use.
_FEWEST_STEPS = 10


class CodebookStatistics(NamedTuple):
    """Moving averages of each code's uses and of the sum of the vectors assigned to it; and how
    long each code has been idle, in uses of a code of average use.
    """

    cluster_size: Array  # float32 [v]
    embed_avg: Array  # float32 [v, d]
    idle: Array  # float32 [v]


def init_statistics(codebook: Array) -> CodebookStatistics:
    """Statistics of a codebook with no code in use yet."""
    size = codebook.shape[0]
    # A copy: a donated state must not hold one buffer twice.
    return CodebookStatistics(jnp.ones(size), jnp.array(codebook), jnp.full(size, _HORIZON))


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
    average_use = min(len(vectors) / size, _HORIZON / _FEWEST_STEPS)
    idle = jnp.where(counts > 0, 0.0, statistics.idle + average_use)
    return embed_avg / smoothed[:, None], CodebookStatistics(cluster_size, embed_avg, idle)


def revive_dead_codes(
    key: Array, codebook: Array, statistics: CodebookStatistics, vectors: Array
) -> tuple[Array, CodebookStatistics]:
    """Move dead codes onto vectors of the batch, no two onto the same.

    Vectors far from their nearest code are more likely to be taken, as the codebook represents them
    worst. A moved code counts as used a tenth of the average, so its first vectors move it.
    """
    errors = jnp.sum((vectors - codebook[nearest_code(vectors, codebook)]) ** 2, axis=-1)
    dead = statistics.idle >= 2 * _HORIZON
    # A draw without replacement, in proportion to the errors (Gumbel top-k).
    order = jnp.argsort(-(jnp.log(errors + 1e-12) + jax.random.gumbel(key, errors.shape)))
    rank = jnp.cumsum(dead) - 1  # of a dead code among the dead
    moved = dead & (rank < len(vectors))
    fresh = vectors[order[jnp.clip(rank, 0, len(vectors) - 1)]]
    weight = 0.1 * len(vectors) / len(codebook)
    return jnp.where(moved[:, None], fresh, codebook), CodebookStatistics(
        jnp.where(moved, weight, statistics.cluster_size),
        jnp.where(moved[:, None], weight * fresh, statistics.embed_avg),
        jnp.where(moved, _HORIZON, statistics.idle),
    )


def codebook_revision(
    *, decay: float = 0.99, begin: int = 0, revive_every: int = 0
) -> Callable[[Params, Any, Any, Array, Array], tuple[Params, CodebookStatistics]]:
    """`revise` of `make_step`: updates the codebook after each gradient step, from step `begin`.

    Codes follow their moving averages. Every `revive_every` steps (0: never), until the end, dead
    codes are moved onto vectors: no vector was assigned to them, so no picture becomes worse.
    `aux` is the `Assigned` of `hvqvae_loss`.
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
            due = step % revive_every == 0
            moved = jax.lax.cond(due, revived, lambda *same: same, *moved)
        codebook, statistics = jax.tree.map(
            lambda new, old: jnp.where(started, new, old), moved, (params["codebook"], statistics)
        )
        return params | {"codebook": codebook}, statistics

    return revise


def usage(statistics: CodebookStatistics) -> dict[str, float]:
    """ "codes_used", the share of codes that are in use, and "perplexity", exp of the entropy of
    their use: n if n codes are used equally often. {} before any code was used.
    """
    idle, cluster_size = map(np.asarray, (statistics.idle, statistics.cluster_size))
    used = idle < _HORIZON
    if not used.any():
        return {}
    shares = cluster_size[used] / cluster_size[used].sum()
    shares = shares[shares > 0]
    perplexity = np.exp(-(shares * np.log(shares)).sum())
    return {"codes_used": float(used.mean()), "perplexity": float(perplexity)}


def watch_usage(low: float = 0.2, logs: int = 5) -> Callable[[TrainState, bool], Watched]:
    """`watch` of `fit`: `usage`, and a warning if fewer than the share `low` of the codes are in
    use at the end, or (once) at `logs` logs in a row.
    """
    in_a_row = 0

    def watch(state: TrainState, last: bool) -> Watched:
        nonlocal in_a_row
        figures = usage(state.extra)
        if not figures:
            return Watched({})
        used, size = figures["codes_used"], len(state.extra.cluster_size)
        in_a_row = in_a_row + 1 if used < low else 0
        if not (in_a_row == logs or (in_a_row and last)):
            return Watched(figures)
        warning = (
            f"only {used:.0%} of the {size:,} codes are in use: try a lower learning rate, larger"
            " batches or crops, or a smaller codebook"
        )
        return Watched(figures, warning)

    return watch


def kmeans_plus_plus(rng: np.random.Generator, vectors: np.ndarray, num_codes: int) -> np.ndarray:
    """Initial codes, each drawn with a probability proportional to the squared distance from those
    before: [n, d] → [k, d].
    """
    codes = [vectors[rng.integers(len(vectors))]]
    nearest = np.full(len(vectors), np.inf)
    for _ in range(num_codes - 1):
        nearest = np.minimum(nearest, ((vectors - codes[-1]) ** 2).sum(axis=-1))
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(vectors), 1 / len(vectors))
        codes.append(vectors[rng.choice(len(vectors), p=share)])
    return np.stack(codes)


def place_codebook(
    state: TrainState,
    crops: Any,
    strides: Sequence[int],
    config: HVQVAEConfig,
    seed: int,
    per_code: int = 20,
) -> TrainState:
    """The state with its codes on vectors of fresh crops at `strides`: by k-means++ up to 4,096
    codes, for which it is quick, else at random.
    """

    @jax.jit
    def vectors_of(params: Params, pixels: Array) -> tuple[Array, ...]:
        images = pixels.astype(jnp.float32) / 255
        made = HVQVAE(config).apply({"params": params}, images, method="vectors")
        levels = [made[config.strides.index(stride)] for stride in strides]
        return tuple(level.reshape(-1, config.codebook_dim) for level in levels)

    found: list[np.ndarray] = []
    for number in range(64):
        found += map(np.asarray, vectors_of(state.params, crops[number]))
        if sum(map(len, found)) >= per_code * config.codebook_size:
            break
    vectors = np.concatenate(found)
    rng = np.random.default_rng(seed)
    if config.codebook_size <= 4096:
        chosen = kmeans_plus_plus(rng, vectors, config.codebook_size)
    else:
        many = len(vectors) < config.codebook_size
        chosen = vectors[rng.choice(len(vectors), config.codebook_size, replace=many)]

    def in_place_of(old: Array, new: Array) -> Array:
        # A committed array among uncommitted ones would compile the step again.
        return jax.device_put(new, old.sharding) if old.committed else new

    codebook = in_place_of(state.params["codebook"], jnp.asarray(chosen, jnp.float32))
    statistics = jax.tree.map(in_place_of, state.extra, init_statistics(codebook))
    return state._replace(params=state.params | {"codebook": codebook}, extra=statistics)
