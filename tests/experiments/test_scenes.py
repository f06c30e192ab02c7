"""The Scenes training: its inputs, and all of it on a few scenes with tiny networks."""

import dataclasses

import jax
import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import TransformerConfig
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import image
from experiments.scenes import inputs, presets, train
from tests.common import SMALL_TOKENIZER

SIZES = TransformerConfig(num_layers=1, hidden_size=16, num_heads=2)


def test_captions_in_order_name_the_upper_or_left_object_first():
    source = inputs.InOrder(40)
    relations = set()
    for index in range(len(source)):
        (captions,) = source[index].captions
        for language in scenes.LANGUAGES:
            claims = scenes.parse_caption(captions[language])
            verdict = scenes.check(claims, scenes.example_scene("train", index).objects)
            assert verdict.all_named
            if language == "en":
                relations.add(claims.relation)
    assert relations == {None, "above", "left of"}


def test_cuts_are_whole_scenes_or_parts_with_the_same_cells():
    found = {"whole": 0, "part": 0}
    for index in range(30):
        cut = np.asarray(inputs.Cuts(30)[index].picture)
        assert cut.shape == (64, 64, 3)
        picture = scenes.example("train", index).image
        if (cut == np.asarray(picture.reduce(3))).all():
            found["whole"] += 1
        else:
            large = np.asarray(picture)
            corners = [(y, x) for y in range(0, 129, 8) for x in range(0, 129, 8)]
            assert any((large[y : y + 64, x : x + 64] == cut).all() for y, x in corners)
            assert inputs.on_object(cut.astype(np.float32)).any()
            found["part"] += 1
    assert found["whole"] > 10 and found["part"] > 4


def test_repainted_scenes_keep_shapes_and_captions_and_change_colours():
    changed = 0
    for index in range(10):
        example, other = scenes.example("train", index), inputs.Repainted(10)[index]
        assert other.captions == (example.captions,)
        ours, theirs = (
            inputs.on_object(np.asarray(p, np.float32)) for p in (example.image, other.picture)
        )
        assert (
            ours == theirs
        ).mean() > 0.95  # the outline stays; some fills let the ground through
        changed += (np.asarray(example.image) != np.asarray(other.picture)).any()
    assert changed >= 9


def test_cells_of_objects_are_where_the_objects_are():
    for index in range(5):
        cells = inputs.object_cells(index).reshape(24, 24)
        assert 0 < cells.sum() < cells.size
        for item in scenes.example_scene("train", index).objects:
            assert cells[item.y // 8, item.x // 8]


@pytest.mark.long
def test_all_parts_are_trained_and_a_finished_training_is_not_repeated(monkeypatch, tmp_path):
    def narrow(make):
        def made(vocabulary):
            config = make(vocabulary)
            if hasattr(config, "coglm"):
                base = dataclasses.replace(config.coglm, transformer=SIZES)
                return dataclasses.replace(config, coglm=base)
            return dataclasses.replace(config, transformer=SIZES)

        return made

    for name in ("coglm_config", "direct_sr_config", "iterative_sr_config"):
        monkeypatch.setattr(presets, name, narrow(getattr(presets, name)))
    monkeypatch.setattr(presets, "TOKENIZER", SMALL_TOKENIZER)
    monkeypatch.setattr(presets, "NUM_CLUSTERS", 8)
    for name in ("TOKENIZER", "OTHER_STRIDES", "IN_ORDER", "BOTH_ORDERS", "DIRECT", "ITERATIVE"):
        few = dataclasses.replace(getattr(train, name), num_steps=2000, batch_size=2)
        monkeypatch.setattr(train, name, few)
    for name in ("NUM_CUTS", "NUM_SCENES", "NUM_FINE"):
        monkeypatch.setattr(train, name, 8000)

    made = train.train(tmp_path / "work", share=0.001)
    bundles.save(tmp_path / "bundle", made)
    loaded = bundles.load(tmp_path / "bundle")
    for network in bundles.NETWORKS:
        leaves = jax.tree.leaves(getattr(loaded, network))
        assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    again = train.train(tmp_path / "work", share=0.001)
    for network in bundles.NETWORKS:
        jax.tree.map(np.testing.assert_array_equal, getattr(made, network), getattr(again, network))
    # Records that were made before the other strides were trained are still right.
    drafts = np.load(tmp_path / "work" / "drafts.npy")
    assert drafts.shape == (16, 576) and (drafts >= 0).all()
    assert image.used_by(made.tokenizer, (8,), SMALL_TOKENIZER)["encoder"]
