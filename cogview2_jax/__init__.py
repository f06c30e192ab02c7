"""CogView2 in JAX: text to pictures with hierarchical transformers (arXiv 2204.14217).

    import jax
    import cogview2_jax

    cv = cogview2_jax.load()
    images = cv.generate("a red circle above a striped blue square", key=jax.random.key(0))

Importing this is quick and loads nothing: the networks come with the first `load`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.sharding import Execution

__version__ = "0.1.0"


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    execution: Execution | None = None,
    in_turn: bool = False,
) -> CogView:
    """The model in the bundle folder `path`, or the one that ships with the package.

    A model may lack networks that are still to be trained; it does what the others allow.
    `execution` is the precision and the mesh, by default float32 on one device. Others are

        half = Execution(Precision("bfloat16", "bfloat16"))
        small = Execution(Precision("bfloat16", "bfloat16", matrices="int8"))
        sharded = Execution(sharding=Sharding(make_mesh(tensor=2)))

    With `in_turn`, a network is on the device only while it is used: slower by the copies, in the
    memory of the largest one.

    Raises FileNotFoundError or ValueError, in one line, for a missing or damaged bundle.
    """
    from cogview2_jax import bundle
    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.sharding import Execution

    execution = Execution() if execution is None else execution
    return CogView(bundle.load(path, execution=execution, on_host=True), execution, in_turn)
