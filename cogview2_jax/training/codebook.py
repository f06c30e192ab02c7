"""The codebook while it is trained: placed by k-means++, moved by its average, dead codes revived.

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
from cogview2_jax.training.step import TrainState

Array = jax.Array
Params = Any


class CodebookStatistics(NamedTuple):
    """Moving averages behind the codebook: how often each code is used, and the sum of what it
    stands for.
    """

    cluster_size: Array  # float32 [v]
    embed_avg: Array  # float32 [v, d]


def init_statistics(codebook: Array) -> CodebookStatistics:
    # A copy: a donated state must not hold one buffer twice.
    return CodebookStatistics(jnp.ones(codebook.shape[0]), jnp.array(codebook))


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
    return embed_avg / smoothed[:, None], CodebookStatistics(cluster_size, embed_avg)


def revive_dead_codes(
    key: Array,
    codebook: Array,
    statistics: CodebookStatistics,
    vectors: Array,
    *,
    threshold: float = 0.02,
) -> tuple[Array, CodebookStatistics]:
    """Move codes used less than `threshold` times a step onto vectors of the batch.

    Vectors far from their code are likelier to be taken: they are the ones the codebook serves
    worst.
    """
    errors = jnp.sum((vectors - codebook[nearest_code(vectors, codebook)]) ** 2, axis=-1)
    dead = statistics.cluster_size < threshold
    chosen = jax.random.categorical(key, jnp.log(errors + 1e-12), shape=(codebook.shape[0],))
    fresh = vectors[chosen]
    codebook = jnp.where(dead[:, None], fresh, codebook)
    cluster_size = jnp.where(dead, 5 * threshold, statistics.cluster_size)
    embed_avg = jnp.where(dead[:, None], fresh * 5 * threshold, statistics.embed_avg)
    return codebook, CodebookStatistics(cluster_size, embed_avg)


def codebook_revision(
    *, decay: float = 0.99, begin: int = 0, revive_every: int = 0, last_revival: int = 0
) -> Callable[[Params, Any, Any, Array, Array], tuple[Params, CodebookStatistics]]:
    """What `train.make_step` does with the codebook after each gradient step, from step `begin`.

    It moves by its average, and every `revive_every` steps (0: never) before `last_revival` dead
    codes are moved onto vectors. `hvqvae_loss`'s `Assigned` is what it sees of the batch.
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
            due = (step % revive_every == 0) & (step < last_revival)
            moved = jax.lax.cond(due, revived, lambda *same: same, *moved)
        codebook, statistics = jax.tree.map(
            lambda new, old: jnp.where(started, new, old), moved, (params["codebook"], statistics)
        )
        return params | {"codebook": codebook}, statistics

    return revise


def kmeans_plus_plus(rng: np.random.Generator, vectors: np.ndarray, num_codes: int) -> np.ndarray:
    """Start codes: each next one is drawn in proportion to its squared distance from those before.
    [n, d] → [k, d].
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
    """Codes placed on the vectors of fresh crops at `strides`: by k-means++ up to 4,096 codes, for
    which it is quick, else at random.
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
        # One that is committed to its device where the others are not would compile the step anew.
        return jax.device_put(new, old.sharding) if old.committed else new

    codebook = in_place_of(state.params["codebook"], jnp.asarray(chosen, jnp.float32))
    statistics = jax.tree.map(in_place_of, state.extra, init_statistics(codebook))
    return state._replace(params=state.params | {"codebook": codebook}, extra=statistics)
