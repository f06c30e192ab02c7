"""The tiny pipeline on a mesh and on one device, compared; in a process with 8 devices.

python tests/pipeline/mesh_run.py DATA FSDP TENSOR
"""

import sys
from typing import Any

import jax
import numpy as np

from cogview2_jax.pipeline import parts
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.sharding import Execution, Sharding, make_mesh
from tests.conftest import tiny_bundle

PROMPTS = ("a small green star on the left", "左边的绿色星形")


def drawn(cv: CogView) -> dict[str, Any]:
    """All results of the pipeline, for batches that the mesh does not split evenly."""
    tokens: list[np.ndarray] = []
    to_pixels = parts.image_tokenizer.to_pixels

    def seen(params: Any, ids: Any, **options: Any) -> Any:
        tokens.append(np.asarray(ids))
        return to_pixels(params, ids, **options)

    parts.image_tokenizer.to_pixels = seen
    try:
        key, picture = jax.random.key(3), np.full((96, 96, 3), 90, np.uint8)
        made = cv.generate_stages(PROMPTS, key, 3, candidates=2)
        filled = cv.infill(PROMPTS[0], picture, (0, 0, 0.5, 1), 2, key=key)
        edited = cv.edit(PROMPTS[0], picture, box=(0, 0, 0.5, 1), num_images=2, key=key)
    finally:
        parts.image_tokenizer.to_pixels = to_pixels
    return {
        "tokens": [ids[:rows] for ids, rows in zip(tokens, (6, 6, 6, 2, 2), strict=True)],
        "pictures": [*made.values(), filled, edited],
        "captions": [cv.caption(picture), cv.caption(picture, language="zh", key=key)],
        "scores": cv.rank(PROMPTS[0], [picture, made["full"][0, 0], made["full"][1, 0]])[1],
    }


def main(data: int, fsdp: int, tensor: int) -> None:
    one = drawn(CogView(tiny_bundle()))
    sharding = Sharding(make_mesh(data, fsdp, tensor))
    cv = CogView(tiny_bundle(), Execution(sharding=sharding))
    table = cv.bundle.params("coglm")["word_embeddings"]
    assert table.sharding.num_devices == 8
    assert table.addressable_shards[0].data.size == table.size // (fsdp * tensor)
    many = drawn(cv)
    for ours, theirs in zip(many["tokens"], one["tokens"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(many["pictures"], one["pictures"], strict=True):
        # Equal tokens; the decoder's sums may round a pixel to the next level.
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert many["captions"] == one["captions"]
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=0, atol=1e-4)
    print("equal")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
