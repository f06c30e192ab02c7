"""All measures of one set of pictures, from the features that are on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cogview2_jax.data import manifest as manifests
from cogview2_jax.evaluation import distances
from cogview2_jax.evaluation.distances import Statistics
from cogview2_jax.evaluation.features import LOGITS, read_features

# The most pictures of each set that KID, precision and recall compare: more than 30,000 would take
# hours and gigabytes.
MOST_COMPARED = 30_000
_SPLITS = 10  # of the Inception Score
_SUBSET = 1000  # of KID, or as many pictures as there are


def measure(
    pictures: Path,
    reference: Path | None,
    *,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The measures of a folder of `write_features` against another one, or against a .npz file of
    statistics: JSON values by name.

    "fid" has one value for each blur, "kid", "precision", "recall" and "inception_score" are
    of the pictures without blur. What cannot be measured is left out, and `note` is told why.
    Without a reference only the Inception Score is left. Raises ValueError for folders that do not
    go together.
    """
    settings = manifests.read(pictures).settings
    made: dict[str, Any] = {}
    if settings["num_classes"]:
        logits = np.concatenate(list(read_features(pictures, LOGITS)))
        if len(logits) < _SPLITS:
            note(f"no Inception Score: {len(logits)} pictures, of {_SPLITS} that it needs")
        else:
            made["inception_score"] = distances.inception_score(logits, _SPLITS)._asdict()
    if reference is None:
        return made
    is_file = reference.suffix == ".npz"
    if not is_file:
        require_alike(settings, manifests.read(reference).settings, reference)
    blurs = settings["blurs"]  # 0 first
    if is_file:
        left = [f"FID-{blur:g}" for blur in blurs[1:]]
        note(f"no {', '.join([*left, 'KID', 'precision and recall'])}: {reference} is statistics")
        blurs = blurs[:1]
    fid: dict[str, float] = {}
    for blur in blurs:
        own = statistics_of(pictures, blur)
        other = distances.load_statistics(reference) if is_file else statistics_of(reference, blur)
        for what, some in ((pictures, own), (reference, other)):
            if not blur and some.num_pictures and not some.enough:
                note(
                    f"FID is biased upwards: {what} has {some.num_pictures} pictures, features of"
                    f" {len(some.mean)} values need more"
                )
        fid[f"{blur:g}"] = distances.frechet_distance(own, other)
    made["fid"] = fid
    if not is_file:
        made |= _compared(pictures, reference, note)
    return made


def statistics_of(folder: Path, blur: float = 0) -> Statistics:
    """`Statistics` of the features in a folder after a blur of that radius."""
    return distances.statistics(read_features(folder, blur))


def require_alike(ours: dict[str, Any], theirs: dict[str, Any], reference: Path) -> None:
    """Raises ValueError unless two folders' features are of one encoder, size and blurs."""
    for name in ("encoder", "num_features", "size", "blurs"):
        if theirs.get(name) != ours[name]:
            raise ValueError(
                f"{reference} has features with {name} {theirs.get(name)}, not {ours[name]}:"
                " measure both in the same way"
            )


def _compared(
    pictures: Path, reference: Path, note: Callable[[str], None]
) -> dict[str, float | dict[str, float]]:
    """KID, precision and recall."""
    ours, theirs = (_first(folder, MOST_COMPARED) for folder in (pictures, reference))
    fewest = min(len(ours), len(theirs))
    if fewest < 10:
        note(f"no KID, precision and recall: {fewest} pictures, of 10 that they need")
        return {}
    kid = distances.kernel_distance(ours, theirs, size=min(_SUBSET, fewest))
    shares = distances.precision_recall(ours, theirs)
    return {"kid": kid._asdict(), **shares._asdict()}


def _first(folder: Path, most: int) -> np.ndarray:
    parts, count = [], 0
    for part in read_features(folder):
        parts.append(part[: most - count])
        count += len(parts[-1])
        if count == most:
            break
    return np.concatenate(parts)


def table(measures: dict[str, Any]) -> str:
    """A line for each measure: name, a tab, value."""
    lines = [f"FID-{blur}\t{value:.3f}" for blur, value in measures.get("fid", {}).items()]
    for name, title in (("kid", "KID"), ("inception_score", "Inception Score")):
        if name in measures:
            mean, deviation = measures[name]["mean"], measures[name]["deviation"]
            lines.append(f"{title}\t{mean:.5g} ± {deviation:.2g}")
    for name in ("precision", "recall"):
        if name in measures:
            lines.append(f"{name}\t{measures[name]:.3f}")
    if "caption_loss" in measures:
        mean, error = (measures["caption_loss"][name] for name in ("mean", "standard_error"))
        lines.append(f"caption loss\t{mean:.4f} ± {error:.2g}")
    return "\n".join(lines)
