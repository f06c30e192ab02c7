"""Does editing replace what the text names, and leave the rest?

\b
    python -m experiments.editing.run --num-edits 200 \\
        --json experiments/editing/results.json

To "replace", an edit takes a picture of Scenes with two objects, masks the half with one of them,
and gives a text that names another object there; to "add", the picture has one object, and the half
is empty. The judge of experiments/caption_match reads the result. For `edit`, and for `infill` of
the same box:

\b
    replaced   share of edits with an object in the half that is all the text says of the new one
    kept       share of edits in which the other object is what it was, at its place
    one        share of edits with one object in the half
    unchanged  share of edits in which no pixel of the other half changed

The row `drawing` has the clean drawings of what the edits should show: the judge's own limit.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import jax
import numpy as np

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import ObjectClaim, Scene, SceneObject
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.editing import Box
from experiments import results
from experiments.caption_match import judge

_NEAR = scenes.CELL / 2  # pixels: an object further off than this has moved
METHODS = ("edit", "infill")
KINDS = ("replace", "add")


class Task(NamedTuple):
    """One edit, after which a picture has two objects."""

    before: Scene
    after: Scene
    box: Box  # the half to redraw
    text: str
    wanted: ObjectClaim  # what the text says of the new object
    kept: SceneObject


def make_task(rng: np.random.Generator, language: str, kind: str = KINDS[0]) -> Task:
    """A random scene of two objects, one of them replaced by one of another shape and colour, or,
    to "add", not there before.
    """
    before = scenes.sample_scene(rng, 2)
    which = int(rng.integers(2))
    old, kept = before.objects[which], before.objects[1 - which]
    while True:
        (drawn,) = scenes.sample_scene(rng, 1).objects
        if drawn.shape not in (old.shape, kept.shape) and drawn.colour != old.colour:
            break
    # Of the same size: a larger one may not fit next to the other object.
    new = dataclasses.replace(drawn, size=old.size, x=old.x, y=old.y)
    after = Scene((new, kept) if which == 0 else (kept, new), before.background)
    text = scenes.caption(after, rng, language)
    claims = scenes.parse_caption(text).objects
    wanted = next(claim for claim in claims if claim.shape == new.shape)
    if kind == "add":
        before = dataclasses.replace(before, objects=(kept,))
    return Task(before, after, _half(old, kept), text, wanted, kept)


def _half(old: SceneObject, kept: SceneObject) -> Box:
    """The part of the canvas on `old`'s side of the middle between the two."""
    middle_x, middle_y = ((old.x + kept.x) / 384, (old.y + kept.y) / 384)
    if abs(old.x - kept.x) > abs(old.y - kept.y):
        return (0, 0, 1, middle_x) if old.x < kept.x else (0, middle_x, 1, 1)
    return (0, 0, middle_y, 1) if old.y < kept.y else (middle_y, 0, 1, 1)


def verdicts(task: Task, picture: np.ndarray, found: list[SceneObject]) -> dict[str, bool]:
    """What holds for an edited picture uint8 [192, 192, 3] in which the judge `found` objects."""
    top, left, bottom, right = (edge * scenes.CANVAS for edge in task.box)
    inside = [item for item in found if top <= item.y < bottom and left <= item.x < right]
    said = {name: word for name, word in vars(task.wanted).items() if word and name != "place"}
    kept = task.kept
    changed = (picture != np.asarray(scenes.draw(task.before))).any(-1)
    rows, columns = np.arange(scenes.CANVAS)[:, None], np.arange(scenes.CANVAS)
    half = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return {
        "replaced": any(
            all(getattr(item, name) == word for name, word in said.items()) for item in inside
        ),
        "kept": any(
            dataclasses.replace(item, x=kept.x, y=kept.y) == kept
            and max(abs(item.x - kept.x), abs(item.y - kept.y)) <= _NEAR
            for item in found
        ),
        "one": len(inside) == 1,
        "unchanged": not changed[~half].any(),
    }


def run_edits(
    cv: CogView, tasks: list[Task], seed: int, methods: Sequence[str] = METHODS
) -> dict[str, np.ndarray]:
    """The edited picture of each task by each method, uint8 [tasks, 192, 192, 3]."""
    made: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    with click.progressbar(enumerate(tasks), length=len(tasks), label="editing") as bar:
        for number, task in bar:
            picture = np.asarray(scenes.draw(task.before))
            key = jax.random.fold_in(jax.random.key(seed), number)
            for method in methods:
                redraw = getattr(cv, method)
                one = redraw(task.text, picture, box=task.box, num_images=1, key=key)[0]
                made[method].append(one)
    return {method: np.stack(pictures) for method, pictures in made.items()}


def measure(
    tasks: list[Task], made: dict[str, np.ndarray], params: judge.Params
) -> dict[str, dict[str, float]]:
    """The shares (see the module) of each method, and of the clean drawings."""
    drawings = np.stack([np.asarray(scenes.draw(task.after)) for task in tasks])
    results = {}
    for method, pictures in {**made, "drawing": drawings}.items():
        rows = [
            verdicts(*each)
            for each in zip(tasks, pictures, judge.read(params, pictures), strict=True)
        ]
        results[method] = {
            name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]
        }
    return results


@click.command(help=__doc__)
@click.option("--num-edits", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the scenes and the pictures.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS)
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@results.bundle_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    num_edits: int,
    seed: int,
    kinds: tuple[str, ...],
    methods: tuple[str, ...],
    bundle: Path | None,
    json_file: Path | None,
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    params, found = judge.load(), {}
    for kind in kinds:
        rng = np.random.default_rng((0xED17, seed))
        languages = [scenes.LANGUAGES[number % 2] for number in range(num_edits)]
        tasks = [make_task(rng, language, kind) for language in languages]
        found[kind] = measure(tasks, run_edits(cv, tasks, seed, methods), params)
        for method, shares in found[kind].items():
            said = "".join(f"  {name} {value}" for name, value in shares.items())
            click.echo(f"{kind:8s}{method:8s}{said}")
    if json_file:
        figures = {**found, "num_edits": num_edits, "seed": seed}
        results.write(json_file, figures, bundle, begin)


if __name__ == "__main__":
    main()
