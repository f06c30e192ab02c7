"""Run a task: make its state, its step and its validation, and pass them to the loop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cogview2_jax.sharding import Sharding
from cogview2_jax.training import checkpoint, metrics
from cogview2_jax.training.loop import Hooks, fit, shard_batch
from cogview2_jax.training.losses import Metrics
from cogview2_jax.training.options import LoopOptions, Options
from cogview2_jax.training.step import (
    TrainState,
    adamw,
    cast,
    freeze,
    init_params,
    init_state,
    make_step,
    muon_with_adamw,
    shardings_of,
    warmup_cosine,
)
from cogview2_jax.training.task import Task

Params = Any


def run(
    task: Task,
    options: Options,
    folder: Path,
    loop: LoopOptions = LoopOptions(),
    *,
    sample: Callable[[Params], np.ndarray] | None = None,
) -> Params:
    """Train `task` in `folder`, or resume it; returns the parameters (their moving average, if the
    options ask for one).

    `sample` draws a picture, uint8 [y, x, 3], from parameters, every `loop.sample_every` steps.
    Raises as `loop.fit` does.
    """
    sharding, precision = task.execution.sharding, task.execution.precision
    optimizer, schedule = make_optimizer(options, task.trained)
    state = initial_state(task, options, optimizer)
    step = make_step(
        task.loss,
        optimizer,
        seed=options.seed,
        precision=precision,
        accumulate=options.accumulate,
        average=options.average,
        revise=task.revise,
        trained=task.trained,
        sharding=sharding,
        shardings=shardings_of(state),
    )

    def kept(state: TrainState) -> Params:
        return state.average if options.average else state.params

    flops = options.batch_size * task.flops_per_sample
    validate = make_validation(task) if task.validation_batches else None
    state = fit(
        state,
        step,
        task.read,
        num_steps=options.num_steps,
        folder=folder,
        name=task.name,
        settings=settings_of(task, options),
        loop=loop,
        hooks=Hooks(
            validate=None if validate is None else lambda state: validate(kept(state)),
            sample=None if sample is None else lambda state: sample(kept(state)),
            before_step=task.before_step,
            watch=task.watch,
            ids_of=task.ids_of,
        ),
        costs=metrics.Costs(
            options.batch_size * task.tokens_per_sample,
            flops,
            metrics.MatrixRate(precision.compute) if flops else None,
        ),
        schedule=schedule,
        on_stop="; with --steps {step} it writes the model as it is now",
        sharding=sharding,
    )
    return kept(state)


def make_optimizer(
    options: Options, trained: Params | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser that the options ask for, and its learning rate by step."""
    steps = options.planned_steps
    schedule, tenth = (
        warmup_cosine(rate, steps, int(options.warmup * steps), options.final_rate)
        for rate in (options.learning_rate, options.learning_rate / 10)
    )
    decay, clip = options.weight_decay, options.clip
    if options.optimizer == "adamw":
        optimizer = adamw(schedule, weight_decay=decay, clip=clip)
    else:
        optimizer = muon_with_adamw(schedule, tenth, weight_decay=decay, clip=clip)
    return optimizer if trained is None else freeze(optimizer, trained), schedule


def initial_state(
    task: Task, options: Options, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state at step 0, each array created in its sharding."""
    sharding = task.execution.sharding
    if task.params is None:
        params = init_params(task.init, jax.random.key(options.seed), task.axes, sharding)
    elif sharding is None:
        params = task.params
    else:
        params = jax.device_put(task.params, sharding.of_tree(task.params, task.axes))
    return init_state(
        params,
        optimizer,
        extra=task.extra(params),
        average=options.average > 0,
        sharding=sharding,
    )


def make_validation(task: Task) -> Callable[[Params], dict[str, float]]:
    """Parameters → means of the loss and its parts over the validation batches."""
    sharding: Sharding | None = task.execution.sharding

    @jax.jit
    def losses(params: Params, batch: Any) -> Metrics:
        loss, found, _ = task.loss(cast(params, task.execution.precision.compute), batch, None)
        return found | {"loss": loss}

    def validate(params: Params) -> dict[str, float]:
        sums: Metrics | None = None
        for number in range(task.validation_batches):
            batch = task.read_validation(number)
            batch = batch if sharding is None else shard_batch(batch, sharding)
            found = losses(params, batch)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        return {name: float(mean.value) for name, mean in (sums or {}).items()}

    return validate


def settings_of(task: Task, options: Options) -> checkpoint.Settings:
    """Settings that must not change when a run is resumed. `num_steps` may: the schedules stay."""
    described = checkpoint.describe(options) | {"schedule_steps": options.planned_steps}
    del described["num_steps"]
    precision = task.execution.precision
    return {
        "task": task.name,
        "network": checkpoint.describe(task.network),
        "options": described,
        "dtype": jnp.dtype(precision.compute).name,
        "dropout": task.execution.training.dropout,  # remat changes no result
        **task.settings,
    }


def going_on(options: Options, folder: Path) -> Options:
    """The options with the `schedule_steps` of the run in `folder`, if there is one and the options
    leave them open.
    """
    begun = checkpoint.begun_settings(folder)
    if begun is None or options.schedule_steps is not None:
        return options
    planned = begun.get("options", {}).get("schedule_steps")
    return options if planned is None else dataclasses.replace(options, schedule_steps=planned)
