"""A model's quantized linears as other tools' files: which are written, and how; nothing is rounded unasked.

block, ways = plan("gptq", tensors, weights, head="lm_head")        # what config.json says, and each linear
model, changes = requantize(model, "awq")                           # what awq cannot hold, rounded
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import tensor_files
from checkpoints_convert.families.family import Tensor, stem
from checkpoints_convert.quantized.affine import read_rows
from checkpoints_convert.quantized.any_precision import AnyPrecision
from checkpoints_convert.quantized.scheme import SCHEMES, WritableScheme
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights import experts
from jaxllm.weights.dense import Dense


def scheme_named(who: str, name: str) -> Any:
    """The class of a scheme."""
    if name not in SCHEMES:
        raise ValueError(f"{who} must be one of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def plan(
    name: str, tensors: list[Tensor], weights: dict[str, Any], head: str
) -> tuple[dict[str, Any], dict[str, WritableScheme]]:
    """What config.json says of a model's linears, and how each quantized one is stored, by their names.

    head: its name, which is dense where no tensor has it. Raises ValueError where a scheme cannot hold a
    weight, with the nearest setting that it can, and where there is nothing to write in codes.
    """
    scheme = scheme_named("huggingface.save: scheme", name)
    ways: dict[str, Any] = {}
    dense: list[str] = []
    one_group = True
    for tensor in tensors:
        parts, linear = [weights[leaf] for leaf in tensor.ours], stem(tensor)
        if tensor.ours[0].endswith(".router.weight"):  # to other tools one more linear of the block
            linear = tensor.theirs.removesuffix(".weight")
        if linear is None:
            continue
        if any(isinstance(part, jax.Array) for part in parts):
            dense.append(linear)
        else:
            way = ways[linear] = _way(scheme, tensor, parts)
            one_group &= getattr(way, "group_size", None) == parts[0].shape[0]
    if not ways:
        raise ValueError(
            f"huggingface.save: {name} needs a quantized model, got dense weights: quantize first"
        )
    if one_group:  # of whatever size
        ways = {linear: dataclasses.replace(way, group_size=-1) for linear, way in ways.items()}
    if head not in ways and head not in dense:
        dense.append(head)
    try:
        block = scheme.to_config(ways, dense)
    except ValueError as error:
        raise ValueError(f"huggingface.save: {name}: {error}") from error
    return {"anyprec" if scheme is AnyPrecision else "quantization_config": block}, ways


def _way(scheme: Any, tensor: Tensor, parts: list[Any]) -> WritableScheme:
    """How one linear is stored; ValueError, which names it, where it cannot be."""
    who, linear = f"huggingface.save: {scheme.name}", stem(tensor)
    if tensor.transposed and not scheme.transposes:
        raise ValueError(f"{who} has no [in, out] matrices, got {tensor.theirs}")
    try:
        way = scheme.holding(parts)
    except ValueError as error:
        raise ValueError(f"{who}: {error}, at {linear}: quantize so, or round it (--requantize)") from error
    try:
        way.shapes(parts[0].shape[0], sum(part.shape[1] for part in parts))
    except ValueError as error:
        raise ValueError(f"{who}: {error}, at {linear}: leave it dense") from error
    return way


def entries(linear: str, way: WritableScheme, parts: Sequence[Any]) -> list[tensor_files.Tensor]:
    """How a quantized linear is written: name, shape, type of each tensor, and what makes it in its turn."""
    shapes = way.shapes(parts[0].shape[0], sum(part.shape[1] for part in parts))
    found: list[tensor_files.Tensor] = []
    for last in way.written:
        shape, kinds = shapes[last]
        read = functools.partial(way.write, parts, last)
        dtype = np.dtype(read().dtype) if kinds[0] == "F16" else tensor_files.DTYPES[kinds[0]]
        found.append((f"{linear}.{last}", shape, dtype, read))
    return found


def requantize(model: Any, name: str) -> tuple[Any, dict[str, float]]:
    """The model with what a scheme cannot hold rounded plainly to what it can, and how much that changed.

    The change is mean |w - w'| / mean |w| of each weight that was rounded, by its name, an expert's own.
    A quantized embedding becomes dense, as all tools have it, and does not change. Raises ValueError for a
    model without codes.
    """
    scheme = scheme_named("requantize: to", name)
    made: dict[str, Any] = {}
    changes: dict[str, float] = {}
    quantized = {
        key: w
        for key, w in linear_weights(model).items()
        if not (experts.is_dense(w) or isinstance(w, jax.Array))
    }
    for key, w in quantized.items():
        if key == "embedding":
            made[key] = Dense(w.dequantize_rows(w.dtype))
            continue
        try:
            for one in experts.parts(w):
                scheme.holding([one])
        except ValueError:  # experts are stored alike: all of a linear are rounded, or none
            rounded = [scheme.round(one) for one in experts.parts(w)]
            for own, one, new in zip(experts.members(key, w), experts.parts(w), rounded, strict=True):
                changes[own] = float(_change(read_rows(one), read_rows(new)))
            made[key] = experts.stack(rounded) if isinstance(w, experts.Experts) else rounded[0]
    if not quantized:
        raise ValueError(f"requantize: {name} needs a quantized model, got dense weights: quantize first")
    return replace_weights(model, made), changes


@jax.jit
def _change(before: jax.Array, after: jax.Array) -> jax.Array:
    return jnp.abs(before - after).mean() / jnp.abs(before).mean()
