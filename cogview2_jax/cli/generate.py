"""`cogview2 generate`: text in, pictures out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cogview2_jax.cli import common, pictures, sheets
from cogview2_jax.pipeline import settings

# The progress bar's names of the running networks.
_PART_OF = {"coglm": "base", "direct": "direct", "iterative": "iterative", "tokenizer": "pixels"}


@click.command(
    "generate",
    epilog="""\b
Examples:
  cogview2 generate "a red circle above a striped blue square"
  cogview2 generate --num-images 2 --stage base "a large green star" "左边的黄色心形"
  cogview2 generate --candidates 16 --seed 1 --out best "a small dotted purple heart"
  cogview2 generate --candidates 16 --keep 2 --out two "a small dotted purple heart"
  cogview2 generate --animate gif --num-images 1 "a red circle above a striped blue square"
""",
)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@pictures.num_images_option(settings.NUM_IMAGES)
@click.option(
    "--keep",
    type=click.IntRange(1, pictures.MOST_IMAGES),
    metavar="K",
    help="Of --candidates pictures of a prompt, finish the K with the highest caption score, best"
    " first. In place of --num-images.",
)
@click.option(
    "--animate",
    type=click.Choice(settings.ANIMATIONS),
    help="Also write how each picture came to be, as an animation of this kind, and how sure the"
    " model was of each token, as a PNG: yellow is sure, dark is not.",
)
@pictures.seed_option
@pictures.stage_option
@pictures.candidates_option
@common.dtype_option
@pictures.out_option
@common.overwrite_option
@common.bundle_option
def generate_command(
    prompts: tuple[str, ...],
    num_images: int,
    keep: int | None,
    animate: str | None,
    seed: int,
    stage: str | None,
    candidates: int | None,
    dtype: str,
    out: Path,
    overwrite: bool,
    bundle: Path | None,
) -> None:
    """Draw pictures of each PROMPT, in English or Chinese.

    Writes every picture, a labelled grid of all and a JSON file with prompts, seed, versions and
    timings. A picture depends on its prompt, the seed and its number alone, so --num-images 8
    begins with the pictures of --num-images 4. A prompt that the model cannot read is refused
    before anything is drawn.
    """
    begin = time.perf_counter()
    num_images = _kept(num_images, keep, candidates)
    folder = common.check_model(bundle, prompts)
    common.check_writable(out)
    chosen = common.choose_stage(folder, stage)
    names = sheets.stems(prompts, seed, "" if chosen == pictures.LAST_STAGE else chosen)
    whole = names[0] if len(names) == 1 else f"{names[0]}_and_{len(names) - 1}_more"
    grid = f"{whole}_grid.png"
    rows = [_files_of(*each, num_images, animate) for each in zip(prompts, names, strict=True)]
    best_of = common.candidates(folder, candidates)
    description = {
        "seed": seed,
        "num_images": num_images,
        "prompts": rows,
        "grid": grid,
        "stage": chosen,
        "candidates": best_of,
        **({"keep": keep} if keep else {}),
    } | common.circumstances(folder, dtype)
    files = [name for row in rows for kind in _KINDS for name in row.get(kind, ())] + [grid]
    outputs = common.Outputs(out, files, f"{whole}.json", description, overwrite)

    cv, _ = common.load(folder, settings.STAGES[chosen], dtype)
    timings = {"load": time.perf_counter() - begin}
    made: list[Any] = []
    contents: dict[str, Any] = {}
    with _Bar(len(prompts), settings.STAGES[chosen], timings) as bar:
        for row in rows:
            found = _draw(cv, row, seed, chosen, best_of, bool(keep), animate, bar)
            made.append(found["pictures"])
            for kind in _KINDS:
                contents |= dict(zip(row.get(kind, ()), found.get(kind, ()), strict=True))
    timings["total"] = time.perf_counter() - begin
    contents = {
        name: each if isinstance(each, bytes) else sheets.png(each)
        for name, each in contents.items()
    }
    contents[grid] = sheets.png(sheets.labelled_grid(prompts, made))
    outputs.write(contents, timings)


_KINDS = ("pictures", "animations", "confidence")  # of files of a prompt


def _files_of(prompt: str, name: str, num_images: int, animate: str | None) -> dict[str, Any]:
    """What the report says of a prompt: its files, by kind."""
    row: dict[str, Any] = {"prompt": prompt}
    row["pictures"] = [f"{name}_{i}.png" for i in range(num_images)]
    if animate:
        row["animations"] = [f"{name}_{i}_making.{animate}" for i in range(num_images)]
        row["confidence"] = [f"{name}_{i}_confidence.png" for i in range(num_images)]
    return row


def _kept(num_images: int, keep: int | None, candidates: int | None) -> int:
    """How many pictures of a prompt are finished. Raises UsageError for options that contradict."""
    if keep is None:
        return num_images
    given = click.get_current_context().get_parameter_source("num_images")
    if given is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--keep stands in place of --num-images: give one of them")
    if candidates is None or candidates < keep:
        raise click.UsageError(f"--keep {keep} needs at least as many --candidates")
    return keep


class _Bar:
    """A progress bar over the stages of some prompts; adds each one's seconds to `timings`."""

    def __init__(self, prompts: int, networks: tuple[str, ...], timings: dict[str, float]) -> None:
        from tqdm import tqdm

        self._parts = [_PART_OF[network] for network in networks]
        self._timings, self._last = timings, time.perf_counter()
        self._bar = tqdm(total=prompts * len(self._parts), unit="stage", file=sys.stderr)
        self._bar.set_description(f"{self._parts[0]:9s}")

    def __enter__(self) -> Callable[[str], None]:
        return self._step

    def _step(self, part: str) -> None:
        now = time.perf_counter()
        self._timings[part] = self._timings.get(part, 0.0) + now - self._last
        self._last = now
        following = (self._parts.index(part) + 1) % len(self._parts)
        self._bar.set_description(f"{self._parts[following]:9s}")
        self._bar.update()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._bar.set_description("done")
        self._bar.close()


def _draw(
    cv: Any,
    row: dict[str, Any],
    seed: int,
    stage: str,
    candidates: int,
    keep_best: bool,
    animate: str | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The content of a prompt's files, by kind: uint8 [y, x, 3] each, or bytes."""
    import jax

    prompt, num_images = row["prompt"], len(row["pictures"])
    key, options = jax.random.key(seed), {"candidates": candidates, "keep_best": keep_best}
    if not animate:
        pictures = cv.generate_stages(
            [prompt], key, num_images, stages=(stage,), progress=progress, **options
        )
        return {"pictures": pictures[stage][0]}
    from cogview2_jax.pipeline import making

    made = cv.making(prompt, num_images, key=key, stage=stage, progress=progress, **options)
    grid = cv.bundle.coglm_config.grid
    return {
        "pictures": made.steps[-1][1],
        "animations": [
            making.animation([(step, each[i]) for step, each in made.steps], grid, animate)
            for i in range(num_images)
        ],
        "confidence": making.confidence(made),
    }
