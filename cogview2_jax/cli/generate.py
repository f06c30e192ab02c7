"""`cogview2 generate`: text in, pictures out."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import bars, common, devices, lines, pictures, plan, sampling, sheets
from cogview2_jax.pipeline import settings

if TYPE_CHECKING:
    import numpy as np

    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.sharding import Sharding

# The progress bar's names of the running networks.
_PART_OF = {"coglm": "base", "direct": "direct", "iterative": "iterative", "tokenizer": "pixels"}
_KINDS = ("pictures", "animations", "confidence")  # of files of a prompt


@dataclass(frozen=True)
class How:
    """What the prompts of one command share."""

    folder: Path
    num_images: int
    keep: int | None
    animate: str | None
    seed: int
    stage: str
    candidates: int
    style: str
    chosen: dict[str, float]  # by option of sampling, those that were given
    dtype: str
    place: dict[str, Any]  # more arguments of `CogView`
    sharding: Sharding | None
    out: Path
    overwrite: bool

    def description(self) -> dict[str, Any]:
        """What every report says."""
        from cogview2_jax.styles import PLAIN

        return {
            "seed": self.seed,
            "num_images": self.num_images,
            "stage": self.stage,
            "candidates": self.candidates,
            # Always there: what a report lacks is not compared.
            "keep": self.keep or None,
            "style": None if self.style == PLAIN else self.style,
            "sampling": self.chosen or None,
            "memory": self.place or None,
            **devices.described(self.sharding),
        } | common.circumstances(self.folder, self.dtype)

    def load(self) -> CogView:
        networks = settings.STAGES[self.stage]
        cv, _ = common.load(self.folder, networks, self.dtype, self.sharding, **self.place)
        if not self.chosen:
            return cv
        return dataclasses.replace(cv, bundle=sampling.changed(cv.bundle, self.chosen))


@click.command(
    "generate",
    epilog="""\b
Examples:
  cogview2 generate "a red circle above a striped blue square"
  cogview2 generate --num-images 2 --stage base "a large green star" "左边的黄色心形"
  cogview2 generate --candidates 16 --seed 1 --out best "a small dotted purple heart"
  cogview2 generate --candidates 16 --keep 2 --out two "a small dotted purple heart"
  cogview2 generate --animate gif --num-images 1 "a red circle above a striped blue square"
  cogview2 generate --prompts prompts.txt --out many
  cogview2 generate --memory 16GB "a red circle"
""",
)
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw each line of a file, perhaps with an id and a tab in front, which names the files.",
)
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
@pictures.style_option("the first of the model, if it has any")
@sampling.options
@common.dtype_option
@plan.memory_option
@devices.options
@pictures.out_option
@common.overwrite_option
@common.bundle_option
def generate_command(
    prompts: tuple[str, ...],
    file: Path | None,
    num_images: int,
    keep: int | None,
    seed: int,
    stage: str | None,
    candidates: int | None,
    style: str | None,
    bundle: Path | None,
    animate: str | None,
    dtype: str,
    memory: int | None,
    out: Path,
    overwrite: bool,
    data: int,
    **given: Any,
) -> None:
    """Draw pictures of each PROMPT, in English or Chinese.

    Writes every picture, a labelled grid of all and a JSON file with prompts, seed, versions and
    timings. A picture depends on its prompt, the seed and its number alone, so --num-images 8
    begins with the pictures of --num-images 4. A prompt that the model cannot read is refused
    before anything is drawn. Without any prompt, a terminal is asked for one after another.

    With --prompts, each line has a JSON file of its own, a line that cannot be used is named on
    stderr, the others are drawn, and the exit code is 1. Lines that are done already are left as
    they are, so that the same command continues after a kill, and several runs of it share the
    lines.
    """
    if prompts and file:
        raise click.UsageError("give PROMPTs or --prompts, one of them")
    asking = not prompts and not file
    if asking and not sys.stdin.isatty():
        raise click.UsageError("Missing argument 'PROMPT...': give a prompt, or --prompts FILE")
    num_images = _kept(num_images, keep, candidates)
    folder = common.check_model(bundle, prompts, style=style)
    common.check_writable(out)
    number = given.pop("devices")
    if memory and number > 1:
        raise click.UsageError("--memory is for one device: leave out --devices")
    sharding = devices.sharding_of(number, data)
    chosen = {name: value for name, value in given.items() if value is not None}
    last = common.choose_stage(folder, stage)
    together = bool(keep or animate)
    dtype, place = plan.fitting(folder, memory, dtype, num_images, together, last, chosen)
    how = How(
        folder,
        num_images,
        keep,
        animate,
        seed,
        last,
        common.candidates(folder, candidates),
        common.style_of(folder, style),
        chosen,
        dtype,
        place,
        sharding,
        out,
        overwrite,
    )
    from cogview2_jax import bundle as bundles

    # Refused before anything is read.
    sampling.changed(bundles.read_description(folder), how.chosen)
    if file:
        _of_lines(file, how)
    elif asking:
        _of_answers(how)
    else:
        names = sheets.stems(prompts, seed, _suffix(how))
        _generate(prompts, names, how, how.load)


def _suffix(how: How) -> str:
    """What names of files have of the stage."""
    return "" if how.stage == pictures.LAST_STAGE else how.stage


def _of_lines(file: Path, how: How) -> None:
    """The pictures of every line of a file."""
    load = functools.cache(how.load)
    check = common.prompt_check(how.folder, style=how.style)
    names: dict[str, int] = {}

    def prepare(line: bytes, number: int) -> Callable[[], bool]:
        fields = lines.fields_of(line, number)
        if len(fields) > 2 or not fields[0].strip():
            what = f"{len(fields)} fields" if fields[0].strip() else "an empty id"
            raise ValueError(f"must be a prompt, or an id, a tab and a prompt: got {what}")
        name, prompt = fields[0].strip() if len(fields) == 2 else str(number), fields[-1]
        lines.require_new(name, number, names)
        check(prompt)
        stem = f"{sheets.slug(name)}_{sheets.stems([prompt], how.seed, _suffix(how))[0]}"
        return functools.partial(_generate, [prompt], [stem], how, load, again=False)

    lines.for_each_line(file, "a prompt", how.out, prepare)


def _of_answers(how: How) -> None:
    """The pictures of prompts that are typed, until an empty one."""
    load = functools.cache(how.load)
    check = common.prompt_check(how.folder, style=how.style)
    while prompt := click.prompt("prompt", default="", show_default=False).strip():
        try:
            check(prompt)
            _generate([prompt], sheets.stems([prompt], how.seed, _suffix(how)), how, load)
        except click.ClickException as error:
            common.complain(error.message)


def _generate(
    prompts: Sequence[str],
    names: Sequence[str],
    how: How,
    load: Callable[[], CogView],
    again: bool = True,
) -> bool:
    """Draw prompts and write their files; unless `again`, only if they are not there, else false
    is returned.
    """
    begin = time.perf_counter()
    whole = names[0] if len(names) == 1 else f"{names[0]}_and_{len(names) - 1}_more"
    grid = f"{whole}_grid.png"
    rows = [
        _files_of(*each, how.num_images, how.animate) for each in zip(prompts, names, strict=True)
    ]
    description = how.description() | {"prompts": rows, "grid": grid}
    files = [name for row in rows for kind in _KINDS for name in row.get(kind, ())] + [grid]
    outputs = common.Outputs(how.out, files, f"{whole}.json", description, how.overwrite)
    if not again and outputs.are_there():
        return False

    cv = load()
    timings = {"load": time.perf_counter() - begin}
    made: list[Any] = []
    contents: dict[str, Any] = {}
    with _Bar(len(prompts), settings.STAGES[how.stage], timings) as bar:
        for row in rows:
            found = _draw(cv, row, how, bar)
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
    return True


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

        self._parts = [_PART_OF[network] for network in networks]
        self._timings, self._last = timings, time.perf_counter()
        self._bar = bars.bar("", prompts * len(self._parts), "stages")
        self._bar.set_description_str(f"{self._parts[0]:9s}")

    def __enter__(self) -> Callable[[str], None]:
        return self._step

    def _step(self, part: str) -> None:
        now = time.perf_counter()
        self._timings[part] = self._timings.get(part, 0.0) + now - self._last
        self._last = now
        following = (self._parts.index(part) + 1) % len(self._parts)
        self._bar.update()
        if self._bar.n < self._bar.total:
            self._bar.set_description_str(f"{self._parts[following]:9s}")

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._bar.set_description_str("done")
        self._bar.close()


def _pictures(cv: CogView, prompt: str, key: Any, how: How, options: dict[str, Any]) -> np.ndarray:
    """uint8 [num_images, y, x, 3]: all at once, or with --memory as many as fit."""
    import numpy as np

    at_once = how.place.get("at_once", how.num_images)
    progress, made = options.pop("progress"), []
    for first in range(0, how.num_images, at_once):
        # The last batch is whole, so that it compiles nothing; its rest is dropped.
        last = first + at_once >= how.num_images
        found = cv.generate_stages(
            [prompt],
            key=key,
            stages=(how.stage,),
            first=first,
            progress=progress if last else lambda part: None,
            **options | {"num_images": at_once},
        )
        made.append(found[how.stage][0])
    return np.concatenate(made)[: how.num_images]


def _draw(
    cv: CogView, row: dict[str, Any], how: How, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The content of a prompt's files, by kind: uint8 [y, x, 3] each, or bytes."""
    import jax

    prompt, key = row["prompt"], jax.random.key(how.seed)
    options: dict[str, Any] = {"num_images": how.num_images, "candidates": how.candidates}
    options |= {"keep_best": bool(how.keep), "style": how.style, "progress": progress}
    if not how.animate:
        return {"pictures": _pictures(cv, prompt, key, how, options)}
    from cogview2_jax.pipeline import making

    made = cv.making(prompt, key=key, stage=how.stage, **options)
    return {
        "pictures": made.steps[-1][1],
        "animations": making.animations(made.steps, cv.bundle.coglm_config.grid, how.animate),
        "confidence": making.confidence(made),
    }
