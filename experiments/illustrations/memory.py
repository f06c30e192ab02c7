"""Training records held in memory: a GPU takes batches faster than they are read from files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cogview2_jax.data import reading
from cogview2_jax.data.manifest import PICTURES, TOKENS, Manifest
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.training.batches import Rows
from cogview2_jax.training.options import Options
from cogview2_jax.training.task import TokenData


class InMemory(reading.Records):
    """Records given as bytes, in the place of a prepared folder."""

    def __init__(
        self, contents: Sequence[bytes], layout: RecordLayout | None, settings: dict[str, str]
    ) -> None:
        kind = PICTURES if layout is None else TOKENS
        self.manifest = Manifest(kind, len(contents), max(1, len(contents)), layout, settings)
        self.folder = Path("memory")
        self.splits: dict[float, np.ndarray] = {}
        self._contents = contents

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, index: int) -> bytes:
        return self._contents[index]

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        return [self._contents[number] for number in numbers]


def digest(rows: np.ndarray) -> str:
    """Names rows by what they hold."""
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16]


def token_data(
    rows: np.ndarray, validation: np.ndarray, *, layout: RecordLayout, options: Options, name: str
) -> TokenData:
    """Training data from `rows`, int32 [n, length]: each batch takes some at random. `validation`
    holds the rows to validate on; samples of text alone are of `rows` there too.
    """
    contents = [row.astype("<i4").tobytes() for row in rows]
    # A run that is resumed must have these rows.
    records = InMemory(contents, layout, {"source": name, "rows": digest(rows)})
    size = options.batch_size
    batches = min(8, -(-len(validation) // size))

    def numbers(step: int) -> np.ndarray:
        return np.random.default_rng((options.seed, 2, step)).integers(len(rows), size=size)

    def unseen(step: int) -> Rows:
        chosen = np.arange(step * size, (step + 1) * size) % len(validation)
        return Rows(validation[chosen], 0, size)

    return TokenData(
        records=records,
        layout=layout,
        training_numbers=np.arange(len(rows)),
        validation_numbers=np.arange(len(rows)),
        rows=lambda step: Rows(rows[numbers(step)], 0, size),
        validation_rows=unseen,
        validation_batches=batches,
        ids_of=lambda step: numbers(step).tolist(),
    )
