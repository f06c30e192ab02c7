"""Post-selection: of several base pictures the one with the highest caption score (section 3.1 of
the paper), for samplers that are more and less careful.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview2_jax.pipeline.cogview import CogView
from experiments import results
from experiments.caption_match.judged import Judged
from experiments.caption_match.scoring import make_prompts
from experiments.sampling import points
from experiments.sampling.points import Drawer, Point

NUMBERS = (1, 2, 4, 8)  # of candidates for each picture


def samplers() -> list[Point]:
    """A careful one, and two that are freer; the first of these ships."""
    free = {point.setting: point for point in points.samplers()}
    return [points.CAREFUL, free["2 of the clusters"], free["p 0.97"]]


def compare(
    cv: CogView, num_prompts: int, num_images: int, seed: int, real: int
) -> list[dict[str, Any]]:
    """A row of figures for each sampler and number of candidates. The candidates of fewer are the
    first of those of more.
    """
    prompts = make_prompts(num_prompts, seed)
    texts, judged, most = [prompt.text for prompt in prompts], Judged(real), max(NUMBERS)
    rows = []
    for point in tqdm(samplers(), desc="samplers"):
        begin = time.process_time()
        drawn = Drawer(cv, num_images * most, at_once=5).draw(point, texts, seed)
        drawing = time.process_time() - begin
        flat = drawn.reshape(-1, drawn.shape[-1])
        numbers = np.repeat(np.arange(num_prompts), num_images * most)
        begin = time.process_time()
        scores = cv.pair_scores(texts, list(flat), numbers, np.arange(len(flat)))
        scoring = time.process_time() - begin
        apart = num_prompts, num_images, most
        for number in NUMBERS:
            best = scores.reshape(apart)[..., :number].argmax(-1)
            chosen = np.take_along_axis(drawn.reshape(*apart, -1), best[..., None, None], axis=2)
            fine = results.super_resolved(cv, texts, chosen[:, :, 0])
            each = (drawing + (scoring if number > 1 else 0)) * number / len(flat)
            rows.append(
                {"family": point.setting, "setting": f"{number} candidates"}
                | judged.measure(prompts, results.pixels_of(cv, fine))
                | {"cpu_seconds_a_picture": round(each, 3)}
            )
    return rows
