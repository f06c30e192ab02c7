"""Recorded files: their arrays, their seeded weights, and what they are compared with."""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# The largest error allowed, absolute. A check over it has a cause to be found.
TOLERANCES = {
    # Ids, positions, masks and most probable tokens are integers: any difference is a mistake. The
    # number reported is how many differ.
    "equal": 0.0,
    # The recording and we add the same float32 products in another order. Logits reach 10 and a
    # unit in the last place of 10 is 1e-6; a stack of layers multiplies that by ten or so.
    "logits": 1e-4,
    "scores": 1e-4,  # q·k, its log-sum-exp and attention's output
    "features": 1e-4,
    "images": 1e-4,
    "likelihood": 1e-4,  # a mean over tokens, around −10; the commitment loss, around 1
    # Probabilities are at most 1, where float32 ends at 6e-8; the recording is float64.
    "probability": 1e-6,
}


class Check(NamedTuple):
    """A line of the report. `error` is nan where nothing could be compared: `note` says why."""

    name: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""


class Skipped(NamedTuple):
    """What a file does not record, so that nothing was checked."""

    name: str
    note: str


Outcome = Check | Skipped


class Golden(Mapping[str, np.ndarray]):
    """One recorded file. It remembers which arrays were read: the rest were not checked."""

    def __init__(self, path: Path) -> None:
        # Opened here: NumPy leaves a broken file open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            self._arrays = {name: file[name] for name in file.files}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        self._read.add(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def unread(self) -> list[str]:
        return sorted(set(self._arrays) - self._read)


def seeded_weights(golden: Golden) -> dict[str, np.ndarray]:
    """The tensors that the file's `weights_spec` describes: published name → float32 array."""
    spec = json.loads(str(golden["weights_spec"]))
    tensors = {}
    for name, shape, offset, scale in spec["tensors"]:
        seed = zlib.crc32(f"{spec['seed']}/{spec['tag']}{name}".encode())
        drawn = np.random.RandomState(seed).standard_normal(shape)
        tensors[name] = (offset + scale * drawn).astype(np.float32)
    return tensors


def equal(name: str, ours: ArrayLike, recorded: ArrayLike) -> Check:
    """Whether integers or flags are the same. A recording without batch holds for every row."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    if (wrong := _shapes(name, ours, recorded, "equal")) is not None:
        return wrong
    differ = int((ours != recorded).sum())
    return Check(name, float(differ), 0.0, differ == 0, f"{ours.size:,} numbers")


def close(name: str, ours: ArrayLike, recorded: ArrayLike, kind: str) -> Check:
    """Whether numbers are within the tolerance of their kind. nan is within nothing."""
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    if (wrong := _shapes(name, ours, recorded, kind)) is not None:
        return wrong
    error = float(np.abs(ours - recorded).max())
    return Check(name, error, TOLERANCES[kind], error <= TOLERANCES[kind], f"{ours.size:,} numbers")


def guarded(
    name: str,
    golden: Golden,
    needs: tuple[str, ...],
    check: Callable[..., Iterator[Outcome]],
    *args: Any,
) -> Iterator[Outcome]:
    """Outcomes of `check(golden, *args)`: skipped without its arrays, a failure if it raises."""
    if missing := [array for array in needs if array not in golden]:
        yield Skipped(name, f"{', '.join(missing)} not recorded")
        return
    try:
        yield from check(golden, *args)
    except Exception as error:  # whatever a damaged or foreign file leads to is a failed check
        yield failure(name, error)


def failure(name: str, error: Exception) -> Check:
    lines = str(error).splitlines() or [""]
    return Check(name, math.nan, math.nan, False, f"{type(error).__name__}: {lines[0]}")


def _shapes(name: str, ours: np.ndarray, recorded: np.ndarray, kind: str) -> Check | None:
    """A failed check if the recording does not fit our array."""
    inner = recorded.shape
    while inner[:1] == (1,):
        inner = inner[1:]
    if ours.size and (recorded.shape == ours.shape or inner in (ours.shape, ours.shape[1:])):
        return None
    note = f"ours has shape {ours.shape}, the recorded {recorded.shape}"
    return Check(name, math.nan, TOLERANCES[kind], False, note)
