"""A format: another one in a rotated basis, activations rounded to 4 or 8 bits on the way in.

Which transforms, and why: `quant/methods/rotate.py`. Letters: K inputs, N outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jaxllm.ops import hadamard
from jaxllm.ops.packing import unpack
from jaxllm.pytree import pytree, static
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine


@pytree
class Rotated:
    """A [K, N] weight stored as Q^T W, and how the turned input is rounded.

    holds: shape == base.shape; activation_bits in (4, 8, 16); 0 < clip <= 1
    """

    base: Any  # any weight format [K, N]
    activation_bits: int = static()  # 4 or 8; 16 rounds nothing
    clip: float = static()  # the greatest code's share of max |x Q|
    seed: int = static()  # of the signs in Q

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The rows [N, K] that multiply x itself, were it not rounded."""
        return hadamard.unrotate(self.base.dequantize_rows(jnp.float32), self.seed).astype(dtype)

    def partition_specs(self, spec: P) -> "Rotated":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        return dataclasses.replace(self, base=self.base.partition_specs(spec))


def activations(
    x: Float[Array, "*B K"], w: Rotated
) -> tuple[Float[Array, "*B K"], Float[Array, "*B 1"] | None]:
    """The turned input's whole codes in float32 and a step a token; the turned input and None at 16 bits."""
    turned = hadamard.rotate(x, w.seed)
    if w.activation_bits == 16:
        return turned, None
    qmax = 2 ** (w.activation_bits - 1) - 1
    step = jnp.max(jnp.abs(turned), axis=-1, keepdims=True) * (w.clip / qmax)
    step = jnp.where(step == 0, 1.0, step)  # a token with a NaN has NaN in all places, and so in its product
    return jnp.clip(jnp.round(turned / step), -qmax, qmax), step


def is_whole(w: Rotated) -> bool:
    """Whether the product can be taken in whole numbers: affine codes with one scale an output."""
    whole = isinstance(w.base, Affine) and w.base.group_size >= w.base.shape[0]
    return whole and w.activation_bits <= 8


def whole_product(codes: Float[Array, "*B K"], w: Affine) -> Float[Array, "*B N"]:
    """`codes @ w` for whole codes -127 .. 127 and a weight with one scale an output, by int8 and int32.

    sum_k q_k (c_k - z) = sum_k q_k (c_k - h) - (z - h) sum_k q_k, h = 2**(bits - 1). No overflow below
    K = 2**17.
    """
    half = 2 ** (w.codes.bits - 1)
    weights = (unpack(w.codes).astype(jnp.int32) - half).astype(jnp.int8)  # [N, K]
    q = codes.astype(jnp.int8)
    y: Int32[Array, "*B N"] = jax.lax.dot_general(
        q, weights, (((q.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    total = jnp.sum(q, axis=-1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)

    def flat(v):  # of the one group, for all tokens
        return jnp.expand_dims(v[0], range(y.ndim - 1))

    shifted = y.astype(jnp.float32) - total * flat(affine.zero_points(w) - half)
    return shifted * flat(affine.scales(w))
