"""The comparison of samplers: each draws from its own distribution, and the figures are of it."""

from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.pipeline.cogview import CogView
from experiments import results
from experiments.caption_match import judged
from experiments.sampling import points, run
from experiments.sampling.points import Drawer

PROMPTS = ["a red circle above a blue square", "左边的绿色星形", "a purple cross"]


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


def families(cv):
    return [*points.samplers(), *points.cluster_counts(), *points.attention()]


def test_every_point_is_a_distribution(cv):
    logits = 3 * jax.random.normal(jax.random.key(0), (5, 64))
    labels = jnp.arange(64) % 8
    settings = [(point.family, point.setting) for point in families(cv)]
    assert len(set(settings)) == len(settings)
    for point in families(cv):
        found = point.probabilities(logits, labels, 8)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5, err_msg=point.setting)


def test_pictures_are_drawn_by_the_point_and_do_not_depend_on_calls(cv):
    greedy = next(point for point in families(cv) if point.setting == "k 1")
    free = next(point for point in families(cv) if point.setting == "k 1024")
    drawn = Drawer(cv, 2, at_once=2).draw(greedy, PROMPTS, 0)
    assert drawn.shape == (3, 2, 16)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    apart = Drawer(cv, 2, at_once=2).draw(free, PROMPTS, 0)
    assert (apart[:, 0] != apart[:, 1]).any(1).all()
    np.testing.assert_array_equal(apart, Drawer(cv, 2, at_once=2).draw(free, PROMPTS, 0))
    assert (apart != Drawer(cv, 2, at_once=2).draw(free, PROMPTS, 1)).any()


def test_up_weighting_changes_what_is_drawn(cv):
    weak, *_, strong = points.attention()
    drawer = Drawer(cv, 2, at_once=3)
    assert (drawer.draw(weak, PROMPTS, 0) != drawer.draw(strong, PROMPTS, 0)).any()


def test_what_is_cut_off_is_counted():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    two = next(p for p in points.samplers() if p.setting == "k 2")
    mass, never = points.cut_off(logits, jnp.array([2, 2]), two, jnp.zeros(3, int), 1)
    # Of equal tokens all are kept, so that the second row loses nothing.
    np.testing.assert_allclose(mass, [0.2, 0.0], atol=1e-6)
    assert never.tolist() == [True, False]


def test_the_distance_of_pictures():
    assert judged._apart(np.zeros((4, 9))) == 0
    assert judged._apart(np.array([[0.0] * 9, [1.0] * 9])) == pytest.approx(1)


def test_the_table_has_a_line_for_each_point():
    row = dict.fromkeys(("right", "right_error", "diversity", "diversity_error", "fid"), 0.25)
    row |= {"family": "top-k", "setting": "k 4", "cut_off": 0.125, "real_never_drawn": 0.5}
    head, line = run.table([row]).splitlines()
    assert line.split() == [*"top-k k 4 25.0 ± 25.0 0.2500 ± 0.2500 0.2500 12.50 50.00".split()]
    assert head.split()[-2:] == ["lost", "%"]


def test_parts_are_kept_only_of_the_same_settings_and_bundle(tmp_path):
    file, settings = tmp_path / "results.json", {"seed": 0, "num_prompts": 4}
    assert results.parts_before(file, settings, None) == {}
    results.write(file, settings | {"parts": {"one": [1]}}, None, 0.0)
    assert results.parts_before(file, settings, None) == {"one": [1]}
    before = file.read_bytes()
    for other, bundle in ((settings | {"seed": 1}, None), (settings, Path("mine"))):
        with pytest.raises(click.UsageError, match="give another --json"):
            results.parts_before(file, other, bundle)
    file.write_bytes(before[:50])
    with pytest.raises(click.UsageError, match="holds no results"):
        results.parts_before(file, settings, None)
