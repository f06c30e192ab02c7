"""Checkpoints of a training run: written in the background, the last ones and the best kept.

    <folder>/<step>/params, rest, run       parameters; optimiser and averages; the run's settings

A checkpoint appears whole or not at all: what a kill or a full disk leaves half written has a
temporary name and is passed over. Arrays are read straight to where they are wanted, on this mesh
or another. Nothing in a checkpoint is code.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers, multihost

Settings = dict[str, Any]
_BEST = "validation_loss"


@contextlib.contextmanager
def open_folder(
    folder: Path, keep: int = 2, *, best: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `folder`, made if missing: the newest `keep` stay, and with `best` the
    one of the lowest validation loss.

    Raises OSError, in one line, where it cannot be, and at the end as `finish` does.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: checkpoints need a folder")
    options: dict[str, Any] = {}
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    if best:
        policies.append(
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics[_BEST], n=1)
        )
        options = {"best_fn": lambda metrics: metrics[_BEST], "best_mode": "min"}
    with _one_line(f"checkpoints in {folder}"):
        manager = ocp.CheckpointManager(
            folder.absolute(),
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
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # what happened first is what is told
            manager.close()
        raise
    finish(manager)
    manager.close()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    settings: Settings,
    validation_loss: float = math.inf,
) -> None:
    """Begin to write `state` (a NamedTuple with `params`). It may be donated afterwards.

    Raises OSError, in one line, if this or the last write failed, as on a full disk; earlier
    checkpoints are then as they were.
    """
    if step in manager.all_steps():
        return
    run = {"step": step, "settings": json.loads(json.dumps(settings))}
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(state._replace(params=())._asdict()),
        run=ocp.args.JsonSave(run),
    )
    finish(manager)
    with _one_line(f"checkpoint of step {step} in {manager.directory}"):
        manager.save(step, args=args, metrics={_BEST: validation_loss})


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait for what is being written. Raises OSError, in one line, if it failed."""
    with _one_line(f"the last checkpoint in {manager.directory}"):
        manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, like: Any, settings: Settings) -> tuple[Any, int]:
    """The newest state, laid out as `like`, and its step; `like` itself and 0 if there is none.

    Raises ValueError, in one line, for a run begun with other settings, a checkpoint of another
    network and a damaged one.
    """
    step = manager.latest_step()
    if step is None:
        return like, 0
    where = f"checkpoint {manager.directory / str(step)}"
    begun = read_settings(manager, step)
    if difference := first_difference(begun, json.loads(json.dumps(settings))):
        name, old, new = difference
        raise ValueError(
            f"the run in {manager.directory.parent} was begun with {name} {old!r}, now it is"
            f" {new!r}: give the settings it was begun with, or another folder"
        )
    _check_shapes(manager, step, like, where)
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(wanted.params),
        rest=ocp.args.StandardRestore(wanted._replace(params=())._asdict()),
    )
    with _unreadable(where):
        found = manager.restore(step, args=args)
        state = type(like)(**(found.rest | {"params": found.params}))
    return state, step


def restore_params(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The parameters of a step alone, laid out as `like` (arrays or their shapes)."""
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(wanted))
    with _unreadable(f"checkpoint {manager.directory / str(step)}"):
        return manager.restore(step, args=args).params


def read_settings(manager: ocp.CheckpointManager, step: int) -> Settings:
    """What `save` was given with a step. Raises ValueError, in one line."""
    with _unreadable(f"checkpoint {manager.directory / str(step)}"):
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        settings: Settings = manager.restore(step, args=args).run["settings"]
        return settings


def begun_settings(folder: Path) -> Settings | None:
    """The settings of the run in `folder`, or None where there is no checkpoint yet."""
    if not (folder / "checkpoints").is_dir():
        return None
    with open_folder(folder / "checkpoints") as manager:
        step = manager.latest_step()
        return None if step is None else read_settings(manager, step)


def first_difference(there: Any, asked: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values differ: the name of the place, and both values."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in {**there, **asked}:
            found = first_difference(there.get(key), asked.get(key), f"{name}.{key}".strip("."))
            if found:
                return found
        return None
    return None if there == asked else (name, there, asked)


def describe(config: Any) -> Settings:
    """A dataclass as JSON values, for settings.

    Of a vocabulary only the id space, as in runs of version 0.1: how captions were read is in the
    settings of the records.
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
    """Wait for the other processes, unless a write has failed in this one: it says so and ends,
    instead of waiting 20 minutes for those that wait for the write.
    """
    if sys.exc_info()[0] is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _check_shapes(manager: ocp.CheckpointManager, step: int, like: Any, where: str) -> None:
    with _unreadable(where):
        stored = manager.item_metadata(step).params
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(stored.tree)[0]
    }
    wanted = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(like.params)[0]
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{where} is of another network: parameter {name!r} has shape {found.get(name)}"
                f" there and {wanted.get(name)} here"
            )


@contextlib.contextmanager
def _unreadable(where: str) -> Iterator[None]:
    try:
        yield
    # Orbax and tensorstore raise what their layers happen to raise.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{where} is damaged ({reason}): delete its folder to go on from the one before"
        ) from error


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        known = ("No space left on device", "File too large", "Permission denied", "Disk quota")
        reason = getattr(error, "strerror", None) or next(
            (words for words in known if words in str(error)),
            (str(error).strip().splitlines() or [type(error).__name__])[0][:200],
        )
        raise OSError(f"{what} could not be written: {reason}") from error
