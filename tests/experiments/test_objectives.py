"""An objective that stops learning is noticed, and so is an ablation that changes too much."""

import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.training.batches import FineSample
from experiments.objectives import ablations, figures, overfit, run


@pytest.fixture(scope="module")
def bundle():
    if not bundles.SHIPPED.exists():
        pytest.skip("this checkout has no bundle")
    return bundles.load(None, ("tokenizer",))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


OBJECTIVES = ("image tokenizer", *overfit.MIXES, "direct SR", "iterative SR")
LONG = {"image tokenizer", "direct SR", "iterative SR"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in OBJECTIVES],
)
def test_every_objective_teaches_its_network(objective, bundle, work):
    runs = overfit.runs(bundle, overfit.QUICK, work)
    assert set(runs) == set(OBJECTIVES)
    curve = runs[objective]()
    assert curve.steps[0] == 1
    assert curve.left < run.QUICK_LIMIT


def test_scattered_masks_hide_as_many_cells_with_the_same_weights():
    masked = np.arange(12).reshape(2, 6) % 3 == 0
    weights = np.where(np.arange(12).reshape(2, 6) % 6 == 0, 2, 1).astype(np.float32)
    empty = np.zeros((2, 0), np.int32)
    batch = FineSample(empty, empty, empty, empty, masked, weights)
    read = ablations.scattered(lambda step: batch, seed=0)
    found = [read(step) for step in range(8)]
    for one in found:
        counted = np.where(one.masked, one.weights, 0)
        np.testing.assert_array_equal(
            np.sort(counted, axis=1), np.sort(np.where(masked, weights, 0), axis=1)
        )
    assert len({one.masked.tobytes() for one in found}) > 1
    np.testing.assert_array_equal(found[3].masked, read(3).masked)


def test_what_is_left_is_a_share_of_the_first_loss():
    curve = figures.Curve([1, 2, 3], [8.0, 0.3, 0.2])
    assert curve.left == 0.025
    assert run.overfit_figures(curve, 0.05)["first_step_below"] == 2
    assert run.overfit_figures(curve, 0.01)["first_step_below"] is None


def test_both_languages_and_all_strides_are_averaged():
    found = ablations._summed({"english": 1.0, "chinese": 2.0, "image": 5.0})
    assert found["caption"] == 1.5
    found = ablations._summed({"reconstruction_4": 0.1, "reconstruction_8": 0.3})
    assert found["reconstruction"] == 0.2
