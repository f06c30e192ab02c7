"""Illustrations as examples, and their records in memory."""

import numpy as np
import pytest

from cogview2_jax.config import Vocabulary
from cogview2_jax.data import reading
from cogview2_jax.data.illustrations import STYLES, Item
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.training.options import Options
from experiments.illustrations import examples, memory, train
from experiments.illustrations.presets import COARSE_PIXELS, FINE_PIXELS


@pytest.fixture(scope="module")
def collection():
    rng = np.random.default_rng(0)
    pictures = np.full((8, FINE_PIXELS, FINE_PIXELS, 3), 255, np.uint8)
    pictures[:, 60:120, 60:120] = rng.integers(0, 200, (8, 1, 1, 3))
    splits = ["train"] * 6 + ["unseen_pair", "validation"]
    items = [
        Item("", f"thing-{n}", list(STYLES)[n % 2], f"thing {n}", f"东西{n}", "food", split)
        for n, split in enumerate(splits)
    ]
    return examples.Collection(pictures, items)


def test_examples_show_what_is_known_and_nothing_held_out(collection):
    parts = list(examples.to_train(collection, at_once=10))
    assert all(len(part) <= 10 for part in parts)
    made = sum(parts, [])
    assert len(made) == 6 * examples.VARIANTS + round(6 * examples.FRAMES)
    words = " ".join(caption for example in made for caption in example.captions)
    assert "thing 5" in words and "thing 6" not in words and "thing 7" not in words
    assert all(example.picture.shape == collection.pictures.shape[1:] for example in made)
    first = made[0]
    assert (first.picture == collection.pictures[0]).all()
    assert len(first.captions) == 9 and "thing 0, 3D" in first.captions  # every caption
    several = examples.VARIANTS
    assert [len(example.captions) for example in made[1 : several + 1]] == [2] * (several - 1) + [9]
    again = sum(examples.to_train(collection), [])
    assert all((a.picture == b.picture).all() for a, b in zip(made, again, strict=True))
    (unseen,) = examples.to_validate(collection)
    assert "thing 7" in unseen.captions[0] and "东西7" in unseen.captions[1]


def test_variants_are_smaller_and_elsewhere(collection):
    def extent(picture):
        cells = np.argwhere((picture < 230).any(-1))
        return cells.min(0), cells.max(0) + 1

    (top, left), (bottom, right) = extent(collection.pictures[0])
    sizes = []
    for seed in range(20):
        varied = examples.varied(collection.pictures[0], np.random.default_rng(seed))
        begin, end = extent(varied)
        sizes.append((end - begin).max() / (bottom - top))
    assert examples.SMALLEST - 0.05 < min(sizes) < 0.95 < max(sizes) <= 1.05
    assert examples.reduced(collection.pictures).shape[1:3] == (COARSE_PIXELS,) * 2


def test_records_in_memory_are_read_as_those_of_a_folder():
    vocabulary = Vocabulary(16, 40, 20, 17, 30, as_published=False)
    layout = RecordLayout(text_slots=3, stride=8, sizes=(16,), vocabulary=vocabulary)
    rows = np.arange(10 * layout.length, dtype=np.int32).reshape(10, -1)
    options = Options(5, 4, seed=3)
    data = memory.token_data(rows[:8], rows[8:], layout=layout, options=options, name="test")
    batch = data.rows(2)
    assert (batch.records == rows[data.ids_of(2)]).all() and batch.batch_size == 4
    assert (data.rows(2).records == batch.records).all()
    assert {row[0] for row in data.validation_rows(0).records} == {rows[8][0], rows[9][0]}
    assert reading.opened(data.records) is data.records
    other = memory.token_data(
        rows[1:9], rows[8:], layout=layout, options=options, name="test"
    ).records.manifest
    assert other.settings != data.records.manifest.settings  # so that no run goes on with them
    from_tokens = reading.tokens(data.records, 4, seed=1)[0]
    assert {tuple(row) for row in from_tokens} <= {tuple(row) for row in rows[:8]}


def test_what_is_kept_of_other_pictures_or_parameters_has_another_name(collection, tmp_path):
    one, other = ({"w": np.full(3, value)} for value in (1.0, 2.0))
    names = {
        train._file(tmp_path, "coarse", params, (items, 3))
        for params in (one, other)
        for items in (collection.items, collection.items[:4])
    }
    assert len(names) == 4
    assert train._file(tmp_path, "coarse", {"w": np.full(3, 1.0)}, (collection.items, 3)) in names
