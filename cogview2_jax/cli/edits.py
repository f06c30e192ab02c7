"""`cogview2 edit`: a part of a picture redrawn, or one part for each line of a file."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common, lines, pictures, sheets
from cogview2_jax.pipeline import settings
from cogview2_jax.styles import PLAIN

if TYPE_CHECKING:
    from PIL import Image

    from cogview2_jax.pipeline.cogview import CogView

Box = tuple[float, float, float, float]
_FIELDS = "text, image, h0, w0, h1, w1, with tabs between, and perhaps an id in front"


@dataclass(frozen=True)
class Request:
    """One edit. The box of a line is one of the square in the middle of its picture."""

    text: str
    picture: Path
    box: Box | None = None
    mask: Path | None = None
    line: int = 0  # of a file, from 1; 0 on the command line
    name: str = ""  # of a line: its id, or its number

    def part(self, picture: Image.Image) -> dict[str, Any]:
        """The part of the opened picture that is redrawn, as arguments of `CogView.edit`."""
        from cogview2_jax.pipeline import patch_completion

        if self.mask:
            return {"mask": common.open_picture(self.mask)}
        if self.line and self.box:
            size = picture.height, picture.width
            return {"mask": patch_completion.square_box_mask(self.box, *size)}
        return {"box": self.box}

    def description(self) -> dict[str, Any]:
        """What the report says of it."""
        said: dict[str, Any] = {"text": self.text} | file_facts("picture", self.picture)
        if self.mask:
            said |= file_facts("mask", self.mask)
        if self.box:
            said["box"] = self.box
        return said | ({"line": self.line, "id": self.name} if self.line else {})


@dataclass(frozen=True)
class How:
    """What the edits of one command share."""

    folder: Path
    num_images: int
    seed: int
    stage: str
    candidates: int
    dtype: str
    out: Path
    overwrite: bool
    style: str = PLAIN

    def draw(
        self,
        name: str,
        description: dict[str, Any],
        begin: float,
        redraw: Callable[..., Any],
        load: Callable[[], CogView] | None = None,
        again: bool = True,
    ) -> bool:
        """Write the pictures that `redraw` makes with a model and the arguments of all edits;
        unless `again`, only if they are not there, else false is returned.

        Files begin with `name`; the report has the `description`, what is said here, and the time
        since `begin`. `redraw` returns uint8 [n, y, x, 3]; `load` replaces `self.load`. Raises as
        `common.Outputs`, and ClickException where `redraw` raises ValueError.
        """
        name += f"_seed{self.seed}"
        name += "" if self.stage == pictures.LAST_STAGE else f"_{self.stage}"
        files = [f"{name}_{i}.png" for i in range(self.num_images)]
        description = description | {
            "seed": self.seed,
            "num_images": self.num_images,
            "pictures": files,
            "stage": self.stage,
            "candidates": self.candidates,
            "style": None if self.style == PLAIN else self.style,
        }
        description |= common.circumstances(self.folder, self.dtype)
        outputs = common.Outputs(self.out, files, f"{name}.json", description, self.overwrite)
        if not again and outputs.are_there():
            return False
        cv = (load or self.load)()
        import jax

        with common.refusing():
            made = redraw(
                cv,
                key=jax.random.key(self.seed),
                num_images=self.num_images,
                stage=self.stage,
                candidates=self.candidates,
            )
        contents = {file: sheets.png(each) for file, each in zip(files, made, strict=True)}
        outputs.write(contents, {"total": time.perf_counter() - begin})
        return True

    def load(self) -> CogView:
        return common.load(self.folder, settings.STAGES[self.stage], self.dtype)[0]


def file_facts(name: str, file: Path) -> dict[str, str]:
    """What a report says of a file."""
    return {name: str(file), f"{name}_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _box(context: click.Context, parameter: click.Parameter, said: str | None) -> Box | None:
    if said is None:
        return None
    try:
        top, left, bottom, right = (float(edge) for edge in said.split(","))
    except ValueError:
        raise click.BadParameter(
            f"must be four numbers, Y0,X0,Y1,X1: got {said}", context, parameter
        ) from None
    return top, left, bottom, right


@click.command(
    "edit",
    epilog="""\b
Examples:
  cogview2 edit picture.png "a red circle above a blue star" --box 0.5,0,1,1
  cogview2 edit wide.jpg "a large green star" --mask mask.png --num-images 2
  cogview2 edit --lines edits.tsv --out edited
""",
)
@click.argument("picture", type=click.Path(path_type=Path), required=False)
@click.argument("text", required=False)
@click.option(
    "--box",
    callback=_box,
    metavar="Y0,X0,Y1,X1",
    help="What to redraw: top, left, bottom and right, as fractions of the whole picture.",
)
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="What to redraw: the white pixels of a picture of the same size.",
)
@click.option(
    "--lines",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Many edits, a line each, as published: {_FIELDS}. The box is of the square in the middle"
    " of the picture.",
)
@pictures.num_images_option(settings.NUM_EDITED)
@pictures.seed_option
@pictures.stage_option
@pictures.candidates_option
@pictures.style_option(f"{PLAIN}, as published")
@common.dtype_option
@pictures.out_option
@common.overwrite_option
@common.bundle_option
def edit_command(
    picture: Path | None,
    text: str | None,
    box: Box | None,
    mask: Path | None,
    file: Path | None,
    bundle: Path | None,
    stage: str | None,
    candidates: int | None,
    style: str | None,
    **shared: Any,
) -> None:
    """Redraw a part of PICTURE as TEXT says, which describes the whole.

    PICTURE may have any shape and size; the results have the same. The model sees a square around
    the part, and only the part's cells change. Writes the pictures and a JSON file with the
    settings, for each edit. A line of --lines that cannot be used is named on stderr; the others
    are done, and the exit code is 1. Lines that are done already are left as they are; several runs
    of one command share the lines.
    """
    shared["style"] = style or PLAIN
    if file is not None and not (picture is None and text is None and box is None and not mask):
        raise click.UsageError("--lines names pictures, texts and boxes itself: give nothing else")
    if file is None:
        if picture is None or text is None:
            raise click.UsageError("give PICTURE and TEXT, or --lines FILE")
        if (box is None) == (mask is None):
            raise click.UsageError("give --box or --mask, one of them")
        folder = common.check_model(bundle, (text,), start_token=True, style=shared["style"])
    else:
        folder = common.check_model(bundle, style=shared["style"])
    common.check_writable(shared["out"])
    how = How(
        folder,
        stage=common.choose_stage(folder, stage),
        candidates=common.candidates(folder, candidates, edits=True),
        **shared,
    )
    if file is not None:
        _edit_lines(file, how)
        return
    assert picture is not None and text is not None
    _edit(Request(text, picture, box, mask), how, how.load)


def _edit(request: Request, how: How, load: Callable[[], CogView], again: bool = True) -> bool:
    """Do one edit and write its files, as `How.draw`."""
    begin = time.perf_counter()
    opened = common.open_picture(request.picture)
    with common.refusing():
        part = request.part(opened)
    common.check_part(how.folder, part, opened)
    name = f"{sheets.slug(request.name)}_" if request.line else ""
    name += f"{sheets.slug(request.picture.stem)}_{sheets.slug(request.text)}"

    def redraw(cv: CogView, **shared: Any) -> Any:
        return cv.edit(request.text, opened, **part, style=how.style, **shared)

    return how.draw(name, request.description(), begin, redraw, load, again)


# --- Files of edits -------------------------------------------------------------------------------


def _edit_lines(file: Path, how: How) -> None:
    load = functools.cache(how.load)
    check = common.prompt_check(how.folder, start_token=True, style=how.style)
    names: dict[str, int] = {}

    def prepare(line: bytes, number: int) -> Callable[[], bool]:
        request = parse_line(line, number)
        lines.require_new(request.name, number, names)
        check(request.text)
        return functools.partial(_edit, request, how, load, again=False)

    lines.for_each_line(file, f"an edit: give lines of {_FIELDS}", how.out, prepare)


def parse_line(line: bytes, number: int) -> Request:
    """An edit from a line of a file: `[id⇥]text⇥image⇥h0⇥w0⇥h1⇥w1` in UTF-8.

    Raises ValueError for another number of fields, edges that are no numbers, and bytes that are no
    UTF-8.
    """
    fields = lines.fields_of(line, number)
    if len(fields) not in (6, 7):
        raise ValueError(f"must have {_FIELDS}: got {len(fields)} fields")
    name = fields[0].strip() if len(fields) == 7 else str(number)
    text, picture, *edges = fields[-6:]
    try:
        top, left, bottom, right = (float(edge) for edge in edges)
    except ValueError:
        raise ValueError(f"h0, w0, h1, w1 must be numbers: got {', '.join(edges)}") from None
    if not picture.strip() or not name:
        raise ValueError(f"must name {'an image' if name else 'its id'}: got an empty field")
    return Request(text, Path(picture), (top, left, bottom, right), line=number, name=name)
