"""The processes of a run: how they connect, and how their arrays are gathered."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cogview2_jax.errors import first_line
from cogview2_jax.training.options import ProcessOptions


def join(options: ProcessOptions) -> None:
    """Connect to the other processes, if there are any. Call it before jax looks for devices.

    Raises ValueError, in one line, where they do not meet.
    """
    if not options.distributed and options.process is None:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=options.coordinator,
            num_processes=options.processes,
            process_id=options.process,
            heartbeat_timeout_seconds=options.peer_timeout,
            # One that ends with an error waits for the others, who wait for it in the next step.
            shutdown_timeout_seconds=options.peer_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes do not meet: {first_line(error)}") from error


def on_host(params: Any) -> Any:
    """Parameters of any mesh as NumPy arrays, one leaf after the other."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, params)
