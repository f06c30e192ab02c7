"""`cogview2 data draw` and `unpack`: a picture for each caption of a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import bars, cluster, common, pictures, sources
from cogview2_jax.cli.data import say_report
from cogview2_jax.pipeline import settings

if TYPE_CHECKING:
    from cogview2_jax.data.shards import Report
    from cogview2_jax.data.sources import Source


@click.command(
    "draw",
    epilog="""\b
Examples:
  cogview2 data draw prompts.txt --out drawn
  cogview2 data draw coco_captions --data-dir tfds --caption-field captions/text --out coco
  cogview2 data draw prompts.txt --out drawn --engine ray --gpus 1
""",
)
@click.argument("source")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of them."
)
@sources.choice_options
@pictures.seed_option
@pictures.stage_option
@pictures.candidates_option
@pictures.style_option("the first of the model, if it has any")
@common.dtype_option
@click.option(
    "--batch-size",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    metavar="N",
    help="Pictures at once. Another number may change the last bits of a picture.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, 10**9),
    default=64,
    show_default=True,
    metavar="N",
    help="Pictures in a shard; a kill costs at most the shard being written.",
)
@sources.workers_option
@cluster.options
@common.bundle_option
def draw_command(
    source: str,
    out: Path,
    stage: str | None,
    style: str | None,
    dtype: str,
    bundle: Path | None,
    engine: str | None,
    address: str | None,
    processes: int | None,
    gpus: float,
    **more: Any,
) -> None:
    """Draw a picture for each caption of SOURCE, as shards of PNG files that hold their prompt.

    SOURCE is a file of prompts (.txt, a line each), a captions file, the word scenes or a tfds data
    set; of several captions the first one is drawn. A caption that the model cannot read is listed
    in refused.jsonl. A picture depends on its caption, the seed and its row alone. After a kill the
    same command continues, and several runs of it share the rows. `data unpack` writes the pictures
    as files.
    """

    chosen = cluster.chosen(engine, address, processes, gpus)
    folder = common.check_model(bundle, style=style)
    stage = common.choose_stage(folder, stage)
    names = ("split", "count", "caption_fields", "data_dir")
    open_source = functools.partial(_open, source, **{name: more.pop(name) for name in names})
    with common.refusing():
        inputs = open_source()
    common.check_writable(out)
    more |= {"stage": stage, "style": style}
    call = functools.partial(_draw, open_source, folder, dtype, out, **more)
    name = click.format_filename(out.name)
    with common.refusing(), bars.bar(name, len(inputs), "pictures") as bar:
        report = cluster.run(call, chosen, progress=bar.update)
    say_report(out, report)


def _open(source: str, count: int | None, **chosen: Any) -> Source:
    from cogview2_jax.data.sources import First, PromptFile

    if source.endswith(".txt"):
        sources.require_read(["a file of prompts"], **chosen)
        prompts = PromptFile(Path(source))
        return prompts if count is None else First(prompts, count)
    kind = sources.kind_of(source)
    if kind == "a folder":
        raise ValueError(f"{source} is a folder: give a file with captions")
    sources.require_read([kind], **chosen)
    return sources.open_to_read(source, kind, pictures=False, count=count, **chosen)


def _draw(
    open_source: Callable[[], Source], folder: Path, dtype: str, out: Path, stage: str, **how: Any
) -> Report:
    """Opens the captions and the model, in whichever process this is, and draws."""
    from cogview2_jax.evaluation.drawing import write_drawings

    cv, _ = common.load(folder, settings.STAGES[stage], dtype)
    return write_drawings(open_source(), out, cv, stage=stage, **how)


@click.command(
    "unpack",
    epilog="""\b
Examples:
  cogview2 data unpack drawn --out pictures
  cogview2 data unpack drawn --out shards --tar
""",
)
@click.argument("drawn", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the files: a new one, or an empty one.",
)
@click.option("--tar", is_flag=True, help="Tar files of a thousand pictures, for WebDataset.")
def unpack_command(drawn: Path, out: Path, tar: bool) -> None:
    """Write the pictures of `data draw` as PNG files with captions.jsonl, which `data prepare` and
    `evaluate` read; with --tar as tar files of .png and .txt, which WebDataset reads.
    """

    from cogview2_jax.evaluation import drawing

    with common.refusing():
        found = drawing.Drawings(drawn)
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: give another --out")
        with bars.bar(click.format_filename(out.name), len(found), "pictures") as bar:
            write = drawing.write_tars if tar else drawing.write_files
            for file in write(found, out, progress=bar.update):
                click.echo(file)
