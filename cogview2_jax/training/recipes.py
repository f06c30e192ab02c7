"""How each network is trained: where it starts, what it is fed, its loss, and one function that
runs it.

    task = recipes.coglm_task(bundle, Path("records"), options)
    params = recipes.run(task, options, Path("run"))

A `Task` is all that differs between the four networks; `Options` is what does not.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Precision,
    Training,
    TransformerConfig,
)
from cogview2_jax.data import reading
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.sharding import Sharding
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.training import batches, checkpoint, metrics
from cogview2_jax.training.batches import Mix, Rows
from cogview2_jax.training.loop import fit, lay_out, process_rows
from cogview2_jax.training.losses import (
    Mean,
    Metrics,
    codebook_revision,
    coglm_loss,
    direct_sr_loss,
    hvqvae_loss,
    init_statistics,
    iterative_sr_loss,
    kmeans_plus_plus,
)
from cogview2_jax.training.step import (
    TrainState,
    adamw,
    cast,
    freeze,
    init_params,
    init_state,
    layout_of,
    make_step,
    muon_with_adamw,
    warmup_cosine,
)

Array = jax.Array
Params = Any
OPTIMIZERS = ("adamw", "muon")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STARTS = ("model", "coglm", "nothing")


@dataclass(frozen=True)
class Options:
    """How to train, whatever is trained. Checked when made: ValueError names what is wrong.

    `warmup` is a share of all steps, `final_rate` the share of the learning rate that is left at
    the end. `average` is the decay of a moving average of the parameters, which is then what is
    validated and kept; 0 for none. `held_out` is the share of the records that is kept for
    validation.
    """

    num_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 4e-4
    warmup: float = 0.1
    final_rate: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    dtype: str = "float32"
    training: Training = Training()
    average: float = 0.0
    z_loss: float = 0.0
    seed: int = 0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("batch_size", 1), ("accumulate", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}: got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size {self.batch_size}: got {self.accumulate}"
            )
        for name in ("warmup", "final_rate", "average", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1: got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0: got {getattr(self, name)}")
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}: got {getattr(self, name)!r}"
                )

    @property
    def precision(self) -> Precision:
        """Float32 masters, computed with in `dtype`."""
        return Precision(compute=DTYPES[self.dtype])


class Task(NamedTuple):
    """A network and what it is trained on.

    `read` and `read_held_out` give this process's rows of a step; of the latter there are
    `held_out_batches`.
    `loss` takes (params, batch, dropout key or None). `params` are trained parameters to start
    from, or None for `init(key)`. `trained` is a tree of bool, or None when all are.
    """

    name: str
    network: Any  # its configuration
    init: Callable[[Array], Params]
    axes: Params
    params: Params | None
    trained: Params | None
    loss: Callable[[Params, Any, Array | None], tuple[Mean, Metrics, Any]]
    read: Callable[[int], Any]
    read_held_out: Callable[[int], Any]
    held_out_batches: int
    ids_of: Callable[[int], list[int]]
    tokens_per_sample: int
    flops_per_sample: float
    settings: checkpoint.Settings
    extra: Callable[[Params], Any] = lambda params: ()
    revise: Any = None  # as in `make_step`
    before_step: Callable[[int, TrainState], TrainState] | None = None


# --- The four networks ----------------------------------------------------------------------------


def coglm_task(
    bundle: Bundle,
    records: Path,
    options: Options,
    *,
    mix: Mix = Mix(),
    start: str = "model",
    sharding: Sharding | None = None,
) -> Task:
    """CogLM on the three tasks, from the bundle's own parameters or from nothing.

    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    config = dataclasses.replace(
        bundle.coglm_config, transformer=_unrolled(bundle.coglm_config.transformer)
    )
    data = _Data(records, options, sharding)
    batches.require_layout(data.layout, config)
    first_chinese = data.records.manifest.settings["first_chinese"]
    length = data.layout.text_slots + 1 + config.num_image_tokens
    if mix.text_ratio and length > config.num_positions:
        raise ValueError(
            f"text_ratio must be 0 for records of {length} tokens, as the model has"
            f" {config.num_positions} positions: got {mix.text_ratio}"
        )

    def sample(rng: np.random.Generator, rows: Rows) -> Any:
        return batches.coglm(
            rng, rows, data.records, data.training_numbers, config, first_chinese, mix
        )

    def loss(params: Params, batch: Any, key: Array | None) -> Any:
        found = coglm_loss(
            params,
            batch,
            config=config,
            **_how(options, sharding, key),
        )
        return *found, ()

    sample(np.random.default_rng(0), data.rows(0))  # a mix that cannot be is refused here
    return data.task(
        "CogLM",
        config,
        sample,
        loss,
        init=functools.partial(coglm.init_params, config=config),
        axes=coglm.parameter_axes(config),
        params=_start(start, {"model": bundle.coglm}),
        tokens=length,
        settings={"mix": checkpoint.describe(mix), "start": start},
    )


def direct_sr_task(
    bundle: Bundle,
    records: Path,
    options: Options,
    *,
    start: str = "model",
    freeze_base: bool = False,
    sharding: Sharding | None = None,
) -> Task:
    """Direct super-resolution, from the bundle's own parameters, from its CogLM or from nothing.

    `freeze_base` trains only what CogLM has not: the second attention and the fine positions.
    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    base = dataclasses.replace(
        bundle.direct_config.coglm, transformer=_unrolled(bundle.direct_config.coglm.transformer)
    )
    config = dataclasses.replace(bundle.direct_config, coglm=base)
    data = _Data(records, options, sharding)
    batches.require_layout(data.layout, base, config.num_image_tokens)

    def loss(params: Params, batch: Any, key: Array | None) -> Any:
        layout = inputs.direct_super_resolution(batch.text, batch.is_text, batch.seen, config)
        found = direct_sr_loss(
            params,
            layout,
            batch.fine,
            batch.weights,
            config=config,
            **_how(options, sharding, key),
        )
        return *found, ()

    axes = direct_sr.parameter_axes(config)
    return data.task(
        "direct SR",
        config,
        lambda rng, rows: batches.direct_sr(rng, rows, data.layout, config),
        loss,
        init=functools.partial(direct_sr.init_params, config=config),
        axes=axes,
        params=_start(
            start,
            {"model": bundle.direct, "coglm": bundle.coglm},
            lambda params: direct_sr.from_coglm(params, config),
        ),
        trained=direct_sr.added_parameters(axes) if freeze_base else None,
        tokens=config.num_prefix + config.num_image_tokens,
        settings={"start": start, "freeze_base": freeze_base},
    )


def iterative_sr_task(
    bundle: Bundle,
    records: Path,
    options: Options,
    *,
    start: str = "model",
    sharding: Sharding | None = None,
) -> Task:
    """Iterative super-resolution, its masks those of the LoPAR rounds; from the bundle's own
    parameters, from its CogLM or from nothing.

    Raises ValueError, in one line, for records that do not fit the bundle.
    """
    config = dataclasses.replace(
        bundle.iterative_config, transformer=_unrolled(bundle.iterative_config.transformer)
    )
    data = _Data(records, options, sharding)
    batches.require_layout(data.layout, bundle.coglm_config, config.num_image_tokens)

    def loss(params: Params, batch: Any, key: Array | None) -> Any:
        start_token = config.vocabulary.start_of_image
        shown = jnp.where(batch.masked, start_token, batch.seen)
        layout = inputs.iterative_super_resolution(batch.text, batch.is_text, shown, config)
        found = iterative_sr_loss(
            params,
            layout,
            batch.fine,
            batch.masked,
            batch.weights,
            config=config,
            **_how(options, sharding, key),
        )
        return *found, ()

    return data.task(
        "iterative SR",
        config,
        lambda rng, rows: batches.iterative_sr(rng, rows, data.layout, bundle.coglm_config, config),
        loss,
        init=functools.partial(iterative_sr.init_params, config=config),
        axes=iterative_sr.parameter_axes(config),
        params=_start(
            start,
            {"model": bundle.iterative, "coglm": bundle.coglm},
            lambda params: iterative_sr.from_coglm(params, bundle.coglm_config, config),
        ),
        tokens=config.text_slots + config.num_image_tokens,
        settings={"start": start},
    )


def tokenizer_task(
    bundle: Bundle,
    pictures: Path,
    options: Options,
    *,
    side: int | None = None,
    flip: bool = True,
    strides: Sequence[int] = (),
    keep_others: bool = False,
    start: str = "model",
    place_at: float = 0.1,
    decay: float = 0.99,
    commitment: float = 1.0,
    pixel_weights: Callable[[Array], Array] | None = None,
    perceptual: Callable[[Array, Array], Array] | None = None,
    perceptual_weight: float = 1.0,
    sharding: Sharding | None = None,
) -> Task:
    """The image tokenizer on crops of `side` pixels (default: 8 of its largest stride), half of
    them mirrored if `flip`, for `strides` (default: all) at once.

    What only other strides use stays as it is. With `keep_others`, all that they use does: their
    tokens and pictures stay the same, and so does the codebook.

    From nothing, the networks settle unquantised for the share `place_at` of all steps; then the
    codebook is placed on what they make of fresh crops, and follows by its moving average of
    `decay`. Codes that are not used are moved, in the first four fifths of the training.
    `pixel_weights` says of crops [b, y, x, 3] in [0, 1] how much each pixel counts, [b, y, x].
    `perceptual` is a distance of pictures that is added, with its weight. Raises ValueError, in
    one line, for a folder without pictures.
    """
    config = bundle.tokenizer_config
    side = 8 * config.strides[-1] if side is None else side
    if side < 1 or side % config.strides[-1]:
        raise ValueError(f"side must be a multiple of {config.strides[-1]}: got {side}")
    strides = tuple(sorted(set(strides))) or config.strides
    if not set(strides) <= set(config.strides):
        raise ValueError(f"strides must be of {config.strides}: got {strides}")
    records = reading.Records(pictures)
    crops_of = functools.partial(
        reading.pictures, records, options.batch_size, side, validation_share=options.held_out
    )
    part, parts = process_rows(sharding, options.batch_size)
    own: dict[str, Any] = {"process_index": part, "process_count": parts}
    crops = crops_of(seed=options.seed, flip=flip, **own)
    params = _start(start, {"model": bundle.tokenizer})
    if keep_others and params is None:
        raise ValueError("keep_others needs a tokenizer that the model does not hold")
    begin = 0 if params is not None else int(place_at * options.num_steps)
    init = functools.partial(image_tokenizer.init_params, config=config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    trained = image_tokenizer.used_by(shapes, strides, config)
    if keep_others:
        others = tuple(stride for stride in config.strides if stride not in strides)
        kept = image_tokenizer.used_by(shapes, others, config)
        trained = jax.tree.map(lambda ours, theirs: ours and not theirs, trained, kept)

    def marked(pixels: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        # Whether to quantise goes with the batch: it changes no shape, and compiles nothing anew.
        return pixels, np.full(len(pixels), step >= begin)

    def loss(params: Params, batch: Any, key: Array | None) -> Any:
        pixels, quantize = batch
        images = pixels.astype(jnp.float32) / 255
        return hvqvae_loss(
            params,
            images,
            pixel_weights(images) if pixel_weights else jnp.ones(images.shape[:-1]),
            strides,
            config=config,
            precision=options.precision,
            quantize=jnp.all(quantize),
            commitment=commitment,
            perceptual=perceptual,
            perceptual_weight=perceptual_weight,
        )

    def before_step(step: int, state: TrainState) -> TrainState:
        if params is not None or step != begin:
            return state
        # All processes place it on the same crops.
        fresh = crops_of(seed=options.seed + 1, flip=flip)
        return _place_codebook(state, fresh, strides, config, options.seed)

    def held_out() -> Any:
        return crops_of(seed=options.seed, validation=True, epochs=1, flip=False, **own)

    unseen = _held_out(held_out, options, most=4)  # crops are large
    return Task(
        name="tokenizer",
        network=config,
        init=init,
        axes=jax.tree.map(lambda leaf: (), shapes),
        params=params,
        trained=None if all(jax.tree.leaves(trained)) else trained,
        loss=loss,
        read=lambda step: marked(crops[step], step),
        read_held_out=lambda step: marked(unseen[step], begin),
        held_out_batches=len(unseen),
        ids_of=functools.partial(_ids, records, options),
        tokens_per_sample=sum((side // stride) ** 2 for stride in strides),
        flops_per_sample=metrics.tokenizer_flops_per_sample(config, side, strides),
        settings={
            "records": checkpoint.describe(records.manifest),
            **reading.split_settings(options.held_out),
            "start": start,
            "side": side,
            "flip": flip,
            "strides": list(strides),
            "keep_others": keep_others,
            "decay": decay,
            "commitment": commitment,
        },
        extra=lambda params: init_statistics(params["codebook"]),
        revise=None
        if keep_others
        else codebook_revision(
            decay=decay, begin=begin, revive_every=10, last_revival=int(0.8 * options.num_steps)
        ),
        before_step=before_step,
    )


# --- Running one ----------------------------------------------------------------------------------


def run(
    task: Task,
    options: Options,
    folder: Path,
    *,
    save_every: int = 200,
    log_every: int = 20,
    keep: int = 2,
    sample: Callable[[Params], np.ndarray] | None = None,
    sample_every: int = 0,
    skip_non_finite: bool = False,
    sharding: Sharding | None = None,
) -> Params:
    """Train `task` in `folder`, or go on with it; returns the parameters (their moving average,
    where the options ask for one).

    `sample` makes a picture, uint8 [y, x, 3], of parameters, every `sample_every` steps. The rest,
    and what is raised, is as in `fit`.
    """
    warmup = int(options.warmup * options.num_steps)
    schedule, tenth = (
        warmup_cosine(rate, options.num_steps, warmup, options.final_rate)
        for rate in (options.learning_rate, options.learning_rate / 10)
    )
    if options.optimizer == "adamw":
        optimizer = adamw(schedule, weight_decay=options.weight_decay, clip=options.clip)
    else:
        optimizer = muon_with_adamw(
            schedule, tenth, weight_decay=options.weight_decay, clip=options.clip
        )
    if task.trained is not None:
        optimizer = freeze(optimizer, task.trained)

    key = jax.random.key(options.seed)
    if task.params is None:
        params = init_params(task.init, key, task.axes, sharding)
    elif sharding is None:
        params = task.params
    else:
        params = jax.device_put(task.params, sharding.of_tree(task.params, task.axes))
    state = init_state(
        params,
        optimizer,
        extra=task.extra(params),
        average=options.average > 0,
        sharding=sharding,
    )
    del params
    step_fn = make_step(
        task.loss,
        optimizer,
        seed=options.seed,
        precision=options.precision,
        accumulate=options.accumulate,
        average=options.average,
        revise=task.revise,
        trained=task.trained,
        sharding=sharding,
        layout=layout_of(state),
    )

    @jax.jit
    def losses(params: Params, batch: Any) -> Metrics:
        loss, found, _ = task.loss(cast(params, options.precision.compute), batch, None)
        return found | {"loss": loss}

    def of(state: TrainState) -> Params:
        return state.average if options.average else state.params

    def validate(state: TrainState) -> dict[str, float]:
        sums: Metrics | None = None
        for number in range(task.held_out_batches):
            batch = task.read_held_out(number)
            batch = batch if sharding is None else lay_out(batch, sharding)
            found = losses(of(state), batch)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        return {name: float(mean.value) for name, mean in (sums or {}).items()}

    flops = options.batch_size * task.flops_per_sample
    dtype = options.precision.compute
    described = checkpoint.describe(options)
    del described["num_steps"]  # a run may go on for longer
    state = fit(
        state,
        step_fn,
        task.read,
        num_steps=options.num_steps,
        folder=folder,
        name=task.name,
        settings={
            "task": task.name,
            "network": checkpoint.describe(task.network),
            "options": described,
            **task.settings,
        },
        save_every=save_every,
        log_every=log_every,
        keep=keep,
        validate=validate if task.held_out_batches else None,
        sample=None if sample is None else lambda state: sample(of(state)),
        sample_every=sample_every,
        schedule=schedule,
        tokens_per_step=options.batch_size * task.tokens_per_sample,
        flops_per_step=flops,
        peak_flops=jax.device_count() * metrics.matrix_rate(dtype) if flops else 0.0,
        ids_of=task.ids_of,
        before_step=task.before_step,
        skip_non_finite=skip_non_finite,
        sharding=sharding,
    )
    return of(state)


# --- Parts ----------------------------------------------------------------------------------------


class _Data:
    """Token records, and which rows of each batch this process reads."""

    def __init__(self, folder: Path, options: Options, sharding: Sharding | None) -> None:
        part, parts = process_rows(sharding, options.batch_size)
        self.records = reading.Records(folder)
        tokens = functools.partial(
            reading.tokens,
            self.records,
            options.batch_size,
            seed=options.seed,
            process_index=part,
            process_count=parts,
            validation_share=options.held_out,
        )
        self._rows = tokens()
        self._unseen = _held_out(lambda: tokens(validation=True, epochs=1), options)
        self._first_row = part * (options.batch_size // parts)
        self._options = options
        self.training_numbers = reading.training_numbers(self.records, options.held_out)
        layout = self.records.manifest.layout
        assert layout is not None  # `reading.tokens` has refused pictures
        self.layout: RecordLayout = layout

    def rows(self, step: int) -> Rows:
        return Rows(self._rows[step], self._first_row, self._options.batch_size)

    def task(
        self,
        name: str,
        network: CogLMConfig | DirectSRConfig | IterativeSRConfig,
        sample: Callable[[np.random.Generator, Rows], Any],
        loss: Callable[[Params, Any, Array | None], Any],
        *,
        init: Callable[[Array], Params],
        axes: Params,
        params: Params | None,
        tokens: int,
        settings: checkpoint.Settings,
        trained: Params | None = None,
    ) -> Task:
        seed = self._options.seed

        def read(step: int) -> Any:
            return sample(np.random.default_rng((seed, 0, step)), self.rows(step))

        def read_held_out(step: int) -> Any:
            rows = Rows(self._unseen[step], self._first_row, self._options.batch_size)
            return sample(np.random.default_rng((seed, 1, step)), rows)

        return Task(
            name=name,
            network=network,
            init=init,
            axes=axes,
            params=params,
            trained=trained,
            loss=loss,
            read=read,
            read_held_out=read_held_out,
            held_out_batches=len(self._unseen),
            ids_of=functools.partial(_ids, self.records, self._options),
            tokens_per_sample=tokens,
            flops_per_sample=metrics.flops_per_sample(network),
            settings={
                "records": checkpoint.describe(self.records.manifest),
                **reading.split_settings(self._options.held_out),
                **settings,
            },
        )


def _held_out(made: Callable[[], Any], options: Options, most: int = 16) -> Any:
    """Up to `most` batches of held-out rows; empty if none are."""
    if not options.held_out:
        return ()
    batches_ = made()
    return batches_[: min(len(batches_), most)]


def _ids(records: reading.Records, options: Options, step: int) -> list[int]:
    numbers = reading.record_numbers(
        records, options.batch_size, step, seed=options.seed, validation_share=options.held_out
    )
    return [int(number) for number in numbers]


def _start(
    start: str, known: dict[str, Params], made: Callable[[Params], Params] = lambda params: params
) -> Params | None:
    """Parameters to start from; None for fresh ones. Those of "coglm" are turned into this
    network's by `made`. Raises ValueError for a start that the model does not have.
    """
    if start == "nothing":
        return None
    if start not in known:
        raise ValueError(
            f"start must be one of {', '.join([*known, 'nothing'])} for this network: got {start!r}"
        )
    if not known[start]:
        raise ValueError(f"start {start!r} needs parameters that the model does not hold")
    return made(known[start]) if start == "coglm" else known[start]


def _how(options: Options, sharding: Sharding | None, key: Array | None) -> dict[str, Any]:
    """What a transformer's loss is to be computed with; without a key, as validation wants it."""
    return {
        "precision": options.precision,
        "training": options.training,
        "sharding": sharding,
        "dropout_key": key,
        "z_loss": 0.0 if key is None else options.z_loss,
    }


def _unrolled(sizes: TransformerConfig) -> TransformerConfig:
    """On a CPU the scan over layers costs a third of a step: unrolled, where that compiles soon."""
    few = sizes.num_layers <= 8 and jax.default_backend() == "cpu"
    return dataclasses.replace(sizes, unroll=sizes.num_layers) if few else sizes


def _place_codebook(
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
