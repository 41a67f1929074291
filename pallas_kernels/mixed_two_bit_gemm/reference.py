"""What the product with columns of 2 and 4 bits means, in jnp (arXiv:2311.16442v4); layout in `__init__`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from pallas_kernels.dot import depend_on, dot
from pallas_kernels.words import from_words

INPUTS_PER_GROUP = 16  # of columns
OUTPUTS_PER_BLOCK = 16


def mixed_two_bit_gemm(x: Float[Array, "*B W"], *weight: Array | None, group4: int) -> Float32[Array, "*B N"]:
    """`x @ w` in float32, of the weight's ten arrays: the rows are made in x's type, then multiplied."""
    return dot(x, permuted_rows(*depend_on(x, weight), group4=group4, dtype=x.dtype))


def permuted_rows(
    two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place,
    *, group4: int, dtype,
) -> Float[Array, "N W"]:  # fmt: skip
    """The rows as they are stored, W inputs in the order of x."""
    parts = []
    if two is not None:
        N = two.shape[0]
        scale, zero = two_bit_steps(step, zero_point, step_zero, step_scale, N)
        codes = from_words(two[..., None], 2).astype(jnp.float32)  # [N, n2, 16]
        parts.append(((codes - zero[..., None]) * scale[..., None]).reshape(N, -1))
    if four is not None:
        N = four.shape[0]
        codes = from_words(four, 4).astype(jnp.float32).reshape(N, -1)  # [N, 16 n4]
        zero = by_output(from_words(four_zero_point, 4), N).astype(jnp.float32)
        zero, scale = (
            jnp.repeat(v, group4, axis=1)[:, : codes.shape[1]] for v in (zero, four_scale.astype(jnp.float32))
        )
        parts.append((codes - zero) * scale)
    rows = jnp.concatenate(parts, axis=1)
    if outlier is not None:
        rows = add_to_rows(rows, outlier, place)
    return rows.astype(dtype)


def two_bit_steps(step, zero_point, step_zero, step_scale, N: int):
    """The scale and the zero point of each 2-bit group [N, n2]: exact in float32."""
    step = by_output(from_words(step, 4), N).astype(jnp.float32)
    zero = by_output(from_words(zero_point[..., None], 2), N).astype(jnp.float32)
    shared = nibbles(step_zero, step_scale.shape[1]).astype(jnp.float32)  # [B, n2]
    step_zero, step_scale = (
        jnp.repeat(v, OUTPUTS_PER_BLOCK, axis=0)[:N] for v in (shared, step_scale.astype(jnp.float32))
    )
    return (step + step_zero) * step_scale, zero


def by_output(codes: UInt32[Array, "B n 16"], N: int) -> UInt32[Array, "N n"]:
    """What blocks of 16 outputs hold, [B, n, 16], an output a row [N, n]."""
    return jnp.swapaxes(codes, 1, 2).reshape(-1, codes.shape[1])[:N]


def nibbles(pairs: UInt8[Array, "B _"], n: int) -> UInt8[Array, "B n"]:
    """The first n codes of 4 bits, two a byte, the first lower."""
    return jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)[:, :n]


def add_to_rows(rows: Float[Array, "N W"], values, places) -> Float[Array, "N W"]:
    """The rows and each value at its place, added to what stands there."""
    N, W = rows.shape
    R = block_rows(W)
    flat = jnp.pad(rows, ((0, -N % R), (0, 0))).reshape(-1, R * W)
    flat = jax.vmap(lambda line, at, value: line.at[at].add(value))(
        flat, places.astype(jnp.int32), values.astype(rows.dtype)
    )
    return flat.reshape(-1, W)[:N]


def block_rows(W: int) -> int:
    """Rows of a block of outliers: 16, or as many as 16 bits can address a place in."""
    if W > 2**16:
        raise ValueError(f"sparse: outliers need at most 65536 inputs, got {W=}")
    return min(OUTPUTS_PER_BLOCK, 2 ** ((2**16 // W).bit_length() - 1))
