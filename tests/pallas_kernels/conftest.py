"""What the attention tests compare with, and how closely."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

# kind: largest error, absolute and (for gradients, which grow with the cotangents) relative to the
# largest number expected.
TOLERANCES = {
    "float32": 1e-5,  # sums of up to a few hundred float32 products in another order
    "bfloat16": 1e-2,  # 8 bits: rounding the result alone costs 2**-9 of it
    "float16": 2e-3,  # 11 bits: rounding the result alone costs 2**-12 of it
    "lse": 1e-5,  # float32 whatever the inputs are
    "golden": 1e-5,  # recorded in float32 by other code; 5e-7 was seen
    "exact": 0.0,
}


@pytest.fixture
def assert_close() -> Callable[..., None]:
    def check(actual, expected, kind: str) -> None:
        actual, expected = (np.asarray(a).astype(np.float32) for a in (actual, expected))
        assert actual.shape == expected.shape
        largest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[kind] * largest)

    return check


@pytest.fixture(autouse=True)
def full_precision():
    """GPUs multiply float32 in TF32 unless told not to, which no 1e-5 survives."""
    with jax.default_matmul_precision("highest"):
        yield
