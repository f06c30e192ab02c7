"""What experiments share: the model of --bundle, its prompts and logits, the record of --json."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import cogview2_jax
from cogview2_jax.data.sources import Input, Scenes
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.prompts import PromptTokens, prompt_tokens


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


def write(file: Path, figures: dict[str, Any], bundle: Path | None, begin: float) -> None:
    """Write figures as JSON, with the bundle's name, the time since `begin` and jax's version."""
    circumstances = {
        "bundle": bundle.name if bundle else None,
        "seconds": round(time.monotonic() - begin, 1),
        "jax": jax.__version__,
    }
    file.write_text(json.dumps(figures | circumstances, indent=2) + "\n", "utf-8")
