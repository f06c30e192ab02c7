"""Training of CogLM: generation, captioning with masked patches, and masked spans of text."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.networks import coglm
from cogview2_jax.sharding import Execution
from cogview2_jax.training import batches, checkpoint
from cogview2_jax.training.batches import Rows
from cogview2_jax.training.losses import coglm_loss
from cogview2_jax.training.options import CogLMOptions, Options
from cogview2_jax.training.task import (
    Params,
    Task,
    TokenData,
    starting_params,
    token_data,
    transformer_task,
    unrolled,
)


def coglm_task(
    bundle: Bundle,
    records: Path | TokenData,
    options: Options,
    own: CogLMOptions = CogLMOptions(),
    execution: Execution = Execution(),
) -> Task:
    """CogLM on the three tasks, from the bundle's own parameters or from nothing.

    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    config = dataclasses.replace(
        bundle.coglm_config, transformer=unrolled(bundle.coglm_config.transformer)
    )
    data = token_data(records, options, execution)
    batches.require_layout(data.layout, config)
    length = data.layout.text_slots + 1 + config.num_image_tokens
    if own.text_ratio and length > config.num_positions:
        raise ValueError(
            f"text_ratio must be 0 for records of {length} tokens, as the model has"
            f" {config.num_positions} positions: got {own.text_ratio}"
        )
    start, params = starting_params(own.start, {"model": bundle.coglm})

    def sample(rng: np.random.Generator, rows: Rows) -> Any:
        return batches.coglm(rng, rows, data.records, data.training_numbers, config, own)

    def unseen(rng: np.random.Generator, rows: Rows) -> Any:
        return batches.coglm(rng, rows, data.records, data.validation_numbers, config, own)

    def loss(params: Params, batch: Any, key: jax.Array | None) -> Any:
        z_loss = 0.0 if key is None else options.z_loss
        found = coglm_loss(
            params, batch, config=config, execution=execution, dropout_key=key, z_loss=z_loss
        )
        return *found, ()

    # Refuses impossible options before anything is compiled.
    sample(np.random.default_rng(0), data.rows(0))
    return transformer_task(
        "CogLM",
        config,
        data,
        options,
        sample,
        checkpoint.describe(own) | {"start": start},
        execution=execution,
        init=functools.partial(coglm.init_params, config=config),
        axes=coglm.parameter_axes(config),
        params=params,
        trained=None,
        loss=loss,
        tokens_per_sample=length,
        bundle=bundle,
        stage="base",
        unseen=unseen,
    )
