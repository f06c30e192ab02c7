"""How fast and in how much memory are published checkpoints converted?

\b
    python -m experiments.convert_speed.run --gigabytes 4

Writes a checkpoint of CogLM in the published layout, of the published width and random numbers, as
large as asked for; copies its file; and converts it to every dtype, each in a process of its own
and --repeats times. The table has the fastest of each and the largest memory.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from tqdm import tqdm

from cogview2_jax.config import CogLMConfig, TransformerConfig
from cogview2_jax.published import names
from cogview2_jax.published.checkpoints import CONFIG, FILES, FOLDERS, LATEST
from cogview2_jax.published.torch_writing import NewTensor, write_pt
from cogview2_jax.published.writing import DTYPES
from cogview2_jax.tokenizer import text

NUM_IMAGE = 20_000
_NUMBERS = 1 << 20  # random numbers, of which every tensor is made


class Timing(NamedTuple):
    what: str
    seconds: float
    megabytes: float  # largest resident memory


def write_checkpoint(folder: Path, size: int, width: int, heads: int) -> Path:
    """The published files of CogLM in `folder`, with a .pt file of about `size` bytes. Its path."""
    (folder / FILES["text"]).write_bytes(text.train_text_model(["a cat on a mat", "一只猫"]))
    model = text.load_text_model(folder / FILES["text"])
    vocabulary = text.vocabulary_for(model, NUM_IMAGE, as_published=True)
    np.save(folder / FILES["labels"], np.arange(NUM_IMAGE) % 500)
    one_layer = 2 * 12 * width**2
    layers = max(1, (size - 2 * vocabulary.size * width) // one_layer)
    config = CogLMConfig(TransformerConfig(layers, width, heads), vocabulary)
    place = folder / FOLDERS["coglm"]
    (place / "1").mkdir(parents=True)
    (place / LATEST).write_text("1", "utf-8")
    sizes = {
        "num_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "vocab_size": vocabulary.size,
        "model_parallel_size": 1,
    }
    (place / CONFIG).write_text(json.dumps(sizes), "utf-8")
    numbers = np.random.default_rng(0).standard_normal(_NUMBERS).astype(np.float16)

    def blocks(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        left = math.prod(shape)
        while left:
            yield numbers[: min(left, _NUMBERS)]
            left -= min(left, _NUMBERS)

    module = {
        name: NewTensor(numbers.dtype, leaf.published_shape, partial(blocks, leaf.published_shape))
        for leaf in names.leaves(config)
        for name in leaf.names
    }
    file = place / "1" / "mp_rank_00_model_states.pt"
    write_pt(file, {"module": module, "mp_world_size": 1})
    return file


def timed(what: str, command: list[str], repeats: int, target: Path) -> Timing:
    """The fastest of `repeats` runs, each to an absent `target`."""
    seconds, peak = [], 0.0
    for _ in range(repeats):
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, _peak_megabytes(process.pid))
            time.sleep(0.01)
        seconds.append(time.monotonic() - began)
        if process.returncode:
            raise click.ClickException(f"{what} failed: {' '.join(command)}")
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return Timing(what, min(seconds), peak)


def _peak_megabytes(process: int) -> float:
    """The largest resident memory so far of a process; 0 where the system does not tell.

    Not `getrusage`, which also counts the memory of the process that it was forked from.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else 0.0


def measure(folder: Path, size: int, width: int, heads: int, repeats: int) -> list[Timing]:
    source = folder / "published"
    source.mkdir()
    file = write_checkpoint(source, size, width, heads)
    copied = folder / "copied"
    copy = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"
    made = [timed("copy", [sys.executable, "-c", copy, str(file), str(copied)], repeats, copied)]
    for dtype in tqdm(DTYPES, desc="dtypes", disable=None):
        target = folder / "model"
        command = [sys.executable, "-m", "cogview2_jax.cli", "convert", str(source), str(target)]
        command += ["--only", "coglm", "--dtype", dtype]
        made.append(timed(dtype, command, repeats, target))
    return made


@click.command(help=__doc__)
@click.option("--gigabytes", type=click.FloatRange(0, min_open=True), default=4.0)
@click.option("--width", type=click.IntRange(min=64), default=3072, show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="For the files: three times their size. Default: a temporary one.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    gigabytes: float,
    width: int,
    heads: int,
    repeats: int,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = measure(Path(place), int(1e9 * gigabytes), width, heads, repeats)
    copy = made[0].seconds
    click.echo(f"{'':10} {'seconds':>8} {'of a copy':>10} {'MB':>6}")
    for each in made:
        click.echo(
            f"{each.what:10} {each.seconds:8.1f} {each.seconds / copy:10.2f} {each.megabytes:6.0f}"
        )
    if json_path:
        json_path.write_text(json.dumps([each._asdict() for each in made], indent=1) + "\n")


if __name__ == "__main__":
    main()
