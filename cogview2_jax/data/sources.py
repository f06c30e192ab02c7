"""Inputs of `prepare`, by number: a captions file with pictures, a folder of pictures, a prepared
tfds data set, Scenes.

A source has a length and gives input `i` as an `Input`, or raises `Refused` for what is wrong with
that input alone, so that work can be split by number and one bad input costs nothing but itself.
Sources are read by many threads at once. What is wrong with the machine (too many open files, a
failing disk) is no refusal: it is raised as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of picture files
# What is opened, by content. Pillow knows more, among them PostScript, which it would have run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MOST_BYTES = 1 << 28  # of one picture file; a larger one is refused before it is read
# What the path or the file is to blame for, and not the machine.
_OF_THE_FILE = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EISDIR: "not a file",
    errno.EACCES: "not readable",
    errno.EPERM: "not readable",
    errno.ENAMETOOLONG: "name too long",
    errno.ELOOP: "too many links",
}

Captions = dict[str, str]  # field -> text


class Input(NamedTuple):
    """One input. Each of `captions` is one set, in one language or two, and makes a record."""

    name: str
    picture: bytes | Image.Image
    captions: tuple[Captions, ...]


class Refused(Exception):
    """What is wrong with one input: a short `kind` to count by, and one line that says why."""

    def __init__(self, kind: str, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.name = kind, reason, name


class Source(Protocol):
    """`fingerprint`: JSON values that change whenever the inputs do."""

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Input: ...


# --- A captions file ------------------------------------------------------------------------------


class CaptionsFile:
    """Lines of a `.jsonl` or `.tsv` file, each of a picture's path and its captions.

    JSON lines: `{"image": "a.jpg", "caption": "a cat"}`, with `fields` naming the captions; one may
    be a list, and then each of it makes a record. Tab-separated: the first line may name the
    columns; without names they are the picture, then `fields` in order. A field that is missing,
    null or an empty column is no caption of that picture; there must be one. With `pictures_only`,
    captions are passed over.

    Paths are taken from `images` (default: the file's folder). Blank lines count for nothing.
    Raises ValueError for another ending and for no lines, OSError when the file cannot be read.
    """

    def __init__(
        self,
        file: Path,
        images: Path | None = None,
        fields: Sequence[str] = ("caption",),
        image_field: str = "image",
        *,
        pictures_only: bool = False,
    ) -> None:
        if file.suffix not in (".jsonl", ".tsv"):
            raise ValueError(f"{file} must be .jsonl (JSON lines) or .tsv (tab-separated)")
        self._file, self._images = file, images or file.parent
        self._fields = () if pictures_only else tuple(fields)
        self._image_field, self._columns = image_field, (image_field, *fields)
        starts, numbers = array("q"), array("q")
        digest, start = hashlib.sha256(), 0
        with file.open("rb") as content:
            for number, line in enumerate(content, 1):
                digest.update(line)
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        starts.append(start)
        self._starts, self._numbers, self._digest = starts, numbers, digest.hexdigest()
        self._descriptor = os.open(file, os.O_RDONLY)
        if file.suffix == ".tsv" and len(self):
            first: list[str] = []
            with contextlib.suppress(Refused):  # then it is no line of names
                first = self._line(0).split("\t")
            if image_field in first:
                missing = [field for field in self._fields if field not in first]
                if missing:
                    raise ValueError(f"{file} has no column {missing[0]!r}: it has {first}")
                self._columns = tuple(first)
                del self._starts[0], self._numbers[0]
        if not len(self):
            raise ValueError(f"{file} has no lines")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": self._file.name,
            "sha256": self._digest,
            "image_field": self._image_field,
            "caption_fields": list(self._fields),
        }

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Input:
        where = f"line {self._numbers[index]}"
        try:
            row = self._row(self._line(index))
            picture = row.get(self._image_field)
            if not isinstance(picture, str) or not picture:
                raise Refused("malformed line", f"no path of a picture in {self._image_field!r}")
            where += f": {picture}"
            captions = self._captions_of(row)
            return Input(where, read_picture(self._images / picture), captions)
        except Refused as refused:
            refused.name = where
            raise

    def captions(self, index: int) -> tuple[Captions, ...]:
        """The captions of an input, without its picture. Raises Refused."""
        return self._captions_of(self._row(self._line(index)))

    def _captions_of(self, row: Mapping[str, Any]) -> tuple[Captions, ...]:
        return caption_sets({field: row.get(field) for field in self._fields})

    def _line(self, index: int) -> str:
        start, end = self._starts[index], self._starts[index + 1]
        line = os.pread(self._descriptor, end - start, start)
        try:
            return line.decode("utf-8-sig" if start == 0 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise Refused("malformed line", "not UTF-8") from error

    def _row(self, line: str) -> Mapping[str, Any]:
        if self._file.suffix == ".tsv":
            cells = line.split("\t")
            if len(cells) < 1 + bool(self._fields) or len(cells) > len(self._columns):
                raise Refused(
                    "malformed line", f"{len(cells)} columns where {len(self._columns)} belong"
                )
            row = dict(zip(self._columns, cells, strict=False))
            return {name: cell for name, cell in row.items() if cell}
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed line", f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise Refused("malformed line", "not a JSON object")
        return row


def caption_sets(values: Mapping[str, Any]) -> tuple[Captions, ...]:
    """Captions by field, each None, a text or a list of texts, as sets with one text a field.

    Lists go side by side; a single text goes with each of a list. No fields make no sets. Raises
    Refused.
    """
    if not values:
        return ()
    lists: dict[str, list[Any]] = {}
    for field, value in values.items():
        if value is not None:
            lists[field] = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in lists[field]):
                raise Refused("malformed line", f"{field!r} must be a text or a list of texts")
    lengths = {len(texts) for texts in lists.values()}
    if not lengths or lengths == {0}:
        raise Refused("empty caption", f"no caption in {', '.join(values)}")
    if 0 in lengths or len(lengths - {1}) > 1:
        numbers = ", ".join(f"{len(texts)} of {field!r}" for field, texts in lists.items())
        raise Refused("malformed line", f"captions do not go together: {numbers}")
    return tuple(
        {field: texts[i % len(texts)] for field, texts in lists.items()}
        for i in range(max(lengths))
    )


# --- A folder of pictures -------------------------------------------------------------------------


class PictureFolder:
    """All pictures in a folder and below it, by name, without captions.

    Raises ValueError when there is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = sorted(_pictures_below(folder))
        if not self._names:
            raise ValueError(f"{folder} has no pictures ({', '.join(ENDINGS)})")

    @property
    def fingerprint(self) -> dict[str, Any]:
        names = "\n".join(self._names).encode(errors="surrogateescape")
        return {"source": self._folder.name, "sha256": hashlib.sha256(names).hexdigest()}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Input:
        name = self._names[index]
        try:
            return Input(name, read_picture(self._folder / name), ())
        except Refused as refused:
            refused.name = name
            raise


def _pictures_below(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


# --- tfds -----------------------------------------------------------------------------------------


class Tfds:
    """A split of a data set that tfds has prepared as array_record, read without TensorFlow.

    `fields` are paths to texts, such as `captions/text`; by default the only one there is. With
    `download`, a set that is not there is downloaded and prepared first; some sets need TensorFlow
    for that. Raises ValueError, in one line, for an unknown name, split or field.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: Path | None = None,
        fields: Sequence[str] = (),
        image_field: str = "image",
        *,
        download: bool = False,
        pictures_only: bool = False,
    ) -> None:
        import tensorflow_datasets as tfds

        builder = _tfds_builder(name, data_dir, download)
        features = builder.info.features
        texts = sorted(path for path, feature in _leaves(features) if _is(feature, "Text"))
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
            raise ValueError(f"{name}: {_first_line(error)}") from error
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
        except Exception as error:  # whatever tfds or its file format finds wrong with this one
            reason = f"{type(error).__name__}: {_first_line(error)}"
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
        # From the files alone: the code that made them often needs TensorFlow.
        return read_only_builder.builder_from_files(name, data_dir=place)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        if not download:
            raise ValueError(
                f"{name!r} is neither a captions file (.jsonl, .tsv), a folder, scenes, nor a data"
                f" set that tfds has prepared in {place or 'its data folder'}: give --data-dir, or"
                " --download to have tfds prepare it"
            ) from error
    try:
        # What a set without TensorFlow prints is said below, in one line.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder = tfds.builder(name, data_dir=place, file_format="array_record")
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(
            f"tfds needs {error.name or 'TensorFlow'} to prepare {name}: install it, or prepare the"
            " set elsewhere with file_format='array_record'; to read it takes neither"
        ) from error
    except Exception as error:  # a builder is code of others, and so are its mistakes
        raise ValueError(f"tfds could not prepare {name}: {_first_line(error)}") from error
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


def _texts(example: Any, path: str) -> Any:
    """What lies at `path`: a text, or a list of texts. A name may have slashes of its own."""
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


# --- Scenes ---------------------------------------------------------------------------------------


class Scenes:
    """The first `length` examples of a split of Scenes, drawn when asked for."""

    def __init__(self, length: int, split: str = "train", fields: Sequence[str] = ()) -> None:
        from cogview2_jax.data import scenes

        known = scenes.LANGUAGES
        if split not in scenes.SPLITS:
            raise ValueError(f"split must be one of {', '.join(scenes.SPLITS)}: got {split}")
        if not set(fields) <= set(known):
            raise ValueError(f"captions of Scenes are {', '.join(known)}: got {', '.join(fields)}")
        self._length, self._split, self._fields = length, split, tuple(fields or known)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": f"scenes/{self._split}", "caption_fields": list(self._fields)}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        from cogview2_jax.data import scenes

        example = scenes.example(self._split, index)
        captions = {field: example.captions[field] for field in self._fields}
        return Input(f"scenes/{self._split}/{index}", example.image, (captions,))


# --- Any of them ----------------------------------------------------------------------------------


class First:
    """The first `length` inputs of a source, or all where it has fewer."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length = source, min(length, len(source))

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        return self._source[index]


def read_picture(file: Path) -> bytes:
    """The content of a picture file. Raises Refused for what the file is to blame for."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            raise Refused("missing image", "not a file")
        if status.st_size > MOST_BYTES:
            raise Refused("unreadable image", f"larger than {MOST_BYTES >> 20} MiB")
        return file.read_bytes()
    except ValueError as error:  # a NUL in the path, or half of a surrogate pair
        raise Refused("missing image", "not a path") from error
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise Refused("missing image", _OF_THE_FILE[error.errno]) from error


def open_picture(picture: bytes | Image.Image) -> Image.Image:
    """A picture, upright and in RGB, on white where it is transparent. Raises Refused."""
    try:
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture), formats=FORMATS)
        opened = ImageOps.exif_transpose(picture)
        if opened.has_transparency_data:
            opened = opened.convert("RGBA")
            white = Image.new("RGBA", opened.size, "white")
            opened = Image.alpha_composite(white, opened)
        return opened.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise Refused("unreadable image", f"not a picture in {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise Refused("unreadable image", _first_line(error) or type(error).__name__) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "").strip()
