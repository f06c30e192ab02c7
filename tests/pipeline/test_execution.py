"""The same pipeline in bfloat16, and on a mesh of devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cogview2_jax
from cogview2_jax.config import Precision
from cogview2_jax.pipeline import stages as programs
from cogview2_jax.pipeline.prompts import prompt_tokens
from cogview2_jax.sharding import Execution
from tests.pipeline.conftest import PROMPT

ROOT = Path(__file__).parents[2]


def test_bfloat16_draws_nearly_the_same(cv, stages, tiny, tiny_folder):
    half = Execution(Precision("bfloat16", "bfloat16"))
    rounded = cogview2_jax.load(tiny_folder, execution=half)
    for name in ("coglm", "direct", "iterative"):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(rounded.bundle.params(name))}
        assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert rounded.bundle.params("tokenizer")["codebook"].dtype == jnp.float32
    made = rounded.generate_stages([PROMPT], jax.random.key(0), 2)
    assert {stage: pictures.shape for stage, pictures in made.items()} == {
        stage: pictures.shape for stage, pictures in stages.items()
    }
    # The same coarse tokens, one pass: 8-bit mantissas seldom change which token is drawn.
    tokens = direct_inputs(cv)
    exact, near = (
        np.asarray(
            programs.super_resolve_direct(
                one.bundle.params("direct"),
                *tokens,
                tiny.cluster_labels,
                config=tiny.direct_config,
                sampling=tiny.sampling,
                num_clusters=tiny.num_clusters,
                execution=one.execution,
            )
        )
        for one in (cv, rounded)
    )
    assert (exact == near).mean() > 0.9


def direct_inputs(cv):
    bundle = cv.bundle
    tokens = prompt_tokens([PROMPT] * 2, bundle.text_model, bundle.coglm_config, 10, 6)
    coarse = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    return *tokens.direct, coarse, jax.random.split(jax.random.key(0), 2)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws():
    """On 8 virtual devices: see `mesh_run.py`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pipeline" / "mesh_run.py"), "2", "2", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
