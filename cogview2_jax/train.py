"""The training loop: one jitted step over batches that are a function of the step number.

Everything a run needs to go on after a kill is in its checkpoint: the state (parameters, optimiser,
RNG key) and the step. Batches depend on the step alone, so a resumed run sees what an uninterrupted
one would.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import orbax.checkpoint as ocp
from tqdm import tqdm

Array = jax.Array
Params = Any


class TrainState(NamedTuple):
    """What a step takes and gives back. `extra` holds what an objective keeps besides (EMA
    statistics, …).
    """

    params: Params
    opt_state: Any
    extra: Any
    step: Array


def init_state(
    params: Params, optimizer: optax.GradientTransformation, extra: Any = ()
) -> TrainState:
    return TrainState(params, optimizer.init(params), extra, jnp.zeros((), jnp.int32))


def make_step(
    loss_fn: Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """A jitted step that donates its state. `loss_fn(params, batch, key)` gives a scalar and
    metrics.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.extra, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def warmup_then_anneal(peak: float, cycles: Sequence[int], warmup: int) -> optax.Schedule:
    """In each of `cycles`, in steps: linear warm-up, constant to the middle, linear to zero."""
    parts: list[optax.Schedule] = []
    ends: list[int] = []
    for num_steps in cycles:
        up = min(warmup, max(1, num_steps // 4))
        half = max(num_steps // 2, up + 1)
        parts += [
            optax.linear_schedule(0.0, peak, up),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, num_steps - half),
        ]
        start = ends[-1] if ends else 0
        ends += [start + up, start + half, start + num_steps]
    return optax.join_schedules(parts, ends[:-1])


def muon_with_adamw(
    matrices: optax.Schedule, rest: optax.Schedule, *, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """Muon on weight matrices, AdamW on embeddings, norms and biases.

    A matrix is a stacked layer's [layers, in, out] or a convolution's [h, w, in, out].
    """
    axes = {3: ((1,), (2,)), 4: ((0, 1, 2), (3,))}

    def dimensions(params: Params) -> Params:
        return jax.tree.map(
            lambda leaf: (
                optax.contrib.MuonDimensionNumbers(*axes[leaf.ndim]) if leaf.ndim in axes else None
            ),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            matrices,
            weight_decay=weight_decay,
            adam_b2=0.99,
            adam_learning_rate=rest,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
    batches: Callable[[int], Any],
    *,
    num_steps: int,
    directory: Path,
    name: str,
    save_every: int = 200,
    log_every: int = 20,
) -> TrainState:
    """Train to `num_steps`, going on from the newest checkpoint under `directory` if there is one.

    `step_fn` may be jitted or wrap a jitted one; `batches(step)` runs in a thread, one step ahead.
    Metrics go to `directory/metrics.jsonl` and the progress bar.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with (
        ocp.CheckpointManager(directory / "checkpoints", options=options) as manager,
        ThreadPoolExecutor(1) as pool,
        (directory / "metrics.jsonl").open("a") as log,
    ):
        start = manager.latest_step() or 0
        if start:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(start, args=ocp.args.StandardRestore(abstract))
        if start >= num_steps:
            return state
        pending = pool.submit(batches, start)
        bar = tqdm(range(start, num_steps), initial=start, total=num_steps, desc=name)
        began = time.monotonic()
        for step in bar:
            batch = pending.result()
            if step + 1 < num_steps:
                pending = pool.submit(batches, step + 1)
            state, metrics = step_fn(state, batch)
            if (step + 1) % log_every == 0:
                figures = {key: round(float(value), 6) for key, value in metrics.items()}
                figures |= {"step": step + 1, "seconds": round(time.monotonic() - began, 1)}
                log.write(json.dumps(figures) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items() if k != "step"})
                if not jnp.isfinite(metrics["loss"]):
                    raise FloatingPointError(
                        f"{name}: the loss is {figures['loss']} at step {step + 1}; "
                        f"the last good checkpoint is step {manager.latest_step()} in {directory}"
                    )
            if (step + 1) % save_every == 0 or step + 1 == num_steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
    return state
