"""Small data sets to prepare, intact and damaged."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SENTENCE, CHINESE = "a small green star on the left", "左边的绿色星形"


def picture(number: int, width: int = 40, height: int = 32) -> bytes:
    """A JPEG of coloured squares, different for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    content = io.BytesIO()
    enlarged = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    enlarged.save(content, "JPEG")
    return content.getvalue()


# What can be wrong with one input → the kind it is listed under.
DAMAGE = {
    "truncated": "unreadable image",
    "no picture": "unreadable image",
    "empty file": "unreadable image",
    "missing": "missing image",
    "folder": "missing image",
    "no words": "empty caption",
    "no caption": "empty caption",
    "long": "long caption",
    "unknown": "unknown words",
    "malformed": "malformed line",
    "not utf-8": "malformed line",
    "no object": "malformed line",
}


def write_inputs(folder: Path, number: int, damaged: dict[int, str]) -> Path:
    """A captions file of `number` pictures, some damaged: input → a key of DAMAGE."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        content, row = picture(i), {"image": f"{i}.jpg", "caption": (SENTENCE, CHINESE)[i % 2]}
        line = None
        match damaged.get(i):
            case "truncated":
                content = content[: len(content) // 2]
            case "no picture":
                content = b"<html>not found</html>"
            case "empty file":
                content = b""
            case "missing":
                row["image"] = f"nowhere/{i}.jpg"
            case "folder":
                row["image"] = "."
            case "no words":
                row["caption"] = " \t"
            case "no caption":
                del row["caption"]
            case "long":
                row["caption"] = " ".join([SENTENCE] * 4)
            case "unknown":
                row["caption"] = "a pink elephant"
            case "malformed":
                line = json.dumps(row)[:-5].encode()
            case "not utf-8":
                line = b'{"image": "\xff.jpg", "caption": "a star"}'
            case "no object":
                line = b"[1, 2]"
        (folder / f"{i}.jpg").write_bytes(content)
        lines.append(line or json.dumps(row, ensure_ascii=False).encode())
    file = folder / "captions.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


@pytest.fixture(scope="session")
def damaged() -> dict[int, str]:
    return {5 * i + 2: name for i, name in enumerate(DAMAGE)}


@pytest.fixture(scope="session")
def captions_file(tmp_path_factory, damaged) -> Path:
    """70 inputs, with one for each kind of damage."""
    return write_inputs(tmp_path_factory.mktemp("inputs") / "photos", 70, damaged)
