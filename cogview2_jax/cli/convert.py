"""`cogview2 convert` and `cogview2 export`: from the published files to a model, and back."""

from __future__ import annotations

from pathlib import Path

import click

from cogview2_jax.cli import bars, common

NETWORKS = ("tokenizer", "coglm", "direct", "iterative")


@click.command(
    name="convert",
    epilog="""\b
SRC is a folder with the published files, each as it was unpacked or downloaded, at any depth:
  coglm/, cogview2-dsr/, cogview2-itersr/   each with latest, model_config.json and <step>/*.pt
  ice_image.pt                              image tokenizer, of the icetk package
  ice_text.model                            text model, of the icetk package
  cluster_label.npy                         clusters of the image tokens, of the CogView2 repository

\b
Examples:
  cogview2 convert downloads model
  cogview2 convert downloads model --dtype bfloat16 --cluster-labels CogView2/cluster_label.npy
  cogview2 convert downloads stage1 --only tokenizer --only coglm
  cogview2 generate --bundle model "一只戴帽子的猫"
""",
)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(("float16", "bfloat16", "float32")),
    default="float16",
    show_default=True,
    help="Dtype of the parameters on disk. float16 is that of the published files, so that nothing"
    " is lost; float32 takes twice the space. `generate --dtype` says what is computed in.",
)
@click.option(
    "--only",
    "networks",
    type=click.Choice(NETWORKS),
    multiple=True,
    help="Convert this network; may be repeated. Default: all four.",
)
@click.option(
    "--image-tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="ice_image.pt, if it is not in SRC.",
)
@click.option(
    "--text-model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="ice_text.model, if it is not in SRC.",
)
@click.option(
    "--cluster-labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="cluster_label.npy, if it is not in SRC.",
)
def convert_command(
    source: Path,
    target: Path,
    dtype: str,
    networks: tuple[str, ...],
    image_tokenizer: Path | None,
    text_model: Path | None,
    cluster_labels: Path | None,
) -> None:
    """Make a model from the published checkpoints in SRC and write it as the new folder DST.

    Needs no torch, runs no code from the files, and reads one tensor at a time, so that models
    larger than the memory are converted. Model-parallel ranks are merged and the padding of the
    word table is cut off. All names and shapes are checked first: after an error there is nothing
    at DST.
    """
    common.check_writable(target.absolute().parent)

    from cogview2_jax.published import convert

    given = {"tokenizer": image_tokenizer, "text": text_model, "labels": cluster_labels}
    elsewhere = {name: file for name, file in given.items() if file is not None}
    chosen = tuple(name for name in NETWORKS if name in networks) if networks else NETWORKS
    bar = bars.bar("converting", None, "B", unit_scale=True)

    def progress(now: int, total: int) -> None:
        bar.total = total
        bar.update(now)

    with common.refusing(), bar:
        made = convert.convert(
            source,
            target,
            dtype=dtype,
            networks=chosen,
            elsewhere=elsewhere,
            progress=progress,
        )
    vocabulary = made.description.coglm_config.vocabulary
    click.echo(f"{target}: parameters in {dtype}")
    for name, number in made.parameters.items():
        click.echo(f"{name:12s}{number:,} parameters")
    click.echo(
        f"{'vocabulary':12s}{vocabulary.num_image:,} image tokens, {vocabulary.num_text:,} text"
        " pieces"
    )
    for note in made.notes:
        common.complain(note)


@click.command(
    name="export",
    epilog="""\b
Examples:
  cogview2 export model published
  cogview2 export model published --ranks 2
  cogview2 convert published again          # the same numbers, bit for bit
""",
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Model-parallel files of each transformer.",
)
def export_command(model: Path, target: Path, ranks: int) -> None:
    """Write the model in the folder MODEL as files in the published layout, in the new folder DST.

    They are what `cogview2 convert`, torch and the published code read. The numbers stay as they
    are; networks that the model lacks are left out. After an error there is nothing at DST.
    """
    common.check_writable(target.absolute().parent)

    from cogview2_jax.published import export

    bar = bars.bar("exporting", None, "B", unit_scale=True)

    def progress(now: int, total: int) -> None:
        bar.total = total
        bar.update(now)

    with common.refusing(), bar:
        made = export.export(model, target, ranks=ranks, progress=progress)
    for file in made.files:
        click.echo(file)
    for note in made.notes:
        common.complain(note)
