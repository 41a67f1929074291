"""A format: columns at 2 bits, a few at 4, a few single weights at 16 (arXiv:2311.16442v4).

A weight [K, N] is cut into C = ceil(K / 16) column groups: 16 inputs, all outputs. With i an input of one:

    2 bits   w[n, i] = (code - zero_point[n]) * (step[n] + step_zero[b]) * step_scale[b]
             zero_point 2 bits, step 4 bits; step_zero 4 bits and step_scale float16 a block b of 16 outputs
    4 bits   w[n, i] = (code - zero_point[n, g]) * scale[n, g]
             zero_point 4 bits, scale float16, for each `group4` inputs g
    16 bits  a residual added to one weight: float16 and a place of 16 bits

Layout, with B = ceil(N / 16) blocks of outputs and n2 + n4 = C; code j of a word at bit 2 j or 4 j; None for
what does not occur:

    two [N, n2]        four [N, n4, 2]      order [C]: the column group at each place, both parts ascending
    step [B, n2, 2]    zero_point [B, n2]   step_zero [B, ceil(n2 / 2)]      step_scale [B, n2]
    four_scale [N, G]  four_zero_point [B, G, 2]  with G = ceil(16 n4 / group4)
    outlier [O, m]     place [O, m]         as in `sparse`, of permuted inputs

Letters: K inputs, N outputs, C column groups, n2 and n4 of them at 2 and 4 bits, *B any leading axes.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.pytree import pytree, static
from pallas_kernels.mixed_two_bit_gemm import mixed_two_bit_gemm, reference
from pallas_kernels.mixed_two_bit_gemm.reference import INPUTS_PER_GROUP, OUTPUTS_PER_BLOCK, block_rows

# The fields of the two parts.
TWO_BIT_FIELDS = ("two", "step", "zero_point", "step_zero", "step_scale")
FOUR_BIT_FIELDS = ("four", "four_scale", "four_zero_point")

Outliers = Literal["exclusive", "anywhere", "none"]


@pytree
class MixedColumns:
    """A [K, N] weight in columns of 2 and of 4 bits, and sparse residuals.

    holds: n2 + n4 == C == order.size; TWO_BIT_FIELDS are None where n2 == 0, FOUR_BIT_FIELDS where n4 == 0;
      outlier.shape == place.shape, both None where there is no room for outliers
    """

    two: jax.Array | None  # uint32 [N, n2]
    four: jax.Array | None  # uint32 [N, n4, 2]
    step: jax.Array | None  # uint32 [B, n2, 2]: 16 codes of 4 bits, one an output
    zero_point: jax.Array | None  # uint32 [B, n2]: 16 codes of 2 bits
    step_zero: jax.Array | None  # uint8 [B, ceil(n2 / 2)]: two of 4 bits
    step_scale: jax.Array | None  # float16 [B, n2]
    four_scale: jax.Array | None  # float16 [N, G]
    four_zero_point: jax.Array | None  # uint32 [B, G, 2]: 16 codes of 4 bits, one an output
    order: jax.Array  # int16 (int32 where C > 32767) [C]
    outlier: jax.Array | None  # float16 [O, m]
    place: jax.Array | None  # uint16 [O, m]
    group4: int = static()  # inputs of a 4-bit group, in the permuted order
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        K, N = self.shape
        groups = permuted_rows(self).reshape(N, -1, INPUTS_PER_GROUP)
        return groups[:, jnp.argsort(self.order)].reshape(N, -1)[:, :K].astype(dtype)

    def partition_specs(self, spec: P) -> "MixedColumns":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        Always cut along N, in multiples of 16 outputs; where the weight is cut along K instead, N is cut over
        those devices: the permuted columns of a shard would not be the shard of the inputs.
        """
        K, N = spec
        axis = K if N is None else N

        def place(path, leaf):
            return P(None if path[0].name == "order" else axis, *[None] * (leaf.ndim - 1))

        return jax.tree.map_with_path(place, self)


def arrays(w: MixedColumns) -> tuple[jax.Array | None, ...]:
    """The weight's arrays but the order, as `mixed_two_bit_gemm` takes them."""
    return (*(getattr(w, field) for field in (*TWO_BIT_FIELDS, *FOUR_BIT_FIELDS)), w.outlier, w.place)


@functools.partial(jax.jit, inline=True)
def two_bit_steps(w: MixedColumns) -> tuple[Float[Array, "N n2"], Float[Array, "N n2"]]:
    """The scale and the zero point of each 2-bit group: exact in float32, and known without the codes."""
    return reference.two_bit_steps(w.step, w.zero_point, w.step_zero, w.step_scale, w.shape[1])


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def permuted_rows(w: MixedColumns, dtype=jnp.float32) -> Float[Array, "N W"]:
    """The rows as they are stored, W = 16 C inputs in the order of `permute`."""
    return reference.permuted_rows(*arrays(w), group4=w.group4, dtype=dtype)


def permute(x: Float[Array, "*B K"], w: MixedColumns) -> Float[Array, "*B W"]:
    """The inputs in the order in which the weight stores them, zeros where a last column group is short."""
    C = w.order.shape[0]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, C * INPUTS_PER_GROUP - x.shape[-1])])
    return x.reshape(*x.shape[:-1], C, INPUTS_PER_GROUP)[..., w.order, :].reshape(*x.shape[:-1], -1)


def matmul(x: Float[Array, "*B K"], w: MixedColumns) -> Float[Array, "*B N"]:
    """`x @ w` in float32: one permutation of x instead of one of the weight."""
    return mixed_two_bit_gemm(permute(x, w), *arrays(w), group4=w.group4)


def slots(K: int, N: int, four: int, *, outliers: float, where: Outliers) -> int:
    """Places for outliers in each block: floor(outliers * R * K), no more than there are weights for them."""
    if not outliers or where == "none":
        return 0
    C = -(-K // INPUTS_PER_GROUP)
    R = min(block_rows(C * INPUTS_PER_GROUP), N)
    free = C - four if where == "exclusive" else C
    return min(int(outliers * R * K + 1e-9), R * free * INPUTS_PER_GROUP)


def stored_bits(
    K: int, N: int, four: int, *, group4: int = 128, outliers: float = 0.0, where: Outliers = "exclusive"
) -> int:
    """Bits of a [K, N] weight with `four` column groups at 4 bits: all arrays, with what fills them up."""
    C = -(-K // INPUTS_PER_GROUP)
    two, B, G = C - four, -(-N // OUTPUTS_PER_BLOCK), -(-four * INPUTS_PER_GROUP // group4)
    bits = (32 * two + 64 * four) * N  # codes
    bits += B * (two * (64 + 32 + 16) + 8 * -(-two // 2))  # step, zero_point, step_scale, step_zero
    bits += G * (16 * N + 64 * B)  # four_scale, four_zero_point
    bits += C * (16 if C < 2**15 else 32)  # order
    m = slots(K, N, four, outliers=outliers, where=where)
    return bits + (m * 32 * -(-N // block_rows(C * INPUTS_PER_GROUP)) if m else 0)
