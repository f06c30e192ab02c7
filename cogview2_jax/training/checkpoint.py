"""Checkpoints of a training run: written in the background, the last ones and the best kept.

    <folder>/<step>/params, rest, run       parameters; optimiser and averages; the run's settings

A checkpoint appears whole or not at all: one that a kill or a full disk left half written has a
temporary name and is ignored. Arrays are read directly into their sharding, on this mesh or
another. Nothing in a checkpoint is code.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers, multihost

from cogview2_jax.errors import first_difference, first_line

Settings = dict[str, Any]
_BEST = "validation_loss"
_MISSING = "missing"
# In tensorstore's messages about bytes that it has read and found wrong.
_DAMAGED = re.compile(
    "DATA_LOSS|checksum|[Cc]orrupt|Error decoding|Invalid JSON|is not valid for value of size"
)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of an open folder. `_manager` may know the folder by another name."""

    folder: Path
    _manager: ocp.CheckpointManager

    def latest_step(self) -> int | None:
        step: int | None = self._manager.latest_step()
        return step

    def reached_preemption(self, step: int) -> bool:
        """Whether SIGTERM has come to any process; the same answer in all, at the same step."""
        return bool(self._manager.reached_preemption(step))


@contextlib.contextmanager
def open_folder(folder: Path, keep: int = 2, *, best: bool = False) -> Iterator[Checkpoints]:
    """The checkpoints in `folder`, made if missing: the newest `keep` stay, and with `best` the
    one of the lowest validation loss.

    Raises OSError, in one line, where it cannot be, and at the end as `finish` does.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: checkpoints need a folder")
    options: dict[str, Any] = {}
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    if best:
        policies.append(
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics[_BEST], n=1)
        )
        options = {"best_fn": lambda metrics: metrics[_BEST], "best_mode": "min"}
    with contextlib.ExitStack() as stack:
        with _one_line(f"checkpoints in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            manager = ocp.CheckpointManager(
                stack.enter_context(_plain_name(folder)),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    async_options=ocp.options.AsyncOptions(barrier_sync_fn=_meet),
                    **options,
                ),
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "rest": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )
        checkpoints = Checkpoints(folder, manager)
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                manager.close()
            raise
        finish(checkpoints)
        manager.close()


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    settings: Settings,
    validation_loss: float = math.inf,
) -> None:
    """Start writing `state` (a NamedTuple with `params`). It may be donated afterwards.

    A validation loss that is not finite counts as the highest. Raises OSError, in one line, if
    this or the last write failed, as on a full disk; earlier checkpoints are then as they were.
    """
    manager = checkpoints._manager
    if step in manager.all_steps():
        return
    run = {"step": step, "settings": json.loads(json.dumps(settings))}
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(_rest(state)),
        run=ocp.args.JsonSave(run),
    )
    loss = validation_loss if math.isfinite(validation_loss) else math.inf
    finish(checkpoints)
    with _one_line(f"checkpoint of step {step} in {checkpoints.folder}"):
        manager.save(step, args=args, metrics={_BEST: loss})


def finish(checkpoints: Checkpoints) -> None:
    """Wait for the write in progress. Raises OSError, in one line, if it failed."""
    with _one_line(f"the last checkpoint in {checkpoints.folder}"):
        checkpoints._manager.wait_until_finished()


def restore(
    checkpoints: Checkpoints, like: Any, settings: Settings, last: int | None = None
) -> tuple[Any, int]:
    """The newest state, on the devices of `like`, and its step; `like` itself and 0 if there is
    none. Of a run that is past step `last`, the state of that step. Fields of `like.extra` that an
    older version did not save keep their values.

    Raises ValueError, in one line, for a run begun with other settings, a checkpoint of another
    network, a damaged one, and a `last` that is not kept; OSError for one that cannot be read.
    """
    step = checkpoints.latest_step()
    if step is None:
        return like, 0
    if last is not None and step > last:
        kept = sorted(checkpoints._manager.all_steps())
        if last not in kept:
            raise ValueError(
                f"the run in {checkpoints.folder.parent} is past step {last}: it keeps the steps"
                f" {', '.join(map(str, kept))}"
            )
        step = last
    begun = read_settings(checkpoints.folder, step)
    if difference := first_difference(begun, json.loads(json.dumps(settings)), missing=_MISSING):
        name, old, new = difference
        run = f"the run in {checkpoints.folder.parent} was begun"
        if _MISSING in (old, new):
            raise ValueError(
                f"{run} by another version, which has other settings ({name}): go on with that"
                " version, or give another folder"
            )
        raise ValueError(
            f"{run} with {name} {old!r}, now it is {new!r}: give the settings it was begun with, or"
            " another folder"
        )
    with _reading(checkpoints, step):
        stored = checkpoints._manager.item_metadata(step)
    where, rest = _where(checkpoints.folder, step), _rest(like)
    if stored.params is None or stored.rest is None:
        raise ValueError(f"{where} is incomplete: {_move(step)}")
    extra: Any = getattr(like, "extra", ())
    fields = extra._asdict() if hasattr(extra, "_asdict") else {}
    unsaved = {name: fields[name] for name in fields if name not in stored.rest.tree["extra"]}
    if unsaved:
        rest["extra"] = {name: fields[name] for name in fields if name not in unsaved}
    _check_shapes(where, "parameter", stored.params.tree, like.params)
    _check_shapes(where, "part of the state", stored.rest.tree, rest)
    params, rest = jax.tree.map(ocp.utils.to_shape_dtype_struct, (like.params, rest))
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
    )
    with _reading(checkpoints, step):
        found = checkpoints._manager.restore(step, args=args)
    made = found.rest | {"params": found.params}
    if unsaved:
        made["extra"] = type(extra)(**made["extra"], **unsaved)
    return type(like)(**made), step


def begun_settings(folder: Path) -> Settings | None:
    """The settings of the newest checkpoint of the run in `folder`; None where there is none.

    Reads one small file, and changes nothing: safe while another process trains there. Raises as
    `read_settings` does.
    """
    checkpoints = folder.absolute() / "checkpoints"
    if not checkpoints.is_dir():
        return None
    names = [path.name for path in checkpoints.iterdir()]
    steps = [int(name) for name in names if name.isascii() and name.isdigit()]
    return read_settings(checkpoints, max(steps)) if steps else None


def read_settings(folder: Path, step: int) -> Settings:
    """What `save` was given with a step of the checkpoints in `folder`.

    Raises ValueError for a damaged file and OSError for one that cannot be read, in one line.
    """
    file = folder / str(step) / "run" / "metadata"
    try:
        settings: Settings = json.loads(file.read_bytes())["settings"]
    except FileNotFoundError:
        raise ValueError(
            f"{_where(folder, step)} is incomplete, it has no run/metadata: {_move(step)}"
        ) from None
    except OSError as error:
        raise OSError(f"{file} could not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{_where(folder, step)} is damaged (run/metadata is not the JSON that was written):"
            f" {_move(step)}"
        ) from error
    return settings


def describe(config: Any) -> Settings:
    """A dataclass as JSON values, for settings.

    Of a vocabulary only the id space is kept, as in runs of version 0.1: how captions were read is
    in the settings of the records.
    """
    content: Settings = json.loads(
        json.dumps(dataclasses.asdict(config), default=str), object_hook=_without_text_facts
    )
    return content


def _without_text_facts(content: dict[str, Any]) -> dict[str, Any]:
    if "num_image" in content:
        return {k: v for k, v in content.items() if k not in ("first_chinese", "as_published")}
    return content


def _meet(*, key: str, timeout_ms: int) -> None:
    """Wait for the other processes, unless a write has failed in this one: then it reports that and
    ends, instead of waiting 20 minutes for processes that wait for the write.
    """
    if sys.exc_info()[0] is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _rest(state: Any) -> dict[str, Any]:
    """A state without its parameters."""
    rest: dict[str, Any] = state._replace(params=())._asdict()
    return rest


def _where(folder: Path, step: int) -> str:
    return f"checkpoint {folder / str(step)}"


def _move(step: int) -> str:
    return f"move folder {step} away to resume from the checkpoint before it"


def _check_shapes(where: str, kind: str, stored: Any, like: Any) -> None:
    """Raises ValueError for the first array that is not in both trees, or has other shapes."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
        return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in named.items()}

    found, wanted = shapes(stored), shapes(like)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, here = (tree.get(name, "that is missing") for tree in (found, wanted))
            raise ValueError(
                f"{where} is of another network or version: {kind} {name!r} has shape {there} there"
                f" and {here} here: give another folder"
            )


@contextlib.contextmanager
def _plain_name(folder: Path) -> Iterator[Path]:
    """A path to `folder` without special characters.

    Orbax lists files with glob, for which [ ] * and ? are patterns, and takes gs:/ in any place
    and /gs at the beginning for a bucket. It is given a symbolic link where a path is not plain.
    """
    scheme = folder.parts[1:2] and folder.parts[1] in ("gs", "gcs", "s3", "az", "hf")
    if re.fullmatch(r"[\w./+=,@ -]*", str(folder), re.ASCII) and not scheme:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cogview2-", ignore_cleanup_errors=True) as place:
        link = Path(place) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _said(error: BaseException) -> str:
    """The first line of what orbax or tensorstore says, without the specification it ends with."""
    return first_line(error).split(" [tensorstore_spec")[0][:200]


@contextlib.contextmanager
def _reading(checkpoints: Checkpoints, step: int) -> Iterator[None]:
    """Errors in one line. A checkpoint is called damaged only if its bytes were read and found to
    be wrong.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):  # too large for this machine, not damaged
        raise
    # Orbax and tensorstore raise what their layers happen to raise.
    except Exception as error:
        place, where = checkpoints.folder / str(step), _where(checkpoints.folder, step)
        if file := _not_json(place):
            what = f"{file} is not the JSON that was written"
            raise ValueError(f"{where} is damaged ({what}): {_move(step)}") from error
        names = (str(checkpoints.folder), str(checkpoints._manager.directory))
        said = _said(error)
        if _DAMAGED.search(str(error).replace(names[0], "").replace(names[1], "")):
            raise ValueError(f"{where} is damaged ({said}): {_move(step)}") from error
        said = said.replace(names[1], names[0])
        raise OSError(
            f"{where} could not be read: {said}: nothing was changed; see that its files are all"
            " there and can be read, and start again"
        ) from error


def _not_json(place: Path) -> str:
    """The first of a checkpoint's JSON files that can be read and is not JSON, or ""."""
    for pattern in ("*/_METADATA", "*/_sharding", "*/array_metadatas/*", "*/metadata"):
        for file in sorted(place.glob(pattern)):
            try:
                json.loads(file.read_bytes())
            except ValueError:
                return str(file.relative_to(place))
            except OSError:
                continue  # the original error says more
    return ""


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        known = (
            *("No space left on device", "File too large", "Permission denied"),
            *("Disk quota exceeded", "Read-only file system", "File name too long"),
        )
        reason = getattr(error, "strerror", None) or next(
            (words for words in known if words in str(error)), _said(error)
        )
        raise OSError(f"{what} could not be written: {reason}") from error
