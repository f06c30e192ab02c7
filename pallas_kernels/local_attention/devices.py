"""The device that a call computes on."""

import re

import jax


def default_device() -> jax.Device:
    """`jax.default_device` if it is set, else the first device of the default backend."""
    default = getattr(jax.config, "jax_default_device", None)  # a device, a platform or None
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, None for other devices."""
    name = str(getattr(device, "compute_capability", ""))  # "9.0"; an AMD GPU's is "gfx942"
    found = re.fullmatch(r"(\d+)\.(\d+)", name) if device.platform == "gpu" else None
    return (int(found[1]), int(found[2])) if found else None
