"""The figures of experiments/stages on pictures whose answer is known."""

import numpy as np
from PIL import ImageFilter

from cogview2_jax.data import scenes
from experiments.caption_match.scoring import Prompt
from experiments.stages import run


def _scene():
    return scenes.example("test", 3).scene


def test_a_clean_drawing_has_full_sharpness_and_no_error():
    scene = _scene()
    picture = np.asarray(scenes.draw(scene))
    assert run.clean_drawing(picture, list(scene.objects)) == scene
    assert run.against_drawing(picture, scene) == (1.0, 0.0)


def test_blur_costs_sharpness_and_adds_error():
    scene = _scene()
    drawn = scenes.draw(scene)
    soft, softer = (
        run.against_drawing(np.asarray(drawn.filter(ImageFilter.GaussianBlur(radius))), scene)
        for radius in (1, 3)
    )
    assert softer[0] < soft[0] < 0.8
    assert softer[1] > soft[1] > 1


def test_measure_counts_right_pictures_and_passes_over_unclear_readings():
    scene = _scene()
    picture = np.asarray(scenes.draw(scene))
    text = scenes.example("test", 3).captions["en"]
    prompt = Prompt(text, scenes.parse_caption(text))
    pictures = np.stack([np.stack([picture, picture])])
    found = [[list(scene.objects), []]]
    figures = run.measure(pictures, [prompt], found)
    assert figures["right"] == 0.5
    assert (figures["pictures"], figures["drawn_anew"]) == (2, 1)
    assert (figures["sharpness"], figures["error"]) == (1.0, 0.0)
