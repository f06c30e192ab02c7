"""Forward mode, reverse mode and vmap for a function with kernels of its own in reverse mode.

jax.custom_vjp allows no forward mode, and jax.custom_jvp gets reverse mode from the tangents'
program, so without kernels. Three jax primitives allow both: the function, its tangents and its
cotangents. The last two are linear in what they are given, and each is the other's transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = Sequence[jax.Array]


def differentiable_once(
    name: str,
    function: Callable[..., Arrays],
    output_types: Callable[..., Sequence[Any]],
    tangents: Callable[[Arrays, Arrays, Arrays, Any], Arrays],
    cotangents: Callable[[Arrays, Arrays, Arrays, Any], Arrays],
    second_order_error: Callable[[Any], Exception],
) -> Callable[..., list[jax.Array]]:
    """`function(*inputs, call)` with derivatives; `call` is all that is static, and hashable.

    - `output_types(*inputs, call)` are the outputs' abstract values, from the inputs'.
    - `tangents(inputs, outputs, input_tangents, call)` are the outputs' tangents.
    - `cotangents(inputs, outputs, output_cotangents, call)` are the inputs' cotangents.
    - `second_order_error(call)` is raised when a derivative is differentiated.

    Inputs and outputs are floating-point arrays with a leading batch axis. Their entries along it
    must be independent: under vmap the mapped axis is folded into it.
    """
    function_p = _primitive(name, function, output_types)

    def split(operands: Sequence[Any], num_inputs: int, num_residuals: int) -> tuple[Any, Any, Any]:
        """Inputs, outputs, and the tangents or cotangents given."""
        residuals = operands[:num_residuals]
        return residuals[:num_inputs], residuals[num_inputs:], operands[num_residuals:]

    def run_tangents(*operands: Any, call: Any, **counts: int) -> Arrays:
        return tangents(*split(operands, **counts), call)

    def run_cotangents(*operands: Any, call: Any, **counts: int) -> Arrays:
        return cotangents(*split(operands, **counts), call)

    # A tangent has the type of its output, a cotangent that of its input.
    tangents_p = _primitive(
        f"{name}_tangents", run_tangents, lambda *a, call, **counts: split(a, **counts)[1]
    )
    cotangents_p = _primitive(
        f"{name}_cotangents", run_cotangents, lambda *a, call, **counts: split(a, **counts)[0]
    )
    _make_linear(tangents_p, cotangents_p, second_order_error)
    _make_linear(cotangents_p, tangents_p, second_order_error)

    def jvp(inputs: Arrays, input_tangents: Sequence[Any], *, call: Any) -> tuple[Any, Any]:
        outputs = function_p.bind(*inputs, call=call)
        given = map(ad.instantiate_zeros, input_tangents)
        counts = {"num_inputs": len(inputs), "num_residuals": len(inputs) + len(outputs)}
        return outputs, tangents_p.bind(*inputs, *outputs, *given, call=call, **counts)

    ad.primitive_jvps[function_p] = jvp
    return function_p.bind


def _primitive(name: str, run: Callable[..., Any], types: Callable[..., Any]) -> Primitive:
    """A primitive that lowers to what `run` traces, and folds mapped axes into the batch."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(types)
    compiled = jax.jit(lambda params, *a: run(*a, **dict(params)), static_argnums=0)
    primitive.def_impl(lambda *a, **params: compiled(tuple(params.items()), *a))

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        # In shard_map, the types say over which mesh axes an array varies. Kernels know no mesh,
        # and the interpreter of Pallas rejects such types, so `run` is traced without them.
        plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
        lowering = mlir.lower_fun(run, multiple_results=True)
        return lowering(ctx.replace(avals_in=plain), *operands, **params)

    mlir.register_lowering(primitive, lower)

    def fold(operands: Arrays, axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
        size = next(a.shape[i] for a, i in zip(operands, axes, strict=True) if i is not None)
        stacked = [
            jax.numpy.broadcast_to(a, (size, *a.shape))
            if i is None
            else jax.numpy.moveaxis(a, i, 0)
            for a, i in zip(operands, axes, strict=True)
        ]
        outputs = primitive.bind(*(a.reshape(-1, *a.shape[2:]) for a in stacked), **params)
        return [a.reshape(size, -1, *a.shape[1:]) for a in outputs], [0] * len(outputs)

    batching.primitive_batchers[primitive] = fold
    return primitive


def _make_linear(
    primitive: Primitive, transposed: Primitive, second_order_error: Callable[[Any], Exception]
) -> None:
    """Gives a primitive that is linear in its operands after the residuals its derivatives."""

    def jvp(
        operands: Arrays, operand_tangents: Sequence[Any], *, call: Any, **counts: int
    ) -> tuple[Any, Any]:
        n = counts["num_residuals"]
        if any(type(tangent) is not ad.Zero for tangent in operand_tangents[:n]):
            raise second_order_error(call)
        given = map(ad.instantiate_zeros, operand_tangents[n:])
        results = primitive.bind(*operands, call=call, **counts)
        return results, primitive.bind(*operands[:n], *given, call=call, **counts)

    def transpose(
        result_cotangents: Sequence[Any], *operands: Any, call: Any, **counts: int
    ) -> list[Any]:
        n = counts["num_residuals"]
        given = map(ad.instantiate_zeros, result_cotangents)
        results = transposed.bind(*operands[:n], *given, call=call, **counts)
        # Operands that are known here are zeros: nothing asks for their cotangents.
        wanted = map(ad.is_undefined_primal, operands[n:])
        return [None] * n + [r if w else None for r, w in zip(results, wanted, strict=True)]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
