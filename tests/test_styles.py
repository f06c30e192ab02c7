"""Styles: kept in a bundle, chosen by name, applied to prompts and sampling."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import ClusterSampling
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.styles import PUBLISHED_STYLES, Style, find_style, in_style

PLAINLY = ClusterSampling(1.0, 4)
STYLES = (
    Style("left", "{} on the left", PLAINLY, PLAINLY),
    Style("greedy", "{}", ClusterSampling(0.0, 4), ClusterSampling(0.0, 4)),
)


@pytest.fixture(scope="module")
def styled(tiny):
    return CogView(tiny._replace(styles=STYLES))


def test_the_published_table():
    """UPSTREAM: templates, the base temperature, and what flat pictures are drawn with."""
    table = {style.name: style for style in PUBLISHED_STYLES}
    assert list(table) == [
        *("mainbody", "photo", "flat", "comics", "oil"),
        *("sketch", "isometric", "chinese", "watercolor"),
    ]
    assert in_style(table["mainbody"], "一只猫") == "一只猫 高清摄影 隔绝"
    temperatures = {name: style.base.temperature for name, style in table.items()}
    assert temperatures["flat"] == temperatures["sketch"] == 1.1 and temperatures["oil"] == 1.15
    assert temperatures["chinese"] == 1.12
    assert table["comics"].direct == table["flat"].direct == ClusterSampling(1.0, 5, 0.4)
    assert table["photo"].direct == ClusterSampling(1.0, 100, 0.89)


def test_names():
    assert find_style(STYLES, "none") is None and find_style((), "none") is None
    assert find_style(STYLES, "greedy") is STYLES[1]
    with pytest.raises(ValueError, match=r"style must be one of none, left, greedy: got oil$"):
        find_style(STYLES, "oil")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "two words"}, "must be one word"),
        ({"name": "none"}, "and not none"),
        ({"template": "no place"}, "must have one {}"),
        ({"template": "{} and {}"}, "must have one {}"),
    ],
)
def test_what_is_no_style(fields, said):
    with pytest.raises(ValueError) as caught:
        Style(**{"name": "oil", **fields})
    assert said in str(caught.value)


def test_a_bundle_keeps_them_and_refuses_damaged_ones(tiny, tmp_path):
    bundles.save(tmp_path / "styled", tiny._replace(styles=STYLES))
    assert bundles.load(tmp_path / "styled").styles == STYLES
    bundles.save(tmp_path / "plain", tiny)
    assert "styles" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert bundles.load(tmp_path / "plain").styles == ()
    file = tmp_path / "styled" / "config.json"
    content = json.loads(file.read_text())
    for change, said in {
        "template": "styles[0] lacks 'template'",
        "name": "styles must have different names: got greedy twice",
        "all": "styles must be a list",
    }.items():
        damaged = json.loads(json.dumps(content))
        if change == "template":
            del damaged["styles"][0]["template"]
        elif change == "name":
            damaged["styles"][0]["name"] = "greedy"
        else:
            damaged["styles"] = 1
        file.write_text(json.dumps(damaged))
        with pytest.raises(ValueError) as caught:
            bundles.load(tmp_path / "styled")
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_is_the_default_and_the_template_is_part_of_the_prompt(styled, tiny):
    key, text = jax.random.key(5), "a star"
    plain = CogView(tiny)
    in_template = plain.generate("a star on the left", 2, key=key, candidates=1)
    for style in (None, "left"):
        made = styled.generate(text, 2, key=key, candidates=1, style=style)
        np.testing.assert_array_equal(made, in_template)
    without = styled.generate(text, 2, key=key, candidates=1, style="none")
    np.testing.assert_array_equal(without, plain.generate(text, 2, key=key, candidates=1))
    assert (without != in_template).any()


def test_its_sampling_is_used(styled):
    """At temperature 0 both pictures of the base stage are the same; the model is as before."""
    options = {"key": jax.random.key(1), "stage": "base", "candidates": 1}
    one, other = styled.generate("a star", 2, style="greedy", **options)
    np.testing.assert_array_equal(one, other)
    one, other = styled.generate("a star", 2, style="none", **options)
    assert (one != other).any()


def test_candidates_are_scored_without_the_template(styled, monkeypatch):
    scored = []

    def scores(self, tokens, coarse):
        scored.append(np.asarray(tokens.base[1]).sum(axis=1).tolist())
        return np.zeros(len(coarse), np.float32)

    monkeypatch.setattr(CogView, "_scores", scores)
    key = jax.random.key(0)
    styled.generate("a star", 2, key=key, candidates=2, style="left", stage="base")
    assert scored == [[2, 2], [2, 2]]


def test_an_edit_has_a_style_when_it_is_named(styled, tiny):
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    options = {"box": (0, 0, 1, 0.5), "num_images": 2, "key": jax.random.key(0)}
    plain = CogView(tiny)
    np.testing.assert_array_equal(
        styled.edit("a star", picture, **options), plain.edit("a star", picture, **options)
    )
    np.testing.assert_array_equal(
        styled.edit("a star", picture, style="left", **options),
        plain.edit("a star on the left", picture, **options),
    )
    with pytest.raises(ValueError, match="got oil"):
        styled.edit("a star", picture, style="oil", **options)


def test_parameters_are_taken_apart_once(tiny):
    """Whichever styles are drawn in; the sampling is that of the style."""
    model = CogView(tiny._replace(styles=STYLES))
    apart = model._params("coglm")
    model.generate("a star", 2, key=jax.random.key(0), stage="base", style="left")
    assert model._params("coglm") is apart
    sampling = model._sampling(STYLES[0])["sampling"]
    assert dataclasses.replace(sampling, base=PLAINLY) == sampling
