"""Scenes: a procedural, bilingual text-to-image data set, drawn on demand.

A scene is one or two objects (8 shapes, 8 colours, 2 sizes, 4 fills) on a flat light background,
192x192 pixels. `example(split, index)` gives its picture and an English and a Chinese caption;
`parse_caption` and `check` turn a caption back into claims and say which of them hold for a scene,
so that a reader of pictures can score a generator.
"""

from cogview2_jax.data.scenes.captions import (
    TEMPLATES,
    WORDS,
    Claims,
    ObjectClaim,
    Verdict,
    caption,
    check,
    parse_caption,
)
from cogview2_jax.data.scenes.drawing import DEFAULT_STYLE, Style, draw
from cogview2_jax.data.scenes.sampling import SPLITS, Example, example, example_scene, sample_scene
from cogview2_jax.data.scenes.scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    CANVAS,
    CELL,
    COLOURS,
    FILLS,
    HELD_OUT_PAIRS,
    LANGUAGES,
    LATTICE,
    PLACES,
    RADII,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    place_of,
    relation_of,
)

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CANVAS",
    "CELL",
    "COLOURS",
    "DEFAULT_STYLE",
    "FILLS",
    "HELD_OUT_PAIRS",
    "LANGUAGES",
    "LATTICE",
    "PLACES",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TEMPLATES",
    "WORDS",
    "Claims",
    "Example",
    "ObjectClaim",
    "Scene",
    "SceneObject",
    "Style",
    "Verdict",
    "caption",
    "check",
    "draw",
    "example",
    "example_scene",
    "parse_caption",
    "place_of",
    "relation_of",
    "sample_scene",
]
