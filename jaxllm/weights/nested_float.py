"""A format: a float16 as two bytes, the upper of which is itself an 8-bit float weight (arXiv:2506.02024).

Modes and exactness: `quant/methods/nested_fp.py`. Layout: upper uint8 [N, K], the bits of a float8_e4m3fn,
lower uint8 [N, K], apart, so that fp8 streams one of them. 16 bits a weight. Letters: K inputs, N outputs.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float16, Int, UInt8

from jaxllm.ops.gather import gather
from jaxllm.pytree import pytree, static
from pallas_kernels.nested_fp_gemm import nested_fp_gemm
from pallas_kernels.nested_fp_gemm.reference import F8, MAX_FLOAT8, join, join_float32

ELIGIBLE_BELOW = 1.875  # eligible are the finite weights below
SHIFTS = range(15)  # 1.875 * 2**14 is the last below float16's greatest, 65,504
Mode = Literal["fp16", "fp8"]


@pytree
class NestedFloat:
    """A [K, N] float16 weight in two bytes.

    holds: upper.shape == lower.shape == (N, K); |w| < 1.875 * 2**shift, shift 0 .. 14;
      switch is None unless mode == "traced"
    """

    upper: jax.Array  # uint8 [N, K], the bits of float8_e4m3fn
    lower: jax.Array  # uint8 [N, K]
    switch: jax.Array | None  # int32 scalar if mode is "traced"
    mode: Literal["fp16", "fp8", "traced"] = static()
    shift: int = static()  # stored is w * 2**-shift
    dtype: object = static()  # numpy dtype: what it was quantized from

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        N, K = self.upper.shape
        return K, N

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The float16 weight's rows [N, K], one an output, whatever the mode."""
        if dtype == jnp.float16 and not self.shift:
            return jax.lax.bitcast_convert_type(join(self.upper, self.lower), jnp.float16)
        return _scaled(join_float32(self.upper, self.lower), self.shift).astype(dtype)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "NestedFloat":
        """The weight of some outputs."""
        return dataclasses.replace(self, upper=gather(self.upper, index), lower=gather(self.lower, index))

    def partition_specs(self, spec: P) -> "NestedFloat":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        place = {"upper": P(N, K), "lower": P(N, K), "switch": P()}
        return jax.tree.map_with_path(lambda path, _: place[path[0].name], self)


@functools.partial(jax.jit, inline=True)
def split(w: Float16[Array, "*B"]) -> tuple[UInt8[Array, "*B"], UInt8[Array, "*B"]]:
    """Upper and lower byte of eligible weights."""
    # subtle: the cast gives NaN above 448, which 126 eligible weights reach, unless clipped before
    upper = jnp.clip(w.astype(jnp.float32) * 256, -MAX_FLOAT8, MAX_FLOAT8).astype(F8)
    lower = jax.lax.bitcast_convert_type(w, jnp.uint16) & 0xFF
    return jax.lax.bitcast_convert_type(upper, jnp.uint8), lower.astype(jnp.uint8)


def _scaled(w, shift: int):
    return w * np.float32(2.0**shift) if shift else w


def find_shift(w: Float16[Array, "*B"]) -> int | None:
    """The least shift that makes all weights eligible and loses nothing; None if there is none."""
    greatest, low = (float(x) for x in extent(w)) if w.size else (0.0, 1.0)
    shift = next((t for t in SHIFTS if greatest < ELIGIBLE_BELOW * 2**t), None)  # none for NaN
    return shift if shift is not None and low >= 2**shift else None


@jax.jit
def extent(w):
    """The greatest weight in size, and the greatest 2**t (t <= 14) that divides every w / 2**-24."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.int32)
    exponent, mantissa = (bits >> 10) & 0x1F, bits & 0x3FF
    # The low bits of w / 2**-24.
    whole = jnp.where(exponent > 0, (mantissa | 0x400) << jnp.clip(exponent - 1, 0, 14), mantissa)
    divides = jnp.stack([((whole & (2**t - 1)) == 0).all() for t in SHIFTS])
    return jnp.abs(w.astype(jnp.float32)).max(), 2 ** (divides.sum() - 1)


def changed_by_float16(rows: Float[Array, "N K"]) -> int:
    """How many weights the cast to float16 changes."""
    return int((rows.astype(jnp.float16).astype(jnp.float32) != rows.astype(jnp.float32)).sum())


def encode(rows: Float[Array, "N K"], *, mode: Mode | jax.Array = "fp16", dtype=jnp.float16) -> NestedFloat:
    """The rows, cast to float16, in two bytes; ValueError if some weight is not eligible at any shift."""
    half = rows.astype(jnp.float16)
    shift = find_shift(half)
    if shift is None:
        worst = float(jnp.abs(rows.astype(jnp.float32)).max())
        raise ValueError(
            f"nested_fp: weights must be finite, below 1.875 after a lossless shift, got {worst=}"
        )
    upper, lower = split(_scaled(half.astype(jnp.float32), -shift).astype(jnp.float16))
    return with_mode(NestedFloat(upper, lower, None, "fp16", shift, jnp.dtype(dtype)), mode)


def with_mode(tree, mode: Mode | jax.Array):
    """A model or weight with each nested weight in this mode: a name, or a scalar (0 fp16, else fp8)."""
    name: Literal["fp16", "fp8", "traced"]
    if isinstance(mode, str):
        if mode not in ("fp16", "fp8"):
            raise ValueError(f"nested_fp: mode must be fp16, fp8 or an int32 scalar, got {mode=}")
        name, switch = mode, None
    else:
        _check_switch(mode)
        name, switch = "traced", mode

    def turn(w):
        if not isinstance(w, NestedFloat):
            return w
        own = None if switch is None else jnp.broadcast_to(switch, w.upper.shape[:-2])  # of experts, each
        return dataclasses.replace(w, switch=own, mode=name)

    return jax.tree.map(turn, tree, is_leaf=lambda w: isinstance(w, NestedFloat))


def _check_switch(switch) -> None:
    if switch.ndim or not jnp.issubdtype(switch.dtype, jnp.integer):
        raise ValueError(
            f"nested_fp: a mode is for all rows, an int32 scalar, got {switch.shape=}, {switch.dtype=}"
        )


def matmul(x: Float[Array, "*B K"], w: NestedFloat) -> Float[Array, "*B N"]:
    """`x @ w` in float32, in the mode of `w`."""
    if w.switch is not None:
        _check_switch(w.switch)
    return nested_fp_gemm(x, w.upper, w.lower, w.switch, mode=w.mode, shift=w.shift)
