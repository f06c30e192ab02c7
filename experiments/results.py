"""What experiments share: the model of --bundle, its prompts and logits, the record of --json."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import cogview2_jax
from cogview2_jax import errors
from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.data.manifest import write_durably
from cogview2_jax.data.sources import Input, Scenes
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.prompts import PromptTokens, prompt_tokens
from cogview2_jax.tokenizer import image as image_tokenizer

bundle_option = click.option(
    "--bundle", type=click.Path(path_type=Path), help="A folder or a name. Default: scenes."
)


def load_model(bundle: Path | None) -> CogView:
    """The model of --bundle, or the one that ships. Raises UsageError for what cannot be loaded."""
    try:
        return cogview2_jax.load(bundle)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def prompts_of(cv: CogView, prompts: Sequence[str]) -> PromptTokens:
    """The tokens of prompts, for each network."""
    bundle = cv.bundle
    slots = bundle.direct_config.text_slots, bundle.iterative_config.text_slots
    return prompt_tokens(prompts, bundle.text_model, bundle.coglm_config, *slots)


def validation_scenes(number: int) -> list[Input]:
    """Scenes of the validation split, with an English caption each."""
    source = Scenes(number, "validation", ("en",))
    return [source[index] for index in range(number)]


def image_logits(cv: CogView, tokens: np.ndarray, texts: Sequence[str]) -> jax.Array:
    """CogLM's logits of the image tokens at each cell of pictures int32 [n, cells], given their
    captions: float32 [n, cells, num_image].
    """
    config, params = cv.bundle.coglm_config, cv.bundle.params("coglm")
    text, is_text = map(jnp.asarray, prompts_of(cv, texts).base)
    given = inputs.text_to_image(text, is_text, jnp.asarray(tokens), config)
    bias = inputs.text_key_bias(given.is_text, cv.bundle.sampling.text_upweight)
    how: dict[str, Any] = {"config": config, "execution": cv.execution}
    hidden = coglm.hidden_states(params, given, bias=bias, **how)
    before = hidden[:, config.max_text : -1]  # each slot predicts the next
    return coglm.logits(params, before, ids=(0, config.vocabulary.num_image), **how)


def super_resolved(
    cv: CogView, prompts: Sequence[str], tokens: np.ndarray, at_once: int = 50
) -> np.ndarray:
    """Base tokens int32 [prompts, n, cells] through direct super-resolution, as the bundle says:
    int32 [prompts, n, fine cells].
    """
    bundle, number = cv.bundle, tokens.shape[1]
    text, is_text = prompts_of(cv, prompts).direct

    def drawn(rows: np.ndarray, flat: np.ndarray) -> jax.Array:
        return stages.super_resolve_direct(
            bundle.params("direct"),
            text[rows // number],
            is_text[rows // number],
            flat[rows],
            jax.random.split(jax.random.key(rows[0]), len(rows)),
            bundle.cluster_labels,
            config=bundle.direct_config,
            sampling=bundle.sampling,
            num_clusters=bundle.num_clusters,
            execution=cv.execution,
        )

    return in_batches(drawn, tokens, at_once)


def pixels_of(cv: CogView, tokens: np.ndarray, at_once: int = 50) -> np.ndarray:
    """Fine tokens int32 [prompts, n, cells] as pictures: uint8 [prompts, n, y, x, 3]."""
    bundle = cv.bundle

    def pixels(rows: np.ndarray, flat: np.ndarray) -> jax.Array:
        return image_tokenizer.to_pixels(
            bundle.params("tokenizer"),
            flat[rows],
            grid=bundle.direct_config.grid,
            stride=TOKEN_STRIDE,
            config=bundle.tokenizer_config,
        )

    return in_batches(pixels, tokens, at_once)


def in_batches(
    function: Callable[[np.ndarray, np.ndarray], jax.Array], rows: np.ndarray, at_once: int
) -> np.ndarray:
    """`function` of numbers of rows [b] and all rows [prompts · n, …], for `rows` [prompts, n, …]:
    [prompts, n, …]. Every batch has one size; the last one repeats its last row.
    """
    flat, made = rows.reshape(-1, *rows.shape[2:]), []
    for begin in range(0, len(flat), at_once):
        chosen = np.arange(begin, begin + at_once).clip(max=len(flat) - 1)
        made.append(np.asarray(function(chosen, flat))[: len(flat) - begin])
    whole = np.concatenate(made)
    return whole.reshape(*rows.shape[:2], *whole.shape[1:])


def parts_before(
    file: Path | None, settings: dict[str, Any], bundle: Path | None
) -> dict[str, Any]:
    """The parts that `file` has of an earlier run: they are kept. Raises UsageError for a file that
    was made with other settings or another bundle, or is none of ours.
    """
    if file is None or not file.exists():
        return {}
    expected = settings | {"bundle": bundle.name if bundle else None}
    try:
        before = json.loads(file.read_text("utf-8"))
        parts = dict(before["parts"])
        found = {name: before[name] for name in expected}
    except (ValueError, LookupError, TypeError):
        raise click.UsageError(f"{file} holds no results: give another --json") from None
    if difference := errors.first_difference(found, expected):
        name, old, new = difference
        raise click.UsageError(f"{file} was made with {name} {old}, not {new}: give another --json")
    return parts


def write(file: Path, figures: dict[str, Any], bundle: Path | None, begin: float) -> None:
    """Write figures as JSON, with the bundle's name, the time since `begin` and jax's version."""
    circumstances = {
        "bundle": bundle.name if bundle else None,
        "seconds": round(time.monotonic() - begin, 1),
        "jax": jax.__version__,
    }
    write_durably(file, (json.dumps(figures | circumstances, indent=2) + "\n").encode())
