import itertools
import re

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import Claims, ObjectClaim, Scene, SceneObject

COUNT = 1500


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[scenes.Example]]:
    """Scenes with captions; to draw their pictures too would take most of the time."""
    return {
        split: [scenes.Example(None, *scenes.captioned_scene(split, i)) for i in range(COUNT)]
        for split in scenes.SPLITS
    }


def shapes_of(text: str, language: str) -> list[str]:
    """The shapes that a caption names, in its order."""
    words = "|".join(sorted(scenes.WORDS[language], key=len, reverse=True))
    shapes = []
    for word in re.findall(rf"\b(?:{words})\b" if language == "en" else words, text):
        try:
            shapes.append(scenes.parse_caption(word).objects[0].shape)
        except ValueError:  # no shape
            continue
    return shapes


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    return {(item.shape, item.colour) for item in scene.objects}


def test_an_example_depends_on_split_and_index_alone():
    for split, index in itertools.product(scenes.SPLITS, (0, 1, 10**12)):
        first, again = scenes.example(split, index), scenes.example(split, index)
        assert first.scene == again.scene
        assert first.captions == again.captions
        assert first.image.tobytes() == again.image.tobytes()
        assert (first.scene, first.captions) == scenes.captioned_scene(split, index)
        assert first.image.mode == "RGB" and first.image.size == (192, 192)


def test_the_streams_stay_what_they_were():
    # A trained model was trained on these: a change here is a new data set.
    example = scenes.example("train", 5)
    assert example.captions == {
        "en": "a cyan triangle above a large checked blue semicircle",
        "zh": "上方有一个青色小三角形，下方有一个蓝色大半圆",
    }
    assert example.scene == Scene(
        (
            SceneObject("triangle", "cyan", "small", "plain", 72, 48),
            SceneObject("semicircle", "blue", "large", "checked", 72, 144),
        ),
        "mist",
    )


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_the_object_to_be_named_first_is(language, drawn):
    rng = np.random.default_rng(0)
    for example in drawn["train"][:200]:
        objects = example.scene.objects
        for first in range(len(objects)):
            text = scenes.caption(example.scene, rng, language, first)
            assert shapes_of(text, language) == [
                objects[first].shape,
                *(o.shape for o in objects if o != objects[first]),
            ]


def test_splits_are_disjoint_streams(drawn):
    streams = [[e.scene for e in examples] for examples in drawn.values()]
    for one, other in itertools.combinations(streams, 2):
        same = sum(a == b for a, b in zip(one, other, strict=True))
        assert same == 0


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_held_out_pairs_are_not_drawn_for_training(drawn, split):
    seen = set().union(*(pairs_of(e.scene) for e in drawn[split]))
    everything = set(itertools.product(scenes.SHAPES, scenes.COLOURS))
    assert seen == everything - scenes.UNSEEN_PAIRS


def test_every_composition_scene_has_one_held_out_pair(drawn):
    found = [pairs_of(e.scene) & scenes.UNSEEN_PAIRS for e in drawn["composition"]]
    assert all(len(pairs) == 1 for pairs in found)
    assert set().union(*found) == scenes.UNSEEN_PAIRS


def test_held_out_pairs_spare_each_shape_and_colour_once():
    shapes, colours = zip(*scenes.UNSEEN_PAIRS, strict=True)
    assert sorted(shapes) == sorted(scenes.SHAPES)
    assert sorted(colours) == sorted(scenes.COLOURS)


def test_objects_are_on_the_lattice_inside_and_apart(drawn):
    for example in itertools.chain.from_iterable(drawn.values()):
        for item in example.scene.objects:
            assert item.x in scenes.LATTICE and item.y in scenes.LATTICE
        if len(example.scene.objects) == 2:
            one, other = example.scene.objects
            distance = np.hypot(one.x - other.x, one.y - other.y)
            assert distance >= scenes.RADII[one.size] + scenes.RADII[other.size] + 4
            assert {abs(one.x - other.x), abs(one.y - other.y)} & {0, 24}
            assert scenes.relation_of(one, other) is not None


def test_share_of_one_object(drawn):
    share = np.mean([len(e.scene.objects) == 1 for e in drawn["train"]])
    assert abs(share - 0.35) < 0.04


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_claims_of_a_caption_hold_for_its_scene(drawn, language):
    for example in itertools.chain.from_iterable(drawn.values()):
        text = example.captions[language]
        claims = scenes.parse_caption(text)
        verdict = scenes.check(claims, example.scene.objects)
        assert verdict.all_named and verdict.right == verdict.named, text
        assert verdict.named["shape"] == len(example.scene.objects)
        if len(example.scene.objects) == 2:
            assert verdict.named["place"] == (2 if claims.relation is None else 1)
        assert len(text.split()) <= 20


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_every_phrase_is_used(drawn, language):
    texts = [e.captions[language] for e in itertools.chain.from_iterable(drawn.values())]
    for phrase in scenes.WORDS[language]:
        assert any(phrase in text for text in texts), phrase
    phrase = "([a-z ]+?)" if language == "en" else "([^，]+?)"
    for (of, _), templates in scenes.TEMPLATES.items():
        for template in templates if of == language else ():
            pattern = re.compile(re.sub(r"\{\w\}", phrase, template))
            assert any(pattern.fullmatch(text) for text in texts), template


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_attributes_are_sometimes_left_out(drawn, language):
    claims = [scenes.parse_caption(e.captions[language]).objects for e in drawn["train"]]
    objects = list(itertools.chain.from_iterable(claims))
    for attribute, share in {"colour": 0.8, "size": 0.8, "fill": 0.725}.items():
        named = np.mean([getattr(item, attribute) is not None for item in objects])
        assert abs(named - share) < 0.04, attribute


@pytest.mark.parametrize(
    "text", ["a red circle above a striped blue square", "蓝色条纹正方形上方的红色圆"]
)
def test_the_example_sentences(text):
    red_circle = ObjectClaim("circle", colour="red")
    blue_square = ObjectClaim("square", colour="blue", fill="striped")
    assert scenes.parse_caption(text) == Claims((red_circle, blue_square), "above")


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        (" A Red Circle, on the left. ", Claims((ObjectClaim("circle", "red", place="left"),))),
        ("圆点大圆在左边。", Claims((ObjectClaim("circle", None, "large", "dotted", "left"),))),
        ("半圆", Claims((ObjectClaim("semicircle"),))),
        (
            "左边是圆,右边是心形",
            Claims((ObjectClaim("circle", place="left"), ObjectClaim("heart", place="right"))),
        ),
    ],
)
def test_small_liberties_are_understood(text, claims):
    assert scenes.parse_caption(text) == claims


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red dog on the sofa", "not understood: dog, on, the, sofa"),
        ("红色狗", "not understood: 狗"),
        ("a redcircle", "not understood: redcircle"),
        ("a red blue circle", "two colours, red and blue"),
        ("a red", "no shape after red"),
        ("a red on the left", "no shape after red"),
        ("circle circle circle", "not a sentence"),
        ("圆中间的星形", "not a relation"),
        ("", "not a sentence"),
        ("above", "not a sentence"),
    ],
)
def test_other_sentences_are_refused_in_one_line(text, says):
    with pytest.raises(ValueError, match=says) as error:
        scenes.parse_caption(text)
    assert "\n" not in str(error.value)


def test_check_says_which_attribute_is_wrong():
    claims = scenes.parse_caption("a small red circle above a striped blue square")
    circle = SceneObject("circle", "red", "small", "plain", 96, 48)
    square = SceneObject("square", "blue", "large", "striped", 96, 144)

    def wrong(*objects: SceneObject) -> set[str]:
        verdict = scenes.check(claims, objects)
        assert verdict.named == {"shape": 2, "colour": 2, "size": 1, "fill": 1, "place": 1}
        found = {a for a in scenes.ATTRIBUTES if verdict.right[a] < verdict.named[a]}
        return found | (set() if verdict.all_named else {"all"})

    def changed(item: SceneObject, **changes: str | int) -> SceneObject:
        return SceneObject(**{**vars(item), **changes})

    assert wrong(circle, square) == wrong(square, circle) == set()
    assert wrong(changed(circle, fill="dotted"), square) == set()
    assert wrong(changed(circle, shape="star"), square) == {"shape", "all"}
    assert wrong(circle, changed(square, colour="cyan")) == {"colour", "all"}
    assert wrong(changed(circle, size="large"), square) == {"size", "all"}
    assert wrong(circle, changed(square, fill="plain")) == {"fill", "all"}
    assert wrong(changed(circle, y=144), changed(square, y=48)) == {"place", "all"}
    assert wrong(circle) == {"shape", "colour", "fill", "place", "all"}
    assert wrong() == {"shape", "colour", "size", "fill", "place", "all"}
    assert wrong(circle, square, changed(circle, x=144)) == {"all"}


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (48, 96, "left"),
        (53, 120, "left"),
        (48, 144, None),
        (72, 96, None),
        (96, 96, "centre"),
        (120, 48, "top"),
        (96, 150, "bottom"),
        (144, 72, "right"),
    ],
)
def test_place_of(x, y, place):
    assert scenes.place_of(x, y) == place


def test_every_kind_of_object_looks_different():
    pictures = set()
    kinds = list(itertools.product(scenes.SHAPES, scenes.COLOURS, scenes.SIZES, scenes.FILLS))
    for shape, colour, size, fill in kinds:
        item = SceneObject(shape, colour, size, fill, 96, 96)
        image = scenes.draw(Scene((item,), "white"))
        pictures.add(image.resize((64, 64), Image.Resampling.BOX).tobytes())
    assert len(pictures) == len(kinds) == 512


def test_fills_are_anchored_to_the_canvas():
    def picture(x: int, background: str = "white") -> np.ndarray:
        item = SceneObject("square", "green", "large", "checked", x, 96)
        return np.asarray(scenes.draw(Scene((item,), background)))

    np.testing.assert_array_equal(np.roll(picture(96), 24, axis=1), picture(120))
    # Inside both objects, moving by half a period keeps the cloth where it is.
    np.testing.assert_array_equal(picture(96)[70:120, 75:120], picture(108)[70:120, 75:120])


def test_bad_arguments_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        scenes.example("dev", 0)
    with pytest.raises(ValueError, match="starts at 0"):
        scenes.example("train", -1)
    with pytest.raises(ValueError, match="1 or 2 objects, not 3"):
        scenes.sample_scene(rng, num_objects=3)
    with pytest.raises(ValueError, match="seen"):
        scenes.sample_scene(rng, pairs="any")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown language 'fr'"):
        scenes.caption(scenes.sample_scene(rng), rng, "fr")
