"""Scenes as a TensorFlow Datasets builder that writes array_record files, without TensorFlow.

Importing this module imports tensorflow_datasets; nothing else in the package imports it.

    builder = Scenes(data_dir="data", lengths={"train": 100_000, "validation": 1_000})
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")      # random access: source[7]["caption_en"]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cogview2_jax.data import scenes


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """`lengths`: (split, number of examples) pairs."""

    lengths: tuple[tuple[str, int], ...] = ()


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Record `i` of a split is `scenes.example(split, i)`.

    Features: `image` uint8 [192, 192, 3] (PNG), `caption_en` and `caption_zh` (UTF-8), the label
    `background`, and `objects`, a sequence of labels shape, colour, size and fill and of the centre
    x, y in pixels. Labels count in the order of the tuples of `scenes`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "One or two objects, English and Chinese."}

    def __init__(self, *, data_dir: str | os.PathLike[str], lengths: Mapping[str, int]) -> None:
        """`lengths`: how many examples to write of each split of `scenes.SPLITS`.

        Each choice of lengths has its own folder below `data_dir`. Raises ValueError on an
        unknown split, on a length below one and when there is no split.
        """
        unknown = set(lengths) - set(scenes.SPLITS)
        if unknown:
            known = ", ".join(scenes.SPLITS)
            raise ValueError(f"unknown splits {', '.join(sorted(unknown))}; known are {known}")
        if not lengths or min(lengths.values()) < 1:
            raise ValueError(f"every split needs at least one example: {dict(lengths)}")
        config = ScenesConfig(
            name="-".join(f"{split}_{length}" for split, length in lengths.items()),
            lengths=tuple(lengths.items()),
        )
        super().__init__(data_dir=os.fspath(data_dir), config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel
        return tfds.core.DatasetInfo(
            builder=self,
            description=scenes.__doc__,
            # Examples are independent draws: keep their order, so that record i is example i.
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(scenes.CANVAS, scenes.CANVAS, 3), encoding_format="png"
                    ),
                    "caption_en": tfds.features.Text(),
                    "caption_zh": tfds.features.Text(),
                    "background": label(names=list(scenes.BACKGROUNDS)),
                    "objects": tfds.features.Sequence(
                        {
                            "shape": label(names=list(scenes.SHAPES)),
                            "colour": label(names=list(scenes.COLOURS)),
                            "size": label(names=list(scenes.SIZES)),
                            "fill": label(names=list(scenes.FILLS)),
                            "x": np.int32,
                            "y": np.int32,
                        }
                    ),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: _examples(split, length) for split, length in self.builder_config.lengths}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        raise NotImplementedError("the splits have their own generators")


def _examples(split: str, length: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(length):
        image, scene, captions = scenes.example(split, index)
        yield (
            index,
            {
                "image": image,
                "caption_en": captions["en"],
                "caption_zh": captions["zh"],
                "background": scene.background,
                "objects": [dataclasses.asdict(item) for item in scene.objects],
            },
        )
