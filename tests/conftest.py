"""A tiny model with random weights, for everything that composes the networks."""

from pathlib import Path

import jax
import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import (
    ClusterSampling,
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    Sampling,
    TransformerConfig,
)
from cogview2_jax.tokenizer import text
from tests.common import SMALL_TOKENIZER

CODES, CLUSTERS = SMALL_TOKENIZER.codebook_size, 8
SENTENCES = (
    "a red circle above a striped blue square",
    "a small green star on the left",
    "a dotted yellow heart below a purple cross",
    "蓝色条纹正方形上方的红色圆",
    "左边的绿色星形",
)
WORDS = ("蓝色", "条纹", "正方形", "上方", "红色", "左边", "绿色", "星形")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


def tiny_bundle() -> bundles.Bundle:
    """Coarse grid 4×4, fine 12×12 (96 px); two layers of 32; at most 12 tokens of text."""
    model = text.load_text_model(text.train_text_model(SENTENCES, words=WORDS))
    vocabulary = text.vocabulary_for(model, CODES)
    transformer = TransformerConfig(num_layers=2, hidden_size=32, num_heads=4)
    base = CogLMConfig(
        transformer, vocabulary, (4, 4), max_text=12, num_positions=40, image_position=16
    )
    # Fewer text slots than the base model has: longer prompts are cut.
    direct = DirectSRConfig(base, text_slots=10)
    iterative = IterativeSRConfig(
        transformer, vocabulary, direct.grid, text_slots=6, num_positions=8
    )
    sampling = Sampling(
        ClusterSampling(1.0, 4), ClusterSampling(1.0, 4), iterative_top_k=(20, 20, 20, 10, 10, 5)
    )
    rng = np.random.default_rng(0)
    empty = bundles.Bundle(
        base,
        direct,
        iterative,
        SMALL_TOKENIZER,
        sampling,
        {},
        {},
        {},
        {},
        model,
        rng.integers(0, CLUSTERS, CODES).astype(np.int32),
    )
    flat = {}
    for name, shape in bundles.expected_shapes(base, direct, iterative, SMALL_TOKENIZER).items():
        if "/" in name:  # cluster labels are no network's
            # Rounded, so that saving changes nothing; large enough that logits differ clearly.
            values = 0.3 * rng.standard_normal(shape) + name.endswith("/scale")
            flat[name] = values.astype(np.float16).astype(np.float32)
    return empty._replace(**bundles.nest(flat))


@pytest.fixture(scope="session")
def tiny() -> bundles.Bundle:
    return tiny_bundle()


@pytest.fixture(scope="session")
def tiny_folder(tiny: bundles.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    bundles.save(folder, tiny)
    return folder
