"""`cogview2 rank`: how well pictures fit a text."""

from __future__ import annotations

from pathlib import Path

import click

from cogview2_jax.cli import common


@click.command(
    "rank",
    epilog="""\b
Examples:
  cogview2 rank "a red circle above a blue star" pictures/*.png
""",
)
@click.argument("text")
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.dtype_option
@common.bundle_option
def rank_command(text: str, pictures: tuple[Path, ...], dtype: str, bundle: Path | None) -> None:
    """Sort pictures by how well TEXT fits them, best first.

    Prints a line for each: the mean log-likelihood of TEXT's tokens as the picture's caption, a
    tab, and the file. A picture that cannot be used is named on stderr; the others are ranked, and
    the exit code is 1.
    """
    folder = common.check_model(bundle, (text,))
    from cogview2_jax.tokenizer.pictures import PictureError, open_picture

    cv = None
    scores: list[tuple[float, Path]] = []
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
        found = cv.token_scores([text], tokens)[0]
        scores = sorted(zip(found.tolist(), usable, strict=True), key=lambda pair: -pair[0])
    for score, file in scores:
        click.echo(f"{score:.4f}\t{file}")
    if failed:
        raise click.exceptions.Exit(1)
