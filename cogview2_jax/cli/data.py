"""`cogview2 data prepare`: turns pictures with captions into records for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cogview2_jax.cli import bars, cluster, common, sources
from cogview2_jax.data import defaults

if TYPE_CHECKING:
    from cogview2_jax.bundle import Description
    from cogview2_jax.data.records import RecordLayout
    from cogview2_jax.data.shards import Report
    from cogview2_jax.data.sources import Source


@click.group(
    "data",
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data draw prompts.txt --out drawn
  cogview2 data prepare --help
""",
)
@click.pass_context
def data_group(context: click.Context) -> None:
    """Gather and prepare data for training, and draw data sets."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@data_group.command(
    "prepare",
    epilog="""\b
A captions file has a line for each picture, with its path from the file's folder:
  captions.jsonl    {"image": "a.jpg", "caption": "a cat"}
                    {"image": "b.jpg", "caption": ["a dog", "a dog runs"]}    two records
  captions.tsv      a.jpg<TAB>a cat
The first line of a .tsv may name the columns, all of them: image<TAB>caption

\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data prepare pairs.tsv --images photos --caption-field en --caption-field zh --out pairs
  cogview2 data prepare scenes --count 10000 --apart --out scenes_records
  cogview2 data prepare coco_captions --data-dir tfds --caption-field captions/text --out coco
  cogview2 data prepare photos --pictures --out picture_records
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
@click.option("--split", default="train", show_default=True, help="Of scenes or a tfds data set.")
@click.option(
    "--count",
    type=click.IntRange(1, 10**12),
    metavar="N",
    help="Only the first N inputs. Required for scenes.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that the paths in a captions file start at. Default: the file's own folder.",
)
@click.option(
    "--image-field",
    default=defaults.IMAGE_FIELD,
    show_default=True,
    metavar="NAME",
    help="Field with the picture, or with its path.",
)
@click.option(
    "--caption-field",
    "caption_fields",
    multiple=True,
    metavar="NAME",
    help="Field with a caption; given twice for two languages. Default:"
    f' "{defaults.CAPTION_FIELD}" in a captions file, both languages of scenes, the only text of a'
    " tfds data set.",
)
@click.option(
    "--apart",
    is_flag=True,
    help="Make a record for each language, instead of one with both.",
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
    help="Side of the square that each picture is resized and cropped to before it becomes tokens."
    " May be repeated, ascending, for super-resolution. Default: the base model's.",
)
@click.option(
    "--stride",
    type=click.IntRange(1, 10**5),
    metavar="PIXELS",
    help="Pixels of a token's side. Default, and the only one accepted: the model's.",
)
@click.option(
    "--text-slots",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Columns for text in a record, not counting the pad after them. Default: the base model's;"
    " published: 111.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of tfds data sets."
)
@click.option(
    "--download", is_flag=True, help="Have tfds download and prepare a data set that is not there."
)
@sources.workers_option
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10**9),
    default=defaults.BATCH_SIZE,
    show_default=True,
    metavar="N",
    help="Pictures that the tokenizer encodes at once; less needs less memory.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, 10**9),
    default=defaults.SHARD_SIZE,
    show_default=True,
    metavar="N",
    help="Inputs per shard. Each shard is a file; a kill costs at most the shard being written.",
)
@cluster.options
@common.bundle_option
@click.pass_context
def prepare_command(
    context: click.Context,
    source: str,
    out: Path,
    pictures: bool,
    apart: bool,
    allow_unknown: bool,
    sizes: tuple[int, ...],
    stride: int | None,
    text_slots: int | None,
    workers: int,
    batch_size: int,
    shard_size: int,
    bundle: Path | None,
    engine: str | None,
    address: str | None,
    processes: int | None,
    gpus: float,
    **source_options: Any,
) -> None:
    """Turn SOURCE into array_record shards of token records, ready for training.

    SOURCE is a captions file (.jsonl or .tsv), the word scenes, the name of a tfds data set, or a
    file of tokens (.bin), rows of int32 as the released training script reads them; with --pictures
    also a folder, read with the folders in it.

    A record is one row of int32: texts, pads, the picture's tokens. With the published model that
    is 111 + 1 + 400. Inputs that cannot become one (an unreadable picture, an empty or over-long
    caption, a malformed line) are left out and listed in refused.jsonl, with the reason.

    After a kill, the same command continues. Several runs of it on one folder share the work: each
    takes shards that no other holds. With --engine ray the processes of a cluster do, which are
    started, placed on devices and replaced for you. The records are the same every way.
    """

    chosen = cluster.chosen(engine, address, processes, gpus)
    kind = sources.kind_of(source)
    given = _given(context)
    _check_options(context, source, kind, pictures, source_options["caption_fields"])
    folder = description = None
    if not pictures:
        from cogview2_jax import bundle as bundles

        folder = common.check_model(bundle)
        description = bundles.read_description(folder)
    with common.refusing():
        tokens = description and _layout(description, (), None, None)
        inputs = sources.open_source(source, kind, tokens, pictures=pictures, **source_options)
        if unread := given & source_options.keys() - sources.READ_BY[kind] - sources.READ_BY_ALL:
            raise ValueError(f"{_named(context, unread)}: not an option for {kind}")
    common.check_writable(out)
    with common.refusing():
        layout = description and _layout(description, sizes, stride, text_slots)
    of_tokens = {"batch_size": batch_size, "allow_unknown": allow_unknown or None, "apart": apart}
    prepare = functools.partial(
        _prepare,
        functools.partial(
            sources.open_source, source, kind, tokens, pictures=pictures, **source_options
        ),
        functools.partial(_preparation, kind, folder, description, layout, of_tokens),
        out,
        shard_size=shard_size,
        workers=workers,
    )
    name = click.format_filename(out.name)
    with common.refusing(), bars.bar(name, len(inputs), "inputs") as bar:
        report = cluster.run(prepare, chosen, progress=bar.update)
    say_report(out, report)


def _prepare(
    open_source: Callable[[], Source],
    preparation: Callable[[], Callable[..., Report]],
    out: Path,
    **how: Any,
) -> Report:
    """Opens the data and the model, in whichever process this is, and prepares `out`."""
    return preparation()(open_source(), out, **how)


def _check_options(
    context: click.Context, source: str, kind: str, pictures: bool, fields: tuple[str, ...]
) -> None:
    """Raises UsageError for options that contradict each other."""
    if len(fields) > 2 or len(set(fields)) < len(fields):
        raise click.UsageError("--caption-field can be given once or twice, with two names")
    of_tokens = _given(context) & _OF_TOKENS
    if pictures and of_tokens:
        raise click.UsageError(
            "--pictures keeps files as they are: it goes with no --size, --stride, --text-slots,"
            " --apart, --allow-unknown, --batch-size or --bundle"
        )
    if kind == sources.TOKEN_FILE and (wrong := of_tokens - {"bundle"}):
        raise click.UsageError(
            f"{source} has tokens already: it goes with no {_named(context, wrong)}"
        )


def _preparation(
    kind: str,
    folder: Path | None,
    description: Description | None,
    layout: RecordLayout | None,
    of_tokens: dict[str, Any],
) -> Callable[..., Report]:
    """The function that prepares this kind of source: token records of a layout, with the model in
    `folder`, or picture records without one.
    """
    from cogview2_jax.data import prepare

    if folder is None or description is None or layout is None:
        return prepare.prepare_pictures
    from cogview2_jax import bundle as bundles

    if kind == sources.TOKEN_FILE:
        text_model = bundles.read_text_model(folder, description)
        return functools.partial(prepare.prepare_token_file, layout=layout, text_model=text_model)
    common.use_compilation_cache()
    with common.refusing():
        model = bundles.load(folder, networks=("tokenizer",))
    return functools.partial(
        prepare.prepare_tokens,
        layout=layout,
        text_model=model.text_model,
        tokenizer=model.tokenizer,
        tokenizer_config=model.tokenizer_config,
        **of_tokens,
    )


@data_group.command(
    "gather",
    epilog="""\b
Examples:
  cogview2 data gather illustrations
  cogview2 data gather illustrations --packages downloads
""",
)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--packages",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("packages"),
    show_default=True,
    metavar="DIR",
    help="Folder of the packages, as `npm pack` writes them. Those that it lacks are fetched.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the choice of what is held out.",
)
def gather_command(out: Path, packages: Path, seed: int) -> None:
    """Gather illustrations: 820 things in five styles, with English and Chinese names.

    Fetches open emoji sets and Unicode's names with the npm client (50 MB) and draws them on white,
    256 pixels a side, into OUT/pictures. OUT/index.json says what each shows and what is held out,
    refused.jsonl what was left out, CREDITS.md who made the pictures. The same command resumes
    after an interruption.
    """

    from cogview2_jax.data.illustrations import gather

    bar = bars.bar("pictures", 0, "pictures")

    def begin(total: int) -> None:
        bar.total = total

    with common.refusing(), bar:
        common.require_module("resvg_py", "illustrations")
        report = gather.gather(out, packages, seed=seed, begin=begin, progress=bar.update)
    things = len({item.thing for item in report.items})
    click.echo(f"{out}: {len(report.items)} pictures of {things} things")
    if report.refused:
        click.echo(f"{len(report.refused)} were left out: see {out / 'refused.jsonl'}")


# Options of token records.
_OF_TOKENS = {"sizes", "stride", "text_slots", "apart", "allow_unknown", "batch_size", "bundle"}


def _named(context: click.Context, parameters: set[str]) -> str:
    """Parameters as options."""
    options = context.command.params
    return " and ".join(each.opts[0] for each in options if each.name in parameters)


def _given(context: click.Context) -> set[str]:
    """The parameters that the user gave, not their defaults."""
    given = ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) == given}


def say_report(out: Path, report: Report) -> None:
    """Print the number of records, and where refused inputs are listed."""
    name, listed = (click.format_filename(path) for path in (out, out / "refused.jsonl"))
    number = sum(report.refused.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.refused.items())
    click.echo(f"{name}: {report.records} records of {report.inputs} inputs, {number} refused")
    if number:
        click.echo(f"{listed if report.complete else 'refused'}: {kinds}")
    if report.left_out:
        where = f", see {listed}" if report.complete else ""
        click.echo(f"not read as pictures: {report.left_out} other files or folders{where}")
    if not report.complete:
        click.echo(
            "another run is working on the other shards: run the same command again for the report"
        )
    elif not report.records:
        raise click.ClickException(f"no input became a record: see {listed}")


def _layout(
    description: Description, sizes: tuple[int, ...], stride: int | None, text_slots: int | None
) -> RecordLayout:
    from cogview2_jax.config import TOKEN_STRIDE
    from cogview2_jax.data.records import RecordLayout

    config = description.coglm_config
    if stride not in (None, TOKEN_STRIDE):
        raise ValueError(
            f"--stride must be {TOKEN_STRIDE}, which the model draws with: got {stride}"
        )
    return RecordLayout(
        text_slots or config.text_slots,
        TOKEN_STRIDE,
        sizes or (config.grid[0] * TOKEN_STRIDE,),
        config.vocabulary,
    )
