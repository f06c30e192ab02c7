"""Pictures drawn for the captions of a data set."""

import threading

import jax
import numpy as np
import pytest

from cogview2_jax.data import sources
from cogview2_jax.data.sources import Input
from cogview2_jax.evaluation.drawing import Drawings, write_drawings
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.tokenizer.pictures import open_picture

WORDS = (
    "a red circle",
    "左边的绿色星形",
    "a zebra",
    "a red circle",
    "",
    "a purple cross",
    "a star",
)


class Captions:
    """Captions without pictures."""

    fingerprint = {"source": "captions"}

    def __len__(self):
        return len(WORDS)

    def __getitem__(self, index):
        return Input(f"row {index}", b"", ({"text": WORDS[index]},))


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


def draw(cv, folder, **how):
    how = {"stage": "base", "candidates": 1, "batch_size": 2, "shard_size": 3} | how
    return write_drawings(Captions(), folder, cv, **how)


@pytest.fixture(scope="module")
def drawn(cv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    report = draw(cv, folder)
    assert (report.records, report.complete) == (5, True)
    assert report.refused == {"unknown words": 1, "empty caption": 1}
    return folder


def test_a_picture_depends_on_its_row_alone(cv, drawn):
    found = Drawings(drawn)
    items = [found[number] for number in range(len(found))]
    pictures = {item.name: np.asarray(open_picture(item.picture)) for item in items}
    assert list(pictures) == [f"drawn/{n}" for n in (0, 1, 3, 5, 6)]
    for number in (0, 1, 3, 6):
        expected = cv.generate_stages(
            [WORDS[number]], jax.random.key(0), 1, candidates=1, stages=("base",), first=number
        )["base"][0, 0]
        np.testing.assert_array_equal(pictures[f"drawn/{number}"], expected)
    # One caption, two rows.
    assert (pictures["drawn/0"] != pictures["drawn/3"]).any()
    assert found[2].captions == ({"prompt": "a red circle"},)


def test_several_at_once_and_the_rest_later_draw_the_same(cv, drawn, tmp_path):
    def records(folder):
        return {file.name: file.read_bytes() for file in folder.glob("records-*")}

    draw(cv, tmp_path / "two", workers=3)
    first = next((tmp_path / "two").glob("records-00001-of-*.array_record"))
    first.unlink()
    threads = [threading.Thread(target=draw, args=(cv, tmp_path / "two")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert draw(cv, tmp_path / "two").complete
    assert records(tmp_path / "two") == records(drawn)
    assert (tmp_path / "two" / "refused.jsonl").read_bytes() == (
        drawn / "refused.jsonl"
    ).read_bytes()


def test_a_folder_of_other_settings_is_refused(cv, drawn, tmp_path):
    with pytest.raises(ValueError, match="seed"):
        draw(cv, drawn, seed=1)
    with pytest.raises(FileNotFoundError):
        Drawings(tmp_path)


def test_a_sample_has_each_input_once_with_one_caption():
    class Many:
        fingerprint = {"source": "many"}

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return Input(str(index), b"", tuple({"text": f"{index} {n}"} for n in range(5)))

    sample = sources.Sampled(Many(), 25, seed=3)
    items = [sample[n] for n in range(25)]
    names = [int(item.name) for item in items]
    assert names == sorted(set(names)) and len(names) == 25 < max(names)
    texts = [words for item in items for words in item.captions[0].values()]
    assert all(text.split()[0] == item.name for text, item in zip(texts, items, strict=True))
    assert len({text.split()[1] for text in texts}) > 2
    again = sources.Sampled(Many(), 25, seed=3)
    assert [again[n] for n in range(25)] == items
    other = sources.Sampled(Many(), 25, seed=4)
    assert [other[n] for n in range(25)] != items and other.fingerprint != again.fingerprint
    with pytest.raises(ValueError, match="from 1 to the 40 inputs: got 41"):
        sources.Sampled(Many(), 41)
