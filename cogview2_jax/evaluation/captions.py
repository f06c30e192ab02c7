"""How well pictures fit their captions: CogView's caption loss, and CLIP score with any encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.prepare import fingerprint
from cogview2_jax.data.shards import Progress, Recipe, Report, Run, Work, write_shards
from cogview2_jax.data.sources import Input, Refused, Source, refused_text
from cogview2_jax.evaluation.features import read_rows
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.settings import SCORED_AT_ONCE
from cogview2_jax.styles import PLAIN, find_style, in_style
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.cleaning import TextError
from cogview2_jax.tokenizer.pictures import open_picture

_LOSS = "caption loss"


def caption_losses(
    cv: CogView, pictures: Sequence[np.ndarray], captions: Sequence[str]
) -> np.ndarray:
    """The mean negative log-likelihood of each caption's tokens, given its picture: float32 [n].

    `pictures` are `cv.picture_tokens`. Their mean is CogView's caption loss (arXiv 2105.13290,
    section 4.2): what CogLM itself thinks of the pair, best judged by a model that did not draw the
    picture.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: one for each")
    if not captions:
        return np.zeros(0, np.float32)
    numbers = np.arange(len(captions))
    return -cv.pair_scores(captions, pictures, numbers, numbers)


def write_caption_losses(
    source: Source,
    folder: Path,
    cv: CogView,
    *,
    shard_size: int = 1024,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Write `caption_losses` of all pictures of `source`, each with its first caption, to `folder`:
    shards, resumed and shared as those of `features.write_features`.

    A caption that is empty or too long for the model is refused, with its picture.
    """
    bundle = cv.bundle
    settings = {
        "source": source.fingerprint,
        "measure": _LOSS,
        "coglm": fingerprint(bundle.coglm),
        "tokenizer": fingerprint(bundle.tokenizer),
    }
    manifest = Manifest(manifests.FEATURES, len(source), shard_size, None, settings)
    manifests.require_same(folder, manifest)

    def read(item: Input, number: int) -> tuple[tuple[Any, str], list[Any]]:
        caption = readable_caption(item, cv)
        return (open_picture(item.picture), caption), []

    def write(items: Sequence[tuple[Any, str]]) -> list[list[bytes]]:
        tokens = [cv.picture_tokens(picture) for picture, _ in items]
        losses = caption_losses(cv, tokens, [caption for _, caption in items])
        return [[np.asarray(loss, "<f4").tobytes()] for loss in losses]

    recipe = Recipe(read, write, SCORED_AT_ONCE)
    return run(Work(source, manifest, recipe), folder, workers, progress)


def readable_caption(item: Input, cv: CogView, style: str | None = PLAIN) -> str:
    """The first caption of an input. Raises Refused if it has none, and if the model cannot read
    it in a style.
    """
    words = [words for captions in item.captions for words in captions.values() if words.strip()]
    if not words:
        raise Refused("empty caption", "no caption", item.name)
    config = cv.bundle.coglm_config
    styled = in_style(find_style(cv.bundle.styles, style), words[0])
    try:
        text.encode_prompt(cv.bundle.text_model, styled, config.vocabulary, config.max_text)
    except TextError as error:
        raise refused_text(error, "caption", item.name) from error
    return words[0]


def read_caption_losses(folder: Path) -> Iterator[np.ndarray]:
    """The losses in a folder of `write_caption_losses`, float32 [n] for each shard, in order.

    Raises ValueError if the folder is not complete, is damaged or holds something else.
    """
    manifest = manifests.read(folder)
    if manifest.settings.get("measure") != _LOSS:
        raise ValueError(f"{folder} has no caption losses")
    for rows in read_rows(folder, manifest, 1):
        yield rows[:, 0]


def mean_loss(folder: Path) -> dict[str, float]:
    """The mean of the losses in a folder, and its error. Raises as `read_caption_losses`."""
    losses = np.concatenate(list(read_caption_losses(folder)))
    error = losses.std(ddof=min(1, len(losses) - 1)) / np.sqrt(len(losses))
    return {"mean": float(losses.mean()), "standard_error": float(error)}


def clip_scores(pictures: np.ndarray, captions: np.ndarray, scale: float = 100.0) -> np.ndarray:
    """`scale` times the cosine of each picture's embedding to its caption's, at least 0: float32
    [n] (CLIPScore, Hessel et al., arXiv 2104.08718, with the scale of 100 that is usual today).

    Both are [n, d], of any text–image encoder. Raises ValueError for other shapes, values that are
    not finite, and embeddings of length 0.
    """
    pictures, captions = (np.asarray(each, np.float64) for each in (pictures, captions))
    if pictures.ndim != 2 or pictures.shape != captions.shape:
        raise ValueError(
            f"embeddings must be [n, d], of as many pictures as captions: got"
            f" {list(pictures.shape)} and {list(captions.shape)}"
        )
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(captions, axis=1)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ValueError("embeddings must be finite, and none of length 0")
    cosines = (pictures * captions).sum(1) / lengths
    return (scale * np.maximum(cosines, 0)).astype(np.float32)
