"""Shards of records: each written atomically by one process, with a list of refused inputs.

The inputs are cut into shards by number. A shard is written under a temporary name, read back and
renamed, so that a kill, a full disk or a failing machine costs at most the shards that were being
written. Any number of processes may prepare one folder: each takes shards that no other holds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.sources import Input, Refused, Source, left_out
from cogview2_jax.files import held
from cogview2_jax.tokenizer.pictures import PictureError

OTHER_FILE = "other file"  # the kind of a file that a source does not read


class Refusal(NamedTuple):
    """One line of refused.jsonl. `input` is the input's number from 0, None for a file that is no
    input; `caption` is the refused one of several.
    """

    input: int | None
    name: str
    kind: str
    reason: str
    caption: str | None = None


class Report(NamedTuple):
    """Counts of a folder. `complete` is false while another process is working on a shard.
    `left_out` counts files that the source does not read.
    """

    inputs: int
    records: int
    refused: dict[str, int]  # kind -> number of refusals
    left_out: int
    complete: bool


class Recipe(NamedTuple):
    """How inputs become records.

    `read` runs in a thread on one input and its number, and raises `Refused` or `PictureError`. It
    returns an item for `write`, or None if nothing of the input is left, and the refusals of single
    captions. `write` runs in the main thread on up to `batch_size` items and returns the records of
    each.
    """

    read: Callable[[Input, int], tuple[Any, list[tuple[str, Refused]]]]
    write: Callable[[Sequence[Any]], list[list[bytes]]]
    batch_size: int


class Work(NamedTuple):
    """What is to be written: the same wherever it is done, and by how many."""

    source: Source
    manifest: Manifest
    recipe: Recipe


Progress = Callable[[int], None]
# How work is done: (work, folder, threads that read, progress) → the report.
Run = Callable[[Work, Path, int, Progress], Report]


def write_shards(work: Work, folder: Path, workers: int, progress: Progress) -> Report:
    """Write the shards of `work` that `folder` lacks. `progress` is called with numbers of inputs
    as they are done, first with those of the shards that are there.

    Raises ValueError for a folder that was begun with other settings, and OSError, in one line,
    when something cannot be written.
    """
    missing = begin(work, folder, progress)
    write_some(work, folder, missing, workers, progress)
    return summarise(work, folder)


def begin(work: Work, folder: Path, progress: Progress) -> list[int]:
    """Makes the folder, or goes on in it: the shards that it lacks. Raises as `write_shards`."""
    manifest = work.manifest
    with _one_line_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            manifests.begin(folder, manifest)
    done = manifest.shards_in(folder)
    progress(sum(len(manifest.inputs(shard)) for shard in done))
    there = set(done)
    return [shard for shard in range(manifest.num_shards) if shard not in there]


def write_some(
    work: Work, folder: Path, shards: Iterable[int], workers: int, progress: Progress
) -> None:
    """Write those of `shards` that are not there and that no other process holds."""
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # Pillow warns of harmless oddities, and of sizes that `pictures` limits by itself.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for shard in shards:
                with _to_write(folder, work.manifest, shard) as mine:
                    if mine:
                        inputs = _Inputs(work.source, work.recipe, pool, workers, progress)
                        _write_shard(inputs, folder, work.manifest, shard)
        finally:
            pool.shutdown(cancel_futures=True)


def summarise(work: Work, folder: Path) -> Report:
    """Counts of the shards that are done; once all are, they and all refusals are written."""
    with _one_line_errors(folder), _locked(folder):
        return _summarise(work.source, folder, work.manifest)


# --- Inputs that are read ahead -------------------------------------------------------------------


class _Inputs(NamedTuple):
    """How the inputs of a shard are read."""

    source: Source
    recipe: Recipe
    pool: ThreadPoolExecutor
    workers: int
    progress: Callable[[int], None]

    def read(self, index: int) -> tuple[Any, list[Refusal]]:
        """An input's item for `recipe.write`, or None, and its refusals."""
        name = ""
        try:
            item = self.source[index]
            name = item.name
            made, refused = self.recipe.read(item, index)
        except (Refused, PictureError) as one:
            return None, [_refusal(index, one.name or name, one)]
        return made, [_refusal(index, name, one, caption) for caption, one in refused]

    def accepted(self, indices: range, refusals: list[Refusal]) -> Iterator[Any]:
        """The items for `recipe.write` of all inputs that are not refused, in order. Refusals are
        added to `refusals`.
        """
        ahead = self.workers + 2 * self.recipe.batch_size
        for made, refused in _in_order(self.pool, self.read, indices, ahead):
            refusals.extend(refused)
            if made is not None:
                yield made
            self.progress(1)


def _refusal(
    index: int, name: str, refused: Refused | PictureError, caption: str | None = None
) -> Refusal:
    caption = None if caption is None else _short(caption)
    return Refusal(index, _short(name), refused.kind, _short(refused.reason), caption)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[int], Any], indices: range, ahead: int
) -> Iterator[Any]:
    """`function` of each index, in order, with at most `ahead` in work."""
    pending: deque[Future[Any]] = deque()
    for index in indices:
        pending.append(pool.submit(function, index))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# --- One shard ------------------------------------------------------------------------------------


def _write_shard(inputs: _Inputs, folder: Path, manifest: Manifest, shard: int) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    file = manifest.shard_file(folder, shard)
    partial = file.with_name(f".{file.name}.partial")
    refusals: list[Refusal] = []
    written: list[bytes] = []  # digests
    try:
        with _one_line_errors(folder):
            # One record a group: random access reads no neighbours.
            writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            items = inputs.accepted(manifest.inputs(shard), refusals)
            while batch := list(islice(items, inputs.recipe.batch_size)):
                for records in inputs.recipe.write(batch):
                    for record in records:
                        with _one_line_errors(folder):
                            writer.write(record)
                        written.append(hashlib.sha256(record).digest())
        finally:
            with _one_line_errors(folder):
                writer.close()
        report = {"records": len(written), "refused": [each._asdict() for each in refusals]}
        with _one_line_errors(folder):
            require_written(partial, written)
            manifests.write_durably(_report_file(folder, manifest, shard), _json_line(report))
            manifests.rename_durably(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def require_written(file: Path, digests: Sequence[bytes]) -> None:
    """Raises OSError unless the records on the disk have these SHA-256 digests."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        intact = reader.num_records() == len(digests)
        intact = intact and all(hashlib.sha256(reader.read()).digest() == each for each in digests)
        reader.close()  # raises what was wrong when it was opened
    except (RuntimeError, IndexError):
        intact = False
    if not intact:
        raise OSError(f"{file.name} does not hold what was written to it: a full or failing disk")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _to_write(folder: Path, manifest: Manifest, shard: int) -> Iterator[bool]:
    """Whether the shard is still to be written, and by this process."""
    file = manifest.shard_file(folder, shard)
    if file.exists():
        yield False
        return
    with held(file.with_name(f".{file.name}.lock")) as mine:
        yield mine and not file.exists()


# --- Reports --------------------------------------------------------------------------------------


def _summarise(source: Source, folder: Path, manifest: Manifest) -> Report:
    """Counts of the finished shards. Once all are finished, writes them, with all refusals."""
    records, lines = 0, []
    kinds: Counter[str] = Counter()
    done = manifest.shards_in(folder)
    for shard in done:
        report = _read_report(folder, manifest, shard)
        records += report["records"]
        kinds.update(refusal["kind"] for refusal in report["refused"])
        lines += [_json_line(refusal) for refusal in report["refused"]]
    others = left_out(source)
    made = Report(
        sum(len(manifest.inputs(shard)) for shard in done),
        records,
        dict(kinds.most_common()),
        len(others),
        len(done) == manifest.num_shards,
    )
    if made.complete:
        for lock in folder.glob(".records-*.lock"):  # of runs killed just after their last shard
            lock.unlink(missing_ok=True)
        for name, reason in others:
            lines.append(_json_line(Refusal(None, name, OTHER_FILE, reason)._asdict()))
        content = json.dumps(made._asdict(), indent=2) + "\n"
        manifests.write_durably(folder / manifests.REFUSED, b"".join(lines))
        manifests.write_durably(folder / manifests.REPORT, content.encode())
    return made


def _report_file(folder: Path, manifest: Manifest, shard: int) -> Path:
    return manifest.shard_file(folder, shard).with_suffix(".json")


def _read_report(folder: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    file = _report_file(folder, manifest, shard)
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
        refused = [Refusal(**one)._asdict() for one in report["refused"]]
        if not all(isinstance(one["kind"], str) for one in refused):
            raise TypeError("a kind is a text")
        return {"records": int(report["records"]), "refused": refused}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{file} is missing or damaged: delete {manifest.shard_file(folder, shard).name},"
            " and prepare will make both again"
        ) from error


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None)
        # array_record says "write() failed: No space left on device; writing …; …"
        reason = reason or str(error).split(";")[0].removeprefix("write() failed: ")
        raise OSError(
            f"cannot write to {folder}: {reason} (the same command continues from here)"
        ) from error


def _short(words: str, most: int = 300) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _json_line(content: Any) -> bytes:
    # Half of a surrogate pair, which names of files and fields may have, becomes a JSON escape.
    return (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
