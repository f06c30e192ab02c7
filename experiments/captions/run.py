"""Are captions right, and does keeping the best of several pictures by rank help?

\b
    python -m experiments.captions.run --num-pictures 200 --num-prompts 60 \\
        --json experiments/captions/results.json

Captions are of pictures of the validation split, in both languages, greedy and the most likely of
--num-captions; what one says is compared with the scene that was drawn. A caption is right if all
that it names is, and it names every object. For the second question each prompt with two objects is
drawn --num-images times without post-selection; the judge of experiments/caption_match reads the
pictures, and `CogView.rank` orders them:

\b
    random     share of pictures that show all that the prompt names: one picked blindly
    best       share of prompts for which the picture ranked first does
    any        share of prompts for which some picture does: the most that ranking can reach
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import ATTRIBUTES, SceneObject
from cogview2_jax.pipeline.cogview import CogView
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.scoring import Prompt, make_prompts


def judge_captions(
    captions: Sequence[str], pictures: Sequence[Sequence[SceneObject]]
) -> dict[str, float | None]:
    """Shares of captions that are right, that are sentences of Scenes, and of right attributes."""
    right, sentences = 0, 0
    named, held = dict.fromkeys(ATTRIBUTES, 0), dict.fromkeys(ATTRIBUTES, 0)
    for said, objects in zip(captions, pictures, strict=True):
        try:
            verdict = scenes.check(scenes.parse_caption(said), objects)
        except ValueError:
            continue
        sentences += 1
        right += verdict.all_named
        for name in ATTRIBUTES:
            named[name] += verdict.named[name]
            held[name] += verdict.right[name]
    shares = {name: round(held[name] / named[name], 4) if named[name] else None for name in named}
    number = len(captions)
    return {
        "right": round(right / number, 4),
        "sentences": round(sentences / number, 4),
        **shares,
    }


def caption_scores(
    cv: CogView, num_pictures: int, num_captions: int, seed: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """language → "greedy" and "best" → `judge_captions`, of the validation split."""
    examples = [scenes.example("validation", number) for number in range(num_pictures)]
    pictures = [np.asarray(example.image) for example in examples]
    objects = [example.scene.objects for example in examples]
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for language in scenes.LANGUAGES:
        best = cv.captions(
            pictures, language=language, key=jax.random.key(seed), candidates=num_captions
        )
        found[language] = {
            "greedy": judge_captions(cv.captions(pictures, language=language), objects),
            "best": judge_captions(best, objects),
        }
    return found


def two_object_prompts(number: int, seed: int) -> list[Prompt]:
    """Prompts with two objects of seen pairs, the languages in turn."""
    many = make_prompts(5 * number, seed)
    return [prompt for prompt in many if "two_objects" in prompt.groups][:number]


def ranking(
    cv: CogView, prompts: Sequence[Prompt], num_images: int, seed: int, params: judge.Params
) -> dict[str, float]:
    """The shares that the module explains."""
    rights = []
    with click.progressbar(prompts, label="drawing") as bar:
        for prompt in bar:
            key = jax.random.key(seed)
            pictures = cv.generate(prompt.text, num_images, key=key, candidates=1)
            order, _ = cv.rank(prompt.text, list(pictures))
            verdicts = [
                scenes.check(prompt.claims, objects).all_named
                for objects in judge.read(params, pictures)
            ]
            rights.append([verdicts[number] for number in order])
    right = np.array(rights, float)
    return {
        "random": round(float(right.mean()), 4),
        "best": round(float(right[:, 0].mean()), 4),
        "any": round(float(right.max(1).mean()), 4),
    }


@click.command(help=__doc__)
@click.option("--num-pictures", type=click.IntRange(1), default=200, show_default=True)
@click.option("--num-captions", type=click.IntRange(2), default=4, show_default=True)
@click.option("--num-prompts", type=click.IntRange(1), default=60, show_default=True)
@click.option("--num-images", type=click.IntRange(2, 64), default=8, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of prompts, pictures and captions.")
@results.bundle_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    num_pictures: int,
    num_captions: int,
    num_prompts: int,
    num_images: int,
    seed: int,
    bundle: Path | None,
    json_file: Path | None,
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    report: dict[str, Any] = {"captions": caption_scores(cv, num_pictures, num_captions, seed)}
    for language, kinds in report["captions"].items():
        for kind, shares in kinds.items():
            said = "".join(f"  {name} {value}" for name, value in shares.items())
            click.echo(f"{language}  {kind:8s}{said}")
    prompts = two_object_prompts(num_prompts, seed)
    report["ranking"] = ranking(cv, prompts, num_images, seed, judge.load())
    click.echo("  ".join(f"{name} {value}" for name, value in report["ranking"].items()))
    if json_file:
        settings = {
            "num_pictures": num_pictures,
            "num_captions": num_captions,
            "num_prompts": num_prompts,
            "num_images": num_images,
            "seed": seed,
        }
        results.write(json_file, report | settings, bundle, begin)


if __name__ == "__main__":
    main()
