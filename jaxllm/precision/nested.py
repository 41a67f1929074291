"""NestedFP's modes as levels: how many of the layers read eight bits, the most tolerant first.

    costs = fp8_costs(model, tokens)                        # what eight bits cost each linear
    model = with_levels(model, costs, level)                # level: an int32 scalar; 0: all fp16

At level n the n linears that lose least read their upper bytes alone; at `levels(model)` all do, which is
the paper's fp8 mode. The level may be traced: one program serves all. Lossless at level 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.quant.source import CalibrationStream
from jaxllm.weights.nested_float import NestedFloat
from pallas_kernels.nested_fp_gemm.reference import F8, join_float32


def nested_weights(model) -> dict[str, NestedFloat]:
    """The linears in two bytes, by name; ValueError where there are none."""
    found = {name: w for name, w in linear_weights(model).items() if isinstance(w, NestedFloat)}
    if not found:
        raise ValueError("precision: the model must have weights stored by NestedFp, got none")
    return found


def levels(model) -> int:
    """The level at which all linears read eight bits."""
    return len(nested_weights(model))


def fp8_costs(model, sequences: Any, *, batch: int = 8, progress: bool = True) -> dict[str, float]:
    """What reading eight bits costs each linear, as `width_costs` by "fisher"; activations left out.

    sequences: as for `quantize`: rows of token ids, or a `Calibration` of this model with "fisher".
    """
    weights = nested_weights(model)
    wanted = {name: frozenset({"fisher"}) for name in weights if "." in name}
    source = CalibrationStream(model, wanted, sequences, batch=batch, progress=progress, desc="fp8")
    costs: dict[str, float] = {}
    for _, stats in source.blocks():
        for name, own in stats.items():
            assert own.fisher is not None
            costs[name] = float(_cost(weights[name], own.fisher)) / own.tokens
    return {name: costs[name] for name in wanted}


@jax.jit
def _cost(w: NestedFloat, fisher: jax.Array) -> jax.Array:
    upper = jax.lax.bitcast_convert_type(w.upper, F8).astype(jnp.float32) / 256
    error = (upper - join_float32(w.upper, w.lower)) * 2.0**w.shift  # none in exceptions: both are zeros
    return jnp.sum(fisher * error**2)


def with_levels(model, costs: Mapping[str, float], level: Int[Array, "..."]):
    """The model whose `level` most tolerant linears read eight bits; those without a cost come last."""
    weights = nested_weights(model)
    unknown = [name for name in costs if name not in weights]
    if unknown:
        raise ValueError(f"with_levels: costs must be of the model's NestedFp linears, got {unknown[0]!r}")
    if level.ndim or not jnp.issubdtype(level.dtype, jnp.integer):
        raise ValueError(f"with_levels: level must be an int32 scalar, got {level.shape=}, {level.dtype=}")
    order = sorted(weights, key=lambda name: (costs.get(name, float("inf")), name))
    new = {
        name: dataclasses.replace(weights[name], mode="traced", switch=(level > rank).astype(jnp.int32))
        for rank, name in enumerate(order)
    }
    return replace_weights(model, new)
