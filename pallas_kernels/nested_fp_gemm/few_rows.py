"""A few rows on a CPU: bytes joined where they stand, eight at once, one conversion each.

A float8_e4m3 is the upper part of a float16 but for the offset of its exponent: 2**-8 of it. Weights are
exact float32, which the reference rounds to the type of x.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.dot import dot
from pallas_kernels.fold import FEW_ROWS, sum_of_rows
from pallas_kernels.nested_fp_gemm.reference import quantize_tokens

NUMBERS = 64  # of a term, at most, where that does not make more than
MOST_TERMS = 64
LANES = 2  # sums that go on side by side
OUTPUTS = 128  # whose weights are float32 at a time, for more rows than one


def takes(x: Float[Array, "*B K"]) -> bool:
    """Whether it is the faster way here: a CPU and few rows."""
    return jax.default_backend() == "cpu" and 0 < x.size <= FEW_ROWS * x.shape[-1]


@functools.partial(jax.jit, static_argnames=("mode", "shift"))  # a model has few shapes: each is traced once
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

    def fp16():
        return _product(x, upper, lower) * np.float32(2.0**shift)

    def fp8():
        x8, scale = quantize_tokens(x)
        return _product(x8, upper, None) * np.float32(2.0**shift) / scale

    if mode == "traced":
        assert switch is not None
        return jax.lax.cond(switch == 0, fp16, fp8)
    return fp16() if mode == "fp16" else fp8()


def _product(
    x: Float[Array, "*B K"], upper: UInt8[Array, "N K"], lower: UInt8[Array, "N K"] | None
) -> Float32[Array, "*B N"]:
    """`x @ w` for the float16 of two bytes, or (lower None) for the one whose upper byte is a float8."""
    # subtle: nothing of the bytes may be made ahead of x; they are read where they are, by loops that need it
    x, upper, lower = jax.lax.optimization_barrier((x.astype(jnp.float32), upper, lower))
    rows = x.reshape(-1, x.shape[-1])
    y = _of_one(rows[0], upper, lower)[None] if len(rows) == 1 else _of_some(rows, upper, lower)
    return y.reshape(*x.shape[:-1], -1)


def _of_one(x: Float32[Array, " K"], upper, lower) -> Float32[Array, " N"]:
    """Sums of terms (`pallas_kernels.fold`): a weight is made in a register and used once."""
    K = len(x)
    fit = [count for count in range(1, MOST_TERMS + 1) if K % count == 0]
    terms = next((count for count in fit if K // count <= NUMBERS), fit[-1])
    sums: list[jax.Array] = []
    for part in (slice(i, i + K // terms) for i in range(0, K, K // terms)):
        w = _weights(upper[:, part], None if lower is None else lower[:, part])
        sums.append(w * x[part][None])
    lanes = [functools.reduce(operator.add, sums[i::LANES]) for i in range(min(LANES, terms))]
    return sum_of_rows(jax.lax.optimization_barrier(functools.reduce(operator.add, lanes)))


def _of_some(x: Float32[Array, "M K"], upper, lower) -> Float32[Array, "M N"]:
    """Weights of some outputs at a time, which stay in the cache while all rows are multiplied by them."""
    N, K = upper.shape
    outputs = min(OUTPUTS, N)

    def step(i, y):
        # subtle: where outputs are left over the last step begins earlier, as both functions clamp it
        at = i * outputs
        u, low = (None if a is None else dynamic_slice_in_dim(a, at, outputs) for a in (upper, lower))
        w = jax.lax.optimization_barrier(_weights(u, low))
        return dynamic_update_slice_in_dim(y, dot(w, x), at, axis=0)

    steps = -(-N // max(outputs, 1))
    return jax.lax.fori_loop(0, steps, step, jnp.zeros((N, len(x)), jnp.float32)).T


def _weights(upper: UInt8[Array, "n k"], lower: UInt8[Array, "n k"] | None) -> Float32[Array, "n k"]:
    """The float16 of both bytes as float32, exactly; without the lower ones the float8 / 256."""
    u = jax.lax.bitcast_convert_type(upper, jnp.int8).astype(jnp.int16)
    bits = u << np.int16(7)  # the sign in both upper bits, of which the lower one goes
    if lower is None:
        bits = bits & ~np.int16(0x4000)
    else:
        low = lower.astype(jnp.int16)
        bits = ((bits - (low & np.int16(0x80))) & ~np.int16(0x40FF)) | low
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
