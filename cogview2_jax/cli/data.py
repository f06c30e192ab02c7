"""`cogview2 data prepare`: pictures with captions into records to train with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    from cogview2_jax.data.sources import Source


@click.group(
    "data",
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data prepare --help
""",
)
@click.pass_context
def data_group(context: click.Context) -> None:
    """Data to train with."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@data_group.command(
    "prepare",
    epilog="""\b
A captions file has a line for each picture, with its path from the file's folder:
  captions.jsonl    {"image": "a.jpg", "caption": "a cat"}
                    {"image": "b.jpg", "caption": ["a dog", "a dog runs"]}    two records
  captions.tsv      a.jpg<TAB>a cat
The first line of a .tsv may name the columns: image<TAB>caption

\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data prepare pairs.tsv --images photos --caption-field en --caption-field zh --out pairs
  cogview2 data prepare scenes --count 10000 --apart --out scenes_records
  cogview2 data prepare coco_captions --data-dir tfds --caption-field captions/text --out coco
  cogview2 data prepare photos --pictures --out pictures
""",
)
@click.argument("source")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the records, made if missing.",
)
@click.option(
    "--pictures",
    is_flag=True,
    help="Keep the pictures themselves, to train an image tokenizer: needs no captions, no bundle.",
)
@click.option("--split", default="train", show_default=True, help="Of a tfds data set or scenes.")
@click.option(
    "--count",
    type=click.IntRange(1, 10**12),
    metavar="N",
    help="The first N inputs; scenes need it.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where paths in a captions file begin; default: the file's folder.",
)
@click.option(
    "--image-field", default="image", show_default=True, metavar="NAME", help="The picture's field."
)
@click.option(
    "--caption-field",
    "caption_fields",
    multiple=True,
    metavar="NAME",
    help='A caption\'s field, given once or twice (two languages). Default: "caption" in a captions'
    " file, both languages of scenes, the only text of a tfds data set.",
)
@click.option(
    "--apart",
    is_flag=True,
    help="A record for each language, instead of one with both.",
)
@click.option(
    "--allow-unknown",
    is_flag=True,
    help="Keep captions with words that the text model cannot spell, whatever the model's"
    " configuration says.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1, 10**5),
    multiple=True,
    metavar="PIXELS",
    help="Side of the picture that is made into tokens; may be repeated, ascending, for"
    " super-resolution. Default: the base model's.",
)
@click.option(
    "--stride",
    type=click.IntRange(1, 10**5),
    default=8,
    show_default=True,
    metavar="PIXELS",
    help="Pixels of a token's side.",
)
@click.option(
    "--text-slots",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Places for text in a record, without the pad at its end. Default: the base model's;"
    " published: 111.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of tfds data sets."
)
@click.option(
    "--download", is_flag=True, help="Have tfds download and prepare a data set that is not there."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: min(os.cpu_count() or 1, 32),
    show_default="one a processor",
    metavar="N",
    help="Threads that read and decode pictures.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10**9),
    default=64,
    show_default=True,
    metavar="N",
    help="Pictures that the tokenizer sees at once.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, 10**9),
    default=4096,
    show_default=True,
    metavar="N",
    help="Inputs of a shard. Each shard is a file; a kill costs at most the shard in work.",
)
@common.bundle_option
def prepare_command(
    source: str,
    out: Path,
    pictures: bool,
    split: str,
    count: int | None,
    images: Path | None,
    image_field: str,
    caption_fields: tuple[str, ...],
    apart: bool,
    allow_unknown: bool,
    sizes: tuple[int, ...],
    stride: int,
    text_slots: int | None,
    data_dir: Path | None,
    download: bool,
    workers: int,
    batch_size: int,
    shard_size: int,
    bundle: Path | None,
) -> None:
    """Turn SOURCE into array_record shards of token records, ready for training.

    SOURCE is a captions file (.jsonl or .tsv), the word scenes, or the name of a tfds data set;
    with --pictures also a folder.

    A record is one row of int32: texts, pads, the picture's tokens. With the published model that
    is 111 + 1 + 400. Inputs that cannot become one (an unreadable picture, an empty or over-long
    caption, a malformed line) are left out and listed in refused.jsonl, with the reason.

    The same command goes on after a kill, and may run several times at once on one folder, to use
    several devices: each run takes shards that no other holds. The records are the same however
    they were made.
    """
    if len(caption_fields) > 2 or len(set(caption_fields)) < len(caption_fields):
        raise click.UsageError("--caption-field can be given once or twice, with two names")
    if pictures and (sizes or text_slots or apart or allow_unknown or bundle):
        raise click.UsageError(
            "--pictures keeps files as they are: it goes with no --size, --text-slots, --apart,"
            " --allow-unknown or --bundle"
        )
    description = None
    if not pictures:
        folder = common.check_model(bundle)
        from cogview2_jax import bundle as bundles

        description = bundles.read_description(folder)
    with common.refusing():
        inputs = _source(
            source, split, count, images, image_field, caption_fields, data_dir, download, pictures
        )
    common.check_writable(out)
    if description is not None:
        from cogview2_jax.data.records import RecordLayout

        config = description.coglm_config
        with common.refusing():
            if stride not in description.tokenizer_config.strides:
                known = ", ".join(map(str, description.tokenizer_config.strides))
                raise ValueError(f"--stride must be one of {known}: got {stride}")
            layout = RecordLayout(
                text_slots or config.text_slots,
                stride,
                tuple(sizes) or (config.grid[0] * stride,),
                config.vocabulary,
            )
        common.use_compilation_cache()
        with common.refusing():
            model = bundles.load(folder, networks=("tokenizer",))

    from tqdm import tqdm

    from cogview2_jax.data import prepare

    with (
        common.refusing(),
        tqdm(total=len(inputs), desc=out.name, unit=" inputs") as bar,
    ):
        if description is None:
            report = prepare.prepare_pictures(
                inputs, out, shard_size=shard_size, workers=workers, progress=bar.update
            )
        else:
            report = prepare.prepare_tokens(
                inputs,
                out,
                layout,
                model.text_model,
                model.tokenizer,
                model.tokenizer_config,
                batch_size=batch_size,
                allow_unknown=allow_unknown or None,
                apart=apart,
                shard_size=shard_size,
                workers=workers,
                progress=bar.update,
            )
    number = sum(report.refused.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.refused.items())
    click.echo(f"{out}: {report.records} records of {report.inputs} inputs, {number} refused")
    if number:
        click.echo(f"{out / 'refused.jsonl' if report.complete else 'refused'}: {kinds}")
    if not report.complete:
        click.echo("another run still works on the other shards; run this again to see the end")
    elif not report.records:
        raise click.ClickException(f"no input became a record: see {out / 'refused.jsonl'}")


def _source(
    source: str,
    split: str,
    count: int | None,
    images: Path | None,
    image_field: str,
    caption_fields: tuple[str, ...],
    data_dir: Path | None,
    download: bool,
    pictures: bool,
) -> Source:
    from cogview2_jax.data import sources

    found: Source
    path = Path(source)
    if path.suffix in (".jsonl", ".tsv") or path.is_file():
        fields = caption_fields or ("caption",)
        found = sources.CaptionsFile(path, images, fields, image_field, pictures_only=pictures)
    elif source == "scenes":
        if count is None:
            raise ValueError("scenes has no end: give --count")
        found = sources.Scenes(count, split, caption_fields)
    elif path.is_dir():
        if not pictures:
            raise ValueError(
                f"{source} is a folder: give its captions file (.jsonl or .tsv), or --pictures"
            )
        found = sources.PictureFolder(path)
    else:
        found = sources.Tfds(
            source,
            split,
            data_dir,
            caption_fields,
            image_field,
            download=download,
            pictures_only=pictures,
        )
    return found if count is None else sources.First(found, count)
