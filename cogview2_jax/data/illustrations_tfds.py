"""Illustrations as a TensorFlow Datasets builder of array_record files, without TensorFlow.

Importing this module imports tensorflow_datasets, as `scenes_tfds` does.

    builder = Illustrations(data_dir="data", pictures="illustrations")   # as `data gather` made it
    builder.download_and_prepare()
    source = builder.as_data_source(split="unseen_pair")      # random access: source[7]["english"]
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from cogview2_jax.tokenizer.pictures import open_picture


@dataclasses.dataclass(kw_only=True)
class IllustrationsConfig(tfds.core.BuilderConfig):
    """`pictures`: the folder that the pictures are in."""

    pictures: str = ""


class Illustrations(tfds.core.GeneratorBasedBuilder):
    """The pictures of a folder that `cogview2 data gather` made, in its splits and in its order.

    Features: `image` uint8 [y, x, 3] (PNG), the names `thing`, `english` and `chinese` and the
    captions `caption_en` and `caption_zh`, every phrasing of each (UTF-8), the labels `style`, in
    the order of `illustrations.STYLES`, and `kind`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Things in five styles, English and Chinese."}

    def __init__(
        self, *, data_dir: str | os.PathLike[str], pictures: str | os.PathLike[str]
    ) -> None:
        """Each folder of pictures has its own folder below `data_dir`, by what it holds.

        Raises FileNotFoundError or ValueError as `illustrations.read_index` does.
        """
        self._folder = Path(pictures)
        self._items = illustrations.read_index(self._folder)
        content = hashlib.sha256(repr(self._items).encode()).hexdigest()
        config = IllustrationsConfig(name=content[:12], pictures=os.fspath(self._folder.resolve()))
        super().__init__(data_dir=os.fspath(data_dir), config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        label, text = tfds.features.ClassLabel, tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=illustrations.__doc__,
            disable_shuffling=True,  # record i is picture i of its split
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "thing": text(),
                    "english": text(),
                    "chinese": text(),
                    "caption_en": tfds.features.Sequence(text()),
                    "caption_zh": tfds.features.Sequence(text()),
                    "style": label(names=list(illustrations.STYLES)),
                    "kind": label(names=sorted({item.kind for item in self._items})),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        splits = [name for name in illustrations.SPLITS if self._of(name)]
        return {name: self._examples(self._of(name)) for name in splits}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        raise NotImplementedError("the splits have their own generators")

    def _of(self, split: str) -> list[Item]:
        return [item for item in self._items if item.split == split]

    def _examples(self, items: list[Item]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, item in enumerate(items):
            yield (
                index,
                {
                    "image": open_picture(self._folder / item.file),
                    "thing": item.thing,
                    "english": item.english,
                    "chinese": item.chinese,
                    "caption_en": illustrations.single_captions(item, "en"),
                    "caption_zh": illustrations.single_captions(item, "zh"),
                    "style": item.style,
                    "kind": item.kind,
                },
            )
