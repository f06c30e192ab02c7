"""Cleaning of typed text before it is encoded: plain spaces, no invisible marks.

For the models that `text.train_text_model` and `text.train_subword_model` make. The published text
model gets its text unchanged.
"""

import unicodedata

# Blank characters that Unicode does not call spaces: Hangul fillers and the empty Braille pattern.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
# Characters that print nothing and are not in the categories Cc and Cf: the combining grapheme
# joiner, Khmer inherent vowels, variation selectors, and what Unicode keeps free for more of them.
_INVISIBLE = (
    (0x034F, 0x034F),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),
    (0xFE00, 0xFE0F),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)


class TextError(ValueError):
    """Text cannot be used; the message is one line.

    `kind` is the reason in a word: "malformed", "empty", "long" or "unknown".
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


def require_text(text: object) -> None:
    """Raises TextError for anything but a text, such as a list of prompts where one belongs."""
    if not isinstance(text, str):
        raise TextError(f"text must be one string: got {type(text).__name__}")


def require_unicode(text: str) -> None:
    """Raises TextError for half of a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"text is not valid Unicode: half of a surrogate pair at character {error.start}"
        ) from error


def clean(text: str) -> str:
    """`text` with composed letters (NFC), with every space as " " and without invisible marks.

    Spaces are all of Unicode's, tabs, line and paragraph separators, and blank letters. Invisible
    are format characters (zero-width joiners, direction marks, soft hyphens), variation selectors
    and control characters. Raises TextError for half of a surrogate pair and for NUL.
    """
    require_text(text)
    if text.isascii() and text.isprintable():
        return text
    require_unicode(text)
    if "\0" in text:
        raise TextError(f"text must not have a NUL: got one at character {text.index(chr(0))}")
    # Composed last: a mark that is dropped may have kept a letter from its accent.
    return unicodedata.normalize("NFC", text.translate(_REPLACEMENTS))


class _Replacements(dict[int, str]):
    """Code → its replacement. Filled on demand: Unicode has a million codes."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character.isspace() or character in _BLANKS:
            replacement = " "
        elif unicodedata.category(character) in ("Cc", "Cf") or any(
            first <= code <= last for first, last in _INVISIBLE
        ):
            replacement = ""
        else:
            replacement = character
        self[code] = replacement
        return replacement


_REPLACEMENTS = _Replacements()
