"""Errors of logits, and the sizes that they are bought with."""

import jax
import numpy as np
import pytest

from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.sharding import Execution
from experiments import results
from experiments.precision import run


def test_errors_are_of_the_largest_and_of_all():
    exact = np.array([[[0.0, 1.0], [2.0, 1.0]]])
    found = exact + np.array([[[0.5, 0.0], [0.0, 1.5]]])
    assert run.errors(found, exact) == {
        "largest_logit_error": 1.5,
        "mean_logit_error": 0.5,
        "same_first_choice": 0.5,
    }


def test_each_precision_is_smaller_and_near(tiny):
    rng = np.random.default_rng(0)
    tokens, texts = rng.integers(0, 64, (2, 16)), ["a red circle", "蓝色条纹正方形"]
    sizes, exact = [], None
    for precision in run.PRECISIONS.values():
        cv = CogView(tiny, Execution(precision))
        sizes.append(run.megabytes(cv))
        logits = np.asarray(results.image_logits(cv, tokens, texts))
        exact = logits if exact is None else exact
        assert run.errors(logits, exact)["mean_logit_error"] < 0.1 * np.abs(exact).mean()
    assert sizes[0] == 2 * sizes[1] and sizes[2] < sizes[0] and sizes[3] < sizes[1]
    assert sizes[0] == pytest.approx(
        sum(
            leaf.nbytes
            for name in ("coglm", "direct", "iterative")
            for leaf in jax.tree.leaves(getattr(tiny, name))
        )
        / 1e6
    )
