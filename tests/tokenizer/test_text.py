"""Text models: of the Scenes captions, and an ordinary SentencePiece model in place of the
published one.
"""

import io
import re

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cogview2_jax.config import Vocabulary
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import text

NUM_IMAGE = 1024
CHINESE_WORDS = (
    "圆 圆形 正方形 三角形 菱形 星形 星星 心形 十字 半圆 大 小"
    " 红色 橙色 黄色 绿色 青色 蓝色 紫色 粉色 纯色 条纹 圆点 格子"
    " 左边 右边 上方 下方 中间 一个 画面 图中 有 是 在 的 里 和"
).split()


def captions(seed: int, number: int) -> list[str]:
    rng = np.random.default_rng(seed)
    drawn = [scenes.sample_scene(rng) for _ in range(number)]
    return [scenes.caption(scene, rng, language) for scene in drawn for language in ("en", "zh")]


@pytest.fixture(scope="module")
def content() -> bytes:
    return text.train_text_model(captions(0, 1000), words=CHINESE_WORDS)


@pytest.fixture(scope="module")
def model(content):
    return text.load_text_model(content)


@pytest.fixture(scope="module")
def ordinary():
    """Trained the usual way: it can spell any letter, and has the published first pieces and
    `<n>`.
    """
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(0, 300)),
        model_writer=content,
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=3,
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    return text.load_text_model(content.getvalue())


def pieces(model):
    return model.id_to_piece(list(range(model.vocab_size())))


def test_every_caption_is_known_and_short(model):
    longest = 0
    for sentence in captions(1, 2000) + unseen_captions(2, 500):
        ids = text.encode(model, sentence, NUM_IMAGE)
        assert model.unk_id() + NUM_IMAGE not in ids
        longest = max(longest, len(ids))
    assert longest <= 22
    assert model.vocab_size() <= 100


def unseen_captions(seed, number):
    rng = np.random.default_rng(seed)
    drawn = [scenes.sample_scene(rng, pairs="unseen") for _ in range(number)]
    return [scenes.caption(scene, rng, language) for scene in drawn for language in ("en", "zh")]


def test_words_are_whole_pieces(model):
    known = set(pieces(model))
    english = " ".join(sentence for sentence in captions(0, 1000) if not text.is_chinese(sentence))
    assert {text.MARK + word for word in re.findall(r"\w+", english)} <= known
    assert set(CHINESE_WORDS) <= known
    assert model.encode("蓝色条纹正方形上方的红色圆", out_type=str) == (
        [text.MARK, *"蓝色 条纹 正方形 上方 的 红色 圆".split()]
    )


def test_training_is_deterministic_and_names_no_path(content):
    assert text.train_text_model(iter(captions(0, 1000)), words=CHINESE_WORDS[::-1]) == content
    assert not ModelProto.FromString(content).HasField("trainer_spec")


def test_what_a_user_types_is_normalised(model):
    plain = text.encode(model, "a red circle", NUM_IMAGE)
    for typed in (
        "A Red Circle",
        "a red circle.",
        "  a\tred \n circle!",
        "ａ ｒｅｄ　ＣＩＲＣＬＥ",
        "a red\u00a0circle",
    ):
        assert text.encode(model, typed, NUM_IMAGE) == plain, typed
    chinese = text.encode(model, "左边是红色圆，右边是蓝色圆", NUM_IMAGE)
    assert text.encode(model, "左边是红色圆,右边是蓝色圆。", NUM_IMAGE) == chinese


def test_a_chinese_word_has_one_id_everywhere(model):
    start, inside = (text.encode(model, typed, NUM_IMAGE) for typed in ("红色圆", "大红色圆"))
    assert start[1:] == inside[2:]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "text must have at least one word: got ''"),
        (" \n\t", "text must have at least one word: got"),
        (" . 。", "text must have at least one word: got"),
        ("an Elephant on the left", "text has words outside the text model: elephant$"),
        ("reddish-brown cat, cat", "text has words outside the text model: reddish-brown, cat$"),
        ("红色大象和绿色猫", "text has words outside the text model: 象, 猫$"),
        ("a red 猫 dog", "text has words outside the text model: 猫, dog$"),
        ("a red circle <start_of_image>", "outside the text model: <start_of_image>$"),
        ("a " * 23, "text must have at most 22 tokens: got 23"),
    ],
)
def test_text_that_cannot_be_used_is_refused_in_one_line(model, typed, message):
    with pytest.raises(ValueError, match=message) as caught:
        text.encode(model, typed, NUM_IMAGE, max_tokens=22)
    assert "\n" not in str(caught.value)


def test_unknown_words_may_be_let_through(model):
    ids = text.encode(model, "a red elephant", NUM_IMAGE, allow_unknown=True)
    assert ids[-1] == NUM_IMAGE + model.unk_id()
    assert text.unknown_words(model, "a red circle") == []


@pytest.mark.parametrize(
    "sentence", ["a small red circle on the left", "大红色圆上方的蓝色条纹正方形"]
)
def test_decode_undoes_encode(model, sentence):
    ids = text.encode(model, sentence, NUM_IMAGE)
    pad = text.vocabulary_for(model, NUM_IMAGE).pad
    assert text.decode(model, [*ids, pad, pad], NUM_IMAGE) == sentence
    assert text.decode(model, np.array(ids), NUM_IMAGE) == sentence


def test_decode_refuses_what_is_no_text(model):
    last = NUM_IMAGE + model.vocab_size() - 1
    for wrong in (NUM_IMAGE - 1, last + 1):
        with pytest.raises(ValueError, match=f"text ids from {NUM_IMAGE} to {last}: got {wrong}"):
            text.decode(model, [last, wrong], NUM_IMAGE)


def test_the_vocabulary_has_the_published_order(model):
    vocabulary = text.vocabulary_for(model, NUM_IMAGE)
    published = Vocabulary()
    assert vocabulary.pad - NUM_IMAGE == published.pad - published.num_image
    assert vocabulary.unknown - NUM_IMAGE == published.unknown - published.num_image
    assert vocabulary.num_text == model.vocab_size()
    assert vocabulary.start_of_image == NUM_IMAGE + model.vocab_size()
    border = text.first_chinese(model, NUM_IMAGE)
    for sentence in captions(3, 200):
        ids = text.encode(model, sentence, NUM_IMAGE)
        assert (max(ids) >= border) == text.is_chinese(sentence)


def test_an_ordinary_model_works_too(ordinary):
    vocabulary = text.vocabulary_for(ordinary, 20_000)
    assert (vocabulary.unknown, vocabulary.pad) == (20_000, 20_003)
    ids = text.encode(ordinary, "a circle", 20_000)
    assert ids == [20_000 + piece for piece in ordinary.encode("a circle")]
    assert text.decode(ordinary, ids, 20_000) == "a circle"


def test_line_breaks_are_spaces_unless_kept(ordinary):
    line_break = 20_000 + ordinary.piece_to_id("<n>")
    kept = text.encode(ordinary, "a circle\r\na star", 20_000, keep_line_breaks=True)
    assert kept.count(line_break) == 1
    assert text.decode(ordinary, kept, 20_000) == "a circle\na star"
    assert text.encode(ordinary, "a circle\na star", 20_000) == (
        text.encode(ordinary, "a circle a star", 20_000)
    )


def test_discouraged_pieces_are_avoided_and_the_model_is_left_as_it_was(ordinary):
    piece = next(p for p in ordinary.encode("a circle", out_type=str) if len(p) > 2)
    before = ordinary.encode("a circle", out_type=str)
    avoiding = text.discourage(ordinary, [piece])
    assert piece not in avoiding.encode("a circle", out_type=str)
    assert ordinary.encode("a circle", out_type=str) == before
    assert avoiding.vocab_size() == ordinary.vocab_size()
    with pytest.raises(ValueError, match="pieces must be of the text model: got 'no such piece'"):
        text.discourage(ordinary, ["no such piece"])


def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "text.model"
    for damage in (b"", b"abc", content[100:]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"text model {re.escape(str(path))} is damaged") as e:
            text.load_text_model(path)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="text model <bytes> is damaged"):
        text.load_text_model(b"abc")
    with pytest.raises(FileNotFoundError):
        text.load_text_model(tmp_path / "missing.model")
    path.write_bytes(content)
    assert text.load_text_model(str(path)).vocab_size() > 0


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="sentences must have at least one word"):
        text.train_text_model([" ", ""])


def test_chinese_is_told_by_its_characters():
    assert text.is_chinese("a 圆") and not text.is_chinese("a circle，。")


OPEN = ("Two dogs run in the park, 3.5 km away!", "两只狗在公园里跑。", "the dog naps")


def test_a_subword_model_spells_what_it_has_not_seen():
    content = text.train_subword_model(OPEN * 5, 60)
    assert content == text.train_subword_model(OPEN * 5, 60)
    model = text.load_text_model(content)
    assert model.vocab_size() <= 60
    assert [model.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    text.vocabulary_for(model, 10)
    for sentence in (*OPEN, "ＴＨＥ park naps", "公园"):
        ids = text.encode(model, sentence, 100)
        english = max(ids) < text.first_chinese(model, 100)
        assert english != text.is_chinese(sentence)
    assert text.decode(model, text.encode(model, OPEN[0], 100), 100) == OPEN[0].lower()


@pytest.mark.parametrize(
    ("sentences", "pieces", "message"),
    [((" ",), 60, "at least one word"), (OPEN, 12, "of 12 pieces can be made: Vocabulary size")],
)
def test_a_subword_model_that_cannot_be_is_refused(sentences, pieces, message):
    with pytest.raises(ValueError, match=message) as caught:
        text.train_subword_model(sentences, pieces)
    assert "\n" not in str(caught.value)
