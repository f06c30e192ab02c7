"""Strings → the text slots of each network, ids → strings, the ids that a caption may have, and the
key of every picture.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm

from cogview2_jax import config as configs
from cogview2_jax.keys import fold_in_all, one_key
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline.stages import CaptionIds
from cogview2_jax.tokenizer import text

Array = jax.Array


class PromptTokens(NamedTuple):
    """Prompts in the slots of each network: (tokens int32, is_text bool), [b, slots] each."""

    base: tuple[np.ndarray, np.ndarray]
    direct: tuple[np.ndarray, np.ndarray]
    iterative: tuple[np.ndarray, np.ndarray]
    english: np.ndarray  # bool [b]

    def repeat(self, number: int) -> "PromptTokens":
        """Each prompt `number` times in a row."""
        return self.take(np.repeat(np.arange(len(self.english)), number))

    def take(self, rows: np.ndarray) -> "PromptTokens":
        """The prompts with these numbers, int [b]."""
        taken: PromptTokens = jax.tree.map(lambda array: array[rows], self)
        return taken


def prompt_tokens(
    prompts: Sequence[str],
    model: spm.SentencePieceProcessor,
    base: configs.CogLMConfig,
    direct_slots: int,
    iterative_slots: int,
    *,
    start_token: bool = False,
) -> PromptTokens:
    """Prompts as tokens for every network; super-resolution gets as many as it has slots.

    With `start_token`, a `<start_of_image>` is the last token of each, as in the published editing.
    Raises ValueError, in one line, for no prompt and for one that `text.encode` refuses.
    """
    if not prompts:
        raise ValueError("prompts must have at least one: got none")
    vocabulary = base.vocabulary
    most = base.max_text - start_token
    ids = [text.encode_prompt(model, prompt, vocabulary, most) for prompt in prompts]
    english = np.array([text.is_english(row, vocabulary) for row in ids])
    if start_token:
        ids = [[*row, vocabulary.start_of_image] for row in ids]
    return PromptTokens(
        inputs.right_padded(ids, base.max_text, vocabulary),
        inputs.left_padded([row[:direct_slots] for row in ids], direct_slots, vocabulary),
        inputs.left_padded([row[:iterative_slots] for row in ids], iterative_slots, vocabulary),
        english,
    )


@functools.partial(jax.jit, static_argnames=("num_images",))
def image_keys(
    key: Array, prompt_hashes: Array, num_images: int, draw: Array, first: Array
) -> Array:
    """A key for every image of every prompt: [prompts · num_images].

    `prompt_hashes` is uint32 [prompts]. An image's key depends only on `key`, on its prompt, on its
    number, counted from `first` int32 [prompts], and on `draw` (the number of the candidate, or the
    stage).
    """
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(one_key(key), prompt_hashes)
    numbers = first[:, None] + jnp.arange(num_images)
    of_image = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(of_prompt, numbers)
    return fold_in_all(of_image.reshape(-1), draw)


def caption_text(
    ids: np.ndarray, model: spm.SentencePieceProcessor, vocabulary: configs.Vocabulary
) -> str:
    """Generated text ids as a string, up to the first pad or end piece."""
    ends = np.isin(ids, _end_ids(model, vocabulary))
    stop = int(np.argmax(ends)) if ends.any() else len(ids)
    return text.decode(model, ids[:stop].tolist(), vocabulary.num_image)


@functools.lru_cache(maxsize=8)
def caption_ids(
    model: spm.SentencePieceProcessor, vocabulary: configs.Vocabulary, language: str
) -> CaptionIds:
    """The text ids that a caption in `language` ("en" or "zh") may have, slot by slot.

    Raises ValueError for another language and for one in which the text model has no word.
    """
    allowed = text.language_ids(model, vocabulary, language)
    words = text.word_ids(model, vocabulary, language)
    if not words.any():
        raise ValueError(f"the text model has no word in {language}: ask for another language")
    first = allowed.copy()
    first[np.array(_end_ids(model, vocabulary)) - vocabulary.num_image] = False
    return CaptionIds(first, words, allowed)


def _end_ids(model: spm.SentencePieceProcessor, vocabulary: configs.Vocabulary) -> list[int]:
    end = model.eos_id()
    return [vocabulary.pad] + ([vocabulary.num_image + end] if end >= 0 else [])
