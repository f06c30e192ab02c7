"""Names and shapes of a bundle's tensors, which follow from its configuration."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
)
from cogview2_jax.errors import first_line

CLUSTER_LABELS = "cluster_labels"

Params = dict


@functools.lru_cache(maxsize=4)
def expected_shapes(
    coglm_config: CogLMConfig,
    direct_config: DirectSRConfig,
    iterative_config: IterativeSRConfig,
    tokenizer_config: HVQVAEConfig,
) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of a bundle with this configuration.

    Raises ValueError, in one line, for sizes that no network can have.
    """
    # Imported here: configuration and text model are read without the networks, and so are the
    # weights that carry the `fingerprint` of shapes that were compared.
    from cogview2_jax.networks import coglm, direct_sr, iterative_sr
    from cogview2_jax.tokenizer import image

    def init(key: jax.Array) -> Params:
        return {
            "coglm": coglm.init_params(key, coglm_config),
            "direct": direct_sr.init_params(key, direct_config),
            "iterative": iterative_sr.init_params(key, iterative_config),
            "tokenizer": image.init_params(key, tokenizer_config),
        }

    try:
        like = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    except Exception as error:  # jax and flax raise what their layers happen to raise
        raise ValueError(f"no networks of these sizes: {first_line(error)}") from error
    shapes = {name: tuple(leaf.shape) for name, leaf in flat(like)}
    return shapes | {CLUSTER_LABELS: (coglm_config.vocabulary.num_image,)}


def flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths, "coglm/layers/…", as in the file of weights."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
