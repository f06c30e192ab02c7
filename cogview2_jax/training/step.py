"""A training step: its state, the optimisers, and one jitted function that donates the state.

The loop around it is `loop.fit`. All random numbers of a step come from the seed and the number of
the step, and batches are a function of that number too, so a run that is resumed after a kill gives
the same parameters as one that was never killed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from cogview2_jax.config import Precision
from cogview2_jax.sharding import Sharding, constrain
from cogview2_jax.training.losses import Mean, Metrics

Array = jax.Array
Params = Any
# (parameters, batch, key) → loss, metrics, and what `revise` needs, or ().
LossFunction = Callable[[Params, Any, Array], tuple[Mean, Metrics, Any]]


# --- State ----------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The state that a step takes and returns.

    `extra` holds further state of an objective (statistics of a codebook, …), `average` the moving
    average of the parameters; each may be ().
    """

    params: Params
    opt_state: Any
    extra: Any
    average: Params
    step: Array  # int32 scalar: steps done


def init_params(
    init: Callable[[Array], Params], key: Array, axes: Any, sharding: Sharding | None = None
) -> Params:
    """`init(key)`, with each parameter created in its own sharding: no device ever holds all.

    `axes` are the names of the parameters' axes, as `coglm.parameter_axes` gives them.
    """
    # It runs once. On a CPU, optimising the random bits of 300 arrays takes five times as long.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    if sharding is None:
        return jax.jit(init, compiler_options=options)(key)
    shardings = sharding.of_tree(jax.eval_shape(init, key), axes)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    extra: Any = (),
    average: bool = False,
    sharding: Sharding | None = None,
) -> TrainState:
    """A state at step 0. Moments and the average have the shardings of their parameters."""

    def build(params: Params, extra: Any) -> TrainState:
        # Copies, so that a donated state never holds one buffer twice.
        copied = jax.tree.map(jnp.array, params)
        followed = jax.tree.map(jnp.array, params) if average else ()
        return TrainState(copied, optimizer.init(params), extra, followed, jnp.zeros((), jnp.int32))

    if sharding is None:
        return jax.jit(build)(params, extra)
    shardings = state_shardings(jax.eval_shape(build, params, extra), params, sharding)
    return jax.jit(build, out_shardings=shardings)(params, extra)


def shardings_of(state: TrainState) -> TrainState:
    """The sharding that each array of a state has, for `make_step`. `state_shardings` says which it
    is to get.
    """
    shardings: TrainState = jax.tree.map(lambda leaf: leaf.sharding, state)
    return shardings


def state_shardings(state: TrainState, params: Params, sharding: Sharding) -> TrainState:
    """The sharding that each leaf of `state` (shapes) is to get: the parameter's, if the leaf's
    path ends in a parameter's path and their shapes are equal; else replicated.
    """

    def names(path: Any) -> tuple[str, ...]:
        keys = [str(key.key) if isinstance(key, jax.tree_util.DictKey) else "" for key in path]
        return tuple(keys)

    known = {names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def one(path: Any, leaf: Any) -> Any:
        whole = names(path)
        for start in range(len(whole)):
            match = known.get(whole[start:])
            if match is not None and match.shape == leaf.shape:
                return match.sharding
        return sharding.named()

    return jax.tree_util.tree_map_with_path(one, state)


# --- Optimisers -----------------------------------------------------------------------------------


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient to norm `clip`; only matrices and tables decay.

    The defaults are those of CogView's published script; CogLM's own are not known.
    """

    def decays(params: Params) -> Params:
        def one(path: Any, leaf: Array) -> bool:
            return leaf.ndim > 1 and path[-1].key not in ("bias", "scale", "codebook")

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays),
    )


def warmup_cosine(peak: float, num_steps: int, warmup: int, final: float = 0.1) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then a cosine to the share `final` of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(num_steps, warmup + 1), end_value=final * peak
    )


def muon_with_adamw(
    matrices: optax.Schedule,
    rest: optax.Schedule,
    *,
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Muon on weight matrices, AdamW without weight decay on embeddings, norms and biases.

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
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            matrices,
            weight_decay=weight_decay,
            adam_b2=0.99,
            adam_learning_rate=rest,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def freeze(
    optimizer: optax.GradientTransformation, trained: Params
) -> optax.GradientTransformation:
    """`optimizer` for the parameters where the tree `trained` is True; the others do not change,
    and have no moments.
    """
    labels = jax.tree.map(lambda one: "trained" if one else "frozen", trained)
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


# --- The step -------------------------------------------------------------------------------------


def make_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    precision: Precision = Precision(),
    accumulate: int = 1,
    average: float = 0.0,
    revise: Callable[[Params, Any, Any, Array, Array], tuple[Params, Any]] | None = None,
    trained: Params | None = None,
    sharding: Sharding | None = None,
    shardings: TrainState | None = None,
) -> Any:
    """A jitted step that donates its state: (state, batch) → (state, metrics).

    Args:
        loss_fn: gets parameters in `precision.compute`, cast before they are gathered on a mesh;
        the state keeps them in float32, and gradients are float32 sums.
        accumulate: number of parts that a batch is cut into, computed one after another; loss and
        gradient are those of the whole. Every array of a batch is [b, …].
        average: decay of the moving average of the parameters, if the state has one; it begins
        lower, min(average, (1 + step) / (10 + step)).
        revise: (params, extra, aux, step, key) → (params, extra), after the gradient's step; `aux`
        is the loss function's, stacked [accumulate, …].
        trained: a tree of bool, which parameters get a gradient; see `freeze`.
        shardings: `shardings_of(state)`, where there is a `sharding`.

    The metrics are float32 scalars: "loss", what `loss_fn` gives, "gradient_norm",
    "parameter_norm" after the step, and "finite", 1 or 0: if one of these three is not finite, the
    step changes nothing but its number.
    """

    gradient = _gradient(loss_fn, precision, accumulate, trained, sharding)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, means, aux = gradient(state.params, batch, key)
        weight = jnp.maximum(means["loss"].weight, 1e-8)
        grads = jax.tree.map(lambda leaf: leaf / weight, grads)
        metrics = {name: mean.value for name, mean in means.items()}
        metrics["gradient_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, extra = optax.apply_updates(state.params, updates), state.extra
        if revise is not None:
            params, extra = revise(params, extra, aux, state.step, jax.random.fold_in(key, 2**31))
        following = state.average
        if average:
            number = state.step.astype(jnp.float32)
            decay = jnp.minimum(average, (1 + number) / (10 + number))
            following = optax.incremental_update(params, state.average, 1 - decay)
        # A finite gradient can still make a parameter overflow, which a save would keep.
        metrics["parameter_norm"] = optax.tree.norm(params)
        norms = ("loss", "gradient_norm", "parameter_norm")
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in norms])))
        metrics["finite"] = finite.astype(jnp.float32)
        made = TrainState(params, opt_state, extra, following, state.step)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, state)
        return kept._replace(step=state.step + 1), metrics

    # The new state is sharded as the old one.
    out = None if shardings is None or sharding is None else (shardings, sharding.named())
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def _gradient(
    loss_fn: LossFunction,
    precision: Precision,
    accumulate: int,
    trained: Params | None,
    sharding: Sharding | None,
) -> Callable[[Params, Any, Array], Any]:
    """(parameters, batch, key) → the gradient of the loss's total, `Mean`s summed over the parts,
    and each part's `aux` for `revise`, stacked.
    """

    def part(params: Params, batch: Any, key: Array) -> Any:
        def summed(params: Params) -> Any:
            if trained is not None:
                params = jax.tree.map(
                    lambda leaf, on: leaf if on else jax.lax.stop_gradient(leaf), params, trained
                )
            loss, metrics, aux = loss_fn(cast(params, precision.compute), batch, key)
            return loss.total, (loss, metrics, aux)

        (_, (loss, metrics, aux)), grads = jax.value_and_grad(summed, has_aux=True)(params)
        return grads, metrics | {"loss": loss}, aux

    def whole(params: Params, batch: Any, key: Array) -> Any:
        if accumulate == 1:
            grads, metrics, aux = part(params, batch, key)
            return grads, metrics, jax.tree.map(lambda leaf: leaf[None], aux)
        parts = jax.tree.map(lambda leaf: _in_parts(leaf, accumulate, sharding), batch)

        def body(sums: Any, one: Any) -> Any:
            number, batch = one
            grads, metrics, aux = part(params, batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, (grads, metrics)), aux

        like = jax.eval_shape(part, params, jax.tree.map(lambda leaf: leaf[0], parts), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like[:2])
        sums, aux = jax.lax.scan(body, zeros, (jnp.arange(accumulate), parts))
        return *sums, aux

    return whole


def cast(params: Params, dtype: Any) -> Params:
    """Floating-point parameters in another dtype."""

    def one(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params)


def _in_parts(leaf: Array, parts: int, sharding: Sharding | None) -> Array:
    """[b, …] → [parts, b / parts, …]; each part has rows of all devices."""
    if leaf.shape[0] % parts:
        raise ValueError(f"accumulate must divide the batch of {leaf.shape[0]}: got {parts}")
    cut = jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)
    return constrain(sharding, cut, None, "batch", *(None,) * (leaf.ndim - 1))
