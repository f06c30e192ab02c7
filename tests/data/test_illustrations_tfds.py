import json
import sys

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item

pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures as `gather` makes it."""
    folder = tmp_path_factory.mktemp("illustrations")
    items = []
    for number, split in enumerate(("train", "unseen_pair", "train", "validation")):
        style = list(illustrations.STYLES)[number]
        file = f"pictures/{number}.png"
        names = f"thing-{number}", style, f"thing {number}", f"东西{number}"
        items.append(Item(file, *names, ("animals", "food")[number % 2], split))
        (folder / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 24), (10 * number, 20, 30)).save(folder / file)
    index = {"format": 1, "seed": 0, "items": [item._asdict() for item in items]}
    (folder / "index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.fixture(scope="module")
def builder(folder, tmp_path_factory):
    from cogview2_jax.data.illustrations_tfds import Illustrations

    builder = Illustrations(data_dir=tmp_path_factory.mktemp("data"), pictures=folder)
    builder.download_and_prepare()
    return builder


def test_records_are_the_pictures_of_a_split_in_order(builder, folder):
    assert set(builder.info.splits) == {"train", "unseen_pair", "validation"}
    source = builder.as_data_source(split="train")
    items = [item for item in illustrations.read_index(folder) if item.split == "train"]
    assert len(source) == len(items) == 2
    for record, item in zip(source, items, strict=True):
        np.testing.assert_array_equal(record["image"], np.asarray(Image.open(folder / item.file)))
        assert builder.info.features["style"].int2str(record["style"]) == item.style
        assert builder.info.features["kind"].int2str(record["kind"]) == item.kind
        assert record["thing"].decode() == item.thing
        assert record["chinese"].decode() == item.chinese
        captions = [caption.decode() for caption in record["caption_zh"]]
        assert captions == illustrations.single_captions(item, "zh")


def test_it_is_array_record_without_tensorflow(builder):
    assert sorted(builder.data_path.glob("*.array_record*"))
    assert "tensorflow" not in sys.modules


def test_another_folder_of_pictures_is_another_data_set(builder, folder, tmp_path):
    from cogview2_jax.data.illustrations_tfds import Illustrations

    index = json.loads((folder / "index.json").read_text("utf-8"))
    index["items"] = index["items"][:2]
    (tmp_path / "index.json").write_text(json.dumps(index), "utf-8")
    other = Illustrations(data_dir=builder.data_dir, pictures=tmp_path)
    assert other.data_dir != builder.data_dir
    with pytest.raises(FileNotFoundError, match="holds no illustrations"):
        Illustrations(data_dir=tmp_path, pictures=tmp_path / "nowhere")
