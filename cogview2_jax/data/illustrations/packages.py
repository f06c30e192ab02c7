"""The packages that pictures and names come from, and how each is read.

Everything is a file of an npm package: nothing here runs code from one.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cogview2_jax.errors import first_line
from cogview2_jax.tokenizer.pictures import open_picture

SIDE = 256  # pixels of a gathered picture
_FLAT = "@iconify-json/fluent-emoji-flat"
_THREE_D = "@lobehub/fluent-emoji-3d"


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    licence: str
    credit: str


STYLES: Mapping[str, Package] = {
    "3d": Package(_THREE_D, "1.1.0", "MIT", "Fluent Emoji by Microsoft"),
    "flat": Package(_FLAT, "1.2.6", "MIT", "Fluent Emoji by Microsoft"),
    "outlined": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Fluent Emoji by Microsoft"
    ),
    "cartoon": Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji by Google"),
    "sticker": Package(
        "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twemoji by Twitter and contributors"
    ),
}
"""The package of each style."""
NAMES = (
    Package("cldr-annotations-full", "48.2.0", "Unicode-3.0", "Unicode CLDR"),
    Package("cldr-annotations-derived-full", "48.2.0", "Unicode-3.0", "Unicode CLDR"),
)
_ANNOTATIONS = {NAMES[0].name: "annotations", NAMES[1].name: "annotationsDerived"}


def every_package() -> tuple[Package, ...]:
    return (*STYLES.values(), *NAMES)


def archive(folder: Path, package: Package) -> Path:
    """The file that `npm pack` makes of a package."""
    return folder / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"


def fetch(folder: Path, package: Package) -> Path:
    """The package's archive in `folder`, fetched by the npm client unless it is there.

    Raises OSError, in one line, where npm is missing or refuses.
    """
    file = archive(folder, package)
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--silent", wanted]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"npm is needed to fetch {wanted}: install it, or give --packages") from error
    if done.returncode or not file.exists():
        why = first_line(OSError(done.stderr.strip() or "no archive was written"))
        raise OSError(f"npm could not fetch {wanted}: {why}")
    return file


class Pictures:
    """The pictures of a style's package: `names` and, by code point, `draw`."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError, in one line, for an archive that is damaged or of another kind."""
        self._svg: dict[str, Any] = {}
        self._webp: dict[str, bytes] = {}
        self.names: dict[str, str] = {}  # code point → the package's own name of it
        self.categories: dict[str, list[str]] = {}
        files = _files(file)
        if icons := files.get("icons.json"):
            self._svg = json.loads(icons)
            self.names = json.loads(files["chars.json"])
            about = json.loads(files.get("metadata.json", b"{}"))
            self.categories = about.get("categories", {})
        else:
            for name, content in files.items():
                if name.startswith("assets/") and name.endswith(".webp"):
                    self._webp[_code(name[len("assets/") : -len(".webp")])] = content
            self.names = {code: code for code in self._webp}
        if not self.names:
            raise ValueError(f"{file} has no pictures: delete it, to fetch it again")

    def draw(self, code: str) -> Image.Image:
        """The picture at SIDE pixels on white. Raises KeyError where there is none."""
        if self._webp:
            content = self._webp[code]
        else:
            content = _rendered(self._svg["icons"][self.names[code]], self._svg)
        with Image.open(io.BytesIO(content)) as drawn:
            # Resized while transparent: a few pictures have other sides.
            picture = drawn.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return open_picture(picture)


def read_names(files: Mapping[str, Path], languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """The CLDR name of every emoji in each language: language → code point → name."""
    found: dict[str, dict[str, str]] = {language: {} for language in languages}
    for package, folder in _ANNOTATIONS.items():
        paths = {language: f"{folder}/{language}/annotations.json" for language in languages}
        contents = _files(files[package], paths.values())
        for language, path in paths.items():
            for emoji, names in json.loads(contents[path])[folder]["annotations"].items():
                if "tts" in names:
                    code = _code("-".join(f"{ord(letter):04x}" for letter in emoji))
                    found[language].setdefault(code, names["tts"][0])
    return found


def _files(archive: Path, wanted: Collection[str] | None = None) -> dict[str, bytes]:
    """The files of a package by their paths in it: those `wanted`, or all.

    Raises ValueError for a damaged archive, and for one that lacks a file.
    """
    try:
        # The whole of it first: tarfile stops at what it cannot read as if it were the end, and
        # never comes to gzip's own check.
        whole = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=whole) as tar:
            found = ((member.name.partition("/")[2], member) for member in tar if member.isfile())
            files = {
                path: content.read()
                for path, member in found
                if wanted is None or path in wanted
                if (content := tar.extractfile(member)) is not None
            }
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        why = first_line(error)
        raise ValueError(f"{archive} is damaged ({why}): delete it, to fetch it again") from error
    if missing := sorted(set(wanted or ()) - files.keys()):
        raise ValueError(f"{archive} has no {missing[0]}: delete it, to fetch it again")
    return files


def _code(name: str) -> str:
    """Code points joined by "-", without the variation selector, which sets differ in."""
    return "-".join(part.lower() for part in name.split("-") if part.lower() != "fe0f")


def _rendered(icon: dict[str, Any], of: dict[str, Any]) -> bytes:
    """An icon as the content of a PNG file."""
    import resvg_py

    width, height = (icon.get(key, of.get(key, 16)) for key in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
