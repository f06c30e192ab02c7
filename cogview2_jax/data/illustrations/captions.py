"""Captions of illustrations in English and Chinese: the thing and its style, in several ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from cogview2_jax.data.illustrations.index import Item

LANGUAGES = ("en", "zh")
STYLE_WORDS: Mapping[str, Mapping[str, str]] = {
    "3d": {"en": "3D", "zh": "立体"},
    "flat": {"en": "flat", "zh": "扁平"},
    "outlined": {"en": "outlined", "zh": "线描"},
    "cartoon": {"en": "cartoon", "zh": "卡通"},
    "sticker": {"en": "sticker", "zh": "贴纸"},
}
"""What a style is called in each language."""
_SINGLE = {
    "en": (
        "{thing}, {style}",
        "{a_thing}, {style}",
        "{a_style} picture of {a_thing}",
        "{a_style} drawing of {a_thing}",
        "{style} {thing}",
    ),
    "zh": ("{thing}，{style}", "{style}的{thing}", "{thing}的{style}图", "{style}{thing}"),
}
RELATIONS = ("left", "right", "above", "below")
_FRAME = {
    "en": {
        "left": "{a} to the left of {b}, {style}",
        "right": "{a} to the right of {b}, {style}",
        "above": "{a} above {b}, {style}",
        "below": "{a} below {b}, {style}",
    },
    "zh": {
        "left": "{b}左边的{a}，{style}",
        "right": "{b}右边的{a}，{style}",
        "above": "{b}上方的{a}，{style}",
        "below": "{b}下方的{a}，{style}",
    },
}
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def single_captions(item: Item, language: str) -> list[str]:
    """Every caption of one thing in a language. The first is the shortest: "panda, 3D"."""
    style = STYLE_WORDS[item.style][language]
    thing = item.english if language == "en" else item.chinese
    return [
        template.format(
            thing=thing, a_thing=with_article(thing), style=style, a_style=with_article(style)
        )
        for template in _SINGLE[language]
    ]


def captions(item: Item, rng: np.random.Generator) -> dict[str, str]:
    """A caption drawn in each language."""
    return {language: str(rng.choice(single_captions(item, language))) for language in LANGUAGES}


def frame_captions(
    first: Item, second: Item, relation: str, rng: np.random.Generator
) -> dict[str, str]:
    """Captions of two things of one style; `relation` says where the first is from the second.

    Either of the two is named first.
    """
    if rng.random() < 0.5:
        first, second, relation = second, first, _INVERSE[relation]
    return {
        language: _FRAME[language][relation].format(
            a=_named(first, language),
            b=_named(second, language),
            style=STYLE_WORDS[first.style][language],
        )
        for language in LANGUAGES
    }


def every_caption(items: list[Item]) -> Iterator[str]:
    """All captions of single things, and a frame of each thing with itself: all words there are."""
    for item in items:
        for language in LANGUAGES:
            yield from single_captions(item, language)
            name = _named(item, language)
            for template in _FRAME[language].values():
                yield template.format(a=name, b=name, style=STYLE_WORDS[item.style][language])


def with_article(words: str) -> str:
    """ "a panda", "an owl", "a 3D"; plurals and names of masses too, as captions are short."""
    return ("an " if words[:1].lower() in "aeiou" and words else "a ") + words


def _named(item: Item, language: str) -> str:
    return with_article(item.english) if language == "en" else item.chinese
