"""Features of many pictures, kept on disk: streaming, resumable, shared by processes and devices.

    folder/records-00003-of-00010.array_record      a record for each picture, in their order
    folder/refused.jsonl, report.json               the pictures that could not be used

They are shards as `data prepare` writes them: a kill costs the shards that were being written, and
the same call, in any number of processes at once, continues.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageFilter

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.prepare import fingerprint
from cogview2_jax.data.shards import Progress, Recipe, Report, Run, Work, write_shards
from cogview2_jax.data.sources import Input, Source
from cogview2_jax.evaluation import inception
from cogview2_jax.sharding import Sharding
from cogview2_jax.tokenizer.pictures import fit_picture

LOGITS = "logits"
ENCODER = "inception-2015-12-05"


class Encoder(NamedTuple):
    """A network that reads pictures. `features` is uint8 [b, y, x, 3] → float32 [b, num_features];
    `logits`, where there is one, has [b, num_classes] too, for the Inception Score. `fingerprint`
    names it and its weights: features of different fingerprints are not mixed.
    """

    apply: Callable[[Any], tuple[Any, Any | None]]
    num_features: int
    num_classes: int
    fingerprint: dict[str, Any]


def inception_encoder(
    file: str | os.PathLike[str],
    resize: inception.Resize = "tensorflow",
    sharding: Sharding | None = None,
) -> Encoder:
    """The encoder of FID, with the published weights in `file`. On a mesh, the batch is split over
    its devices. Raises as `inception.read_weights`.
    """
    params = inception.read_weights(file)
    name = {"encoder": ENCODER, "resize": resize, "weights": fingerprint(params)}
    params = jax.device_put(params, None if sharding is None else sharding.named())

    def apply(pictures: Any) -> tuple[Any, Any]:
        if sharding is not None:
            pictures = jax.device_put(pictures, sharding.named("batch"))
        return inception.apply(params, pictures, resize=resize)

    return Encoder(apply, inception.NUM_FEATURES, inception.NUM_CLASSES, name)


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    """A picture uint8 [y, x, 3] through Pillow's Gaussian blur of standard deviation `radius`.

    DALL-E (arXiv 2102.12092, figure 9) and CogView (arXiv 2105.13290, table 1) blur both sets with
    0, 1, 2, 4 and 8 before their features are compared: FID-0 to FID-8.
    """
    if not radius:
        return picture
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def write_features(
    source: Source,
    folder: Path,
    encoder: Encoder,
    *,
    size: int = 256,
    blurs: Sequence[float] = (0,),
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Write the features of all pictures of `source` to `folder`, or those that it lacks.

    A picture is cropped to a square at its centre and resized to `size`; one of that size is read
    as it is. Features without blur are always among those of `blurs`, first. They do not depend on
    `workers` (threads that read) or on how many processes share the folder. Raises ValueError for a
    folder that was begun with other settings and for features that are not finite, OSError if
    something cannot be written.
    """
    blurs = tuple(dict.fromkeys((0.0, *map(float, blurs))))
    settings = {
        "source": source.fingerprint,
        "encoder": encoder.fingerprint,
        "num_features": encoder.num_features,
        "num_classes": encoder.num_classes,
        "size": size,
        "blurs": list(blurs),
        "batch_size": batch_size,
    }
    manifest = Manifest(manifests.FEATURES, len(source), shard_size, None, settings)
    manifests.require_same(folder, manifest)

    def read(item: Input, number: int) -> tuple[list[np.ndarray], list[Any]]:
        picture = fit_picture(item.picture, size, size)
        return [blurred(picture, radius) for radius in blurs], []

    def write(items: Sequence[list[np.ndarray]]) -> list[list[bytes]]:
        rows = np.minimum(np.arange(batch_size), len(items) - 1)  # one size, one compilation
        columns = []
        for blur in range(len(blurs)):
            found, logits = encoder.apply(np.stack([items[row][blur] for row in rows]))
            columns.append(np.asarray(found, "<f4"))
            if blur == 0 and encoder.num_classes:
                columns.append(np.asarray(logits, "<f4"))
        made = np.concatenate(columns, axis=1)[: len(items)]
        if not np.isfinite(made).all():
            raise ValueError(
                f"features of {encoder.fingerprint.get('encoder', 'the encoder')} are not finite:"
                " its weights are damaged, or its dtype is too narrow"
            )
        return [[row.tobytes()] for row in made]

    return run(Work(source, manifest, Recipe(read, write, batch_size)), folder, workers, progress)


def read_features(folder: Path, blur: float | str = 0) -> Iterator[np.ndarray]:
    """The features in a folder after a blur of that radius, or its "logits": float32 [n, d] for
    each shard, in order.

    Raises ValueError if the folder is not complete, is damaged, or has no such features.
    """
    manifest = manifests.read(folder)
    if manifest.kind != manifests.FEATURES:
        raise ValueError(f"{folder} has records of {manifest.kind}, not features")
    settings = manifest.settings
    widths: dict[float | str, int] = {}
    for number, radius in enumerate(settings["blurs"]):
        widths[float(radius)] = settings["num_features"]
        if number == 0 and settings["num_classes"]:
            widths[LOGITS] = settings["num_classes"]
    names = list(widths)
    if blur not in widths:
        known = ", ".join(str(name) for name in names)
        raise ValueError(f"{folder} has features of blurs {known}: got {blur}")
    begin = sum(widths[name] for name in names[: names.index(blur)])
    for rows in read_rows(folder, manifest, sum(widths.values())):
        yield rows[:, begin : begin + widths[blur]]


def read_rows(folder: Path, manifest: Manifest, width: int) -> Iterator[np.ndarray]:
    """The records of each shard, in order, as float32 [n, width]; shards without one are left out.

    Raises ValueError if the folder is not complete, is damaged, or has no record at all.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    done = manifest.shards_in(folder)
    if len(done) < manifest.num_shards:
        raise ValueError(
            f"{folder} has {len(done)} of {manifest.num_shards} shards: the same command continues"
        )
    found = 0
    for shard in done:
        file = manifest.shard_file(folder, shard)
        reader = ArrayRecordReader(str(file))
        try:
            records = reader.read_all() if reader.num_records() else []
            reader.close()
            rows = np.frombuffer(b"".join(records), "<f4").reshape(len(records), width)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"{file} is damaged: delete it, and run the command again") from error
        if len(rows):
            found += len(rows)
            yield rows
    if not found:
        raise ValueError(f"{folder}: all inputs were left out, for the reasons in refused.jsonl")
