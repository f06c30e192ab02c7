"""The edits of experiments/editing, and what is right in their results."""

import dataclasses

import numpy as np
import pytest

from cogview2_jax.data import scenes
from experiments.caption_match import judge
from experiments.editing.run import make_task, measure, verdicts


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(0)
    return [make_task(rng, scenes.LANGUAGES[number % 2]) for number in range(40)]


def test_a_task_replaces_one_object_by_another_in_its_half(tasks):
    for task in tasks:
        new = [item for item in task.after.objects if item != task.kept]
        assert len(new) == 1 and task.kept in task.before.objects
        (old,) = (item for item in task.before.objects if item != task.kept)
        assert (old.x, old.y, old.size) == (new[0].x, new[0].y, new[0].size)
        assert old.shape != new[0].shape != task.kept.shape and old.colour != new[0].colour
        top, left, bottom, right = (edge * scenes.CANVAS for edge in task.box)
        assert top <= old.y < bottom and left <= old.x < right
        assert not (top <= task.kept.y < bottom and left <= task.kept.x < right)
        assert task.wanted in scenes.parse_caption(task.text).objects
        assert task.wanted.shape == new[0].shape
        assert task.wanted.colour in (None, new[0].colour)


def test_to_add_there_is_one_object_before():
    for number in range(20):
        task = make_task(np.random.default_rng(number), "en", "add")
        assert task.before.objects == (task.kept,) and len(task.after.objects) == 2
        assert verdicts(task, np.asarray(scenes.draw(task.after)), list(task.after.objects)) == {
            "replaced": True,
            "kept": True,
            "one": True,
            "unchanged": True,
        }


def test_clean_drawings_are_right_and_the_pictures_before_are_not(tasks):
    before = np.stack([np.asarray(scenes.draw(task.before)) for task in tasks])
    results = measure(tasks, {"before": before}, judge.load())
    assert results["drawing"] == {"replaced": 1, "kept": 1, "one": 1, "unchanged": 1}
    assert results["before"] == {"replaced": 0, "kept": 1, "one": 1, "unchanged": 1}


def test_what_is_wrong_is_counted(tasks):
    task = tasks[0]
    after = np.asarray(scenes.draw(task.after))
    (new,) = (item for item in task.after.objects if item != task.kept)
    right = [new, task.kept]
    assert all(verdicts(task, after, right).values())
    other = next(fill for fill in scenes.FILLS if fill != task.kept.fill)
    for wrong in (
        dataclasses.replace(task.kept, fill=other),
        dataclasses.replace(task.kept, x=task.kept.x + 20),
    ):
        assert not verdicts(task, after, [new, wrong])["kept"]
    assert not verdicts(task, after, [task.kept])["replaced"]
    assert not verdicts(task, after, [new, new, task.kept])["one"]
    assert not verdicts(task, 255 - after, right)["unchanged"]
