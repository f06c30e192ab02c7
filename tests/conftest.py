"""A tiny model with random weights, for tests of several networks together."""

from pathlib import Path
from typing import Any

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
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.tokenizer import image, text
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)


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
    labels = rng.integers(0, CLUSTERS, CODES).astype(np.int32)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        # Rounded, so that saving changes nothing; large enough that logits differ clearly.
        values = 0.3 * rng.standard_normal(like.shape) + (path[-1].key == "scale")
        return values.astype(np.float16).astype(np.float32)

    def init(key: jax.Array) -> dict[str, Any]:
        return {
            "coglm": coglm.init_params(key, base),
            "direct": direct_sr.init_params(key, direct),
            "iterative": iterative_sr.init_params(key, iterative),
            "tokenizer": image.init_params(key, SMALL_TOKENIZER),
        }

    shapes = jax.eval_shape(init, jax.random.key(0))
    return bundles.Bundle(
        base,
        direct,
        iterative,
        SMALL_TOKENIZER,
        sampling,
        **jax.tree_util.tree_map_with_path(leaf, shapes),
        text_model=model,
        cluster_labels=labels,
    )


@pytest.fixture(scope="session")
def tiny() -> bundles.Bundle:
    return tiny_bundle()


@pytest.fixture(scope="session")
def tiny_folder(tiny: bundles.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    bundles.save(folder, tiny)
    return folder
