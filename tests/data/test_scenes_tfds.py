import sys

import numpy as np
import pytest

from cogview2_jax.data import scenes

pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    from cogview2_jax.data.scenes_tfds import Scenes

    lengths = {"train": 23, "composition": 5}
    builder = Scenes(data_dir=tmp_path_factory.mktemp("scenes"), lengths=lengths)
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize(("split", "length"), [("train", 23), ("composition", 5)])
def test_record_i_is_example_i(builder, split, length):
    source = builder.as_data_source(split=split)
    assert len(source) == length
    labels = builder.info.features["objects"].feature
    for index in range(length):
        record, example = source[index], scenes.example(split, index)
        np.testing.assert_array_equal(record["image"], np.asarray(example.image))
        assert record["caption_en"].decode() == example.captions["en"]
        assert record["caption_zh"].decode() == example.captions["zh"]
        assert list(scenes.BACKGROUNDS)[record["background"]] == example.scene.background
        for number, item in enumerate(example.scene.objects):
            for name in ("shape", "colour", "size", "fill"):
                label = record["objects"][name][number]
                assert labels[name].int2str(label) == getattr(item, name)
            assert record["objects"]["x"][number] == item.x
            assert record["objects"]["y"][number] == item.y


def test_it_is_array_record_without_tensorflow(builder):
    files = sorted(builder.data_path.glob("*.array_record*"))
    assert files
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("lengths", [{}, {"train": 0}, {"trian": 10}])
def test_bad_lengths_are_refused(tmp_path, lengths):
    from cogview2_jax.data.scenes_tfds import Scenes

    with pytest.raises(ValueError, match="split"):
        Scenes(data_dir=tmp_path, lengths=lengths)
