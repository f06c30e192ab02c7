"""Training of both super-resolution networks, on records of two sizes."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cogview2_jax.bundle import Bundle
from cogview2_jax.networks import direct_sr, inputs, iterative_sr
from cogview2_jax.sharding import Execution
from cogview2_jax.training import batches, checkpoint
from cogview2_jax.training.losses import direct_sr_loss, iterative_sr_loss
from cogview2_jax.training.options import DirectSROptions, IterativeSROptions, Options
from cogview2_jax.training.task import (
    Params,
    Task,
    TokenData,
    starting_params,
    token_data,
    transformer_task,
    unrolled,
)


def direct_sr_task(
    bundle: Bundle,
    records: Path | TokenData,
    options: Options,
    own: DirectSROptions = DirectSROptions(),
    execution: Execution = Execution(),
) -> Task:
    """Direct super-resolution, from the bundle's own parameters, from its CogLM or from nothing.

    `own.freeze_base` trains only what CogLM lacks: the second attention and the fine positions.
    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    base = bundle.direct_config.coglm
    base = dataclasses.replace(base, transformer=unrolled(base.transformer))
    config = dataclasses.replace(bundle.direct_config, coglm=base)
    data = token_data(records, options, execution)
    batches.require_layout(data.layout, base, config.num_image_tokens)
    start, params = starting_params(
        own.start,
        {"model": bundle.direct, "coglm": bundle.coglm},
        functools.partial(direct_sr.from_coglm, config=config),
    )

    def loss(params: Params, batch: Any, key: jax.Array | None) -> Any:
        found = direct_sr_loss(
            params,
            inputs.direct_super_resolution(batch.text, batch.is_text, batch.seen, config),
            batch.fine,
            batch.weights,
            config=config,
            execution=execution,
            dropout_key=key,
            z_loss=0.0 if key is None else options.z_loss,
        )
        return *found, ()

    axes = direct_sr.parameter_axes(config)
    return transformer_task(
        "direct SR",
        config,
        data,
        options,
        lambda rng, rows: batches.direct_sr(rng, rows, data.layout, config),
        checkpoint.describe(own) | {"start": start},
        execution=execution,
        init=functools.partial(direct_sr.init_params, config=config),
        axes=axes,
        params=params,
        trained=direct_sr.added_parameters(axes) if own.freeze_base else None,
        loss=loss,
        tokens_per_sample=config.num_prefix + config.num_image_tokens,
        bundle=bundle,
        stage="direct",
    )


def iterative_sr_task(
    bundle: Bundle,
    records: Path | TokenData,
    options: Options,
    own: IterativeSROptions = IterativeSROptions(),
    execution: Execution = Execution(),
) -> Task:
    """Iterative super-resolution with the masks of the LoPAR rounds, from the bundle's own
    parameters, from its CogLM or from nothing.

    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    config = dataclasses.replace(
        bundle.iterative_config, transformer=unrolled(bundle.iterative_config.transformer)
    )
    coglm_config = bundle.coglm_config
    data = token_data(records, options, execution)
    batches.require_layout(data.layout, coglm_config, config.num_image_tokens)
    start, params = starting_params(
        own.start,
        {"model": bundle.iterative, "coglm": bundle.coglm},
        lambda params: iterative_sr.from_coglm(params, coglm_config, config),
    )

    def loss(params: Params, batch: Any, key: jax.Array | None) -> Any:
        shown = jnp.where(batch.masked, config.vocabulary.start_of_image, batch.seen)
        found = iterative_sr_loss(
            params,
            inputs.iterative_super_resolution(batch.text, batch.is_text, shown, config),
            batch.fine,
            batch.masked,
            batch.weights,
            config=config,
            execution=execution,
            dropout_key=key,
            z_loss=0.0 if key is None else options.z_loss,
        )
        return *found, ()

    return transformer_task(
        "iterative SR",
        config,
        data,
        options,
        lambda rng, rows: batches.iterative_sr(rng, rows, data.layout, coglm_config, config),
        checkpoint.describe(own) | {"start": start},
        execution=execution,
        init=functools.partial(iterative_sr.init_params, config=config),
        axes=iterative_sr.parameter_axes(config),
        params=params,
        trained=None,
        loss=loss,
        tokens_per_sample=config.text_slots + config.num_image_tokens,
        bundle=bundle,
        stage="full",
    )
