"""Train the three transformers on Scenes tokens: CogLM, direct SR from it, iterative SR."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cogview2_jax import (
    coglm,
    direct_sr,
    fit,
    iterative_sr,
    objectives,
    pipeline,
    pretraining,
    sequence,
    train,
)
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from experiments.scenes.presets import NUM_CLUSTERS, SAMPLING
from experiments.scenes.records import Tokens

# Share of a batch that is pure text (the published third task) and of the rest that is captioning.
TEXT_SHARE, CAPTION_RATIO = 0.05, 0.3
PATCH_SIZE, NUM_PATCHES = 4, 3
# How CogLM learns what "above" and "left of" mean. With both orders of naming two objects equally
# likely, neither the order nor the word tells anything by itself, and 3,000 steps taught nothing of
# the two together. So in the last cycle the object further up or left is named first, and between
# these parts of the cycle the other order's share grows to a half.
REVERSED_FROM, REVERSED_TO = 0.3, 0.7
# Share of pictures whose coarse tokens show other colours and fills than text and fine tokens: the
# base stage makes such mistakes, and direct SR is to believe the text.
REPAINTED_SHARE = 0.25
# Share of pictures, in training iterative SR, whose anchors are direct SR's instead of the true
# ones. Trained on true anchors alone, it takes mistakes of direct SR for the truth and spreads them
# over the cells between.
DRAFTED_SHARE = 0.75
OBJECT_WEIGHT = 3.0  # how much more a cell with a part of an object counts in super-resolution


def _rows(rng_seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """Which records a step reads: each epoch is a fresh shuffle, a function of the step alone."""
    start = step * batch_size
    chosen = []
    for position in range(start, start + batch_size):
        epoch, offset = divmod(position, size)
        chosen.append(_permutation(rng_seed, epoch, size)[offset])
    return np.array(chosen)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _texts(
    rng: np.random.Generator, tokens: Tokens, rows: np.ndarray, reversed_share: float = 0.5
) -> list[list[int]]:
    """One caption of each row, language, order and wording drawn."""
    languages, _, captions, _ = tokens.texts.shape[1:]
    language, caption = rng.integers((languages, captions), size=(len(rows), 2)).T
    order = (rng.random(len(rows)) < reversed_share).astype(int)
    return [
        [int(t) for t in text if t >= 0] for text in tokens.texts[rows, language, order, caption]
    ]


def _unrolled(sizes: TransformerConfig) -> TransformerConfig:
    """For training on a CPU, where the scan over layers costs a third of the step."""
    return dataclasses.replace(sizes, unroll=sizes.num_layers)


def _fit(
    params: Any,
    loss_fn: Callable[..., Any],
    batches: Callable[[int], Any],
    *,
    peak: float,
    cycles: Sequence[int],
    directory: Path,
    name: str,
) -> Any:
    """Train with Muon at learning rate `peak` on matrices, AdamW at a tenth of it on the rest."""
    schedules = [train.warmup_then_anneal(rate, cycles, 150) for rate in (peak, peak / 10)]
    optimizer = train.muon_with_adamw(*schedules)
    state = train.init_state(params, optimizer)
    step = train.make_step(loss_fn, optimizer)
    state = fit.fit(
        state, step, batches, num_steps=sum(cycles), folder=directory, name=name, save_every=100
    )
    return state.params


def run_coglm(
    tokens: Tokens,
    config: CogLMConfig,
    first_chinese: int,
    directory: Path,
    *,
    cycles: Sequence[int],
    batch_size: int = 64,
) -> Any:
    """CogLM on the three-task mix."""
    config = dataclasses.replace(config, transformer=_unrolled(config.transformer))
    num_text = round(TEXT_SHARE * batch_size)

    def reversed_share(step: int) -> float:
        part = (step - sum(cycles[:-1])) / cycles[-1]
        grown = (part - REVERSED_FROM) / (REVERSED_TO - REVERSED_FROM)
        return 0.5 * min(max(grown, 0.0), 1.0) if part >= 0 else 0.5

    def batch(step: int) -> pretraining.TrainingSample:
        rng = np.random.default_rng((61, step))
        rows = _rows(62, step, batch_size - num_text, len(tokens.coarse))
        texts = _texts(rng, tokens, rows, reversed_share(step))
        records = np.stack(
            [
                pretraining.record([text], image, config)
                for text, image in zip(texts, tokens.coarse[rows], strict=True)
            ]
        )
        choices = pretraining.draw_choices(
            rng,
            len(records),
            config,
            caption_ratio=CAPTION_RATIO,
            patch_size=PATCH_SIZE,
            num_patches=NUM_PATCHES,
            to_border=True,
        )
        english = pretraining.english_texts(records, config, first_chinese)
        made = pretraining.mixed_samples(
            records, english, choices, config, patch_size=PATCH_SIZE, predict_end=True
        )
        # Pure text: captions one after another, cut to the length of a record.
        length = records.shape[1]
        prose = _texts(rng, tokens, rng.integers(len(tokens.coarse), size=num_text * length // 4))
        stream = np.concatenate([np.array(text) for text in prose])[: num_text * length]
        lengths, gaps = pretraining.draw_spans(rng, num_text, length)
        spans = pretraining.text_span_samples(
            stream.reshape(num_text, length).astype(np.int32), lengths, gaps, config
        )
        return pretraining.TrainingSample(
            *(np.concatenate(parts) for parts in zip(made, spans, strict=True))
        )

    def loss_fn(params: Any, sample: pretraining.TrainingSample, key: Any) -> Any:
        return *objectives.coglm_loss(params, sample, config=config), ()

    return _fit(
        jax.jit(lambda key: coglm.init_params(key, config))(jax.random.key(21)),
        loss_fn,
        batch,
        peak=0.02,
        cycles=cycles,
        directory=directory,
        name="CogLM",
    )


def _fine_batch(
    rng: np.random.Generator, tokens: Tokens, rows: np.ndarray, slots: int, vocabulary: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left-padded texts and which slots are words, fine tokens, and the weight of each cell."""
    text, is_text = sequence.left_padded(_texts(rng, tokens, rows), slots, vocabulary)
    weights = np.where(tokens.objects[rows], OBJECT_WEIGHT, 1.0).astype(np.float32)
    return text, is_text, tokens.fine[rows], weights


def run_direct_sr(
    tokens: Tokens,
    coglm_params: Any,
    config: DirectSRConfig,
    directory: Path,
    *,
    cycles: Sequence[int],
    batch_size: int = 8,
) -> Any:
    """Direct SR, starting from CogLM and training all of it."""
    unrolled = dataclasses.replace(config.coglm, transformer=_unrolled(config.coglm.transformer))
    config = dataclasses.replace(config, coglm=unrolled)

    def batch(step: int) -> Any:
        rng = np.random.default_rng((71, step))
        rows = _rows(72, step, batch_size, len(tokens.fine))
        data = _fine_batch(rng, tokens, rows, config.text_slots, config.coglm.vocabulary)
        repainted = rng.random((batch_size, 1)) < REPAINTED_SHARE
        return *data, np.where(repainted, tokens.repainted[rows], tokens.coarse[rows])

    def loss_fn(params: Any, data: Any, key: Any) -> Any:
        text, is_text, fine, weights, coarse = data
        layout = sequence.direct_super_resolution(text, is_text, coarse, config)
        return *objectives.direct_sr_loss(params, layout, fine, weights, config=config), ()

    return _fit(
        direct_sr.from_coglm(coglm_params, config),
        loss_fn,
        batch,
        peak=0.015,
        cycles=cycles,
        directory=directory,
        name="direct SR",
    )


def drafts(
    tokens: Tokens,
    params: Any,
    config: DirectSRConfig,
    cluster_labels: np.ndarray,
    file: Path,
    batch_size: int = 20,
) -> np.ndarray:
    """What direct SR draws for each scene, int32 [n, fine cells]; from `file` if it is there.

    Some coarse tokens are repainted, as in the training of direct SR.
    """
    if file.exists():
        return np.load(file)
    rng = np.random.default_rng(75)
    made = []
    for start in tqdm(range(0, len(tokens.fine), batch_size), desc="drafts"):
        rows = np.arange(start, min(start + batch_size, len(tokens.fine)))
        text, is_text = sequence.left_padded(
            _texts(rng, tokens, rows), config.text_slots, config.coglm.vocabulary
        )
        repainted = rng.random((len(rows), 1)) < REPAINTED_SHARE
        drawn = pipeline.super_resolve_direct(
            params,
            text,
            is_text,
            np.where(repainted, tokens.repainted[rows], tokens.coarse[rows]),
            jax.random.split(jax.random.key(start), len(rows)),
            cluster_labels,
            config=config,
            sampling=SAMPLING,
            num_clusters=NUM_CLUSTERS,
        )
        made.append(np.asarray(drawn))
    temporary = file.with_suffix(".partial.npy")
    np.save(temporary, np.concatenate(made))
    temporary.rename(file)
    return np.load(file)


def run_iterative_sr(
    tokens: Tokens,
    drafts: np.ndarray,
    coglm_params: Any,
    coglm_config: CogLMConfig,
    config: IterativeSRConfig,
    directory: Path,
    *,
    cycles: Sequence[int],
    batch_size: int = 12,
) -> Any:
    """Iterative SR, starting from CogLM, over the `drafts` of direct SR, int32 [n, fine cells]. Its
    training masks are those of the rounds, one drawn for each picture.
    """
    config = dataclasses.replace(config, transformer=_unrolled(config.transformer))
    reset = sequence.lopar_schedule(config).reset
    order = sequence.lopar_order(config).reshape(-1)

    def batch(step: int) -> Any:
        rng = np.random.default_rng((81, step))
        rows = _rows(82, step, batch_size, len(tokens.fine))
        text, is_text, fine, weights = _fine_batch(
            rng, tokens, rows, config.text_slots, config.vocabulary
        )
        rounds = rng.integers(len(reset), size=batch_size)
        # Of what a round predicts, only the cells of its own order stay; the others are for later
        # rounds.
        stays = order == rounds[:, None] + 1
        weights *= np.where(stays, 2.0, 1.0)
        drafted = rng.random((batch_size, 1)) < DRAFTED_SHARE
        shown = np.where(drafted & (order < 1), drafts[rows], fine)
        return text, is_text, shown, fine, weights, reset[rounds]

    def loss_fn(params: Any, data: Any, key: Any) -> Any:
        text, is_text, shown, fine, weights, masked = data
        start = config.vocabulary.start_of_image
        layout = sequence.iterative_super_resolution(
            text, is_text, jax.numpy.where(masked, start, shown), config
        )
        loss = objectives.iterative_sr_loss(params, layout, fine, masked, weights, config=config)
        return *loss, ()

    return _fit(
        iterative_sr.from_coglm(coglm_params, coglm_config, config),
        loss_fn,
        batch,
        peak=0.015,
        cycles=cycles,
        directory=directory,
        name="iterative SR",
    )
