"""Text ↔ ids through a SentencePiece model: a text id is the piece id + the number of image tokens.

Pure functions of a `SentencePieceProcessor` and the `Vocabulary`, which says how text is read. The
published `ice_text.model` (icetk 0.0.7, 130,000 pieces) gets text unchanged: words that it cannot
spell become `<unk>`, and a typed `<start_of_image>` is one id. Text for other models is cleaned
first (`cleaning.clean`), and words that they cannot spell are refused.
"""

import functools
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np
import sentencepiece as spm

from cogview2_jax.config import Vocabulary
from cogview2_jax.files import read_file
from cogview2_jax.tokenizer.cleaning import TextError, clean, require_text, require_unicode

MARK = "▁"  # what SentencePiece writes for the space before a word
LINE_BREAK = "<n>"
PAD = "<pad>"
START_OF_IMAGE = "<start_of_image>"
# Pieces that the released tokenizer appends to its text model, in the order of their ids.
START_TOKENS = (START_OF_IMAGE, "<start_of_english>", "<start_of_chinese>")
LANGUAGES = ("en", "zh")
DISCOURAGED = -100.0  # the published score of a piece to be avoided
MOST_CHARACTERS = 100_000  # of one text: far more than any prompt or caption that fits
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHINESE = re.compile(f"[{_HAN}]")


def load_text_model(source: str | PathLike[str] | bytes) -> spm.SentencePieceProcessor:
    """A text model from its file or its bytes. Raises ValueError when it is damaged or empty,
    OSError when unreadable.
    """
    content = source if isinstance(source, bytes) else read_file(source)
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    if not content:  # SentencePiece would load nothing, and say so later on stderr
        raise ValueError(f"text model {name} is damaged: it has no pieces")
    try:
        model = spm.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"text model {name} is damaged: not a SentencePiece model") from error
    if model.vocab_size() == 0:
        raise ValueError(f"text model {name} is damaged: it has no pieces")
    return model


def vocabulary_for(
    model: spm.SentencePieceProcessor, num_image: int, *, as_published: bool | None = None
) -> Vocabulary:
    """The id space of `num_image` image tokens, this model's pieces, and the three start tokens.

    `as_published` says how text is read; None means as published for the published model only. In
    that model Chinese begins at the published id, in others at the first piece with a Chinese
    character. Raises ValueError if the model has no `<pad>` piece.
    """
    pad = model.piece_to_id(PAD)
    if pad == model.unk_id():
        raise ValueError(f"text model must have a piece {PAD}: got none in {model.vocab_size()}")
    published = _is_published(model)
    return Vocabulary(
        num_image,
        num_image + model.vocab_size() + 3,
        pad=num_image + pad,
        unknown=num_image + model.unk_id(),
        first_chinese=num_image + (_PUBLISHED_BOUNDARY if published else _first_chinese(model)),
        as_published=published if as_published is None else as_published,
    )


_PUBLISHED_BOUNDARY = Vocabulary().first_chinese - Vocabulary().num_image


def _is_published(model: spm.SentencePieceProcessor) -> bool:
    """Whether the model is the published one: its size, and the piece that Chinese begins with."""
    return (
        model.vocab_size() == Vocabulary().num_text
        and model.id_to_piece(_PUBLISHED_BOUNDARY) == "。"
    )


def _first_chinese(model: spm.SentencePieceProcessor) -> int:
    """The first piece with a Chinese character; the number of pieces if there is none."""
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    return next((place for place, piece in enumerate(pieces) if is_chinese(piece)), len(pieces))


def is_chinese(text: str) -> bool:
    """Whether a text has a Chinese character. Ids tell their language by `is_english`."""
    return _CHINESE.search(text) is not None


def is_english(ids: Iterable[int], vocabulary: Vocabulary) -> bool:
    """The published rule: a text is English where all its ids are below the first Chinese one."""
    return all(number < vocabulary.first_chinese for number in ids)


def encode(
    model: spm.SentencePieceProcessor,
    text: str,
    vocabulary: Vocabulary,
    *,
    max_tokens: int | None = None,
    keep_line_breaks: bool = False,
    allow_unknown: bool | None = None,
    allow_empty: bool = False,
) -> list[int]:
    """The ids of `text`, each at least `vocabulary.num_image`. The model's own normalisation
    applies.

    With `vocabulary.as_published`, these are exactly the released tokenizer's ids. Otherwise the
    text is cleaned first. `allow_unknown` says whether words that the model cannot spell become
    `<unk>` or are refused; None follows `as_published`. A line break is the piece `<n>` with
    `keep_line_breaks`, else a space.

    Raises TextError (a ValueError), in one line, for unknown words that are refused, for more than
    `max_tokens` ids or `MOST_CHARACTERS`, for a text without a word unless `allow_empty`, and for
    text that is not Unicode.
    """
    require_text(text)
    if len(text) > MOST_CHARACTERS:
        raise TextError(
            f"text must have at most {MOST_CHARACTERS:,} characters: got {len(text):,}", "long"
        )
    read = _as_read(text, vocabulary, keep_line_breaks)
    if vocabulary.as_published and any(
        token in str(model.normalize(read)) for token in START_TOKENS
    ):
        pieces = _with_start_tokens(model).encode(read, out_type=int)
    else:
        pieces = model.encode(read, out_type=int)
    if not pieces and not allow_empty:
        raise TextError(f"text must have at least one word: got {_short(text)!r}", "empty")
    if allow_unknown is None:
        allow_unknown = vocabulary.as_published
    if not allow_unknown and model.unk_id() in pieces:
        words = unknown_words(model, read)
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        named = ", ".join(map(_short, words[:5]))
        raise TextError(f"text has words outside the text model: {named}{more}", "unknown")
    if max_tokens is not None and len(pieces) > max_tokens:
        raise TextError(f"text must have at most {max_tokens} tokens: got {len(pieces)}", "long")
    return [vocabulary.num_image + piece for piece in pieces]


def encode_prompt(
    model: spm.SentencePieceProcessor, prompt: str, vocabulary: Vocabulary, max_tokens: int
) -> list[int]:
    """The ids of a prompt before `<start_of_image>`. Raises TextError as `encode` does.

    The released scripts append the text `<start_of_image>` before they encode, so that a space at
    the end of a prompt keeps its own id.
    """
    ids = encode(model, prompt, vocabulary, max_tokens=max_tokens)
    if vocabulary.as_published:
        ids = encode(model, prompt + START_OF_IMAGE, vocabulary, max_tokens=max_tokens + 1)[:-1]
    return ids


def _as_read(text: str, vocabulary: Vocabulary, keep_line_breaks: bool) -> str:
    if vocabulary.as_published:
        require_unicode(text)
        return text.replace("\n", LINE_BREAK) if keep_line_breaks else text
    if not keep_line_breaks:
        return clean(text)
    lines = text.replace("\r\n", "\n").split("\n")
    return LINE_BREAK.join(clean(line) for line in lines)


@functools.lru_cache(maxsize=2)
def _with_start_tokens(model: spm.SentencePieceProcessor) -> spm.SentencePieceProcessor:
    """The model with the three start tokens as pieces of score 0, as the released tokenizer has it.

    A piece is field 1 of a model file, with its name in field 1 and its score in field 2.
    Concatenated protocol buffers are one message, so appending needs no protobuf library.
    """
    content = model.serialized_model_proto()
    for token in START_TOKENS:
        name = token.encode()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15\0\0\0\0"
        content += b"\x0a" + bytes([len(piece)]) + piece
    return load_text_model(content)


def _short(words: str, most: int = 40) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def unknown_words(model: spm.SentencePieceProcessor, text: str) -> list[str]:
    """The words of a cleaned text that the model cannot spell, normalised, each once, in order.

    Chinese has no spaces between words, so only the unknown characters are named.
    """
    normalised, flags = "", ""  # flags: "x" under every character that is in no piece
    for piece in model.encode(text, out_type=str):
        normalised += piece
        flags += ("x" if model.piece_to_id(piece) == model.unk_id() else ".") * len(piece)
    found = []
    for word in re.finditer(f"[{_HAN}]+|[^{_HAN}{MARK}\\s]+", normalised):
        begin, end = word.span()
        if is_chinese(word.group()):
            unknown = re.finditer("x+", flags[begin:end])
            found += [normalised[begin:end][part.start() : part.end()] for part in unknown]
        elif "x" in flags[begin:end]:
            # Punctuation that the model knows is not part of the word.
            spelt = zip(word.group(), flags[begin:end], strict=True)
            marks = {mark for mark, flag in spelt if flag == "." and not mark.isalnum()}
            found.append(word.group().strip("".join(marks)))
    return list(dict.fromkeys(found))


def decode(model: spm.SentencePieceProcessor, ids: Sequence[int], num_image: int) -> str:
    """The text of `ids`, without pads and with a line break for each `<n>`. Raises ValueError for
    an id that is not a text id.
    """
    last = num_image + model.vocab_size() - 1
    wrong = [number for number in ids if not num_image <= number <= last]
    if wrong:
        raise ValueError(f"ids must be text ids from {num_image} to {last}: got {wrong[0]}")
    pad = model.piece_to_id(PAD)
    pieces = [int(number) - num_image for number in ids if number - num_image != pad]
    return str(model.decode(pieces)).replace(LINE_BREAK, "\n")


def language_ids(
    model: spm.SentencePieceProcessor, vocabulary: Vocabulary, language: str
) -> np.ndarray:
    """Which text ids a caption in `language` ("en" or "zh") may have: bool [num_text], from
    `vocabulary.num_image` on.

    English: all pieces before Chinese begins. Chinese: all later ones, but none with letters of
    another script, and the earlier ones without letters (spaces, punctuation, digits). Both have
    the pad and the end piece, since a caption must be able to end; neither has unknown, control and
    single-byte pieces. The array is read-only and cached. Raises ValueError for another language.
    """
    return _of_language(model, vocabulary, language)[0]


def word_ids(
    model: spm.SentencePieceProcessor, vocabulary: Vocabulary, language: str
) -> np.ndarray:
    """Those of `language_ids` that are words or parts of words: bool [num_text].

    English pieces with a letter or a digit, and Chinese pieces with a Chinese character. A caption
    that may end only after one of them is never empty.
    """
    return _of_language(model, vocabulary, language)[1]


@functools.lru_cache(maxsize=4)
def _of_language(
    model: spm.SentencePieceProcessor, vocabulary: Vocabulary, language: str
) -> tuple[np.ndarray, np.ndarray]:
    if language not in LANGUAGES:
        raise ValueError(f"language must be {' or '.join(LANGUAGES)}: got {language!r}")
    allowed = np.zeros(vocabulary.num_text, bool)
    words = np.zeros(vocabulary.num_text, bool)
    boundary = vocabulary.first_chinese - vocabulary.num_image
    for number, piece in enumerate(model.id_to_piece(list(range(vocabulary.num_text)))):
        if any(kind(number) for kind in (model.is_unknown, model.is_control, model.is_byte)):
            continue
        if piece == LINE_BREAK:
            piece = ""
        letters = [character for character in piece if character.isalpha()]
        if language == "en":
            allowed[number] = number < boundary
            words[number] = allowed[number] and any(map(str.isalnum, piece))
        else:
            allowed[number] = all(map(is_chinese, letters)) and (number >= boundary or not letters)
            words[number] = allowed[number] and bool(letters)
    allowed[vocabulary.pad - vocabulary.num_image] = True
    if model.eos_id() >= 0:
        allowed[model.eos_id()] = True
    allowed.flags.writeable = words.flags.writeable = False
    return allowed, words


def discourage(
    model: spm.SentencePieceProcessor, pieces: Iterable[str]
) -> spm.SentencePieceProcessor:
    """A copy of the model that avoids `pieces` if others can spell the text: their score becomes
    −100, as published.

    Needs protobuf. Raises ValueError for a piece that the model does not have.
    """
    proto = _model_proto().FromString(model.serialized_model_proto())
    by_name = {piece.piece: piece for piece in proto.pieces}
    for name in pieces:
        if name not in by_name:
            raise ValueError(f"pieces must be of the text model: got {name!r}")
        by_name[name].score = DISCOURAGED
    return load_text_model(proto.SerializeToString())


# --- Making models --------------------------------------------------------------------------------


def train_text_model(
    sentences: Iterable[str], *, words: Iterable[str] = (), ignored: str = ".。!！"
) -> bytes:
    """A SentencePiece unigram model, as file content, with the words of `sentences` as its only
    pieces.

    English splits at spaces. Chinese splits into `words` (longest match first, from the left), and
    the rest into single characters. Punctuation stands alone. A word that is not in the sentences
    is unknown, so that it can be refused; the usual training would keep every letter and spell it.
    The scores are log frequencies: each sentence splits in one way only, so this is the
    maximum-likelihood unigram model without any EM, and no piece joins two adjacent Chinese words.
    The space mark at the start of a sentence is not joined to a Chinese word, so the word has one
    id everywhere; the mark alone is a piece, as in the published model.

    Ids: the published first four (`<unk>`, `<s>`, `</s>`, `<pad>`), then punctuation, English and
    Chinese, each by falling frequency. There is no `<n>`. Sentences are cleaned, as texts are
    before they are encoded. The model itself makes text lower case and full-width forms plain, and
    drops the characters `ignored`. The same input gives the same bytes. Needs protobuf. Raises
    ValueError when `sentences` have no word or are not Unicode.
    """
    normalizer = _normalizer(ignored)
    normalised = (str(normalizer.normalize(clean(word))) for word in words)
    compounds = sorted({word.strip(MARK) for word in normalised} - {""})
    alternatives = "|".join(re.escape(word) for word in sorted(compounds, key=len, reverse=True))
    splitter = re.compile(
        (f"{alternatives}|" if alternatives else "")
        + f"{MARK}?(?:(?![{_HAN}])\\w)+|."  # a word without Chinese, or any one character
    )
    counts = Counter(
        piece
        for sentence in _cleaned(sentences)
        for piece in splitter.findall(str(normalizer.normalize(sentence)))
    )
    if not counts:
        raise ValueError("sentences must have at least one word: got none")
    counts.setdefault(MARK, 1)  # so that a space is never unknown

    proto = _model_proto()()
    proto.normalizer_spec.ParseFromString(normalizer.serialized_normalizer_spec())
    kinds = _model_proto().SentencePiece
    proto.pieces.add(piece="<unk>", score=0, type=kinds.UNKNOWN)
    for control in ("<s>", "</s>", PAD):
        proto.pieces.add(piece=control, score=0, type=kinds.CONTROL)
    total = sum(counts.values())
    for piece in sorted(counts, key=lambda piece: (_group(piece), -counts[piece], piece)):
        proto.pieces.add(piece=piece, score=math.log(counts[piece] / total))
    return bytes(proto.SerializeToString(deterministic=True))


def train_subword_model(sentences: Iterable[str], pieces: int) -> bytes:
    """A SentencePiece unigram model of at most `pieces` pieces, as file content, for open text.

    Frequent words are pieces. Other words are spelled with smaller pieces, down to single
    characters; rare characters are unknown. Cleaning, normalisation, the first four ids and the
    order of the rest are those of `train_text_model`, so English ids are below Chinese ones. The
    same input gives the same bytes. Needs protobuf. Raises ValueError, in one line, when
    `sentences` have no word or are not Unicode, and when `pieces` are too few for their characters.
    """
    normalizer = _normalizer("")
    normalised = (str(normalizer.normalize(sentence)) for sentence in _cleaned(sentences))
    plain = [words for words in (each.replace(MARK, " ").strip() for each in normalised) if words]
    if not plain:
        raise ValueError("sentences must have at least one word: got none")
    content = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(plain),
            model_writer=content,
            model_type="unigram",
            vocab_size=pieces,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            pad_piece=PAD,
            num_threads=1,  # with more threads, sums differ from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] reason"; without a reason, no sentence could be used.
        reason = " ".join(str(error).split()).rpartition("]")[2].strip()
        reason = reason or "the sentences are too short or too long"
        raise ValueError(f"no text model of {pieces} pieces can be made: {reason}") from error
    proto = _model_proto().FromString(content.getvalue())
    proto.normalizer_spec.ParseFromString(normalizer.serialized_normalizer_spec())
    special, rest = list(proto.pieces[:4]), list(proto.pieces[4:])
    rest.sort(key=lambda piece: (_group(piece.piece), -piece.score, piece.piece))
    del proto.pieces[:]
    proto.pieces.extend(special + rest)
    return bytes(proto.SerializeToString(deterministic=True))


def _cleaned(sentences: Iterable[str]) -> Iterator[str]:
    for number, sentence in enumerate(sentences, 1):
        try:
            yield clean(sentence)
        except TextError as error:
            where = f"sentence {number} {_short(sentence)!r}"
            raise TextError(f"{where}: {error}", error.kind) from error


def _model_proto() -> Any:
    """The class of a model file's content. Imported here: only writing models needs protobuf."""
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    return module.ModelProto


def _group(piece: str) -> int:
    """0 punctuation and the space mark, 1 English, 2 Chinese: the published order of ids."""
    return 2 if is_chinese(piece) else int(any(letter.isalnum() for letter in piece))


def _normalizer(ignored: str) -> spm.SentencePieceNormalizer:
    """Rules kept in a model: lower case, full-width ASCII as ASCII, no characters of `ignored`.

    Its rules for spaces and invisible marks are fewer than those of `clean`: adding to them would
    change every model's bytes.
    """
    rules = {chr(code): chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
    # U+FF01 to U+FF5E are the full-width "!" to "~".
    rules |= {chr(code + 0xFEE0): chr(code).lower() for code in range(ord("!"), ord("~") + 1)}
    rules |= dict.fromkeys("\t\n\r\u00a0\u2028\u3000", " ")
    rules |= dict.fromkeys("\u200b\ufeff" + ignored, "")
    # SentencePiece reports on stderr that it compiles the rules; show errors only.
    spm.set_min_log_level(2)
    return spm.SentencePieceNormalizer(
        norm_map=sorted(rules.items()),
        add_dummy_prefix=True,
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )
