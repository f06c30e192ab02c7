"""Scenes as tokens: the text model, and records of any part of the train split, kept on disk."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

from cogview2_jax import pipeline
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import text
from experiments.scenes.presets import (
    COARSE_PIXELS,
    COARSE_STRIDE,
    FINE_PIXELS,
    FINE_STRIDE,
    TOKENIZER,
)

CAPTIONS = 2  # of a scene, in each language and order


class Tokens(NamedTuple):
    """`texts` int32 [n, languages, orders, captions, slots], −1 after each text; order 0 names
    the object further up or left first, order 1 the other.

    `coarse` int32 [n, 64] and `fine` int32 [n, 576], raster order; `objects` bool [n, 576], fine
    cells that hold a part of an object; `repainted` int32 [n, 64], coarse tokens of the scene in
    other colours and fills. All but `texts` and `coarse` are empty where they were not asked for.
    """

    texts: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    objects: np.ndarray
    repainted: np.ndarray


def text_model(directory: Path, num_captions: int = 20_000) -> spm.SentencePieceProcessor:
    """The text model of the captions of the train split, trained once."""
    file = directory / "text.model"
    if not file.exists():
        rng = np.random.default_rng(31)
        drawn = [scenes.sample_scene(rng) for _ in range(num_captions // 2)]
        captions = [
            scenes.caption(scene, rng, lang) for scene in drawn for lang in scenes.LANGUAGES
        ]
        content = text.train_text_model(captions, words=scenes.WORDS["zh"])
        directory.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return text.load_text_model(file)


def _pixels(picture: Any, side: int) -> np.ndarray:
    return np.asarray(picture.reduce(scenes.CANVAS // side) if side < scenes.CANVAS else picture)


def _texts(
    scene: scenes.Scene, number: int, model: spm.SentencePieceProcessor, slots: int
) -> np.ndarray:
    rng = np.random.default_rng((41, number))
    before = int(np.argmin([item.x + item.y for item in scene.objects]))
    texts = np.full((len(scenes.LANGUAGES), 2, CAPTIONS, slots), -1, np.int32)
    for language, order, row in np.ndindex(texts.shape[:-1]):
        first = before if order == 0 else 1 - before
        caption = scenes.caption(scene, rng, scenes.LANGUAGES[language], first)
        ids = text.encode(model, caption, TOKENIZER.codebook_size, max_tokens=slots)
        texts[language, order, row, : len(ids)] = ids
    return texts


def _repainted(scene: scenes.Scene, number: int) -> scenes.Scene:
    rng = np.random.default_rng((42, number))
    objects = [
        dataclasses.replace(
            item, colour=str(rng.choice(list(scenes.COLOURS))), fill=str(rng.choice(scenes.FILLS))
        )
        for item in scene.objects
    ]
    return dataclasses.replace(scene, objects=tuple(objects))


def tokenize(
    directory: Path,
    tokenizer_params: Any,
    model: spm.SentencePieceProcessor,
    indices: range,
    *,
    slots: int,
    fine: bool,
    batch_size: int = 32,
) -> Tokens:
    """Records of examples `indices` of the train split; from `directory` if they are there."""
    kind = "fine" if fine else "coarse"
    file = directory / f"tokens_{indices.start}_{indices.stop}_{kind}.npz"
    if file.exists():
        with np.load(file) as arrays:
            return Tokens(*(arrays[name] for name in Tokens._fields))

    def encode(pixels: np.ndarray, stride: int) -> np.ndarray:
        made = pipeline.to_tokens(tokenizer_params, pixels, stride=stride, config=TOKENIZER)
        return np.asarray(made)

    size = batch_size if not fine else batch_size // 4
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Tokens._fields}
    for start in tqdm(range(indices.start, indices.stop, size), desc=file.stem):
        examples = [scenes.example("train", start + i) for i in range(size)]
        for number, each in enumerate(examples, start):
            parts["texts"].append(_texts(each.scene, number, model, slots))
        small = np.stack([_pixels(each.image, COARSE_PIXELS) for each in examples])
        parts["coarse"].extend(encode(small, COARSE_STRIDE))
        if fine:
            others = [
                scenes.draw(_repainted(each.scene, number))
                for number, each in enumerate(examples, start)
            ]
            small = np.stack([_pixels(other, COARSE_PIXELS) for other in others])
            parts["repainted"].extend(encode(small, COARSE_STRIDE))
            large = np.stack([_pixels(each.image, FINE_PIXELS) for each in examples])
            parts["fine"].extend(encode(large, FINE_STRIDE))
            for each, pixels in zip(examples, large.astype(np.int32), strict=True):
                background = np.array(scenes.BACKGROUNDS[each.scene.background])
                on = np.abs(pixels - background).max(axis=-1) > 4
                side = FINE_PIXELS // FINE_STRIDE
                on = on.reshape(side, FINE_STRIDE, side, FINE_STRIDE).any(axis=(1, 3))
                parts["objects"].append(on.reshape(-1))
    made = Tokens(*(np.array(parts[name])[: len(indices)] for name in Tokens._fields))
    temporary = file.with_suffix(".partial.npz")
    np.savez(temporary, **made._asdict())
    temporary.rename(file)
    return made
