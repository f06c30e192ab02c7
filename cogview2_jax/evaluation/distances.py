"""Distances between two sets of pictures, from the features of each: FID, KID, Inception Score,
precision and recall. NumPy, in float64; features are [n, d] of any encoder.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogview2_jax.errors import first_line

Features = np.ndarray  # [n, d]
_BLOCK = 2048  # rows that are compared at once: 34 MB with as many others


class Statistics(NamedTuple):
    """Of features: `mean` float64 [d] and `covariance` float64 [d, d], by `num_pictures` − 1."""

    num_pictures: int
    mean: np.ndarray
    covariance: np.ndarray

    @property
    def enough(self) -> bool:
        """Whether the covariance can have full rank. FID of fewer pictures is biased upwards so
        much that it says little; KID is not biased.
        """
        return self.num_pictures > len(self.mean)


def statistics(parts: Iterable[Features]) -> Statistics:
    """`Statistics` of features in parts [n, d], which need not fit the memory together.

    Raises ValueError for fewer than two rows and for values that are not finite.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for part in parts:
        values = checked(part)
        if not len(values):
            continue
        own = values.mean(0)
        centred = values - own
        if not count:
            mean, scatter = np.zeros_like(own), np.zeros((len(own), len(own)))
        # Chan, Golub, LeVeque 1983: means are far from zero, so sums of squares would lose digits.
        total, shift = count + len(values), own - mean
        scatter += centred.T @ centred + np.outer(shift, shift) * (count * len(values) / total)
        mean = mean + shift * (len(values) / total)
        count = total
    if count < 2:
        raise ValueError(f"a covariance needs at least two pictures: got {count}")
    return Statistics(count, mean, scatter / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½): FID (Heusel et al., arXiv 1706.08500, equation 6).

    The trace of the square root is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which
    is symmetric: no complex roots, and rank-deficient covariances are no special case.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"features have {len(one.mean)} and {len(other.mean)} values: two encoders"
        )
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ other.covariance @ root
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0))
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(np.sum((one.mean - other.mean) ** 2) + traces - 2 * roots.sum())


class Score(NamedTuple):
    """A mean, and the standard deviation over splits or subsets."""

    mean: float
    deviation: float


def inception_score(logits: Features, splits: int = 10, seed: int = 2020) -> Score:
    """exp of the mean KL divergence of p(class | picture) from p(class), over `splits` of the
    shuffled pictures (Salimans et al., arXiv 1606.03498). Splits and seed as torch-fidelity has
    them.
    """
    values = checked(logits)
    if len(values) < splits:
        raise ValueError(f"{splits} splits need as many pictures: got {len(values)}")
    values = values[np.random.RandomState(seed).permutation(len(values))]
    values = values - values.max(1, keepdims=True)
    log = values - np.log(np.exp(values).sum(1, keepdims=True))
    bounds = [index * len(log) // splits for index in range(splits + 1)]
    scores = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = np.exp(log[begin:end])
        divergence = part * (log[begin:end] - np.log(part.mean(0)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    one: Features, other: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Score:
    """KID: the unbiased squared MMD with the kernel (x·y / d + 1)³ (Bińkowski et al., arXiv
    1801.01401), in the mean over random `subsets` of `size` pictures of each, drawn as
    torch-fidelity draws them. May be a little below zero.
    """
    one, other = _pair(one, other)
    if min(len(one), len(other)) < size:
        raise ValueError(
            f"a subset of {size} needs as many pictures of each: got {len(one)} and {len(other)}"
        )
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = one[rng.choice(len(one), size, replace=False)]
        y = other[rng.choice(len(other), size, replace=False)]
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        found.append(within / (size * (size - 1)) - 2 * xy.mean())
    return Score(float(np.mean(found)), float(np.std(found)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1: of generated pictures that look like real ones, and the other way."""

    precision: float
    recall: float


def precision_recall(generated: Features, real: Features, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991): the share of each
    set's pictures that lie within the distance of some picture of the other set to that picture's
    own `neighbours`-th neighbour.
    """
    generated, real = _pair(generated, real)
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more pictures of each: got {len(generated)} and"
            f" {len(real)}"
        )
    return PrecisionRecall(
        _covered(generated, real, _radii(real, neighbours)),
        _covered(real, generated, _radii(generated, neighbours)),
    )


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distances [n] of each to its `neighbours`-th neighbour, itself not counted."""
    parts = [
        np.partition(_squared_distances(block, features), neighbours, axis=1)[:, neighbours]
        for block in _blocks(features)
    ]
    return np.concatenate(parts)


def _covered(features: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    inside = [(_squared_distances(block, centres) <= radii).any(1) for block in _blocks(features)]
    return float(np.concatenate(inside).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.maximum(squares, 0)


def _blocks(features: np.ndarray) -> Iterable[np.ndarray]:
    return (features[begin : begin + _BLOCK] for begin in range(0, len(features), _BLOCK))


def checked(features: Features) -> np.ndarray:
    """Features as float64 [n, d]. Raises ValueError for another shape and for NaN or infinity."""
    values = np.asarray(features)
    if values.ndim != 2:
        raise ValueError(f"features must be [n, d]: got {list(values.shape)}")
    finite = np.isfinite(values).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"features of {int((~finite).sum())} of {len(values)} pictures are not finite, first of"
            f" number {row}"
        )
    return values.astype(np.float64)


def _pair(one: Features, other: Features) -> tuple[np.ndarray, np.ndarray]:
    one, other = checked(one), checked(other)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"features have {one.shape[1]} and {other.shape[1]} values: two encoders")
    return one, other


# --- Files ----------------------------------------------------------------------------------------


def save_statistics(file: Path, made: Statistics) -> None:
    """Write a .npz file with `mu` and `sigma`, as pytorch-fid reads it, and `count`. It appears
    complete or not at all.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial.npz")
    try:
        np.savez(partial, mu=made.mean, sigma=made.covariance, count=made.num_pictures)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(file: Path) -> Statistics:
    """Read a .npz file of `save_statistics` or of pytorch-fid. In the latter the count is unknown:
    0. Raises ValueError, in one line, for anything else.
    """
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as opened:
            mean, covariance = (opened[name].astype(np.float64) for name in ("mu", "sigma"))
            count = int(opened["count"]) if "count" in opened else 0
    except (KeyError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} has no mu and sigma of features: {first_line(error)}") from error
    except Exception as error:  # damaged zip archives raise much
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{file} is damaged: {first_line(error)}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{file}: mu must be [d] and sigma [d, d]: got {list(mean.shape)} and"
            f" {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{file} has values that are not finite")
    return Statistics(count, mean, covariance)
