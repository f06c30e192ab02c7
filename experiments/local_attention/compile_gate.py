"""What does the CUDA compiler make of the attention kernels, for sm_90a? Needs no GPU.

    python -m experiments.local_attention.compile_gate [--grids 60 64] [--dtype float32] [--dim 128]

Prints a line for each kernel: launch, registers, shared memory, bytes of registers spilled to
memory, instructions in total and in the longest loop, and how many programs fit on one
multiprocessor. Exits with 1 if a kernel spills. README.md has the packages to install and the
results.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention import pallas_triton
from pallas_kernels.local_attention.blocks import BlockSizes, block_sizes
from pallas_kernels.local_attention.window import Window

DEVICE = "NVIDIA H200"
WINDOWS = [Window(9, 5), Window(9, 9), Window(5, 5, ratio=3)]
# What XLA needs to know about the GPU.
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
device_description_str: "{DEVICE}"
"""
# XLA runs the first ptxas on the path. This one keeps the real one's messages and results.
_SHIM = """
import pathlib, shutil, subprocess, sys, tempfile
compiles = "-o" in sys.argv
command = [{ptxas!r}, *sys.argv[1:], *["-v"] * compiles]
done = subprocess.run(command, capture_output=True, text=True)
sys.stdout.write(done.stdout)
sys.stderr.write(done.stderr)
if done.returncode == 0 and compiles:
    folder = pathlib.Path(tempfile.mkdtemp(dir={kept!r}))
    shutil.copy(sys.argv[sys.argv.index("-o") + 1], folder / "cubin")
    (folder / "log").write_text(done.stdout + done.stderr)
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel needs; bytes, and counts of machine instructions (0 if unknown)."""

    name: str
    programs: int
    threads: int
    registers: int
    shared: int
    spilled: int
    instructions: int
    in_loop: int

    @property
    def resident(self) -> int:
        """Programs that fit on one multiprocessor at once."""
        # A thread gets registers in steps of 8, and the system takes 1 KB of shared memory.
        registers = 65536 // (-(-self.registers // 8) * 8 * self.threads)
        return min(registers, 2048 // self.threads, 233472 // (self.shared + 1024), 32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, nargs="+", default=[60, 64])
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args(argv)
    missing = missing_packages()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    print(f"sm_90a, jax {jax.__version__}, {arguments.dtype}, {arguments.heads} heads of ", end="")
    print(f"{arguments.dim}, batch 1\n{HEADER}")
    spilled = False
    with toolchain() as kept:
        for window in WINDOWS:
            blocks = block_sizes(DEVICE, jnp.dtype(arguments.dtype), arguments.dim, window.ratio)
            for side in arguments.grids:
                if side % window.ratio:
                    continue
                shape = (1, side, side, arguments.heads, arguments.dim)
                kernels = compile_kernels(shape, window, arguments.dtype, blocks, kept)
                print(table(side, window, kernels), flush=True)
                spilled |= any(kernel.spilled for kernel in kernels)
    if spilled:
        print("a kernel spills registers: choose smaller blocks in pallas_kernels' blocks.py")
    return int(spilled)


def missing_packages() -> str | None:
    """One line on what to install if a part of the compiler is missing."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(importlib.util.find_spec(name) for name in plugins) and find_tool("ptxas"):
        return None
    return "the CUDA compiler is missing: pip install '.[compile-gate]'"


def find_tool(name: str) -> str | None:
    """The path of a CUDA program: from a pip package if possible, else from PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(found)
    return shutil.which(name)


@contextlib.contextmanager
def toolchain() -> Iterator[Path]:
    """Makes XLA use a ptxas that keeps its results in the yielded folder.

    Enter it once, before this process compiles anything. The process keeps these settings.
    """
    ptxas = find_tool("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        kept, dump, shim = Path(folder, "kept"), Path(folder, "dump"), Path(folder, "bin", "ptxas")
        for path in (kept, dump, shim.parent):
            path.mkdir()
        script = shim.with_suffix(".py")
        script.write_text(_SHIM.format(ptxas=ptxas, kept=str(kept)))
        # Not `#!` with Python's path, which may contain a space.
        command = shlex.join([sys.executable, "-IS", str(script)])
        shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        shim.chmod(0o755)
        jax.config.update("jax_platforms", "cpu")
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        os.environ["PATH"] = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}".strip()
        yield Path(folder)


@contextlib.contextmanager
def lowering_for_gpu() -> Iterator[None]:
    """Lowers for an H200, also without one."""
    if not hasattr(jax.sharding, "AbstractDevice"):  # jax 0.10 does not ask for the device
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind=DEVICE, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def attention_and_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    window: Window,
    blocks: BlockSizes,
) -> tuple[jax.Array, ...]:
    """All three kernels: out, lse, dq, dk and dv."""
    attend = functools.partial(
        pallas_triton.local_attention, window=window, scale=q.shape[-1] ** -0.5, blocks=blocks
    )
    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, *pull((dout, dlse))


def absent_device() -> jax.sharding.NamedSharding:
    """The place of arguments on one device for sm_90a, which need not be there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_kernels(
    shape: tuple[int, ...], window: Window, dtype: str, blocks: BlockSizes, folder: Path
) -> list[Kernel]:
    """Compiles forward and backward for queries of a shape, and reads what the kernels need."""
    for path in ("kept", "dump"):
        shutil.rmtree(folder / path)
        (folder / path).mkdir()
    place = absent_device()
    b, y, x, h, d = shape
    key_shape = (b, y // window.ratio, x // window.ratio, h, d)
    queries, keys = (jax.ShapeDtypeStruct(s, dtype, sharding=place) for s in (shape, key_shape))
    dlse = jax.ShapeDtypeStruct((b, h, y, x), jnp.float32, sharding=place)
    program = functools.partial(attention_and_gradients, window=window, blocks=blocks)
    with lowering_for_gpu():
        lowered = jax.jit(program).lower(queries, keys, keys, queries, dlse)
    lowered.compile()
    return _read(folder)


def _read(folder: Path) -> list[Kernel]:
    launches = {}
    for path in (folder / "dump").glob("*.thunk_sequence.txt"):
        found = re.findall(
            r"local_attention_(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), .*"
            r"shared_memory: (\d+)",
            path.read_text(),
        )
        launches.update({name: tuple(map(int, numbers)) for name, *numbers in found})
    kernels = []
    for log in (folder / "kept").glob("*/log"):
        text = log.read_text()
        name = re.search(r"entry function 'local_attention_(\w+)'", text)
        registers = re.search(r"Used (\d+) registers", text)
        if not name or not registers:
            continue  # a kernel of XLA
        x, y, z, threads, shared = launches[name[1]]
        kernels.append(
            Kernel(
                name[1],
                x * y * z,
                threads,
                int(registers[1]),
                shared,
                sum(map(int, re.findall(r"(\d+) bytes spill", text))),
                *_count_instructions(log.parent / "cubin"),
            )
        )
    if len(kernels) != 3:
        names = ", ".join(kernel.name for kernel in kernels) or "none"
        raise RuntimeError(f"XLA must compile three kernels with our ptxas, but compiled: {names}")
    return sorted(kernels, key=lambda kernel: ("forward", "dq", "dkv").index(kernel.name))


def _count_instructions(cubin: Path) -> tuple[int, int]:
    """Machine instructions in a cubin, and in its longest innermost loop; zeros if unknown."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        return 0, 0
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    labels: dict[str, int] = {}
    total, loops = 0, [0]
    for line in done.stdout.splitlines():
        label = re.match(r"\s*\.(L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if label:
            labels[label[1]] = total
        elif instruction and instruction[1] != "NOP":
            total += 1
            back = re.search(r"\bBRA .*`\(\.(L_x_\d+)\)", instruction[1])
            # Each program ends in a jump to itself, which is no loop.
            if back and labels.get(back[1], total) < total - 1:
                loops.append(total - labels[back[1]])
    return total, max(loops)


HEADER = (
    f"{'grid':>7} {'window':>8} {'kernel':<8}{'programs':>9} {'threads':>8} {'registers':>10} "
    f"{'shared':>8} {'spilled':>8} {'instructions':>13} {'in loop':>8} {'resident':>9}"
)


def table(side: int, window: Window, kernels: list[Kernel]) -> str:
    shown = f"{window.rows}x{window.columns}" + (f" / {window.ratio}" if window.ratio > 1 else "")
    return "\n".join(
        f"{side:>3}x{side:<3} {shown:>8} {k.name:<8}{k.programs:>9} {k.threads:>8} "
        f"{k.registers:>10} {k.shared:>8} {k.spilled:>8} {k.instructions:>13} {k.in_loop:>8} "
        f"{k.resident:>9}"
        for k in kernels
    )


if __name__ == "__main__":
    sys.exit(main())
