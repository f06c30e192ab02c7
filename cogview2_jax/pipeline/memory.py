"""How much device memory generation takes, before anything is loaded: from the configuration and
the compiler's own analysis of each stage's program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cogview2_jax.config import TOKEN_STRIDE, Precision
from cogview2_jax.description import Description
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.networks.quantisation import quantise
from cogview2_jax.networks.transformer import unstacked
from cogview2_jax.pipeline import settings, stages
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image as image_tokenizer

# Of the cluster labels: it changes no figure by more than their sums, and is not in config.json.
CLUSTERS = 500
PRECISIONS = {
    "float32": Precision(),
    "bfloat16": Precision("bfloat16", "bfloat16"),
    "int8": Precision("bfloat16", "bfloat16", "int8"),
}
_INITS: dict[str, Callable[..., Any]] = {
    "coglm": coglm.init_params,
    "direct": direct_sr.init_params,
    "iterative": iterative_sr.init_params,
}
# Of each stage's program, the network that it reads.
NETWORK_OF = {
    "base": "coglm",
    "score": "coglm",
    "direct": "direct",
    "iterative": "iterative",
    "pixels": "tokenizer",
}


class Usage(NamedTuple):
    """Bytes on the device while a stage runs: `params` of its network, and `temporary`: everything
    else that its program needs, its results included.
    """

    params: int
    temporary: int


class Plan(NamedTuple):
    """What a setting takes: bytes at the fullest moment, and in which stage that is. With
    `in_turn`, only one transformer is on the device at a time.
    """

    dtype: str
    batch: int
    in_turn: bool
    peak: int
    stage: str


def parameters(description: Description, network: str, precision: Precision) -> Any:
    """A network's parameters on the device as `jax.ShapeDtypeStruct`s, for generation."""
    if network == "tokenizer":
        config = description.tokenizer_config
        return jax.eval_shape(lambda: image_tokenizer.init_params(jax.random.key(0), config))
    init = functools.partial(_INITS[network], config=getattr(description, f"{network}_config"))

    def made() -> Any:
        params = init(jax.random.key(0), precision=dataclasses.replace(precision, matrices=None))
        params = unstacked(params) if network == "coglm" else params
        return quantise(params) if precision.matrices else params

    return jax.eval_shape(made)


def example(description: Description, stage: str, batch: int) -> tuple[Any, ...]:
    """Arguments of a stage's program behind the parameters, for `batch` pictures of one word."""
    base = description.coglm_config
    fine = math.prod(description.direct_config.grid)
    coarse = jnp.zeros((batch, base.num_image_tokens), jnp.int32)
    tokens = jnp.zeros((batch, fine), jnp.int32)
    keys = jax.random.split(jax.random.key(0), batch)
    num_image = base.vocabulary.num_image
    labels = jnp.arange(num_image, dtype=jnp.int32) % min(CLUSTERS, num_image)

    def text(slots: int) -> tuple[Any, Any]:
        first = jnp.broadcast_to(jnp.arange(slots) == 0, (batch, slots))
        return jnp.where(first, num_image, 0).astype(jnp.int32), first

    if stage == "base":
        return *text(base.max_text), keys, labels
    if stage == "score":
        return coarse, *text(base.max_text), jnp.ones(batch, bool)
    if stage == "direct":
        return *text(description.direct_config.text_slots), coarse, keys, labels
    if stage == "iterative":
        slots = description.iterative_config.text_slots
        return *text(slots), tokens, jnp.ones((batch, fine), bool), keys
    return (tokens,)


def lowered(
    description: Description, stage: str, batch: int, precision: Precision, place: Any = None
) -> Any:
    """The program of one of `NETWORK_OF`, for `batch` pictures, not compiled yet. `place` is the
    sharding of its arguments, for a device that is not here.
    """
    execution, base = Execution(precision), description.coglm_config
    num_image = base.vocabulary.num_image
    shapes = jax.eval_shape(lambda: example(description, stage, batch))
    params = parameters(description, NETWORK_OF[stage], precision)
    if place is not None:
        params, shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (params, shapes),
        )
    sampling: dict[str, Any] = {
        "sampling": dataclasses.replace(description.sampling, candidates=1),
        "execution": execution,
    }
    clusters = {"num_clusters": min(CLUSTERS, num_image)}
    program, static = {
        "base": (stages.decode_image, {"config": base} | sampling | clusters),
        "score": (stages.caption_score, {"config": base, "execution": execution}),
        "direct": (
            stages.super_resolve_direct,
            {"config": description.direct_config} | sampling | clusters,
        ),
        "iterative": (
            stages.super_resolve_iterative,
            {"config": description.iterative_config} | sampling,
        ),
        "pixels": (
            image_tokenizer.to_pixels,
            {
                "grid": description.direct_config.grid,
                "stride": TOKEN_STRIDE,
                "config": description.tokenizer_config,
            },
        ),
    }[stage]
    return program.lower(params, *shapes, **static)


def usage(
    description: Description, stage: str, batch: int, precision: Precision, place: Any = None
) -> Usage:
    """What a stage takes, by compiling its program: seconds to a minute at the published size."""
    params = parameters(description, NETWORK_OF[stage], precision)
    return usage_of(lowered(description, stage, batch, precision, place).compile(), params)


def usage_of(program: Any, params: Any) -> Usage:
    """What a compiled program of `lowered` takes, its parameters apart."""
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    found = program.memory_analysis()
    whole = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )
    return Usage(held, max(0, whole - held))


def peak(used: dict[str, Usage], dtype: str, batch: int, in_turn: bool) -> Plan:
    """The fullest moment of a generation with these stages' usages."""
    sizes = {NETWORK_OF[stage]: each.params for stage, each in used.items()}
    tokenizer = sizes.get("tokenizer", 0)

    def at(stage: str) -> int:
        network = NETWORK_OF[stage]
        resident = sum(sizes.values())
        if in_turn:
            # While pixels are drawn, the last transformer is still there.
            last = max((sizes[name] for name in sizes if name != "tokenizer"), default=0)
            resident = tokenizer + (last if network == "tokenizer" else sizes[network])
        return resident + used[stage].temporary

    fullest = max(used, key=at)
    return Plan(dtype, batch, in_turn, at(fullest), fullest)


def programs_of(networks: Collection[str]) -> list[str]:
    """The programs of `NETWORK_OF` that these networks run."""
    return [program for program, network in NETWORK_OF.items() if network in networks]


def best(
    description: Description,
    memory: int,
    *,
    dtypes: Sequence[str] = ("bfloat16", "int8"),
    batches: Sequence[int] = settings.BATCHES,
    networks: Collection[str] = settings.STAGES["full"],
    measure: Callable[[str, int, Precision], Usage] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[Plan | None, list[Plan]]:
    """The setting to generate with in `memory` bytes, None if nothing fits, and all that were
    looked at.

    The first dtype with which anything fits; with it the largest batch, and all networks on the
    device if that batch allows it. `batches` are in falling order, `networks` are those that are
    loaded, `measure` is (stage, batch, precision) → Usage.
    """
    if measure is None:
        measure = functools.partial(usage, description)
    looked: list[Plan] = []
    for dtype in dtypes:
        for batch in batches:
            used = {}
            for stage in programs_of(networks):
                progress(f"{dtype}, batch {batch}: {stage}")
                used[stage] = measure(stage, batch, PRECISIONS[dtype])
            both = [peak(used, dtype, batch, in_turn) for in_turn in (False, True)]
            looked += both
            if both[1].peak <= memory:
                break
        fitting = [plan for plan in looked if plan.peak <= memory]
        if fitting:
            return max(fitting, key=lambda plan: (plan.batch, not plan.in_turn)), looked
    return None, looked
