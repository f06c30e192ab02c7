"""Captions of illustrations in English and Chinese: the thing and its style, in several ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from cogview2_jax.data.illustrations.index import Item
from cogview2_jax.pipeline.settings import LANGUAGES

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
RELATION_WORDS: Mapping[str, Mapping[str, str]] = {
    "left": {"en": "to the left of", "zh": "左边"},
    "right": {"en": "to the right of", "zh": "右边"},
    "above": {"en": "above", "zh": "上方"},
    "below": {"en": "below", "zh": "下方"},
}
"""Where one thing is from another, in each language."""
RELATIONS = tuple(RELATION_WORDS)
_FRAME = {"en": "{a} {relation} {b}, {style}", "zh": "{b}{relation}的{a}，{style}"}
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def single_captions(item: Item, language: str) -> list[str]:
    """Every caption of one thing in a language. The first is the shortest: "panda, 3D"."""
    style = STYLE_WORDS[item.style][language]
    thing = _name(item, language)
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
    return {language: _of_frame(first, second, relation, language) for language in LANGUAGES}


def every_caption(items: list[Item]) -> Iterator[str]:
    """All captions of single things, and a frame of each thing with itself: all words there are."""
    for item in items:
        for language in LANGUAGES:
            yield from single_captions(item, language)
            for relation in RELATIONS:
                yield _of_frame(item, item, relation, language)


def with_article(words: str) -> str:
    """ "a panda", "an owl", "a 3D"; plurals and names of masses too, as captions are short."""
    return ("an " if words[:1].lower() in "aeiou" and words else "a ") + words


def _of_frame(first: Item, second: Item, relation: str, language: str) -> str:
    a, b = (_name(item, language) for item in (first, second))
    if language == "en":
        a, b = with_article(a), with_article(b)
    return _FRAME[language].format(
        a=a,
        b=b,
        relation=RELATION_WORDS[relation][language],
        style=STYLE_WORDS[first.style][language],
    )


def _name(item: Item, language: str) -> str:
    return item.english if language == "en" else item.chinese
