"""Checks of what needs no network: training samples, local attention, sampling, editing.

Inputs (records, drawn choices, queries, logits, boxes) come from the file; masks and numbers are
ours.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from cogview2_jax.config import ClusterSampling, CogLMConfig
from cogview2_jax.data.records import english_texts
from cogview2_jax.decoding import sampling
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import patch_completion
from cogview2_jax.pipeline.editing import picture_size
from cogview2_jax.training import coglm_samples
from experiments.parity import configs
from experiments.parity.golden import Check, Golden, Outcome, close, equal, guarded
from pallas_kernels import local_attention_2d_with_lse
from pallas_kernels.local_attention.window import Window

IMPLEMENTATIONS = ("reference", "xla")
FIRST_CHINESE = 83_823  # the published rule: a text is English if all its ids are below
DRAWS = 20_000


# --- coglm_masks.npz ------------------------------------------------------------------------------


def check_coglm_masks(golden: Golden) -> Iterator[Outcome]:
    """Every recorded pre-training sample, from its record and the choices drawn for it."""
    config = configs.pretraining(golden)
    for prefix in (name.removesuffix("/token") for name in golden if name.endswith("/token")):
        # `t2i/<sample>/<which text>`, `i2t/<sample>`, `text` or `text/<sample>`.
        task, *rest = prefix.split("/")
        sample = f"sample/{rest[0] if rest else task}"
        arrays = (sample, *(f"{prefix}/{name}" for name in _SAMPLE_ARRAYS.values()))
        make = _SAMPLES.get(task)
        if make is None:
            yield Check(prefix, float("nan"), 0.0, False, "this task is unknown")
            continue
        yield from guarded(
            prefix, golden, arrays, _pretraining_sample, prefix, sample, make, config
        )


_SAMPLE_ARRAYS = {
    "tokens": "token",
    "positions": "pos",
    "labels": "label",
    "mask": "attn_mask",
    "loss_mask": "loss_mask",
}


def _pretraining_sample(
    golden: Golden, prefix: str, sample: str, make: Callable[..., Any], config: CogLMConfig
) -> Iterator[Outcome]:
    made = make(golden, prefix, golden[sample][None], config)
    for ours, recorded in _SAMPLE_ARRAYS.items():
        array = golden[f"{prefix}/{recorded}"]
        yield equal(f"{prefix}: {ours.replace('_', ' ')}", getattr(made, ours)[0], array)


def _generation_sample(
    golden: Golden, prefix: str, record: np.ndarray, config: CogLMConfig
) -> coglm_samples.TrainingSample:
    return coglm_samples.generation_samples(record, [prefix.endswith("/second")], config)


def _captioning_sample(
    golden: Golden, prefix: str, record: np.ndarray, config: CogLMConfig
) -> coglm_samples.TrainingSample:
    english = english_texts(record, config, FIRST_CHINESE)
    corners = golden[f"{prefix}/patch_corners"][None]
    return coglm_samples.captioning_samples(record, english, corners, config)


def _span_sample(
    golden: Golden, prefix: str, record: np.ndarray, config: CogLMConfig
) -> coglm_samples.TrainingSample:
    lengths, gaps = golden[f"{prefix}/span_lengths"], golden[f"{prefix}/span_gaps_sorted"]
    return coglm_samples.text_span_samples(record, lengths[None], gaps[None], config)


_SAMPLES: Mapping[str, Callable[..., coglm_samples.TrainingSample]] = {
    "t2i": _generation_sample,
    "i2t": _captioning_sample,
    "text": _span_sample,
}


# --- local_attention.npz --------------------------------------------------------------------------


def check_local_attention(golden: Golden) -> Iterator[Outcome]:
    """Every case: the scores by the window's own offsets, lse and output by each implementation."""
    for case in (name.removesuffix("/window") for name in golden if name.endswith("/window")):
        names = ("q_scaled", "k", "v", "causal", "scores", "lse", "out")
        needs = tuple(f"{case}/{name}" for name in names)
        yield from guarded(case, golden, needs, _local_attention_case, case)


def _local_attention_case(golden: Golden, case: str) -> Iterator[Outcome]:
    # [n, c, y, x] → [n, y, x, one head, c]; q is scaled already.
    q, k, v = (
        golden[f"{case}/{name}"].transpose(0, 2, 3, 1)[:, :, :, None]
        for name in ("q_scaled", "k", "v")
    )
    rows, columns = (int(number) for number in golden[f"{case}/window"])
    causal = bool(golden[f"{case}/causal"])
    window = Window(rows, columns, causal=causal, ratio=q.shape[1] // k.shape[1])
    yield close(f"{case}: scores", _scores(q, k, window), golden[f"{case}/scores"], "scores")
    for implementation in IMPLEMENTATIONS:
        attend = partial(
            local_attention_2d_with_lse,
            window=(rows, columns),
            causal=causal,
            scale=1.0,
            implementation=implementation,
        )
        out, lse = jax.jit(attend)(q, k, v)
        name = f"{case}: {{}} by {implementation}"
        yield close(name.format("lse"), lse[:, 0], golden[f"{case}/lse"], "scores")
        recorded = golden[f"{case}/out"].transpose(0, 2, 3, 1)
        yield close(name.format("output"), out[:, :, :, 0], recorded, "scores")


def _scores(q: np.ndarray, k: np.ndarray, window: Window) -> np.ndarray:
    """Scores of the window's cells in raster order, −10000 out of the grid: [n, y, x, cells]."""
    cells = np.moveaxis(np.indices(q.shape[1:3]), 0, -1) // window.ratio
    cells = cells[:, :, None] + window.offsets()
    inside = ((cells >= 0) & (cells < k.shape[1:3])).all(-1)
    row, column = np.moveaxis(np.where(inside[..., None], cells, 0), -1, 0)
    keys = k[:, row, column, 0]  # [n, y, x, cells, c]
    return np.where(inside, np.einsum("nyxc,nyxwc->nyxw", q[:, :, :, 0], keys), -10_000.0)


# --- sampling.npz ---------------------------------------------------------------------------------


def check_sampling(golden: Golden) -> Iterator[Outcome]:
    """Every recorded distribution: our probabilities, and a chi-square test of our draws."""
    for prefix in (name.removesuffix("/probs") for name in golden if name.endswith("/probs")):
        kind, name = prefix.split("/", 1)
        needs: tuple[str, ...] = ("logits",)
        if kind == "cluster":
            parts = ("temperature", "top_clusters", "within_temperature")
            needs += ("cluster_labels", *(f"{prefix}/{part}" for part in parts))
            yield from guarded(prefix, golden, needs, _cluster_distribution, prefix)
        else:
            yield from guarded(prefix, golden, needs, _top_k_distribution, prefix, name)


def _cluster_distribution(golden: Golden, prefix: str) -> Iterator[Outcome]:
    labels = jnp.asarray(golden["cluster_labels"])
    temperature, within = (golden[f"{prefix}/{name}"].item() for name in _TEMPERATURES)
    how = ClusterSampling(temperature, golden[f"{prefix}/top_clusters"].item(), within)
    number = int(labels.max()) + 1
    yield from _distribution(
        golden,
        prefix,
        lambda logits: sampling.cluster_probabilities(logits, labels, number, how),
        lambda key, logits: sampling.sample_clusters(key, logits, labels, number, how),
    )


_TEMPERATURES = ("temperature", "within_temperature")


def _top_k_distribution(golden: Golden, prefix: str, name: str) -> Iterator[Outcome]:
    k = int(name)
    yield from _distribution(
        golden,
        prefix,
        lambda logits: sampling.top_k_probabilities(logits, k),
        lambda key, logits: sampling.sample_top_k(key, logits, k),
    )


def _distribution(
    golden: Golden,
    prefix: str,
    probabilities: Callable[[jax.Array], jax.Array],
    draw: Callable[[jax.Array, jax.Array], jax.Array],
) -> Iterator[Outcome]:
    logits, recorded = golden["logits"], golden[f"{prefix}/probs"]
    ours = jax.jit(probabilities)(logits)
    yield close(f"{prefix}: probabilities", ours, recorded, "probability")
    repeats = -(-DRAWS // len(logits))
    # A row at a time: all rows' logits for every draw would not fit a small machine.
    one_row = jax.jit(lambda key, row: draw(key, jnp.broadcast_to(row, (repeats, row.shape[-1]))))
    keys = jax.random.split(jax.random.key(0), len(logits))
    drawn = np.stack([one_row(key, row) for key, row in zip(keys, logits, strict=True)])
    yield _chi_square(f"{prefix}: chi-square of {drawn.size:,} draws", drawn, recorded)


def _chi_square(name: str, drawn: np.ndarray, probabilities: np.ndarray) -> Check:
    """Whether draws [rows, n] follow probabilities [rows, v]. Rare tokens share a bin."""
    statistic, degrees = 0.0, 0
    for tokens, expected in zip(drawn, probabilities * drawn.shape[1], strict=True):
        counts = np.bincount(tokens, minlength=len(expected))
        if counts[expected == 0].any():
            return Check(name, float("inf"), 0.0, False, "a token of probability 0 was drawn")
        common = expected >= 10
        seen = np.append(counts[common], counts[~common].sum())
        hoped = np.append(expected[common], expected[~common].sum())
        seen, hoped = seen[hoped > 0], hoped[hoped > 0]
        statistic += float(((seen - hoped) ** 2 / hoped).sum())
        degrees += len(hoped) - 1
    if degrees == 0:  # one token has all the probability in every row, and was drawn
        return Check(name, 0.0, 0.0, True, "0 degrees of freedom")
    limit = float(scipy.special.chdtri(degrees, 1e-5))  # the 99.999 % point
    return Check(name, statistic, limit, statistic <= limit, f"{degrees} degrees of freedom")


# --- editing.npz ----------------------------------------------------------------------------------


def check_editing(golden: Golden) -> Iterator[Outcome]:
    """Crops and masks of every recorded box, and the recorded sequence."""
    boxes = ("boxes", "crops", "masked_rows_and_columns", "masks_20", "masks_60")
    yield from guarded("boxes", golden, boxes, _edited_boxes)
    names = ("text", "image", "sequence", "mask", "positions", "text_bias")
    case = ("masks_20", "masks_60", "case", *(f"case_{name}" for name in names))
    yield from guarded("sequence", golden, case, _editing_sequence)


def _edited_boxes(golden: Golden) -> Iterator[Outcome]:
    config = configs.editing(golden)
    side = picture_size(config)[0]
    masked = [patch_completion.masked_pixels(box, side) for box in golden["boxes"].tolist()]
    yield equal("masked rows and columns", masked, golden["masked_rows_and_columns"])
    crops = [patch_completion.crop_around(pixels, side) for pixels in masked]
    yield equal("crops", crops, golden["crops"])
    for name, cells in (("masks_20", config.coglm.grid[0]), ("masks_60", config.grid[0])):
        masks = [
            patch_completion.cells_of(pixels, crop, cells)
            for pixels, crop in zip(masked, crops, strict=True)
        ]
        yield equal(f"masks of {cells}×{cells} cells", masks, golden[name])


def _editing_sequence(golden: Golden) -> Iterator[Outcome]:
    config = configs.editing(golden).coglm
    mask = golden["masks_20"][golden["case"].item()]
    recorded = golden["case_text"].reshape(-1)
    text, image = recorded[:-1].tolist(), golden["case_image"].reshape(-1)
    made = patch_completion.sequence(mask, text, image, config, slots=len(recorded))
    yield equal("sequence: tokens", made.tokens, golden["case_sequence"])
    yield equal("sequence: positions", made.positions, golden["case_positions"])
    yield equal("sequence: mask", made.mask, golden["case_mask"])
    upweight = float(golden["case_text_bias"].max())
    bias = inputs.text_key_bias(jnp.asarray(made.is_text), upweight)
    yield equal("sequence: up-weighting", bias, golden["case_text_bias"])
