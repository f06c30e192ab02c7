"""A small data set in the exact layout of tfds' coco_captions, of close-ups of Scenes.

\b
    python -m experiments.coco.fake --data-dir tfds

MS-COCO needs its files; with this the whole protocol runs without them, fine-tuning included. The
close-ups (experiments/fine_tune) are twice as large as anything the Scenes bundle has seen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.fine_tune.run import close_up

# Karpathy's splits, which tfds has: the last three together are COCO's own validation split.
SPLITS = ("train", "val", "test", "restval")


class CocoCaptions(  # type: ignore[call-arg]  # tfds ships no types
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Named, split and structured as tfds' own."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", description="as COCO 2014")]

    def __init__(self, *, lengths: Mapping[str, int], **how: Any) -> None:
        self._lengths = lengths
        super().__init__(**how)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=80),
                    "is_crowd": np.bool_,
                }
            ),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._examples(split, number) for split, number in self._lengths.items()}

    def _generate_examples(self) -> Iterator[Any]:
        raise NotImplementedError("the splits have their own generators")

    def _examples(self, split: str, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        rng = np.random.default_rng((92, SPLITS.index(split)))
        for index in range(number):
            picture, item = close_up(rng)
            # Wider than high, as most photographs are.
            wide = Image.new("RGB", (picture.width + 32, picture.height), picture.getpixel((0, 0)))
            wide.paste(picture, (16, 0))
            content = io.BytesIO()
            wide.save(content, "JPEG", quality=95)
            words = f"{item.colour} {item.shape}"
            texts = [f"a {words}", f"a large {words}", words, f"a {words}", f"large {words}"]
            name = f"COCO_{split}2014_{index:012d}.jpg"
            yield (
                name,
                {
                    "image": content.getvalue(),
                    "image/filename": name,
                    "image/id": index,
                    "objects": [],
                    "captions": [
                        {"id": 5 * index + n, "text": text} for n, text in enumerate(texts)
                    ],
                },
            )


def write(data_dir: Path, train: int, others: int) -> None:
    """Write the set below `data_dir`: `train` pictures, and `others` in each other split."""
    lengths = {split: train if split == "train" else others for split in SPLITS}
    how: dict[str, Any] = {"data_dir": str(data_dir), "file_format": "array_record"}
    CocoCaptions(lengths=lengths, config="2014", **how).download_and_prepare()


@click.command(help=__doc__)
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--train", type=click.IntRange(1), default=400, show_default=True)
@click.option("--others", type=click.IntRange(1), default=100, show_default=True)
def main(data_dir: Path, train: int, others: int) -> None:
    write(data_dir, train, others)
    click.echo(data_dir)


if __name__ == "__main__":
    main()
