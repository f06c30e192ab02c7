"""The MS-COCO protocol: 30,000 validation captions, a picture each, FID and caption loss.

\b
    python -m experiments.coco.run --data-dir tfds --inception FILE --bundle MODEL --out runs/coco

As DALL-E, CogView and CogView2 are compared: captions drawn at random from the validation split,
one picture for each without choosing among several, real pictures cropped to a square at the centre
and resized to 256 pixels, both sets blurred with radii 0, 1, 2, 4 and 8 (FID-0 to FID-8).

Everything is under --out. After a kill the same command continues; several runs of it, on machines
that share the folder, share the work. SOURCE is coco_captions, any other tfds data set with
captions, a captions file, or scenes. With --judge, features are the outputs of the judge of
caption_match, for Scenes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from cogview2_jax.cli import common, sources
from cogview2_jax.data import prepare
from cogview2_jax.data.shards import Report
from cogview2_jax.data.sources import Sampled, Source
from cogview2_jax.evaluation import captions, drawing, features, report
from cogview2_jax.evaluation.features import Encoder
from cogview2_jax.pipeline import settings
from experiments import results
from experiments.caption_match import judge as scenes_judge
from experiments.caption_match.judged import FEATURES, SIDE, judge_features

COCO, VALIDATION = "coco_captions", "val+test+restval"
BLURS = (0.0, 1.0, 2.0, 4.0, 8.0)
_FILE = click.Path(path_type=Path, dir_okay=False)


def open_captions(
    source: str, split: str, fields: tuple[str, ...], data_dir: Path | None
) -> Source:
    """The pictures and captions that SOURCE names."""
    kind = sources.kind_of(source)
    return sources.open_to_read(
        source,
        kind,
        pictures=False,
        split=split,
        count=10**6 if kind == "scenes" else None,
        caption_fields=fields or (("captions/text",) if kind == "a tfds data set" else ()),
        data_dir=data_dir,
    )


def judge_encoder() -> Encoder:
    return Encoder(
        lambda pictures: (judge_features(np.asarray(pictures)), None),
        FEATURES,
        0,
        {"encoder": "judge of caption_match", "weights": prepare.fingerprint(scenes_judge.load())},
    )


def evaluate(
    source: Source,
    out: Path,
    encoder: Encoder,
    bundle: Path | None,
    *,
    size: int,
    seed: int,
    stage: str,
    batch_size: int,
    workers: int,
) -> dict[str, Any] | None:
    """Draw, measure, and return the measures; None while another run is at a part of it."""
    # The network that draws, and that scores captions, is loaded when it is needed.
    model = functools.cache(lambda: results.load_model(bundle))
    shared: dict[str, Any] = {"workers": workers}

    def step(name: str, items: Source, write: Callable[..., Report], **how: Any) -> bool:
        with tqdm(total=len(items), desc=name, unit=" pictures") as bar:
            made = write(items, out / name, progress=bar.update, **shared, **how)
        for kind, number in made.refused.items():
            click.echo(f"{name}: {number} left out ({kind}), see {out / name / 'refused.jsonl'}")
        return made.complete

    drawn = step(
        "drawn",
        source,
        drawing.write_drawings,
        cv=model(),
        seed=seed,
        stage=stage,
        candidates=1,
        batch_size=batch_size,
    )
    read: dict[str, Any] = {"encoder": encoder, "size": size, "blurs": BLURS}
    real = step("real_features", source, features.write_features, **read)
    if not (drawn and real):
        return None
    pictures = drawing.Drawings(out / "drawn")
    found = step("drawn_features", pictures, features.write_features, **read)
    scored = step("captions", pictures, captions.write_caption_losses, cv=model())
    if not (found and scored):
        return None
    measures = report.measure(out / "drawn_features", out / "real_features", note=click.echo)
    return measures | {"caption_loss": captions.mean_loss(out / "captions")}


@click.command(help=__doc__)
@click.argument("source", default=COCO)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of tfds data sets.")
@click.option(
    "--split",
    help="Default: COCO's own validation split, which is val+test+restval in tfds; otherwise"
    " validation.",
)
@click.option("--caption-field", "fields", multiple=True, help="By default captions/text of tfds.")
@click.option("--num-pictures", type=click.IntRange(2), default=30_000, show_default=True)
@click.option("--inception", type=_FILE, metavar="FILE", help="Weights as for `cogview2 evaluate`.")
@click.option("--judge", is_flag=True, help="Features of Scenes in place of Inception's.")
@click.option(
    "--stage", type=click.Choice(tuple(settings.STAGES)), default="full", show_default=True
)
@click.option("--seed", default=0, show_default=True, help="Of the captions and the pictures.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@sources.workers_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--json", "json_file", type=_FILE)
@results.bundle_option
def main(
    source: str,
    data_dir: Path | None,
    split: str | None,
    fields: tuple[str, ...],
    num_pictures: int,
    inception: Path | None,
    judge: bool,
    out: Path,
    json_file: Path | None,
    bundle: Path | None,
    **how: Any,
) -> None:
    if judge == (inception is not None):
        raise click.UsageError("give --inception FILE or --judge, one of them")
    begin = time.monotonic()
    split = split or (VALIDATION if source == COCO else "validation")
    common.use_compilation_cache()
    with common.refusing():
        found = open_captions(source, split, fields, data_dir)
        chosen = Sampled(found, min(num_pictures, len(found)), how["seed"])
        encoder = judge_encoder() if inception is None else features.inception_encoder(inception)
        size = SIDE if judge else 256
        measures = evaluate(chosen, out, encoder, bundle, size=size, **how)
    if measures is None:
        click.echo("another run is working on the rest: run the same command again for the table")
        return
    click.echo(report.table(measures))
    if json_file:
        said = {"source": source, "split": split, "num_pictures": len(chosen), **how}
        results.write(json_file, said | {"measures": measures}, bundle, begin)


if __name__ == "__main__":
    main()
