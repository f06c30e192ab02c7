"""Spaces, invisible marks and text that is not Unicode, for all text models."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview2_jax import bundle
from cogview2_jax.bundle import SHIPPED
from cogview2_jax.tokenizer import cleaning, text
from tests.tokenizer.captions import NUM_IMAGE

EXAMPLES = settings(max_examples=60, derandomize=True, database=None, deadline=None)


SPACES = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "Z"]
SPACES += ["\t", "\n", "\v", "\f", "\r", "\x1c", "\x1f", "\x85", "\r\n", "\u2800", "\u3164"]
INVISIBLE = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Cf"]
INVISIBLE += ["\ufe0e", "\ufe0f", "\U000e0101", "\u180b", "\u034f", "\x07", "\x7f"]


def test_every_space_and_every_invisible_mark_is_read_as_such(model, vocabulary):
    plain = text.encode(model, "a red circle", vocabulary)
    for space in SPACES:
        assert text.encode(model, f"a{space}red {space} circle{space}", vocabulary) == plain, space
    for mark in INVISIBLE:
        typed = f"{mark}a red{mark} cir{mark}cle{mark}"
        assert text.encode(model, typed, vocabulary) == plain, ascii(mark)
    for nothing in SPACES + INVISIBLE:
        with pytest.raises(ValueError, match="at least one word"):
            text.encode(model, nothing, vocabulary)


@pytest.mark.parametrize(
    "typed",
    [
        "a\u2009red\u2009circle",
        "a\u202fred circle",
        "a\u2003red circle",
        "a red\u200c circle",
        "a red cir\u2060cle",
        "\u200ea red circle",
    ],
)
def test_the_bundle_that_ships_reads_text_from_other_programs(typed):
    shipped = text.load_text_model(SHIPPED / "text.model")
    vocabulary = bundle.read_description(SHIPPED).coglm_config.vocabulary
    assert vocabulary == text.vocabulary_for(shipped, 1024)
    plain = text.encode_prompt(shipped, "a red circle", vocabulary, 22)
    assert text.encode_prompt(shipped, typed, vocabulary, 22) == plain


def test_models_are_made_of_clean_sentences():
    marked = ["a cafe\u0301\u2009near\u200b the sea"]
    plain = ["a café near the sea"]
    assert text.train_text_model(marked) == text.train_text_model(plain)
    assert text.train_subword_model(marked, 30) == text.train_subword_model(plain, 30)
    model = text.load_text_model(text.train_text_model(plain))
    vocabulary = text.vocabulary_for(model, NUM_IMAGE)
    assert text.encode(model, marked[0], vocabulary) == text.encode(model, plain[0], vocabulary)


@EXAMPLES
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_cleaning_twice_is_cleaning_once(typed):
    cleaned = cleaning.clean(typed)
    assert cleaning.clean(cleaned) == cleaned
    assert not set(cleaned) & {*SPACES, *INVISIBLE} - {" "}


HALF_PAIRS = ["a red circle \ud83d", "a red circle \ude00", "a red circle \udcff and more"]


@pytest.mark.parametrize("typed", HALF_PAIRS)
@pytest.mark.parametrize("as_published", [False, True])
def test_half_of_a_surrogate_pair_is_refused(model, typed, as_published):
    vocabulary = text.vocabulary_for(model, NUM_IMAGE, as_published=as_published)
    message = "^text is not valid Unicode: half of a surrogate pair at character 13$"
    for call in (
        lambda: text.encode(model, typed, vocabulary, allow_unknown=True),
        lambda: text.encode(model, typed, vocabulary, keep_line_breaks=True),
        lambda: text.encode_prompt(model, typed, vocabulary, 22),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for train in (text.train_text_model, lambda made: text.train_subword_model(made, 60)):
        with pytest.raises(
            ValueError, match="^sentence 2 'a red circle .*': text is not valid Unicode"
        ):
            train(["a red circle", typed])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a red\0 circle", "text must not have a NUL: got one at character 5"),
        ("a " * 5_000_000, "text must have at most 100,000 characters: got 10,000,000"),
        ("龙" * 90_000, "text has words outside the text model: 龙+…$"),
        (" ".join(map(str, range(9000))), "outside the text model: 0, 1, 2, 3, 4 and 8995 more$"),
        (" " * 90_000, "text must have at least one word: got ' +…'$"),
    ],
    ids=["NUL", "10 MB", "one long word", "many words", "nothing but spaces"],
)
def test_text_that_no_prompt_can_be_is_refused_in_a_short_line(model, vocabulary, typed, message):
    with pytest.raises(ValueError, match=message) as caught:
        text.encode_prompt(model, typed, vocabulary, 22)
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


@EXAMPLES
@given(typed=st.text(st.characters()), as_published=st.booleans(), unknown=st.booleans())
def test_any_text_has_ids_or_one_line_that_says_why_not(model, typed, as_published, unknown):
    vocabulary = text.vocabulary_for(model, NUM_IMAGE, as_published=as_published)
    try:
        ids = text.encode(model, typed, vocabulary, allow_unknown=unknown or None)
    except text.TextError as error:
        assert len(str(error).splitlines()) == 1
        assert error.kind != "unknown" or not (as_published or unknown)
    else:
        assert all(NUM_IMAGE <= number < vocabulary.size for number in ids)
