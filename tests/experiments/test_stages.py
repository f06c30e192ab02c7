"""The figures of experiments/stages, on pictures with known answers."""

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


def test_measure_counts_right_pictures_and_compares_those_clear_after_every_stage():
    scene = _scene()
    drawn = scenes.draw(scene)
    sharp = np.asarray(drawn)
    soft = np.asarray(drawn.filter(ImageFilter.GaussianBlur(2)))
    text = scenes.example("test", 3).captions["en"]
    prompts = [Prompt(text, scenes.parse_caption(text))]
    pictures = {"base": np.stack([np.stack([soft, soft])]), "full": np.stack([[sharp, sharp]])}
    objects = list(scene.objects)
    found = {"base": [[objects, []]], "full": [[objects, objects]]}
    figures = run.measure(pictures, prompts, found)
    assert (figures["base"]["right"], figures["full"]["right"]) == (0.5, 1.0)
    assert (figures["base"]["clear"], figures["full"]["clear"]) == (0.5, 1.0)
    assert figures["base"]["compared"] == figures["full"]["compared"] == 1
    assert (figures["full"]["sharpness"], figures["full"]["error"]) == (1.0, 0.0)
    assert figures["base"]["sharpness"] < 0.9
