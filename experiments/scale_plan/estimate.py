"""Arithmetic of a large run: exact bytes of a state, collectives of a compiled program, time."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from cogview2_jax.sharding import Sharding

GB = 1e9
HOST_DEVICES = 8


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware. Rates are per device and in one direction."""

    peak: float = 989e12  # FLOP/s in bfloat16, dense: data sheet of H100 and H200 (SXM)
    achieved: float = 0.55  # share of `peak` while computing, the element-wise work included
    inside: float = 0.7 * 450e9  # bytes/s between devices of a host: NVLink 4, 0.7 of it
    between: float = 0.7 * 50e9  # bytes/s between hosts: a 400 Gb/s card for each device
    memories: tuple[float, ...] = (80 * GB, 141 * GB)  # H100, H200
    usable: float = 0.92  # share of a memory that a program can have


# --- Memory ---------------------------------------------------------------------------------------


def state_bytes(shapes: Any, axes: Any, sharding: Sharding) -> tuple[int, int]:
    """Bytes a device holds of float32 parameters, and of AdamW's state and the step's number.

    The two moments are sharded like their parameters; three int32 scalars (Adam's count, the
    schedule's, the step) are on every device. Computed from sizes and names of axes, without
    arrays.
    """
    parameters = 0
    for leaf, names in zip(
        jax.tree.leaves(shapes),
        jax.tree.leaves(axes, is_leaf=lambda one: isinstance(one, tuple)),
        strict=True,
    ):
        parts = math.prod(sharding.parts(name) for name in names)
        parameters += 4 * math.prod(leaf.shape) // parts
    return parameters, 2 * parameters + 3 * 4


def batch_bytes(batch: Any, sharding: Sharding) -> int:
    """Bytes a device holds of a batch; all arrays are sharded along their first axis."""
    total = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))
    return total // sharding.parts("batch")


# --- Collectives ----------------------------------------------------------------------------------


class Collective(NamedTuple):
    """`received` bytes by a device in all runs of one instruction of the program."""

    kind: str
    received: float
    between_hosts: bool


_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.\-]+) .*\{$")
_WHILE = re.compile(r"while\(.*body=(%[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"(\d+)"')
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=(%[\w.\-]+)")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def collectives(program: str, num_devices: int) -> list[Collective]:
    """The collectives of a compiled program (HLO text); one in a loop counts for every iteration.

    With n devices in a group, a device receives (n − 1)/n of the result of an all-gather or an
    all-to-all, as much of the operand of a reduce-scatter, and twice that of an all-reduce.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    entry = name = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)

    def walk(name: str, times: float) -> Iterator[Collective]:
        for line in lines[name]:
            if found := _COLLECTIVE.search(line):
                yield _collective(line, found[2], found[1], times, num_devices)
            inner = _WHILE.search(line)
            trips = float(_TRIPS.search(line)[1]) if inner and _TRIPS.search(line) else 1.0  # type: ignore[index]
            for called in _CALLED.findall(line):
                yield from walk(called, times * (trips if inner and called == inner[1] else 1.0))

    return list(walk(entry, 1.0))


def _collective(line: str, kind: str, types: str, times: float, num_devices: int) -> Collective:
    size, crosses = _group(line, num_devices)
    # The type of an asynchronous one has operands and results; of a gather the results are larger,
    # of a scatter smaller.
    sizes = [_bytes(*found) for found in _ARRAY.findall(types)]
    paired = "-start(" in line and kind in ("all-gather", "reduce-scatter") and len(sizes) > 1
    halves = sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])
    received: float
    if paired:
        received = abs(halves[1] - halves[0])
    elif kind == "reduce-scatter":
        received = sum(sizes) * (size - 1)
    elif kind == "collective-permute":
        received = halves[1] if "-start(" in line else sum(sizes)
    else:
        received = sum(sizes) * (size - 1) / size * (2 if kind == "all-reduce" else 1)
    return Collective(kind, times * received, crosses)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def _group(line: str, num_devices: int) -> tuple[int, bool]:
    """Devices in a group, and whether some are on other hosts than others."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = [(n, int(s)) for n, s in re.findall(r"'([\w]+)'=(\d+)", found[1])]
        named = set(re.findall(r"'([\w]+)'", found[2]))
        size = span = stride = 1
        for axis, length in reversed(sizes):  # the last is the innermost
            if axis in named:
                size, span = size * length, stride * length
            stride *= length
        return size, span > HOST_DEVICES
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[[\d,]+\](T)?", line):
        size = int(found[2])
        # Transposed: neighbours in a group are far from each other.
        return size, (num_devices if found[3] else size) > HOST_DEVICES
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        members = [int(one) for one in found[1].split(",") if one]
        hosts = {member // HOST_DEVICES for member in members}
        return max(len(members), 1), len(hosts) > 1
    return num_devices, num_devices > HOST_DEVICES


# --- Time -----------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """Seconds of one step: computing, and communication within and between hosts."""

    compute: float
    inside: float
    between: float

    @property
    def overlapped(self) -> float:
        """With all communication hidden behind the computation."""
        return max(self)

    @property
    def one_after_the_other(self) -> float:
        return sum(self)


def step_seconds(flops: float, moved: list[Collective], machine: Machine) -> Seconds:
    """`flops` are one device's, including recomputation."""
    between = sum(one.received for one in moved if one.between_hosts)
    inside = sum(one.received for one in moved if not one.between_hosts)
    return Seconds(
        flops / (machine.peak * machine.achieved),
        inside / machine.inside,
        between / machine.between,
    )


def days(seconds: float, batch: int, pairs: float = 30e6) -> float:
    """For one pass over `pairs` samples; the paper has 30 M pictures with texts (section 4.1)."""
    return pairs / batch * seconds / 86400
