"""A format: a float16 as two bytes, the upper of which is itself an 8-bit float weight (arXiv:2506.02024).

Modes and exactness: `quant/methods/nested_fp.py`. Layout: upper uint8 [N, K], the bits of a float8_e4m3fn,
lower uint8 [N, K], apart, so that fp8 streams one of them. 16 bits a weight. Outputs that are not eligible
may be kept in float16 beside them, read so in every mode: 16 bits a weight of theirs more, and an int32 an
output. Letters: K inputs, N outputs, R exceptions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float16, Int, Int32, UInt8

from jaxllm.ops.gather import gather
from jaxllm.pytree import pytree, static
from pallas_kernels.dot import depend_on, dot
from pallas_kernels.nested_fp_gemm import nested_fp_gemm
from pallas_kernels.nested_fp_gemm.reference import F8, MAX_FLOAT8, join, join_float32

ELIGIBLE_BELOW = 0x3F80  # eligible are weights below 1.875 in size: its bits as a float16
SHIFTS = np.arange(15, dtype=np.int32)  # 1.875 * 2**14 is the last below float16's greatest, 65,504
Mode = Literal["fp16", "fp8"]


@pytree
class NestedFloat:
    """A [K, N] float16 weight in two bytes.

    holds: upper.shape == lower.shape == (N, K); |w| < 1.875 * 2**shift, shift 0 .. 14, but for exceptions;
      switch is None unless mode == "traced"; exceptions and exception_of_output are None where there are none
    """

    upper: jax.Array  # uint8 [N, K], the bits of float8_e4m3fn
    lower: jax.Array  # uint8 [N, K]
    switch: jax.Array | None  # int32 scalar if mode is "traced"
    mode: Literal["fp16", "fp8", "traced"] = static()
    shift: int = static()  # stored is w * 2**-shift
    dtype: object = static()  # numpy dtype: what it was quantized from
    exceptions: jax.Array | None = None  # float16 [R, K]: rows that stand in place of zeros in both bytes
    exception_of_output: jax.Array | None = None  # int32 [N]: which of them, -1 for none

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        N, K = self.upper.shape
        return K, N

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The float16 weight's rows [N, K], one an output, whatever the mode."""
        if dtype == jnp.float16 and not self.shift:
            rows = jax.lax.bitcast_convert_type(join(self.upper, self.lower), jnp.float16)
        else:
            rows = _scaled(join_float32(self.upper, self.lower), self.shift).astype(dtype)
        of = self.exception_of_output
        if self.exceptions is None or of is None:
            return rows
        own = gather(self.exceptions, jnp.maximum(of, 0)).astype(dtype)
        return jnp.where(of[:, None] >= 0, own, rows)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "NestedFloat":
        """The weight of some outputs, with all exceptions."""
        of = self.exception_of_output
        return dataclasses.replace(
            self,
            upper=gather(self.upper, index),
            lower=gather(self.lower, index),
            exception_of_output=None if of is None else gather(of, index),
        )

    def partition_specs(self, spec: P) -> "NestedFloat":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        A device has its inputs of all exceptions, whichever outputs it has: there are few.
        """
        K, N = spec
        place = {"upper": P(N, K), "lower": P(N, K), "switch": P()}
        place |= {"exceptions": P(None, K), "exception_of_output": P(N)}
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


@jax.jit
def find_shift(w: Float16[Array, "N K"]) -> tuple[Int32[Array, ""], Bool[Array, " N"]]:
    """The shift that leaves out fewest rows, the least of such, and whether each row is left out.

    Left out are rows with weights that are not eligible at the shift, or that it would change.
    """
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.int32)
    size = bits & 0x7FFF  # as whole numbers in the order of |w|, NaN last
    exponent, mantissa = size >> 10, size & 0x3FF
    # The low bits of w / 2**-24, and the greatest 2**t (t <= 14) that divides it.
    whole = jnp.where(exponent > 0, (mantissa | 0x400) << jnp.clip(exponent - 1, 0, 14), mantissa) | 1 << 14
    greatest, divides = size.max(1, initial=0)[None], (whole & -whole).min(1, initial=1 << 14)[None]
    shifts = SHIFTS[:, None]
    eligible = (greatest < ELIGIBLE_BELOW + (shifts << 10)) & (divides >= 1 << shifts)  # < 1.875 * 2**shift
    shift = jnp.argmax(eligible.sum(1))  # the first of the best
    return shift.astype(jnp.int32), ~eligible[shift]


def changed_by_float16(rows: Float[Array, "N K"]) -> int:
    """How many weights the cast to float16 changes."""
    return int((rows.astype(jnp.float16).astype(jnp.float32) != rows.astype(jnp.float32)).sum())


def encode(
    rows: Float[Array, "N K"],
    *,
    mode: Mode | jax.Array = "fp16",
    max_exceptions: float = 0.0,
    dtype=jnp.float16,
) -> NestedFloat:
    """The rows, cast to float16, in two bytes; a share of them at most as they are, where not eligible.

    Raises ValueError if more are not eligible at any shift, or one is not finite.
    """
    half = rows.astype(jnp.float16)
    found, left_out = find_shift(half)
    shift, places = int(found), np.flatnonzero(left_out)
    kept = gather(half, jnp.asarray(places))
    if len(places) > max_exceptions * len(half) or not bool(jnp.isfinite(kept).all()):
        worst = float(jnp.abs(rows.astype(jnp.float32)).max())
        raise ValueError(
            "nested_fp: weights must be finite, below 1.875 after a lossless shift, "
            f"got {worst=}, {len(places)} of {len(half)} rows that are not"
        )
    nested = jnp.where(left_out[:, None], jnp.float16(0), half) if len(places) else half
    upper, lower = split(_scaled(nested.astype(jnp.float32), -shift).astype(jnp.float16))
    w = NestedFloat(upper, lower, None, "fp16", shift, jnp.dtype(dtype))
    if len(places):
        order = jnp.cumsum(left_out, dtype=jnp.int32) - 1
        w = dataclasses.replace(w, exceptions=kept, exception_of_output=jnp.where(left_out, order, -1))
    return with_mode(w, mode)


def with_equal_exceptions(weights: Sequence[Any]) -> list[Any]:
    """The weights, nested ones [K, N] with equally many exceptions, zeros of no output where one has fewer.

    So that the weights of experts are stored alike.
    """
    own = [w.exceptions for w in weights if isinstance(w, NestedFloat)]
    R = max((len(rows) for rows in own if rows is not None), default=0)

    def fill(w):
        if not isinstance(w, NestedFloat) or not R:
            return w
        (K, N), rows, of = w.shape, w.exceptions, w.exception_of_output
        if rows is None:
            rows, of = jnp.zeros((0, K), jnp.float16), jnp.full(N, -1, jnp.int32)
        rows = jnp.pad(rows, ((0, R - len(rows)), (0, 0)))
        return dataclasses.replace(w, exceptions=rows, exception_of_output=of)

    return [fill(w) for w in weights]


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
    """`x @ w` in float32, in the mode of `w`; exceptions in every mode as `Dense` float16 rows."""
    if w.switch is not None:
        _check_switch(w.switch)
    y = nested_fp_gemm(x, w.upper, w.lower, w.switch, mode=w.mode, shift=w.shift)
    if w.exceptions is None and w.exception_of_output is None:
        return y
    exceptions, of = _checked_exceptions(w)
    # subtle: the products of an output lie side by side, as XLA:CPU gathers single numbers slowly
    own = jnp.moveaxis(dot(x, depend_on(x, exceptions)), -1, 0)[jnp.maximum(of, 0)]
    return jnp.where(of >= 0, jnp.moveaxis(own, 0, -1), y)


def _checked_exceptions(w: NestedFloat) -> tuple[jax.Array, jax.Array]:
    """Both arrays; ValueError where they do not fit, as those of a file may."""
    (K, N), own, of = w.shape, w.exceptions, w.exception_of_output
    if own is None or of is None or own.shape[1:] != (K,) or not len(own) or of.shape != (N,):
        got = " and ".join(str(None if a is None else a.shape) for a in (own, of))
        raise ValueError(f"nested_fp: exceptions must be [R, {K}] and of outputs [{N}], R > 0, got {got}")
    if (own.dtype, of.dtype) != (jnp.float16, jnp.int32):
        raise ValueError(f"nested_fp: exceptions must be float16 and int32, got {own.dtype} and {of.dtype}")
    return own, of
