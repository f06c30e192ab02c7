"""The image tokenizer's training, on crops of pictures."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import HVQVAEConfig, Training
from cogview2_jax.data import reading
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.clusters import cluster_codebook
from cogview2_jax.training import checkpoint, metrics, samples
from cogview2_jax.training.codebook import (
    codebook_revision,
    init_statistics,
    place_codebook,
    watch_usage,
)
from cogview2_jax.training.loop import process_rows
from cogview2_jax.training.losses import hvqvae_loss
from cogview2_jax.training.options import Options, TokenizerOptions
from cogview2_jax.training.step import TrainState
from cogview2_jax.training.task import (
    Params,
    Task,
    record_numbers,
    starting_params,
    validation_part,
)

Array = jax.Array


def tokenizer_task(
    bundle: Bundle,
    pictures: Path | reading.Records,
    options: Options,
    own: TokenizerOptions = TokenizerOptions(),
    execution: Execution = Execution(),
    *,
    pixel_weights: Callable[[Array], Array] | None = None,
    perceptual: Callable[[Array, Array], Array] | None = None,
    perceptual_weight: float = 1.0,
) -> Task:
    """The image tokenizer, from the bundle's own parameters or from nothing.

    Parameters that only untrained strides use do not change. With `own.keep_others`, no parameter
    that they use changes: their tokens and pictures stay the same, and so does the codebook.

    `pixel_weights` maps crops [b, y, x, 3] in [0, 1] to the weight of each pixel, [b, y, x].
    `perceptual` is a distance between pictures that is added to the loss, with its weight. Raises
    ValueError, in one line, for a folder without pictures and for options that only transformers
    have.
    """
    config = bundle.tokenizer_config
    if execution.training != Training() or options.z_loss:
        raise ValueError(
            "dropout, remat and z_loss are for transformers: train the tokenizer without"
        )
    strides = _strides(own, config)
    side = _side(own, strides, config)
    start, params = _starting_params(own, bundle)
    # From nothing, the step at which the codebook is placed.
    begin = 0 if params is not None else int(own.settle * options.planned_steps)
    init = functools.partial(image_tokenizer.init_params, config=config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    trained = _trained(shapes, strides, own.keep_others, config)
    data = _crop_data(pictures, side, options, own, execution)
    loss = functools.partial(
        hvqvae_loss,
        strides=strides,
        config=config,
        execution=execution,
        commitment=own.commitment,
        perceptual=perceptual,
        perceptual_weight=perceptual_weight,
    )

    def before_step(step: int, state: TrainState) -> TrainState:
        if params is not None or step != begin:
            return state
        return place_codebook(state, data.fresh, strides, config, options.seed)

    revise = codebook_revision(decay=own.decay, begin=begin, revive_every=10)
    return Task(
        name="tokenizer",
        network=config,
        execution=execution,
        init=init,
        axes=jax.tree.map(lambda leaf: (), shapes),
        params=params,
        trained=None if all(jax.tree.leaves(trained)) else trained,
        loss=_of_crops(loss, pixel_weights),
        read=lambda step: _batch(data.crops[step], step >= begin),
        read_validation=lambda step: _batch(data.validation[step], True),
        validation_batches=len(data.validation),
        ids_of=functools.partial(record_numbers, data.records, options),
        tokens_per_sample=sum((side // stride) ** 2 for stride in strides),
        flops_per_sample=metrics.tokenizer_flops_per_sample(config, side, strides),
        settings=_settings(data.records, options, own, start, side, strides),
        put=functools.partial(_put, clusters=own.clusters),
        sampler=lambda prompts: samples.reconstructions(data.crops[0][:8], strides, config),
        extra=lambda params: init_statistics(params["codebook"]),
        revise=None if own.keep_others else revise,
        before_step=before_step,
        watch=None if own.keep_others else watch_usage(),
    )


def _batch(pixels: np.ndarray, quantize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Crops, and whether to quantise them. That changes no shape, so nothing is compiled anew."""
    return pixels, np.full(len(pixels), quantize)


def _of_crops(
    loss: Callable[..., Any], pixel_weights: Callable[[Array], Array] | None
) -> Callable[[Params, Any, Array | None], Any]:
    """`loss` of the batches that `read` gives; the key is for dropout, which there is none of."""

    def of_batch(params: Params, batch: Any, key: Array | None) -> Any:
        pixels, quantize = batch
        images = pixels.astype(jnp.float32) / 255
        weights = pixel_weights(images) if pixel_weights else jnp.ones(images.shape[:-1])
        return loss(params, images, weights, quantize=jnp.all(quantize))

    return of_batch


class _CropData(NamedTuple):
    """Crops uint8 [b, side, side, 3] by step: this process's rows, and `fresh` ones to place the
    codebook on, the same in all processes.
    """

    records: reading.Records
    crops: Any
    validation: Any
    fresh: Any


def _crop_data(
    pictures: Path | reading.Records,
    side: int,
    options: Options,
    own: TokenizerOptions,
    execution: Execution,
) -> _CropData:
    records = reading.opened(pictures)
    part, parts = process_rows(execution.sharding, options.batch_size)
    crops_of = functools.partial(
        reading.pictures, records, options.batch_size, side, validation_share=options.validation
    )
    rows = functools.partial(crops_of, seed=options.seed, process_index=part, process_count=parts)
    unseen = validation_part(lambda: rows(validation=True, epochs=1), options, most=4)
    fresh = crops_of(seed=options.seed + 1, mirror=own.mirror)
    return _CropData(records, rows(mirror=own.mirror), unseen, fresh)


def _settings(
    records: reading.Records,
    options: Options,
    own: TokenizerOptions,
    start: str,
    side: int,
    strides: tuple[int, ...],
) -> checkpoint.Settings:
    return {
        "records": checkpoint.describe(records.manifest),
        **reading.split_settings(options.validation),
        **checkpoint.describe(own),
        "start": start,
        "side": side,
        "strides": list(strides),
        "clusters": None,  # of the model, not of the run
    }


def _strides(own: TokenizerOptions, config: HVQVAEConfig) -> tuple[int, ...]:
    strides = tuple(sorted(set(own.strides))) or config.strides
    if not set(strides) <= set(config.strides):
        raise ValueError(f"strides must be of {config.strides}: got {strides}")
    return strides


def _side(own: TokenizerOptions, strides: tuple[int, ...], config: HVQVAEConfig) -> int:
    side = 8 * strides[-1] if own.side is None else own.side
    if side % config.strides[-1]:
        raise ValueError(f"side must be a multiple of {config.strides[-1]}: got {side}")
    return side


def _starting_params(own: TokenizerOptions, bundle: Bundle) -> tuple[str, Params | None]:
    start, params = starting_params(own.start, {"model": bundle.tokenizer})
    if own.keep_others and params is None:
        raise ValueError(
            "keep_others needs a trained tokenizer to start from: give the model of a run that"
            " trained one, and start 'model'"
        )
    return start, params


def _trained(
    shapes: Params, strides: tuple[int, ...], keep_others: bool, config: HVQVAEConfig
) -> Params:
    """A tree of bool: what `strides` use; with `keep_others`, only what no other stride uses."""
    used: Params = image_tokenizer.used_by(shapes, strides, config)
    if keep_others:
        others = tuple(stride for stride in config.strides if stride not in strides)
        if not others:
            raise ValueError(
                "keep_others needs a stride that is not trained: give the strides to train"
            )
        kept = image_tokenizer.used_by(shapes, others, config)
        used = jax.tree.map(lambda ours, theirs: ours and not theirs, used, kept)
    return used


def _put(bundle: Bundle, params: Params, clusters: int | None) -> Bundle:
    """The bundle with this tokenizer and `clusters` clusters of its codebook (default: as many as
    before).
    """
    codebook = np.asarray(params["codebook"])
    distinct = len(np.unique(codebook, axis=0))
    number = clusters or bundle.num_clusters or max(1, min(500, len(codebook) // 16))
    labels = cluster_codebook(codebook, min(number, distinct))
    return bundle._replace(tokenizer=params, cluster_labels=labels)
