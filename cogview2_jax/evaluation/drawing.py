"""A picture for each caption of a data set, drawn by a model: resumable, shared by processes.

    folder/records-00003-of-00010.array_record      PNG files that hold their prompt
    folder/refused.jsonl, report.json               captions that the model cannot read

They are shards as `data prepare --pictures` writes them: a kill costs the pictures of the shards
that were being drawn, and the same call, in any number of processes at once, continues.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.prepare import fingerprint
from cogview2_jax.data.reading import Records
from cogview2_jax.data.shards import Progress, Recipe, Report, Run, Work, write_shards
from cogview2_jax.data.sources import Input, Source
from cogview2_jax.evaluation.captions import readable_caption
from cogview2_jax.pipeline import saved
from cogview2_jax.pipeline.cogview import CogView

_DRAWN = "drawn"


def write_drawings(
    source: Source,
    folder: Path,
    cv: CogView,
    *,
    seed: int = 0,
    stage: str = "full",
    candidates: int | None = None,
    style: str | None = None,
    batch_size: int = 8,
    shard_size: int = 64,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Draw the first caption of every input of `source`, or those that `folder` lacks.

    Picture n is that of `cv.generate_stages([caption], jax.random.key(seed), 1, first=n)`, whoever
    draws it, and in whichever batch; `stage`, `candidates` and `style` are as there. Raises
    ValueError for a folder that was begun with other settings, OSError if something cannot be
    written.
    """
    settings = {
        "source": source.fingerprint,
        "measure": _DRAWN,
        "model": {name: fingerprint(cv.bundle.params(name)) for name in cv.networks},
        "seed": seed,
        "stage": stage,
        "candidates": candidates,
        "style": style,
        "batch_size": batch_size,
    }
    manifest = Manifest(manifests.PICTURES, len(source), shard_size, None, settings)
    manifests.require_same(folder, manifest)

    def read(item: Input, number: int) -> tuple[tuple[int, str], list[Any]]:
        return (number, readable_caption(item, cv, style)), []

    def write(items: Sequence[tuple[int, str]]) -> list[list[bytes]]:
        filled = [*items, *[items[-1]] * (batch_size - len(items))]  # one size, one compilation
        made = cv.generate_stages(
            [prompt for _, prompt in filled],
            jax.random.key(seed),
            1,
            candidates=candidates,
            stages=(stage,),
            style=style,
            first=[number for number, _ in filled],
        )[stage]
        return [
            [saved.png(picture, {"prompt": prompt, "seed": seed, "first": number})]
            for (number, prompt), (picture,) in zip(items, made, strict=False)
        ]

    return run(Work(source, manifest, Recipe(read, write, batch_size)), folder, workers, progress)


class Drawings:
    """The pictures in a folder of `write_drawings` as a source, each with its prompt as caption.

    Raises FileNotFoundError or ValueError, in one line, for a folder that is not complete or has
    something else.
    """

    def __init__(self, folder: Path) -> None:
        self._records = Records(folder)
        self._settings = self._records.manifest.settings
        if self._settings.get("measure") != _DRAWN:
            raise ValueError(f"{folder} has no drawn pictures")

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"drawn": self._settings}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Input:
        content = self._records[index]
        settings = saved.settings_of(content)
        captions = ({"prompt": str(settings["prompt"])},)
        return Input(f"drawn/{settings['first']}", content, captions)


def write_files(
    drawings: Drawings, folder: Path, progress: Progress = lambda pictures: None
) -> list[Path]:
    """Every picture as a PNG file, named by its row, and captions.jsonl, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(len(drawings)):
        name, content, prompt = _unpacked(drawings[number])
        (folder / f"{name}.png").write_bytes(content)
        lines.append(json.dumps({"image": f"{name}.png", "caption": prompt}, ensure_ascii=False))
        progress(1)
    captions = folder / "captions.jsonl"
    manifests.write_durably(captions, ("\n".join(lines) + "\n").encode())
    return [captions]


def write_tars(
    drawings: Drawings,
    folder: Path,
    progress: Progress = lambda pictures: None,
    at_once: int = 1000,
) -> list[Path]:
    """Tar files of up to `at_once` pictures with their prompts, .png and .txt of one name, as
    WebDataset has them. Returns them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for begin in range(0, len(drawings), at_once):
        file = folder / f"drawn-{begin // at_once:05d}.tar"
        partial = file.with_name(f".{file.name}.partial")
        with tarfile.open(partial, "w") as archive:
            for number in range(begin, min(begin + at_once, len(drawings))):
                name, content, prompt = _unpacked(drawings[number])
                for ending, part in ((".png", content), (".txt", prompt.encode())):
                    header = tarfile.TarInfo(name + ending)
                    header.size = len(part)
                    archive.addfile(header, io.BytesIO(part))
                progress(1)
        partial.replace(file)
        files.append(file)
    return files


def _unpacked(item: Input) -> tuple[str, bytes, str]:
    """A name by its row, the PNG file and the prompt."""
    content = item.picture
    assert isinstance(content, bytes)
    return f"{int(item.name.rpartition('/')[2]):08d}", content, item.captions[0]["prompt"]
