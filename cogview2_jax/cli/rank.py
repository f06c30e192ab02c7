"""`cogview2 rank`: how well pictures fit a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cogview2_jax.cli import common


@click.command(
    "rank",
    epilog="""\b
Examples:
  cogview2 rank "a red circle above a blue star" pictures/*.png
  cogview2 rank "a red circle" --text "a blue star" --json scores.json pictures/*.png
""",
)
@click.argument("text")
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--text",
    "more",
    multiple=True,
    metavar="TEXT",
    help="One more text, for a matrix of texts and pictures. May be given many times.",
)
@click.option(
    "--as-released",
    is_flag=True,
    help="Score every text after the start token of Chinese, as the released script does.",
)
@click.option(
    "--json",
    "report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the scores there too, with the settings.",
)
@common.dtype_option
@common.overwrite_option
@common.bundle_option
def rank_command(
    text: str,
    pictures: tuple[Path, ...],
    more: tuple[str, ...],
    as_released: bool,
    report: Path | None,
    dtype: str,
    overwrite: bool,
    bundle: Path | None,
) -> None:
    """Sort pictures by how well TEXT fits them, best first.

    Prints a line for each: the mean log-likelihood of TEXT's tokens as the picture's caption, a
    tab, and the file. With --text, a line has a score for each text, below a line of the texts, and
    pictures stay in the order given. A picture that cannot be used is named on stderr; the others
    are ranked, and the exit code is 1.
    """
    texts = (text, *more)
    folder = common.check_model(bundle, texts)
    if report is not None:
        common.check_writable(report.parent)
    from cogview2_jax.tokenizer.pictures import PictureError, open_picture

    cv = None
    failed = False
    usable, tokens = [], []
    for file in pictures:
        try:
            opened = open_picture(file)
        except (PictureError, OSError) as error:
            common.complain(common.picture_problem(file, error))
            failed = True
        else:
            if cv is None:
                cv, _ = common.load(folder, ("tokenizer", "coglm"), dtype)
            usable.append(file)
            tokens.append(cv.picture_tokens(opened))
    if cv is not None:
        description: dict[str, Any] = {
            "texts": texts,
            "pictures": [str(file) for file in usable],
            "as_released": as_released or None,
        }
        description |= common.circumstances(folder, dtype)
        if report is not None:
            common.require_free(report.parent, [report.name], report.name, description, overwrite)
        scores = cv.token_scores(texts, tokens, as_released=as_released)
        _show(texts, usable, scores.tolist())
        if report is not None:
            content = common.to_json({**description, "scores": scores.tolist()})
            common.write_all(report.parent, {report.name: content})
    if failed:
        raise click.exceptions.Exit(1)


def _show(texts: Sequence[str], files: Sequence[Path], scores: list[list[float]]) -> None:
    """Print the scores [texts][pictures], a line for each picture."""
    rows = list(zip(files, zip(*scores, strict=True), strict=True))
    if len(texts) == 1:
        rows.sort(key=lambda row: -row[1][0])
    else:
        click.echo("\t".join((*(" ".join(text.split()) for text in texts), "picture")))
    for file, of_texts in rows:
        click.echo("\t".join((*(f"{score:.4f}" for score in of_texts), str(file))))
