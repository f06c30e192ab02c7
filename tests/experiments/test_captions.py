"""What experiments/captions counts."""

import numpy as np

from cogview2_jax.data import scenes
from experiments.caption_match import judge
from experiments.caption_match.scoring import Prompt
from experiments.captions.run import judge_captions, ranking, two_object_prompts


def test_true_captions_are_right_and_those_of_other_pictures_are_not():
    examples = [scenes.example("validation", number) for number in range(40)]
    objects = [example.scene.objects for example in examples]
    for language in scenes.LANGUAGES:
        captions = [example.captions[language] for example in examples]
        assert judge_captions(captions, objects)["right"] == 1
        wrong = judge_captions(captions[1:] + captions[:1], objects)
        assert wrong["right"] < 0.2 and wrong["sentences"] == 1 and wrong["shape"] < 0.6
    babble = judge_captions(["a star a star a star"] * 2, objects[:2])
    assert babble["right"] == babble["sentences"] == 0 and babble["shape"] is None


def test_prompts_have_two_objects_in_both_languages():
    prompts = two_object_prompts(12, 0)
    assert len({prompt.text for prompt in prompts}) == 12
    assert {len(prompt.claims.objects) for prompt in prompts} == {2}
    assert sum(prompt.text.isascii() for prompt in prompts) == 6


class _Model:
    """Draws the scene of a caption and then another one; ranks as it is told."""

    def __init__(self, scene_of, first):
        self.scene_of, self.first = scene_of, first

    def generate(self, prompt, num_images, *, key, candidates):
        number = self.scene_of[prompt]
        shown = [scenes.example_scene("train", each) for each in (number, number + 1)]
        return np.stack([np.asarray(scenes.draw(scene)) for scene in shown])

    def rank(self, prompt, pictures):
        return np.array([self.first, 1 - self.first]), None


def test_the_best_is_the_one_that_is_ranked_first():
    scene_of = {scenes.example("train", number).captions["en"]: number for number in range(3)}
    prompts = [Prompt(text, scenes.parse_caption(text)) for text in scene_of]
    for first, share in ((0, 1.0), (1, 0.0)):
        found = ranking(_Model(scene_of, first), prompts, 2, 0, judge.load())
        assert found == {"random": 0.5, "best": share, "any": 1.0}
