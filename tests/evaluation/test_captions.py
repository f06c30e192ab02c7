"""How well pictures fit their captions."""

import json

import numpy as np
import pytest

from cogview2_jax.data.sources import CaptionsFile
from cogview2_jax.evaluation import captions
from cogview2_jax.pipeline.cogview import CogView
from tests.data.conftest import CHINESE, SENTENCE, picture


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    for number in range(len(lines)):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    rows = [{"image": f"{number}.jpg", "caption": line} for number, line in enumerate(lines)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "captions.jsonl"


def test_the_loss_is_what_rank_says(cv, tmp_path):
    said = [SENTENCE, CHINESE, "a red circle", SENTENCE, CHINESE] * 4
    source = CaptionsFile(write(tmp_path / "pictures", said))
    report = captions.write_caption_losses(source, tmp_path / "out", cv, shard_size=7)
    assert report.records == 20 and report.complete
    found = np.concatenate(list(captions.read_caption_losses(tmp_path / "out")))
    scores = cv.scores([SENTENCE, CHINESE], [tmp_path / "pictures" / f"{n}.jpg" for n in range(2)])
    np.testing.assert_allclose(found[:2], -scores.diagonal(), atol=1e-5)
    tokens = [cv.picture_tokens(tmp_path / "pictures" / f"{n}.jpg") for n in range(20)]
    np.testing.assert_allclose(captions.caption_losses(cv, tokens, said), found, atol=1e-5)
    assert (found > 0).all()


def test_captions_that_cannot_be_scored_are_refused(cv, tmp_path):
    said = [SENTENCE, "red " * 50, " ", [SENTENCE, CHINESE]]
    source = CaptionsFile(write(tmp_path / "pictures", said))
    report = captions.write_caption_losses(source, tmp_path / "out", cv)
    assert report.records == 2 and sum(report.refused.values()) == 2
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        captions.caption_losses(cv, [np.zeros(16, int)] * 2, [SENTENCE])
    assert captions.caption_losses(cv, [], []).shape == (0,)


def test_clip_scores_are_cosines():
    pictures = np.array([[2.0, 0], [1, 1], [-1, 0]])
    texts = np.array([[5.0, 0], [1, 0], [1, 0]])
    found = captions.clip_scores(pictures, texts)
    np.testing.assert_allclose(found, [100, 100 / np.sqrt(2), 0], rtol=1e-6)
    np.testing.assert_allclose(captions.clip_scores(pictures, texts, 2.5)[0], 2.5)
    for wrong in (texts[:2], texts[:, :1], texts[0]):
        with pytest.raises(ValueError, match="as many pictures as captions"):
            captions.clip_scores(pictures, wrong)
    for value in (0, np.nan):
        with pytest.raises(ValueError, match="finite, and none of length 0"):
            captions.clip_scores(pictures, texts * value)
