"""`cogview2 evaluate`: FID and its relatives, and the caption loss of pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import bars, cluster, common, sources

if TYPE_CHECKING:
    from cogview2_jax.data.engine import Cluster
    from cogview2_jax.data.shards import Report
    from cogview2_jax.data.sources import Source
    from cogview2_jax.evaluation.features import Encoder

REPORT = "evaluation.json"


@click.command(
    "evaluate",
    epilog="""\b
Examples:
  cogview2 evaluate drawn photos --inception pt_inception-2015-12-05-6726825d.pth --out fid
  cogview2 evaluate drawn photos.npz --inception pt_inception-2015-12-05-6726825d.pth --out fid
  cogview2 evaluate drawn/captions.jsonl --caption-loss --out captions
""",
)
@click.argument("pictures")
@click.argument("reference", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help=f"Folder of the features, and of {REPORT}. After a kill, the same command continues;"
    " several runs of it share the work.",
)
@click.option(
    "--inception",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The published weights of FID's network, pt_inception-2015-12-05-6726825d.pth of"
    " pytorch-fid, or the same tensors as .safetensors.",
)
@click.option(
    "--resize",
    type=click.Choice(["tensorflow", "torch"]),
    default="tensorflow",
    show_default=True,
    help="To the network's 299 pixels: as the original FID and torch-fidelity do, or as"
    " pytorch-fid does.",
)
@click.option(
    "--size",
    type=click.IntRange(8, 4096),
    default=256,
    show_default=True,
    metavar="PIXELS",
    help="Pictures are cropped at the centre and resized to this side first.",
)
@click.option(
    "--blur",
    "blurs",
    type=click.FloatRange(0, 64),
    multiple=True,
    default=(0.0,),
    show_default="0",
    metavar="RADIUS",
    help="Also compare pictures after a Gaussian blur, as CogView's table does: give 1, 2, 4, 8,"
    " each with its own --blur.",
)
@click.option(
    "--caption-loss",
    is_flag=True,
    help="How well PICTURES fit their captions by --bundle's CogLM: needs captions.",
)
@click.option(
    "--save-statistics",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.npz",
    help="Write mean and covariance of PICTURES' features, to compare others with.",
)
@sources.choice_options
@sources.workers_option
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True)
@cluster.options
@common.bundle_option
def evaluate_command(
    pictures: str,
    reference: str | None,
    out: Path,
    inception: Path | None,
    caption_loss: bool,
    save_statistics: Path | None,
    bundle: Path | None,
    engine: str | None,
    address: str | None,
    processes: int | None,
    gpus: float,
    **how: Any,
) -> int:
    """How good PICTURES are: FID, KID, precision and recall against REFERENCE, Inception Score,
    caption loss.

    PICTURES and REFERENCE are folders, captions files (.jsonl, .tsv), the word scenes or tfds data
    sets, as for `cogview2 data prepare`; REFERENCE may be a .npz file of statistics too. Pictures
    that cannot be read are left out and listed: the exit code is then 1.
    """
    _check(inception, reference, caption_loss, save_statistics)
    folder = common.check_model(bundle) if caption_loss else Path()
    where = cluster.chosen(engine, address, processes, gpus)
    common.check_writable(out)
    is_file = reference is not None and reference.endswith(".npz")
    chosen = {"pictures": pictures}
    if reference and not is_file:
        chosen["reference"] = reference
    with common.refusing():
        kinds = {sources.kind_of(one) for one in chosen.values()}
        options = ("split", "caption_fields", "data_dir")
        sources.require_read(kinds, **{name: how[name] for name in options})
        sizes = {
            name: len(_source(one, caption_loss and name == "pictures", how))
            for name, one in chosen.items()
        }
        if is_file:
            from cogview2_jax.evaluation.distances import load_statistics

            load_statistics(Path(str(reference)))
    reports: list[Report] = []
    if inception is not None:
        if where is None:
            _encoder(inception, how["resize"])  # what is wrong with the file is said first
        for name, one in chosen.items():
            read = functools.partial(_source, one, caption_loss and name == "pictures", how)
            call = functools.partial(_features, read, out / name, inception, how)
            reports.append(_written(name, sizes[name], call, where))
    if caption_loss:
        read = functools.partial(_source, pictures, True, how)
        call = functools.partial(_losses, read, out / "captions", folder, how["workers"])
        reports.append(_written("captions", sizes["pictures"], call, where))
    if not all(report.complete for report in reports):
        click.echo("another run is working on the rest: run the same command again for the report")
        return 0
    place = Path(str(reference)) if is_file else out / "reference" if reference else None
    measures = _measures(out, place, inception is not None, caption_loss)
    if save_statistics is not None:
        _save_statistics(out / "pictures", save_statistics)
    described = {"pictures": pictures, "reference": reference, "measures": measures}
    common.write_all(out, {REPORT: common.to_json(described | _settings(how))})
    refused = sum(sum(report.refused.values()) for report in reports)
    if refused:
        common.complain(f"{refused} pictures were left out: see refused.jsonl in {out}")
    return int(bool(refused))


def _check(
    inception: Path | None,
    reference: str | None,
    caption_loss: bool,
    save_statistics: Path | None,
) -> None:
    """Raises UsageError for options that measure nothing, or lack something."""
    if inception is None and not caption_loss:
        raise click.UsageError("give --inception FILE, --caption-loss, or both")
    if inception is None and (reference or save_statistics):
        raise click.UsageError("a REFERENCE and --save-statistics need --inception FILE")
    if save_statistics is not None and save_statistics.suffix != ".npz":
        raise click.UsageError(f"--save-statistics must end in .npz: got {save_statistics}")


def _source(name: str, captions: bool, how: dict[str, Any]) -> Source:
    kind = sources.kind_of(name)
    if captions and kind == "a folder":
        raise ValueError(f"{name} is a folder: --caption-loss needs its captions file")
    chosen = {name: how[name] for name in ("split", "count", "caption_fields", "data_dir")}
    return sources.open_to_read(name, kind, pictures=not captions, **chosen)


def _settings(how: dict[str, Any]) -> dict[str, Any]:
    named = ("size", "resize", "blurs", "split", "count", "caption_fields", "batch_size")
    return {
        "settings": {name: how[name] for name in named},
        "device": common.devices()[0],
        "versions": common.versions(),
    }


@functools.cache
def _encoder(inception: Path, resize: Any) -> Encoder:
    """One for all sources of a process."""
    from cogview2_jax.evaluation import features

    common.use_compilation_cache()
    with common.refusing():
        return features.inception_encoder(inception, resize)


def _features(
    read: Callable[[], Source], out: Path, inception: Path, how: dict[str, Any], **work: Any
) -> Report:
    """The features of what `read` opens, written by whichever process this is."""
    from cogview2_jax.evaluation import features

    return features.write_features(
        read(),
        out,
        _encoder(inception, how["resize"]),
        size=how["size"],
        blurs=how["blurs"],
        batch_size=how["batch_size"],
        workers=how["workers"],
        **work,
    )


def _losses(
    read: Callable[[], Source], out: Path, folder: Path, workers: int, **work: Any
) -> Report:
    """The caption losses of what `read` opens, written by whichever process this is."""
    from cogview2_jax.evaluation import captions

    cv, _ = common.load(folder, ("tokenizer", "coglm"))
    return captions.write_caption_losses(read(), out, cv, workers=workers, **work)


def _written(name: str, number: int, call: Callable[..., Report], where: Cluster | None) -> Report:

    with common.refusing(), bars.bar(name, number, "pictures") as bar:
        return cluster.run(call, where, progress=bar.update)


def _measures(
    out: Path, reference: Path | None, features: bool, caption_loss: bool
) -> dict[str, Any]:
    from cogview2_jax.evaluation import captions, report

    measures: dict[str, Any] = {}
    with common.refusing():
        if features:
            measures = report.measure(out / "pictures", reference, note=common.complain)
            click.echo(report.table(measures))
        if caption_loss:
            loss = {"caption_loss": captions.mean_loss(out / "captions")}
            click.echo(report.table(loss))
            measures |= loss
    return measures


def _save_statistics(folder: Path, file: Path) -> None:
    from cogview2_jax.evaluation import distances, report

    with common.refusing(f"{file}: "):
        distances.save_statistics(file, report.statistics_of(folder))
    click.echo(file)
