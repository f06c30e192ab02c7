"""Text models: of the Scenes captions, an ordinary SentencePiece model, and the published one where
the environment variable COGVIEW2_PUBLISHED names the folder that has it.
"""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import settings
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cogview2_jax.config import Vocabulary
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import text
from tests.tokenizer.captions import CHINESE_WORDS, NUM_IMAGE, captions

EXAMPLES = settings(max_examples=60, derandomize=True, database=None, deadline=None)


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


def test_every_caption_is_known_and_short(model, vocabulary):
    longest = 0
    for sentence in captions(1, 2000) + unseen_captions(2, 500):
        ids = text.encode(model, sentence, vocabulary)
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


def test_what_a_user_types_is_normalised(model, vocabulary):
    plain = text.encode(model, "a red circle", vocabulary)
    for typed in (
        "A Red Circle",
        "a red circle.",
        "  a\tred \n circle!",
        "ａ ｒｅｄ　ＣＩＲＣＬＥ",
        "a red\u00a0circle",
    ):
        assert text.encode(model, typed, vocabulary) == plain, typed
    chinese = text.encode(model, "左边是红色圆，右边是蓝色圆", vocabulary)
    assert text.encode(model, "左边是红色圆,右边是蓝色圆。", vocabulary) == chinese


def test_a_chinese_word_has_one_id_everywhere(model, vocabulary):
    start, inside = (text.encode(model, typed, vocabulary) for typed in ("红色圆", "大红色圆"))
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
def test_text_that_cannot_be_used_is_refused_in_one_line(model, typed, message, vocabulary):
    with pytest.raises(ValueError, match=message) as caught:
        text.encode(model, typed, vocabulary, max_tokens=22)
    assert "\n" not in str(caught.value)


def test_unknown_words_may_be_let_through(model, vocabulary):
    ids = text.encode(model, "a red elephant", vocabulary, allow_unknown=True)
    assert ids[-1] == NUM_IMAGE + model.unk_id()
    assert text.unknown_words(model, "a red circle") == []


@pytest.mark.parametrize(
    "sentence", ["a small red circle on the left", "大红色圆上方的蓝色条纹正方形"]
)
def test_decode_undoes_encode(model, sentence, vocabulary):
    ids, pad = text.encode(model, sentence, vocabulary), vocabulary.pad
    assert text.decode(model, [*ids, pad, pad], NUM_IMAGE) == sentence
    assert text.decode(model, np.array(ids), NUM_IMAGE) == sentence


def test_decode_refuses_what_is_no_text(model):
    last = NUM_IMAGE + model.vocab_size() - 1
    for wrong in (NUM_IMAGE - 1, last + 1):
        with pytest.raises(ValueError, match=f"text ids from {NUM_IMAGE} to {last}: got {wrong}"):
            text.decode(model, [last, wrong], NUM_IMAGE)


def test_the_vocabulary_has_the_published_order(model, vocabulary):
    published = Vocabulary()
    assert vocabulary.pad - NUM_IMAGE == published.pad - published.num_image
    assert vocabulary.unknown - NUM_IMAGE == published.unknown - published.num_image
    assert vocabulary.num_text == model.vocab_size()
    assert vocabulary.start_of_image == NUM_IMAGE + model.vocab_size()
    for sentence in captions(3, 200):
        ids = text.encode(model, sentence, vocabulary)
        assert text.is_english(ids, vocabulary) != text.is_chinese(sentence)


def test_an_ordinary_model_works_too(ordinary):
    vocabulary = text.vocabulary_for(ordinary, 20_000)
    assert (vocabulary.unknown, vocabulary.pad) == (20_000, 20_003)
    ids = text.encode(ordinary, "a circle", vocabulary)
    assert ids == [20_000 + piece for piece in ordinary.encode("a circle")]
    assert text.decode(ordinary, ids, 20_000) == "a circle"


def test_line_breaks_are_spaces_unless_kept(ordinary):
    vocabulary = text.vocabulary_for(ordinary, 20_000)
    line_break = 20_000 + ordinary.piece_to_id("<n>")
    kept = text.encode(ordinary, "a circle\r\na star", vocabulary, keep_line_breaks=True)
    assert kept.count(line_break) == 1
    assert text.decode(ordinary, kept, 20_000) == "a circle\na star"
    assert text.encode(ordinary, "a circle\na star", vocabulary) == (
        text.encode(ordinary, "a circle a star", vocabulary)
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
    assert text.load_text_model(str(path)).serialized_model_proto() == content


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
    vocabulary = text.vocabulary_for(model, 100)
    for sentence in (*OPEN, "ＴＨＥ park naps", "公园"):
        ids = text.encode(model, sentence, vocabulary)
        assert text.is_english(ids, vocabulary) != text.is_chinese(sentence)
    assert text.decode(model, text.encode(model, OPEN[0], vocabulary), 100) == OPEN[0].lower()


@pytest.mark.parametrize(
    ("sentences", "pieces", "message"),
    [((" ",), 60, "at least one word"), (OPEN, 12, "of 12 pieces can be made: Vocabulary size")],
)
def test_a_subword_model_that_cannot_be_is_refused(sentences, pieces, message):
    with pytest.raises(ValueError, match=message) as caught:
        text.train_subword_model(sentences, pieces)
    assert "\n" not in str(caught.value)


# --- Text as published ----------------------------------------------------------------------------


def test_the_vocabulary_says_whether_unknown_words_are_read(model, vocabulary):
    typed = "a red elephant"
    with pytest.raises(ValueError, match="outside the text model: elephant$"):
        text.encode(model, typed, vocabulary)
    published = text.vocabulary_for(model, NUM_IMAGE, as_published=True)
    known = text.encode(model, "a red", published)
    space = NUM_IMAGE + model.piece_to_id(text.MARK)
    assert text.encode(model, typed, published) == [*known, space, published.unknown]
    with pytest.raises(ValueError, match="outside the text model: elephant$"):
        text.encode(model, typed, published, allow_unknown=False)
    assert text.encode(model, " ", published, allow_empty=True) == []
    with pytest.raises(ValueError, match="at least one word"):
        text.encode_prompt(model, " ", published, 22)


def test_typed_start_tokens_are_single_ids_as_published(model, vocabulary):
    published = text.vocabulary_for(model, NUM_IMAGE, as_published=True)
    tokens = (published.start_of_image, published.start_of_english, published.start_of_chinese)
    for name, number in zip(text.START_TOKENS, tokens, strict=True):
        known = text.encode(model, "a red", published)
        assert text.encode(model, f"a red{name}", published) == [*known, number]
        with pytest.raises(ValueError, match="outside the text model"):
            text.encode(model, f"a red{name}", vocabulary)


@pytest.fixture(scope="module")
def published():
    """The published text model, and its tokenizer's ids of odd texts."""
    folder = os.environ.get("COGVIEW2_PUBLISHED")
    if not folder:
        pytest.skip("COGVIEW2_PUBLISHED names no folder with ice_text.model and text_ids.json")
    recorded = json.loads((Path(folder) / "text_ids.json").read_text("utf-8"))
    return text.load_text_model(Path(folder) / "ice_text.model"), recorded


def test_the_published_model_has_the_published_vocabulary(published):
    model, _ = published
    vocabulary = text.vocabulary_for(model, 20_000)
    assert vocabulary == Vocabulary()
    ids = [text.encode(model, mark, vocabulary) for mark in ("。", "、", "it's 5.", "一只猫")]
    assert ids[:2] == [[20_005, 83_823], [20_005, 83_824]]
    assert [text.is_english(each, vocabulary) for each in ids] == [False, False, True, False]


def test_ids_are_the_published_ones(published):
    model, recorded = published
    vocabulary = Vocabulary()
    for row in recorded:
        typed = row["text"]
        assert text.encode(model, typed, vocabulary, allow_empty=True) == row["ids"], typed
        kept = text.encode(model, typed, vocabulary, allow_empty=True, keep_line_breaks=True)
        assert kept == row["keep_line_breaks"], typed
        started = text.encode(model, typed + text.START_OF_IMAGE, vocabulary)
        assert started == row["with_start"], typed
        if row["ids"]:
            prompt = text.encode_prompt(model, typed, vocabulary, 2000)
            assert [*prompt, vocabulary.start_of_image] == row["with_start"], typed


# --- The ids of a language ------------------------------------------------------------------------


def names(model, allowed):
    return {model.id_to_piece(int(number)) for number in np.flatnonzero(allowed)}


def test_a_language_has_its_ids_and_the_common_ones():
    sentences = ["Two dogs, 2 cats!", "两只狗，3只猫。", "кот 2"]
    model = text.load_text_model(text.train_text_model(sentences, ignored=""))
    vocabulary = text.vocabulary_for(model, 100)
    common = {"▁", ",", "!", "。", "<pad>", "</s>"}
    english, chinese = (
        names(model, text.language_ids(model, vocabulary, language)) for language in ("en", "zh")
    )
    assert english == common | {"▁two", "▁dogs", "▁cats", "▁2", "▁кот", "3"}
    assert chinese == common | {"▁2", "3", "两", "只", "狗", "猫"}
    assert names(model, text.word_ids(model, vocabulary, "en")) == english - common
    assert names(model, text.word_ids(model, vocabulary, "zh")) == set("两只狗猫")
    with pytest.raises(ValueError, match="language must be en or zh: got 'de'"):
        text.language_ids(model, vocabulary, "de")


def test_captions_of_scenes_are_of_their_language(model, vocabulary):
    rng = np.random.default_rng(5)
    for language in ("en", "zh"):
        allowed = text.language_ids(model, vocabulary, language)
        words = text.word_ids(model, vocabulary, language)
        for _ in range(100):
            sentence = scenes.caption(scenes.sample_scene(rng), rng, language)
            ids = np.array(text.encode(model, sentence, vocabulary)) - NUM_IMAGE
            assert allowed[ids].all() and words[ids].any()


def test_the_published_model_has_a_language_for_its_ids(published):
    model, _ = published
    vocabulary = Vocabulary()
    english, chinese = (text.language_ids(model, vocabulary, language) for language in ("en", "zh"))
    assert english.shape == chinese.shape == (130_000,)
    assert (english & chinese)[:100].sum() == 98  # all common ones but <unk> and <s>
    both = names(model, english & chinese)
    assert {",", ".", "0", "9", "▁", "<n>", "<pad>"} <= both and "▁the" not in both
    assert "▁cat" in names(model, english) and "猫" not in names(model, english)
    assert {"猫", "。"} <= names(model, chinese)
    assert not any(re.search("[a-zA-Zа-яぁ-ん]", name) for name in names(model, chinese) - both)
