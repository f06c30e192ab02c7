"""The ways of refining fine tokens that are compared, and the tokens that each draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cogview2_jax.config import IterativeSRConfig, Sampling
from cogview2_jax.decoding.sampling import top_k_probabilities
from cogview2_jax.keys import fold_in_all
from cogview2_jax.networks import inputs, iterative_sr
from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.cogview import CogView
from experiments import results

DIRECT, ENLARGED = "direct", "enlarged"  # where refinement begins
ITERATIVE_ALONE = "iterative alone"  # a setting


class Point(NamedTuple):
    """A way of refining: the order, rounds and window of `config`, None for no refinement.

    With `by_confidence` the cells of a round are those that the network is surest of, as many as
    `config` has.
    """

    family: str
    setting: str
    config: IterativeSRConfig | None
    start: str = DIRECT
    by_confidence: bool = False


def stages_alone(config: IterativeSRConfig) -> list[Point]:
    """Direct super-resolution alone, iterative alone (from the enlarged base picture), and both."""
    return [
        Point("stages", "direct alone", None),
        Point("stages", ITERATIVE_ALONE, config, ENLARGED),
        Point("stages", "both, as published", config),
    ]


def rounds(config: IterativeSRConfig) -> list[Point]:
    """The published order in fewer and in more rounds."""
    ranks = _ranks(config.order)
    return [Point("rounds", f"{n}", _in_rounds(config, ranks, n)) for n in (1, 3, 12)]


def one_by_one(config: IterativeSRConfig) -> list[Point]:
    """Every cell of a tile in a round of its own: full auto-regression inside a tile."""
    ranks = _ranks(config.order)
    number = int(ranks.max()) + 1
    return [Point("one by one", f"{number} rounds", _in_rounds(config, ranks, number))]


def orders(config: IterativeSRConfig, seed: int = 0) -> list[Point]:
    """Other orders of the cells that the published order redraws, in as many rounds.

    Raster and diagonal are inside a tile, as published; random and Halton's sequence (as in Besnier
    et al., arXiv 2503.17076) are over the whole grid; confidence is MaskGIT's (arXiv 2202.04200).
    """
    tile = np.array(config.order)
    y, x = np.indices(tile.shape)
    raster, diagonal = np.asarray(y * 100 + x), np.asarray((y + x) * 100 + x)
    grid = inputs.lopar_order(config)
    over_grid = {
        "random": np.random.default_rng(seed).random(grid.shape),
        "Halton": halton_ranks(grid.shape),
    }
    made = [
        Point("orders", "raster", _in_rounds(config, _ranks(config.order, raster))),
        Point("orders", "diagonal", _in_rounds(config, _ranks(config.order, diagonal))),
    ]
    for name, values in over_grid.items():
        whole = tuple(map(tuple, grid.tolist()))
        made.append(Point("orders", name, _in_rounds(config, _ranks(whole, values))))
    return [*made, Point("orders", "confidence", config, by_confidence=True)]


def windows(config: IterativeSRConfig) -> list[Point]:
    """Local windows of other sizes than the trained one."""
    sizes = ((1, 1), (5, 3), (13, 13))
    return [
        Point("windows", f"{y} × {x}", dataclasses.replace(config, window=(y, x))) for y, x in sizes
    ]


def halton_ranks(shape: tuple[int, int]) -> np.ndarray:
    """When each cell of a grid is first hit by Halton's sequence in bases 2 and 3: int [y, x]."""
    ranks = np.full(shape, -1)
    number = found = 0
    while found < ranks.size:
        number += 1
        y, x = (
            int(_inverse(number, base) * side) for base, side in zip((2, 3), shape, strict=True)
        )
        if ranks[y, x] < 0:
            ranks[y, x] = found
            found += 1
    return ranks


def _inverse(number: int, base: int) -> float:
    """The digits of `number` in `base`, mirrored at the point: from 0 to 1."""
    value, share = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        value += share * digit
    return value


Order = tuple[tuple[int, ...], ...]


def _masked(order: Order) -> np.ndarray:
    """The places in a tile that the first round masks: int [n, 2]."""
    return np.argwhere(np.array(order) > 0)


def _ranks(order: Order, values: np.ndarray | None = None) -> np.ndarray:
    """0, 1, … for the cells that are redrawn, by `values` or by the order itself; −1 for the
    others: int [y, x].
    """
    tile = np.array(order)
    values = tile if values is None else values
    places = _masked(order)
    sorted_ = places[np.argsort(values[tuple(places.T)], kind="stable")]
    ranks = np.full(tile.shape, -1)
    ranks[tuple(sorted_.T)] = np.arange(len(sorted_))
    return ranks


def _in_rounds(
    config: IterativeSRConfig, ranks: np.ndarray, number: int | None = None
) -> IterativeSRConfig:
    """The configuration in which cells are final in the order of `ranks`, in rounds of (nearly) as
    many cells each.
    """
    number = config.rounds if number is None else number
    total = ranks.max() + 1
    # A cell of order r is masked in rounds 1 to r, and final after round r.
    order = np.where(ranks < 0, 0, ranks * number // total + 1)
    return dataclasses.replace(config, order=tuple(map(tuple, order.tolist())), rounds=number)


def sampling_for(sampling: Sampling, number: int) -> Sampling:
    """The shipped top-k of each of six rounds, stretched to `number` rounds."""
    shipped = sampling.iterative_top_k
    top_k = tuple(shipped[round_ * len(shipped) // number] for round_ in range(number))
    return dataclasses.replace(sampling, iterative_top_k=top_k)


# --- Drawing --------------------------------------------------------------------------------------


def enlarged(cv: CogView, coarse: np.ndarray) -> np.ndarray:
    """Fine tokens of the base pictures, enlarged: int32 [prompts, n, fine cells] from the base
    tokens [prompts, n, cells].
    """
    small = cv._pixels(coarse.reshape(-1, coarse.shape[-1]), "base")
    grid = cv.bundle.direct_config.grid
    sides = small.shape[1] * grid[0] // cv.bundle.coglm_config.grid[0]
    rows = [
        cv._picture_tokens(
            Image.fromarray(each).resize((sides, sides), Image.Resampling.BICUBIC), grid
        )[0]
        for each in small
    ]
    return np.stack(rows).reshape(*coarse.shape[:2], -1)


def refined(
    cv: CogView, point: Point, prompts: Sequence[str], start: np.ndarray, at_once: int = 50
) -> np.ndarray:
    """Fine tokens int32 [prompts, n, cells] after a point's rounds, from those of `start`."""
    if point.config is None:
        return start
    text, is_text = results.prompts_of(cv, prompts).iterative
    sampling, number = sampling_for(cv.bundle.sampling, point.config.rounds), start.shape[1]
    refine: Callable[..., jax.Array] = stages.super_resolve_iterative
    if point.by_confidence:
        refine = super_resolve_by_confidence

    def drawn(rows: np.ndarray, fine: np.ndarray) -> jax.Array:
        return refine(
            cv.bundle.params("iterative"),
            text[rows // number],
            is_text[rows // number],
            fine[rows],
            np.ones(fine[rows].shape, bool),
            jax.random.split(jax.random.key(rows[0] + 1), len(rows)),
            config=point.config,
            sampling=sampling,
            execution=cv.execution,
        )

    return results.in_batches(drawn, start, at_once)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"))
def super_resolve_by_confidence(
    params: Any,
    text: jax.Array,
    is_text: jax.Array,
    fine: jax.Array,
    may_change: jax.Array,
    keys: jax.Array,
    *,
    config: IterativeSRConfig,
    sampling: Sampling,
    execution: Any,
) -> jax.Array:
    """As `stages.super_resolve_iterative`, with the cells of each round chosen by their probability
    (MaskGIT): all masked cells are drawn, the surest are kept, as many as the order's round has.
    """
    schedule = inputs.lopar_schedule(config)
    mask_token = config.vocabulary.start_of_image
    tokens, masked = fine, jnp.asarray(schedule[0])[None] & may_change
    for round_ in range(len(schedule)):
        given = inputs.iterative_super_resolution(
            text, is_text, jnp.where(masked, mask_token, tokens), config
        )
        logits = iterative_sr.apply(params, given, config=config, execution=execution)
        chances = top_k_probabilities(
            logits, sampling.iterative_top_k[round_], sampling.iterative_temperature
        )
        drawn = jax.vmap(jax.random.categorical)(
            fold_in_all(keys, jnp.asarray(round_)), jnp.log(chances)
        )
        sure = jnp.take_along_axis(chances, drawn[..., None], axis=-1)[..., 0]
        tokens = jnp.where(masked, drawn, tokens)
        later = int(schedule[round_ + 1].sum()) if round_ + 1 < len(schedule) else 0
        if later:
            # The least sure ones are masked again.
            ranks = jnp.argsort(jnp.argsort(jnp.where(masked, sure, jnp.inf), axis=-1), axis=-1)
            masked = masked & (ranks < later)
    return tokens.astype(jnp.int32)
