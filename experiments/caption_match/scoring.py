"""Prompts for the experiment, and the counting of what a judge finds in pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import ATTRIBUTES, UNSEEN_PAIRS, Claims, SceneObject

GROUPS = ("one_object", "two_objects", "english", "chinese", "unseen_pairs")
COLUMNS = ("all_named", *ATTRIBUTES)


@dataclass(frozen=True)
class Prompt:
    """A sentence and what it claims."""

    text: str
    claims: Claims

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups it counts in: unseen pairs separately, all others by objects and language."""
        pairs = {(item.shape, item.colour) for item in self.claims.objects}
        if pairs & UNSEEN_PAIRS:
            return ("unseen_pairs",)
        number = "one_object" if len(self.claims.objects) == 1 else "two_objects"
        return (number, "english" if self.text.isascii() else "chinese")


def read_prompts(lines: Sequence[str]) -> list[Prompt]:
    """One prompt per line; empty lines are skipped.

    Raises ValueError, with the line's number, on a sentence that is not one of Scenes.
    """
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(Prompt(line.strip(), scenes.parse_caption(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return prompts


def make_prompts(number: int, seed: int) -> list[Prompt]:
    """Different prompts, the languages in turn: of ten, four name one object, four two objects, and
    two a (shape, colour) pair that is not in the training split.
    """
    rng = np.random.default_rng((0x9907, seed))
    # Languages alternate, so each kind comes twice running to be had in both.
    kinds = [1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    prompts: dict[str, Prompt] = {}
    while len(prompts) < number:
        kind = kinds[len(prompts) % len(kinds)]
        language = scenes.LANGUAGES[len(prompts) % 2]
        scene = scenes.sample_scene(rng, kind or None, "seen" if kind else "unseen")
        text = scenes.caption(scene, rng, language)
        prompt = Prompt(text, scenes.parse_caption(text))
        # A caption of a scene with an unseen pair may leave its colour out: that tests nothing new.
        if (prompt.groups == ("unseen_pairs",)) == (kind == 0):
            prompts.setdefault(text, prompt)
    return list(prompts.values())


def score(
    prompts: Sequence[Prompt], found: Sequence[Sequence[Sequence[SceneObject]]]
) -> dict[str, dict[str, Any]]:
    """Counts what the prompts name and the pictures show.

    `found`: for each prompt, for each of its pictures, the objects seen. Returns for each of GROUPS
    the fraction right of each of COLUMNS (None where nothing was named), and under "counts" the
    numbers behind it, as [right, named]. "all_named" counts pictures; the others count claims, so
    that a picture of two coloured objects counts twice under "colour".
    """
    counts = {group: {column: [0, 0] for column in COLUMNS} for group in GROUPS}
    for prompt, pictures in zip(prompts, found, strict=True):
        for objects in pictures:
            verdict = scenes.check(prompt.claims, objects)
            for group in prompt.groups:
                row = counts[group]
                row["all_named"][0] += verdict.all_named
                row["all_named"][1] += 1
                for name in ATTRIBUTES:
                    row[name][0] += verdict.right[name]
                    row[name][1] += verdict.named[name]
    return {
        group: {
            **{name: right / named if named else None for name, (right, named) in row.items()},
            "counts": row,
        }
        for group, row in counts.items()
    }
