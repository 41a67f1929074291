"""Affine weights as qwix arrays and back. qwix (google/qwix) is imported here and nowhere else.

    array = to_qwix(w)                  # qwix.QArray: w = (qvalue - zero_point) * scale, tiles along K
    w = from_qwix(array)

qwix stores signed whole numbers, so codes and zeros are shifted by 2**(bits - 1). To qwix: lossless. From
qwix: lossless where its scales fit float16, else these are rounded and the codes kept.
"""

from typing import Any

import jax.numpy as jnp

from jaxllm.ops.packing import Packed, unpack
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine

WIDTHS = {"int2": 2, "int4": 4, "int8": 8}


def to_qwix(w: Affine) -> Any:
    """A `qwix.QArray` [K, N] with float32 scales [G, N].

    Raises ValueError for what a QArray cannot say: zeros that are no whole codes, a short last group.
    """
    from qwix import QArray

    (K, _), bits = w.shape, w.codes.bits
    if w.zero_point is not None and not isinstance(w.zero_point, Packed):
        raise ValueError(
            "to_qwix: zeros must be whole codes (integer_zero_point=True) or none, got float16 zeros"
        )
    if K % w.group_size:
        raise ValueError(f"to_qwix: group_size must divide K, got group_size={w.group_size}, {K=}")
    name = f"int{bits}" if f"int{bits}" in WIDTHS else "int8"

    def shift(codes):
        return (codes.astype(jnp.int32) - 2 ** (bits - 1)).astype(name)

    zero_point = None if w.zero_point is None else shift(unpack(w.zero_point))
    return QArray(shift(unpack(w.codes).T), affine.scales(w), zero_point, qtype=jnp.dtype(name))


def from_qwix(array: Any, *, dtype=None) -> Affine:
    """The weight of a QArray [K, N] of whole numbers.

    dtype: what the weight was quantized from; None is the type of the scales.
    Raises ValueError for float types (nf4, fp8, mx formats), other ranks, or tiles that are not along K.
    """
    name = jnp.dtype(array.qtype).name if not isinstance(array.qtype, str) else array.qtype
    if name not in WIDTHS or array.qvalue.dtype not in map(jnp.dtype, WIDTHS):
        raise ValueError(f"from_qwix: qtype must be one of {', '.join(WIDTHS)}, got {name}")
    if array.qvalue.ndim != 2:
        raise ValueError(f"from_qwix: the array must be [K, N], got shape={array.qvalue.shape}")
    (K, N), bits = array.qvalue.shape, WIDTHS[name]
    G = array.scale.shape[0]
    zero_point = array.zero_point
    for what, part in (("scale", array.scale), ("zero_point", zero_point)):
        if part is not None and (part.shape[0] != G or part.shape[1] not in (1, N) or K % G):
            raise ValueError(f"from_qwix: {what} must be [G, N or 1], G dividing {K=}, got {part.shape}")

    def shift(v):
        return v.astype(jnp.int32) + 2 ** (bits - 1)

    return affine.from_codes(
        shift(array.qvalue).T.astype(jnp.uint8),
        jnp.broadcast_to(array.scale.astype(jnp.float32), (G, N)).T,
        None if zero_point is None else jnp.broadcast_to(shift(zero_point).astype(jnp.float32), (G, N)).T,
        bits=bits,
        group_size=K // G,
        dtype=array.scale.dtype if dtype is None else dtype,
        integer_zero_point=zero_point is not None,
    )
