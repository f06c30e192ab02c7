"""The samplers that are compared: each a point of a family, and the pictures that it draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import ClusterSampling
from cogview2_jax.decoding import sampling
from cogview2_jax.keys import fold_in_all
from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.tokenizer.clusters import cluster_codebook
from experiments import results

# Logits [..., v], clusters' labels [v] and how many there are → what is drawn from, [..., v].
Probabilities = Callable[[jax.Array, jax.Array, int], jax.Array]


class Point(NamedTuple):
    """A setting of a family of samplers. `clusters` is how many the codebook is cut into, None: as
    the bundle says; `upweight` is the c of textual attention, None: as the bundle says.
    """

    family: str
    setting: str
    probabilities: Probabilities
    clusters: int | None = None
    upweight: float | None = None
    guidance: float = 1.0


def _cluster(settings: ClusterSampling) -> Probabilities:
    return functools.partial(sampling.cluster_probabilities, sampling=settings)


def _top_k(k: int, temperature: float) -> Probabilities:
    return lambda logits, *_: sampling.top_k_probabilities(logits, k, temperature)


def _top_p(p: float, temperature: float) -> Probabilities:
    return lambda logits, *_: sampling.top_p_probabilities(logits, p, temperature)


# What Scenes shipped before post-selection was measured (`selection`).
CAREFUL = Point("careful", "T 0.5, 4 of 64 clusters", _cluster(ClusterSampling(0.5, 4, 0.5)))


def samplers() -> list[Point]:
    """Three families, from careful to free. "2 of the clusters" is what ships."""
    made = [CAREFUL]
    for top in (1, 2, 4, 16, 64):
        how = ClusterSampling(1.0, top, 1.0)
        made.append(Point("cluster", f"{top} of the clusters", _cluster(how)))
    made += [Point("top-k", f"k {k}", _top_k(k, 1.0)) for k in (1, 2, 4, 16, 64, 1024)]
    made += [Point("nucleus", f"p {p:g}", _top_p(p, 1.0)) for p in (0.3, 0.6, 0.8, 0.9, 0.97)]
    made += [
        Point("temperature", f"T {each:g}", _top_k(1024, each)) for each in (0.2, 0.4, 0.6, 0.8)
    ]
    return made


def cluster_counts() -> list[Point]:
    """The same shares of the clusters kept, of few and of many clusters."""
    return [
        Point(
            "clusters",
            f"{kept} of {count}",
            _cluster(ClusterSampling(1.0, kept, 1.0)),
            count,
        )
        for count in (16, 64, 256)
        for kept in (count // 16, count // 4)
    ]


def attention() -> list[Point]:
    """Textual attention: c added to the scores of text keys (paper section 3.3; published: 1.4)."""
    return [
        CAREFUL._replace(family="attention", setting=f"c {c:g}", upweight=c)
        for c in (0.0, 0.5, 1.0, 1.4, 2.0, 3.0, 4.0)
    ]


def guidance(shipped: ClusterSampling) -> list[Point]:
    """Classifier-free guidance, for a model that was trained with texts left out."""
    return [
        Point("guidance", f"g {g:g}", _cluster(shipped), guidance=g)
        for g in (1.0, 1.5, 2.0, 3.0, 5.0)
    ]


class Drawer:
    """Draws pictures of the base stage, by any point, `at_once` prompts at a time."""

    def __init__(self, cv: CogView, num_images: int, at_once: int = 25) -> None:
        self._cv, self._num_images, self._at_once = cv, num_images, at_once
        self._params = cv.bundle.params("coglm")

    def clusters(self, point: Point) -> tuple[jax.Array, int]:
        """The cluster of each token, int32 [v], and how many there are."""
        bundle = self._cv.bundle
        if point.clusters is None:
            return jnp.asarray(bundle.cluster_labels), bundle.num_clusters
        codebook = np.asarray(bundle.params("tokenizer")["codebook"])
        return jnp.asarray(cluster_codebook(codebook, point.clusters)), point.clusters

    def draw(self, point: Point, prompts: Sequence[str], seed: int) -> np.ndarray:
        """int32 [prompts, num_images, cells]."""
        cv, clusters = self._cv, self.clusters(point)
        shipped = cv.bundle.sampling.text_upweight
        upweight = shipped if point.upweight is None else point.upweight

        @jax.jit
        def tokens(params: Any, text: jax.Array, is_text: jax.Array, keys: jax.Array) -> jax.Array:
            def sample(logits: jax.Array, i: jax.Array) -> jax.Array:
                chances = point.probabilities(logits, *clusters)
                drawn = jax.vmap(jax.random.categorical)(fold_in_all(keys, i), jnp.log(chances))
                return drawn.astype(jnp.int32)

            return stages.image_tokens(
                params,
                text,
                is_text,
                sample,
                self._num_images,
                config=cv.bundle.coglm_config,
                text_upweight=upweight,
                guidance=point.guidance,
                execution=cv.execution,
            )

        made = []
        for begin in range(0, len(prompts), self._at_once):
            some = [*prompts[begin : begin + self._at_once]]
            filled = some + some[-1:] * (self._at_once - len(some))
            key = jax.random.fold_in(jax.random.key(seed), begin)
            keys = jax.random.split(key, self._at_once * self._num_images)
            drawn = np.asarray(tokens(self._params, *results.prompts_of(cv, filled).base, keys))
            made.append(drawn.reshape(self._at_once, self._num_images, -1)[: len(some)])
        return np.concatenate(made)


def cut_off(
    logits: jax.Array, real: jax.Array, point: Point, labels: jax.Array, num_clusters: int
) -> tuple[jax.Array, jax.Array]:
    """What a point can never draw: the share of the model's probability that it leaves out, and
    whether it leaves out the token of a real picture, float32 and bool [...].

    `logits` [..., v] are the model's at each cell of real pictures, `real` int [...] their tokens.
    """
    allowed = point.probabilities(logits, labels, num_clusters) > 0
    mass = jnp.where(allowed, 0, jax.nn.softmax(logits)).sum(-1)
    return mass, ~jnp.take_along_axis(allowed, real[..., None], axis=-1)[..., 0]
