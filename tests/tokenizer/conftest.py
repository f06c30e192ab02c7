"""A text model of Scenes captions."""

import pytest

from cogview2_jax.tokenizer import text
from tests.tokenizer.captions import CHINESE_WORDS, NUM_IMAGE, captions


@pytest.fixture(scope="session")
def content() -> bytes:
    return text.train_text_model(captions(0, 1000), words=CHINESE_WORDS)


@pytest.fixture(scope="session")
def model(content):
    return text.load_text_model(content)


@pytest.fixture(scope="session")
def vocabulary(model):
    return text.vocabulary_for(model, NUM_IMAGE)
