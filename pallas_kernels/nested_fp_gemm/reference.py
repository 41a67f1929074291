"""What NestedFP's product means, in jnp (arXiv:2506.02024, section 4).

    fp16    y = x @ w       w the float16 whose bits are rebuilt from both bytes, in x's type
    fp8     y = (x8 @ upper) * 2**(shift - 8) / scale   x8 = float8(x * scale), scale = 448 / max|x| a token

A float16 below 1.875 in size does without its highest exponent bit: sign, 4 bits of exponent and 10 of
mantissa. The upper byte is their first 8, rounded to nearest: the bits of 256 w as a float8_e4m3fn. The lower
byte is the last 8, so that one bit is in both: it says whether the upper byte was rounded up.

Letters: K inputs, N outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt16

from pallas_kernels.dot import depend_on, dot

F8 = jnp.float8_e4m3fn
MAX_FLOAT8 = 448.0  # greatest float8_e4m3fn


def nested_fp_gemm(
    x: Float[Array, "*B K"],
    upper: UInt8[Array, "N K"],
    lower: UInt8[Array, "N K"] | None,
    switch: Int32[Array, ""] | None = None,
    *,
    mode: str,
    shift: int = 0,
) -> Float32[Array, "*B N"]:
    """`x @ w` in float32, in a mode: "fp16", "fp8", or "traced", where `switch` says which (0 fp16)."""
    if mode == "fp16":
        return fp16(x, upper, lower, shift)
    if mode == "fp8":
        return fp8(x, upper, shift)
    assert switch is not None
    return jax.lax.cond(switch == 0, lambda: fp16(x, upper, lower, shift), lambda: fp8(x, upper, shift))


def fp16(x, upper, lower, shift: int):
    upper, lower = depend_on(x, (upper, lower))
    if x.dtype == jnp.float16 and not shift:
        return dot(x, jax.lax.bitcast_convert_type(join(upper, lower), jnp.float16))
    w = join_float32(upper, lower)
    return dot(x, (w * np.float32(2.0**shift) if shift else w).astype(x.dtype))


def fp8(x, upper, shift: int):
    if jax.default_backend() == "cpu":  # others multiply float8 as they are: nothing to take out of a loop
        upper = depend_on(x, upper)
    x8, scale = quantize_tokens(x)
    return dot(x8, jax.lax.bitcast_convert_type(upper, F8)) * np.float32(2.0 ** (shift - 8)) / scale


def quantize_tokens(x: Float[Array, "*B K"]) -> tuple[Float[Array, "*B K"], Float32[Array, "*B 1"]]:
    """Each token as float8 times a scale of its own; a token of zeros has some finite one.

    One with NaN or an infinity becomes NaN.
    """
    x = x.astype(jnp.float32)
    scale = MAX_FLOAT8 / jnp.maximum(jnp.abs(x).max(-1, keepdims=True, initial=0.0), np.float32(2.0**-100))
    return jnp.clip(x * scale, -MAX_FLOAT8, MAX_FLOAT8).astype(F8), scale


def join(upper: UInt8[Array, "*B"], lower: UInt8[Array, "*B"]) -> UInt16[Array, "*B"]:
    """The bits of the float16."""
    upper, lower = upper.astype(jnp.uint16), lower.astype(jnp.uint16)
    return ((upper & 0x80) << 8) | magnitude(upper, lower)


def join_float32(upper: UInt8[Array, "*B"], lower: UInt8[Array, "*B"]) -> Float32[Array, "*B"]:
    """The float16 as a float32, without a step in 16 bits."""
    u, low = upper.astype(jnp.uint32), lower.astype(jnp.uint32)
    bits = magnitude(u, low)
    # subtle: subnormals go through whole numbers, as float32's own are flushed to 0 on many machines
    normal = jax.lax.bitcast_convert_type((bits << 13) + (112 << 23), jnp.float32)
    small = bits.astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    value = jnp.where(bits >= 0x400, normal, small)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32) | ((u & 0x80) << 24)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def magnitude(upper, lower):
    """All bits but the sign: the overlap bit taken off the upper byte, its rounding goes with it."""
    return ((((upper & 0x7F) << 7) - (lower & 0x80)) & 0x3F00) | lower
