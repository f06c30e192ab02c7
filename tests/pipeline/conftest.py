"""The tiny model as a pipeline. All tests draw two images at once, so that they share programs."""

import jax
import numpy as np
import pytest

from cogview2_jax.bundle import Bundle
from cogview2_jax.pipeline.cogview import CogView

PROMPT, OTHER = "a red circle above a striped blue square", "左边的绿色星形"


@pytest.fixture(scope="session")
def cv(tiny: Bundle) -> CogView:
    return CogView(tiny)


@pytest.fixture(scope="session")
def stages(cv: CogView) -> dict[str, np.ndarray]:
    """Two pictures of PROMPT after each stage, with key 0."""
    return cv.generate_stages([PROMPT], jax.random.key(0), 2)


def noise(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return values.astype(np.uint8)
