"""Bytes that one token of cached decoding moves at the published size, in bfloat16, without a GPU.

The decoding program is compiled for Hopper (sm_90a), and its loop is read by `traffic`. The floor
is what any program must read: the matrices of the layers, the image rows of the word table, and the
cache once. Without a device XLA picks Triton for matrix products; `cublas` is compiled as well, but
not for int8 matrices, of which it writes a copy in bfloat16.
Needs the packages of `pip install '.[compile-gate]'`.
"""

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cogview2_jax.config import CogLMConfig, Precision, Sampling
from cogview2_jax.networks import coglm
from cogview2_jax.networks.quantisation import quantise
from cogview2_jax.pipeline.stages import decode_image
from cogview2_jax.sharding import Execution
from experiments.generation_speed import traffic
from experiments.generation_speed.bounds import bytes_a_token
from experiments.local_attention import compile_gate

CLUSTERS = 500
# Of the floor in bfloat16, by batch size, and for int8 matrices at batch 1.
LIMITS = {1: 1.1, 16: 1.2}
INT8_LIMIT = 0.55
BACK_ENDS: dict[str, dict[str, Any]] = {
    "triton": {},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
}


class Case(NamedTuple):
    batch: int
    back_end: str
    matrices: str | None = None

    @property
    def limit(self) -> float:
        return INT8_LIMIT if self.matrices else LIMITS[self.batch]


CASES = {f"batch{n}_{name}": Case(n, name) for name in BACK_ENDS for n in LIMITS}
CASES["batch1_triton_int8"] = Case(1, "triton", "int8")


def main(cases: Sequence[str]) -> int:
    """Prints a line for each of these `CASES` (all if there are none). Returns 1 if one moves more
    than its limit, 2 without a compiler.
    """
    missing = compile_gate.missing_packages()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    config = CogLMConfig()
    slots = config.max_text + 1 + config.num_image_tokens
    print(f"sm_90a, jax {jax.__version__}, bfloat16, one token of CogLM's cached loop")
    over = False
    with compile_gate.toolchain():
        for case in (CASES[name] for name in cases or CASES):
            begin = time.monotonic()
            moved = traffic.loop_bytes(compiled(config, case))
            took = time.monotonic() - begin
            floor = bytes_a_token(
                config.transformer, config.vocabulary.num_image, slots, case.batch, itemsize=2
            )
            over |= moved > case.limit * floor
            print(
                f"batch {case.batch:>2}  {case.back_end:<7} {case.matrices or 'bfloat16':<8}"
                f" {moved / 1e9:6.2f} GB, floor {floor / 1e9:5.2f}: {moved / floor:5.3f} times, at"
                f" most {case.limit};"
                f" compiled in {took:.0f} s",
                flush=True,
            )
    return int(over)


def compiled(config: CogLMConfig, case: Case) -> str:
    """The optimised text of `decode_image`, with parameters taken apart by layers."""
    place = compile_gate.absent_device()
    execution = Execution(Precision(jnp.bfloat16, jnp.bfloat16, case.matrices))
    batch, vocabulary = case.batch, config.vocabulary

    def arguments() -> Any:
        params = coglm.init_params(jax.random.key(0), config, execution.precision)
        text = jnp.zeros((batch, config.max_text), jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)
        labels = jnp.zeros(vocabulary.num_image, jnp.int32)
        params = coglm.unstacked(params)
        return quantise(params) if case.matrices else params, text, text > 0, keys, labels

    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(arguments),
    )
    decode = functools.partial(
        decode_image.lower,
        config=config,
        sampling=Sampling(),
        num_clusters=CLUSTERS,
        execution=execution,
    )
    with compile_gate.lowering_for_gpu():
        lowered = decode(*shapes)
    text = lowered.compile(compiler_options=BACK_ENDS[case.back_end]).as_text()
    assert text is not None
    return text
