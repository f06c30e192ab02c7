"""Captions of scenes in English and Chinese, and what they claim.

A caption is a sentence of a small grammar that always names the shapes and usually everything else.
`parse_caption` turns it back into `Claims`, and `check` says which of them hold for the objects of
a scene: those drawn, or those that a reader of a generated picture reports.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cogview2_jax.data.scenes.scene import (
    ATTRIBUTES,
    COLOURS,
    FILLS,
    LANGUAGES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    pick,
    place_of,
    relation_of,
)

_NAMED = 0.8  # how often a caption names an attribute that it may leave out
_PLAIN_NAMED = 0.5  # "plain" is what a reader assumes; saying it always would sound odd


@dataclass(frozen=True)
class ObjectClaim:
    """What a caption says about one object; None for what it does not mention."""

    shape: str
    colour: str | None = None
    size: str | None = None
    fill: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claims:
    """What a caption says about each object, and about where the first is from the second."""

    objects: tuple[ObjectClaim, ...]
    relation: str | None = None


_EN_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_EN_RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
_ZH_SHAPES = {
    "circle": ("圆", "圆形"),
    "square": ("正方形",),
    "triangle": ("三角形",),
    "diamond": ("菱形",),
    "star": ("星形", "星星"),
    "heart": ("心形",),
    "cross": ("十字",),
    "semicircle": ("半圆",),
}
_ZH_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
}
_ZH_SIZES = {"small": "小", "large": "大"}
_ZH_FILLS = {"plain": "纯色", "striped": "条纹", "dotted": "圆点", "checked": "格子"}
_ZH_PLACES = {"left": "左边", "right": "右边", "top": "上方", "bottom": "下方", "centre": "中间"}
_ZH_RELATIONS = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}

# {a}, {b}: noun phrases. {p}, {q}: their places. {r}: the relation of the first to the second.
TEMPLATES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("en", "one"): ("{a}", "a picture of {a}", "there is {a}", "this is {a}"),
    ("en", "one with place"): (
        "{a} {p}",
        "a picture of {a} {p}",
        "there is {a} {p}",
        "{p} there is {a}",
        "{p} is {a}",
    ),
    ("en", "relation"): (
        "{a} {r} {b}",
        "a picture of {a} {r} {b}",
        "there is {a} {r} {b}",
        "{a} is {r} {b}",
    ),
    ("en", "places"): (
        "{a} {p} and {b} {q}",
        "a picture of {a} {p} and {b} {q}",
        "there is {a} {p} and {b} {q}",
        "{p} is {a} and {q} is {b}",
    ),
    ("zh", "one"): ("{a}", "一个{a}", "有一个{a}", "画面里有一个{a}", "图中是{a}"),
    ("zh", "one with place"): (
        "{p}的{a}",
        "{a}在{p}",
        "一个{a}在{p}",
        "{p}有一个{a}",
        "画面{p}有一个{a}",
        "图中{p}是{a}",
    ),
    ("zh", "relation"): (
        "{b}{r}的{a}",
        "{a}在{b}的{r}",
        "一个{a}在一个{b}的{r}",
        "{b}的{r}有一个{a}",
        "画面里有{b}{r}的{a}",
    ),
    ("zh", "places"): (
        "{p}是{a}，{q}是{b}",
        "{a}在{p}，{b}在{q}",
        "{p}有一个{a}，{q}有一个{b}",
        "{p}的{a}和{q}的{b}",
        "图中{p}是{a}，{q}是{b}",
    ),
}


def caption(
    scene: Scene, rng: np.random.Generator, language: str, first_named: int | None = None
) -> str:
    """A sentence about the scene in "en" or "zh".

    It always names the shapes and, of two objects, their relation or their places; colour, size,
    fill and the place of a single object are each left out about one time in five. Of two objects,
    the one numbered `first_named` is named first, or either one. Raises ValueError on another
    language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; one of {', '.join(LANGUAGES)}")
    objects = list(scene.objects)
    can_place = None not in [place_of(item.x, item.y) for item in objects]
    if len(objects) == 1:
        form = "one with place" if can_place and rng.random() < _NAMED else "one"
    else:
        nameable = can_place or relation_of(*objects) is None
        form = "places" if nameable and rng.random() < 0.4 else "relation"
    template = pick(rng, TEMPLATES[language, form])
    if len(objects) == 2:
        first = int(rng.integers(2)) if first_named is None else first_named
        if (template.index("{b}") < template.index("{a}")) != (first == 1):
            objects.reverse()
    relation = relation_of(*objects) if len(objects) == 2 else None
    places = [place_of(item.x, item.y) for item in objects]
    phrases = [_noun_phrase(item, rng, language) for item in objects]
    place_words = _EN_PLACES if language == "en" else _ZH_PLACES
    fields = {"a": phrases[0], "b": phrases[-1]}
    if form in ("one with place", "places"):
        p, q = places[0], places[-1]
        assert p is not None and q is not None
        fields |= {"p": place_words[p], "q": place_words[q]}
    if form == "relation":
        if relation is None:
            raise ValueError("the two objects are on a diagonal, which no relation names")
        fields["r"] = (
            pick(rng, _EN_RELATIONS[relation]) if language == "en" else _ZH_RELATIONS[relation]
        )
    return template.format(**fields)


def _noun_phrase(item: SceneObject, rng: np.random.Generator, language: str) -> str:
    colour = rng.random() < _NAMED
    size = rng.random() < _NAMED
    fill = rng.random() < (_PLAIN_NAMED if item.fill == "plain" else _NAMED)
    if language == "zh":
        words = [_ZH_COLOURS[item.colour] * colour, _ZH_FILLS[item.fill] * fill]
        return "".join([*words, _ZH_SIZES[item.size] * size, pick(rng, _ZH_SHAPES[item.shape])])
    words = [item.size * size, item.fill * fill, item.colour * colour, item.shape]
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# To parse, a caption becomes tokens (kind, value); attribute words up to a shape become one object.
# The rest is a short sequence of kinds: N object, P place, R relation, D either, "," and, @ 在.
# Words without a meaning have no kind.

Token = tuple[str, str]


def _lexicon_en() -> dict[str, Token]:
    words: dict[str, Token] = {}
    words |= {shape: ("shape", shape) for shape in SHAPES}
    words |= {colour: ("colour", colour) for colour in COLOURS}
    words |= {size: ("size", size) for size in SIZES}
    words |= {fill: ("fill", fill) for fill in FILLS}
    words |= {phrase: ("P", place) for place, phrase in _EN_PLACES.items()}
    words |= {p: ("R", relation) for relation, phrases in _EN_RELATIONS.items() for p in phrases}
    words |= {"and": (",", "")}
    words |= dict.fromkeys(("a", "an", "a picture of", "there is", "this is", "is"), ("", ""))
    return words


def _lexicon_zh() -> dict[str, Token]:
    words: dict[str, Token] = {}
    words |= {word: ("shape", shape) for shape, forms in _ZH_SHAPES.items() for word in forms}
    words |= {word: ("colour", colour) for colour, word in _ZH_COLOURS.items()}
    words |= {word: ("size", size) for size, word in _ZH_SIZES.items()}
    words |= {word: ("fill", fill) for fill, word in _ZH_FILLS.items()}
    words |= {word: ("D", place) for place, word in _ZH_PLACES.items()}
    words |= {"和": (",", ""), "，": (",", ""), "在": ("@", "")}
    words |= dict.fromkeys(("一个", "有", "是", "画面", "画面里", "图中", "的"), ("", ""))
    return words


_LEXICONS = {"en": _lexicon_en(), "zh": _lexicon_zh()}
WORDS = {language: tuple(lexicon) for language, lexicon in _LEXICONS.items()}
"""All words of the grammar, by language: what a text model of Scenes should have whole."""
_RELATION_OF_PLACE = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
# Longest first: 圆点 is a fill although 圆 is a shape. English phrases are whole words.
_LEXERS = {
    "en": re.compile(
        r"\b(" + "|".join(sorted(_LEXICONS["en"], key=len, reverse=True)) + r")\b|\s+|([^\s]+)"
    ),
    "zh": re.compile(
        "(" + "|".join(sorted(_LEXICONS["zh"], key=len, reverse=True)) + r")|\s+|([^\s])"
    ),
}
# The kinds of a sentence -> (index of noun, index of place) of each object, index of the relation.
_SENTENCES: Mapping[str, tuple[tuple[tuple[int, int | None], ...], int | None]] = {
    "N": (((0, None),), None),
    "NP": (((0, 1),), None),
    "PN": (((1, 0),), None),
    "NRN": (((0, None), (2, None)), 1),
    "NP,NP": (((0, 1), (3, 4)), None),
    "PN,PN": (((1, 0), (4, 3)), None),
    "DN": (((1, 0),), None),
    "N@D": (((0, 2),), None),
    "NDN": (((2, None), (0, None)), 1),
    "N@ND": (((0, None), (2, None)), 3),
    "DN,DN": (((1, 0), (4, 3)), None),
    "N@D,N@D": (((0, 2), (4, 6)), None),
}


def parse_caption(text: str) -> Claims:
    """What a caption of the grammar claims, in either language.

    Raises ValueError with one line that says which words, or what else, is not understood.
    """
    language = "zh" if re.search(r"[\u3400-\u9fff]", text) else "en"
    sentence = text.strip().lower().rstrip(".。!！ ")
    sentence = sentence.replace(",", "，") if language == "zh" else sentence.replace(",", " ")
    tokens: list[Token] = []
    unknown: list[str] = []
    for match in _LEXERS[language].finditer(sentence):
        known, other = match.groups()
        if known:
            tokens.append(_LEXICONS[language][known])
        elif other:
            unknown.append(other)
    if unknown:
        joined = ("" if language == "zh" else ", ").join(unknown)
        raise ValueError(f"words not understood: {joined}")
    kinds = ""
    values: list[str | ObjectClaim] = []
    attributes: dict[str, str] = {}
    for kind, value in tokens:
        if kind in ("shape", "colour", "size", "fill"):
            if kind in attributes:
                raise ValueError(f"one object has two {kind}s, {attributes[kind]} and {value}")
            attributes[kind] = value
            if kind == "shape":
                kinds += "N"
                values.append(ObjectClaim(**attributes))
                attributes = {}
        elif attributes:
            raise ValueError(f"no shape after {' '.join(attributes.values())}")
        elif kind:
            kinds += kind
            values.append(value)
    if attributes:
        raise ValueError(f"no shape after {' '.join(attributes.values())}")
    if kinds not in _SENTENCES:
        raise ValueError(f"not a sentence about one or two objects: {' '.join(text.split())!r}")

    nouns, relation_at = _SENTENCES[kinds]
    objects = []
    for noun_at, place_at in nouns:
        noun = values[noun_at]
        assert isinstance(noun, ObjectClaim)
        place = None if place_at is None else str(values[place_at])
        objects.append(dataclasses.replace(noun, place=place))
    relation = None if relation_at is None else str(values[relation_at])
    if language == "zh" and relation is not None:
        if relation not in _RELATION_OF_PLACE:
            raise ValueError(f"not a relation between two objects: {_ZH_PLACES[relation]}")
        relation = _RELATION_OF_PLACE[relation]
    return Claims(tuple(objects), relation)


class Verdict(NamedTuple):
    """Which claims of a caption hold for a scene.

    `named`, `right`: per attribute of ATTRIBUTES, how many claims the caption makes and how many
    hold; an attribute that is not named has 0 of 0. `all_named`: every claim holds, and there are
    as many objects as the caption names.
    """

    named: dict[str, int]
    right: dict[str, int]
    all_named: bool


def check(claims: Claims, objects: Sequence[SceneObject]) -> Verdict:
    """Which claims hold for the objects of a scene, of any number and at any positions.

    Claims are matched with objects so that as many as possible hold. A claim about an object
    that is missing does not hold.
    """
    found: list[SceneObject | None] = list(objects)
    found += [None] * (len(claims.objects) - len(found))
    verdicts = (
        _check_assignment(claims, chosen)
        for chosen in itertools.permutations(found, len(claims.objects))
    )
    named, right, _ = max(verdicts, key=lambda v: sum(v.right.values()))
    complete = named == right and len(objects) == len(claims.objects)
    return Verdict(named, right, complete)


def _check_assignment(claims: Claims, chosen: Sequence[SceneObject | None]) -> Verdict:
    named = dict.fromkeys(ATTRIBUTES, 0)
    right = dict.fromkeys(ATTRIBUTES, 0)
    for claim, item in zip(claims.objects, chosen, strict=True):
        for attribute in ATTRIBUTES:
            value = getattr(claim, attribute)
            if value is None:
                continue
            named[attribute] += 1
            if item is not None:
                place = place_of(item.x, item.y)
                right[attribute] += value == (
                    place if attribute == "place" else getattr(item, attribute)
                )
    if claims.relation is not None:
        named["place"] += 1
        first, second = chosen
        if first is not None and second is not None:
            right["place"] += relation_of(first, second) == claims.relation
    return Verdict(named, right, named == right)
