"""The rules, and that training on a mesh gives the numbers of training on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from cogview2_jax.sharding import MESH_AXES, Sharding, constrain, make_mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def one() -> Sharding:
    return Sharding(make_mesh(devices=jax.devices()[:1]))


def test_names_become_axes_of_the_mesh(one):
    spec = one.spec("batch", None, "heads", "packed_embed")
    assert tuple(spec) == (("data", "fsdp"), None, "tensor", ("fsdp", "tensor"))


def test_unknown_names_are_refused(one):
    with pytest.raises(ValueError, match="axis 'head' has no rule"):
        one.spec("head")
    with pytest.raises(ValueError, match="rule 'batch' needs mesh axis 'pod'"):
        Sharding(one.mesh, (("batch", ("pod",)),))
    with pytest.raises(ValueError, match=r"axes must be one for each dimension of \(2, 3\)"):
        one.constrain(np.zeros((2, 3)), "batch")


def test_a_mesh_has_all_devices():
    devices = jax.devices()
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == (len(devices), 1, 1) and list(mesh.devices.flat) == devices
    with pytest.raises(ValueError, match="must be the number of devices, 1: got 2 × 1 × 1"):
        make_mesh(2, devices=jax.devices()[:1])


def test_sizes_that_a_mesh_cannot_split_are_refused():
    # Shapes are enough, so no devices are needed.
    eight = Sharding(AbstractMesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3))

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, np.float32)

    axes = {"mlp": {"kernel": ("embed", "mlp")}}
    found = eight.of_tree({"mlp": {"kernel": shape(6, 4)}}, axes)
    assert tuple(found["mlp"]["kernel"].spec) == ("fsdp", "tensor")
    message = r"mlp/kernel of shape \(6, 3\): axis 'mlp' of 3 must be a multiple of the 2 parts"
    with pytest.raises(ValueError, match=message):
        eight.of_tree({"mlp": {"kernel": shape(6, 3)}}, axes)

    def constrained(x):
        return eight.constrain(x, "batch", "tokens", None)

    # An odd number of tokens is not split; an odd batch is refused.
    assert jax.eval_shape(constrained, shape(8, 5, 3)).shape == (8, 5, 3)
    with pytest.raises(ValueError, match="an activation of shape .*: axis 'batch' of 6 must be"):
        jax.eval_shape(constrained, shape(6, 5, 3))


def test_without_a_sharding_nothing_happens():
    x = np.zeros(3)
    assert constrain(None, x, "no such axis") is x


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        "follow coglm",
        pytest.param("follow direct", marks=pytest.mark.long),
        pytest.param("follow iterative", marks=pytest.mark.long),
        "logits",
    ],
)
def test_a_mesh_follows_one_device(run):
    """20 steps on 8 virtual devices split in every way, and kernels and tokenizer on a mesh: see
    `training_runs.py`.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "training_runs.py"), *run.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rematerialization" not in done.stderr
