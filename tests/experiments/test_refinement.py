"""The ways of refining: each redraws the same cells, once, in rounds of as many."""

import numpy as np
import pytest

from cogview2_jax.config import IterativeSRConfig
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline.cogview import CogView
from experiments.refinement import points
from experiments.refinement.points import Point

PROMPTS = ["a red circle", "左边的绿色星形"]


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


def test_halton_reaches_every_cell_once_and_spreads():
    ranks = points.halton_ranks((6, 9))
    assert sorted(ranks.reshape(-1)) == list(range(54))
    first = np.argwhere(ranks < 12)  # in every quarter of the grid
    assert {(y >= 3, x >= 5) for y, x in first} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_all_orders_redraw_the_cells_of_the_published_one():
    config = IterativeSRConfig(grid=(24, 24))
    published = inputs.lopar_schedule(config)[0]
    made = [*points.rounds(config), *points.orders(config), *points.one_by_one(config)]
    assert len({point.setting for point in made}) == len(made)
    for point in made:
        schedule = inputs.lopar_schedule(point.config)
        assert len(schedule) == point.config.rounds
        np.testing.assert_array_equal(schedule[0], published, err_msg=point.setting)
        # A cell is final after its round: later rounds mask ever fewer.
        assert (schedule[1:] <= schedule[:-1]).all() and schedule[-1].any()
        final = -np.diff(np.append(schedule.sum(1), 0))
        if point.family == "orders" and not point.by_confidence:
            assert final.max() - final.min() <= 24 * 24 // 36 + 1, point.setting


@pytest.mark.parametrize("by_confidence", [False, True])
def test_a_point_redraws_its_cells_alone(by_confidence, cv):
    config = cv.bundle.iterative_config
    start = np.random.default_rng(0).integers(0, 64, (2, 2, config.num_image_tokens))
    point = Point("orders", "one", config, by_confidence=by_confidence)
    drawn = points.refined(cv, point, PROMPTS, start, at_once=2)
    changes = inputs.lopar_schedule(config)[0]
    np.testing.assert_array_equal(drawn[..., ~changes], start[..., ~changes])
    assert (drawn != start)[..., changes].mean() > 0.5 and drawn.min() >= 0 and drawn.max() < 64
    np.testing.assert_array_equal(points.refined(cv, point, PROMPTS, start, at_once=2), drawn)
    none = Point("stages", "direct alone", None)
    assert points.refined(cv, none, PROMPTS, start) is start


def test_the_enlarged_picture_has_tokens_of_the_fine_grid(cv):
    coarse = np.random.default_rng(0).integers(0, 64, (2, 1, 16)).astype(np.int32)
    fine = points.enlarged(cv, coarse)
    assert fine.shape == (2, 1, cv.bundle.iterative_config.num_image_tokens)
