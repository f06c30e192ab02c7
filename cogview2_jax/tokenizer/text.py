"""Text ↔ ids through a SentencePiece model: a text id is the piece id + the number of image
tokens.

Pure functions round a `SentencePieceProcessor`. They read the published `ice_text.model` (icetk
0.0.7, 130,000 pieces) and the small models that `train_text_model` makes for a closed set of
sentences such as Scenes.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import sentencepiece as spm

from cogview2_jax.config import Vocabulary

MARK = "▁"  # what SentencePiece writes for the space before a word
LINE_BREAK = "<n>"
PAD = "<pad>"
DISCOURAGED = -100.0  # the published score of a piece to be avoided
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHINESE = re.compile(f"[{_HAN}]")


def load_text_model(source: str | PathLike[str] | bytes) -> spm.SentencePieceProcessor:
    """A text model from its file or its bytes. Raises ValueError when it is damaged or empty,
    OSError when unreadable.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        model = spm.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"text model {name} is damaged: not a SentencePiece model") from error
    if model.vocab_size() == 0:
        raise ValueError(f"text model {name} is damaged: it has no pieces")
    return model


def vocabulary_for(model: spm.SentencePieceProcessor, num_image: int) -> Vocabulary:
    """The id space of `num_image` image tokens, this model's pieces, and the three start tokens.

    Raises ValueError when the model has no `<pad>` piece.
    """
    pad = model.piece_to_id(PAD)
    if pad == model.unk_id():
        raise ValueError(f"text model must have a piece {PAD}: got none in {model.vocab_size()}")
    size = num_image + model.vocab_size() + 3
    return Vocabulary(num_image, size, pad=num_image + pad, unknown=num_image + model.unk_id())


def first_chinese(model: spm.SentencePieceProcessor, num_image: int) -> int:
    """The lowest id whose piece has a Chinese character (published: 83,823); English texts lie
    below it.

    A model without any has the first start token's id here.
    """
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    places = (place for place, piece in enumerate(pieces) if is_chinese(piece))
    return num_image + next(places, len(pieces))


def is_chinese(text: str) -> bool:
    """Whether a text is Chinese: it has a Chinese character. Else it is English."""
    return _CHINESE.search(text) is not None


def encode(
    model: spm.SentencePieceProcessor,
    text: str,
    num_image: int,
    *,
    max_tokens: int | None = None,
    keep_line_breaks: bool = False,
    allow_unknown: bool = False,
) -> list[int]:
    """The ids of `text`, each at least `num_image`. The model's own normalisation applies.

    A line break is the piece `<n>` when asked to be kept, else a space. Raises ValueError, in one
    line, for a text without a word, one of more than `max_tokens`, and, unless `allow_unknown`
    (the published behaviour), words that the model cannot spell.
    """
    text = text.replace("\r\n", "\n").replace("\n", LINE_BREAK if keep_line_breaks else " ")
    ids = model.encode(text, out_type=int)
    if not ids:
        raise ValueError(f"text must have at least one word: got {text!r}")
    if not allow_unknown and model.unk_id() in ids:
        words = ", ".join(unknown_words(model, text))
        raise ValueError(f"text has words outside the text model: {words}")
    if max_tokens is not None and len(ids) > max_tokens:
        raise ValueError(f"text must have at most {max_tokens} tokens: got {len(ids)}")
    return [num_image + piece for piece in ids]


def unknown_words(model: spm.SentencePieceProcessor, text: str) -> list[str]:
    """The words of `text` that the model cannot spell, normalised, each once, in order.

    A Chinese text has no spaces, so of that only the characters themselves are named.
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
            # Punctuation that the model knows is not part of the word beside it.
            spelt = zip(word.group(), flags[begin:end], strict=True)
            marks = {mark for mark, flag in spelt if flag == "." and not mark.isalnum()}
            found.append(word.group().strip("".join(marks)))
    return list(dict.fromkeys(found))


def decode(model: spm.SentencePieceProcessor, ids: Sequence[int], num_image: int) -> str:
    """The text of `ids`; pads vanish, `<n>` becomes a line break. Raises ValueError for an id that
    is no text id.
    """
    last = num_image + model.vocab_size() - 1
    wrong = [number for number in ids if not num_image <= number <= last]
    if wrong:
        raise ValueError(f"ids must be text ids from {num_image} to {last}: got {wrong[0]}")
    pad = model.piece_to_id(PAD)
    pieces = [int(number) - num_image for number in ids if number - num_image != pad]
    return str(model.decode(pieces)).replace(LINE_BREAK, "\n")


def discourage(
    model: spm.SentencePieceProcessor, pieces: Iterable[str]
) -> spm.SentencePieceProcessor:
    """A copy of the model that avoids `pieces` where others spell the text, by the published score
    of −100.

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
    """A SentencePiece unigram model, as file content, whose pieces are the words of `sentences`
    and nothing else.

    English splits at spaces; Chinese splits into `words` (longest first, at each place from the
    left), and what they do not cover into single characters; punctuation stands alone. A word
    outside the sentences is thus unknown, and is refused, where the usual training keeps every
    letter and would spell it. The scores are the log frequencies: with one way to split every
    sentence, that is the maximum-likelihood unigram model, so nothing is left for EM to find, and
    no piece spans two Chinese words that often meet. A Chinese word does not take the space mark
    at the start of a sentence, so it has one id everywhere; the mark alone is a piece, as in the
    published model.

    Ids: the published first four (`<unk>`, `<s>`, `</s>`, `<pad>`), then punctuation, English and
    Chinese, each with the frequent first. There is no `<n>`. The model itself normalises: lower
    case, full-width forms, line breaks and other spaces; the characters `ignored` are dropped. The
    same input gives the same bytes. Needs protobuf. Raises ValueError when `sentences` have no
    word.
    """
    normalizer = _normalizer(ignored)
    compounds = sorted({str(normalizer.normalize(word)).strip(MARK) for word in words} - {""})
    alternatives = "|".join(re.escape(word) for word in sorted(compounds, key=len, reverse=True))
    splitter = re.compile(
        (f"{alternatives}|" if alternatives else "")
        + f"{MARK}?(?:(?![{_HAN}])\\w)+|."  # a word without Chinese, or any one character
    )
    counts = Counter(
        piece
        for sentence in sentences
        for piece in splitter.findall(str(normalizer.normalize(sentence)))
    )
    if not counts:
        raise ValueError("sentences must have at least one word: got none")
    counts.setdefault(MARK, 1)  # so that a space is never what is refused

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

    Frequent words are pieces, and others are spelt of parts, down to the characters of the
    sentences, of which only rare ones are unknown. Normalisation, the first four ids and the order
    of the rest are those of `train_text_model`, so that English lies below Chinese. The same input
    gives the same bytes. Needs protobuf. Raises ValueError, in one line, when `sentences` have no
    word and when `pieces` are too few for their characters.
    """
    normalizer = _normalizer("")
    normalised = (str(normalizer.normalize(sentence)) for sentence in sentences)
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
            num_threads=1,  # sums of several threads differ from run to run
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


def _model_proto() -> Any:
    """The class of a model file's content. Imported here: only who writes models needs protobuf."""
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    return module.ModelProto


def _group(piece: str) -> int:
    """0 punctuation and the space mark, 1 English, 2 Chinese: the published order of ids."""
    return 2 if is_chinese(piece) else int(any(letter.isalnum() for letter in piece))


def _normalizer(ignored: str) -> spm.SentencePieceNormalizer:
    """Lower case, full-width ASCII as ASCII, every space as one space, nothing for `ignored` and
    invisible marks.
    """
    rules = {chr(code): chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
    # U+FF01 to U+FF5E are the full-width "!" to "~".
    rules |= {chr(code + 0xFEE0): chr(code).lower() for code in range(ord("!"), ord("~") + 1)}
    rules |= dict.fromkeys("\t\n\r\u00a0\u2028\u3000", " ")
    rules |= dict.fromkeys("\u200b\ufeff" + ignored, "")
    # Compiling the rules is reported on stderr, once for each model; only errors are of interest.
    spm.set_min_log_level(2)
    return spm.SentencePieceNormalizer(
        norm_map=sorted(rules.items()),
        add_dummy_prefix=True,
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )
