"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogview2_jax.data import defaults
from cogview2_jax.data.sources.inputs import Input, Refused, caption_sets
from cogview2_jax.errors import first_line


class Tfds:
    """A split of a data set that tfds has prepared as array_record.

    `fields` are paths to texts, such as `captions/text`; the default is the only text. With
    `download`, a missing set is downloaded and prepared first; some sets need TensorFlow for that.
    Raises ValueError, in one line, for an unknown name, split or field.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: Path | None = None,
        fields: Sequence[str] = (),
        image_field: str = defaults.IMAGE_FIELD,
        *,
        download: bool = False,
        pictures_only: bool = False,
    ) -> None:
        import tensorflow_datasets as tfds

        builder = _tfds_builder(name, data_dir, download)
        features = builder.info.features
        texts = sorted(path for path, feature in _leaves(features) if _is_text(feature))
        if not fields and len(texts) == 1:
            fields = texts
        if pictures_only:
            fields = ()
        unknown = [field for field in fields if field not in texts]
        if unknown or not (fields or pictures_only):
            problem = f"no text {unknown[0]!r}" if unknown else f"{len(texts)} texts"
            raise ValueError(f"{name} has {problem}: choose --caption-field of {', '.join(texts)}")
        if image_field not in features or not _is(features[image_field], "Image"):
            raise ValueError(f"{name} has no image in {image_field!r}: give --image-field")
        try:
            self._source = builder.as_data_source(
                split=split, decoders={image_field: tfds.decode.SkipDecoding()}
            )
        except (ValueError, NotImplementedError, OSError) as error:
            raise ValueError(f"{name}: {first_line(error)}") from error
        self._fields, self._image_field = tuple(fields), image_field
        self._name = f"{builder.info.full_name}/{split}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": self._name,
            "image_field": self._image_field,
            "caption_fields": list(self._fields),
        }

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Input:
        name = f"{self._name}/{index}"
        try:
            example = self._source[index]
        except (OSError, MemoryError):
            raise
        except Exception as error:  # tfds and its file formats raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise Refused("unreadable example", reason, name) from error
        try:
            captions = caption_sets({field: _texts(example, field) for field in self._fields})
        except Refused as refused:
            refused.name = name
            raise
        return Input(name, bytes(example[self._image_field]), captions)


def _tfds_builder(name: str, data_dir: Path | None, download: bool) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    place = None if data_dir is None else str(data_dir)
    try:
        # From the files alone: the builder's code often needs TensorFlow.
        return read_only_builder.builder_from_files(name, data_dir=place)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        if not download:
            raise ValueError(
                f"{name!r} is neither a captions file (.jsonl, .tsv), a folder, scenes, nor a data"
                f" set that tfds has prepared in {place or 'its data folder'}: give --data-dir, or"
                " --download to have tfds prepare it"
            ) from error
    try:
        # Without TensorFlow, tfds prints pages that the errors below say in one line.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder = tfds.builder(name, data_dir=place, file_format="array_record")
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(
            f"tfds needs {error.name or 'TensorFlow'} to prepare {name}: install it, or prepare the"
            " set elsewhere with file_format='array_record'; to read it takes neither"
        ) from error
    except Exception as error:  # builders raise anything
        raise ValueError(f"tfds could not prepare {name}: {first_line(error)}") from error
    return builder


def _leaves(features: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    inner = features
    while _is(inner, "Sequence") and hasattr(inner, "feature"):
        inner = inner.feature
    if hasattr(inner, "items"):
        for name, feature in inner.items():
            yield from _leaves(feature, f"{path}/{name}".lstrip("/"))
    else:
        yield path, inner


def _is(feature: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(feature).__mro__)


def _is_text(feature: Any) -> bool:
    """Text, or a single string: that of coco_captions is declared as a NumPy string."""
    return _is(feature, "Text") or (
        _is(feature, "Tensor") and feature.shape == () and np.dtype(feature.np_dtype).kind in "OUS"
    )


def _texts(example: Any, path: str) -> Any:
    """The text or the list of texts at `path`. Names may have slashes too."""
    if isinstance(example, bytes):
        try:
            return example.decode()
        except UnicodeDecodeError as error:
            raise Refused("malformed line", "a caption is not UTF-8") from error
    if isinstance(example, Mapping):
        for name, value in example.items():
            if path == name:
                return _texts(value, "")
            if path.startswith(f"{name}/"):
                return _texts(value, path[len(name) + 1 :])
        return None
    return [_texts(each, path) for each in example]
