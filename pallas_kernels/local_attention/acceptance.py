"""Which calls implementation="auto" gives to the GPU kernels: those in a record of measurements.

`accepted.json` holds the records, which `python -m experiments.local_attention.accept` measures on
a GPU and writes. A call without a record goes to XLA.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ACCEPTED = Path(__file__).with_name("accepted.json")


class Kind(NamedTuple):
    """What a record holds for: a device kind as jax.Device has it, a dtype, a head dim, and whether
    the keys are on a coarser grid than the queries."""

    device: str
    dtype: str
    dim: int
    coarse_keys: bool


@dataclass(frozen=True)
class Record:
    """The kernels compared with the XLA form, over all cases measured for a kind.

    The speedups are XLA's time over the kernels', the smallest of all cases; 0 if not measured.
    """

    kind: Kind
    agrees: bool
    forward_speedup: float
    gradient_speedup: float  # forward and backward
    jax: str  # the version measured with

    @property
    def accepted(self) -> bool:
        """Whether the kernels agree and are faster in both directions."""
        return self.agrees and min(self.forward_speedup, self.gradient_speedup) > 1


def read_records(path: Path) -> list[Record]:
    return [
        Record(**{**fields, "kind": Kind(**fields["kind"])})
        for fields in json.loads(path.read_text("utf-8"))
    ]


@functools.cache
def shipped_records() -> tuple[Record, ...]:
    """The records of this package, read once."""
    return tuple(read_records(ACCEPTED))


def is_accepted(kind: Kind, records: Iterable[Record]) -> bool:
    return any(record.kind == kind and record.accepted for record in records)
