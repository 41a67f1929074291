"""Affine codes by group: (code - zero_point) * scale, at 1 to 8 bits. What most rivals store, too.

A [K, N] weight is cut along K into groups of `group_size` inputs of one output (the last may be shorter),
each with a scale and a zero point; group_size = K is one a column ("per channel"). The meaning is

    w[k, n] = (codes[n, k] - zero_point[k // group_size, n]) * scale[k // group_size, n]           in float32

`zero_point` is a float16 in units of codes (what least squares gives), or a whole code, packed at the width
of the codes (what a grid through 0 needs), or None for a symmetric grid about the middle code 2**(bits - 1).
`scale` is float16, or an `Affine` of its own: codes, and a scale of scales for the same group of each 16
neighbouring outputs ("second order"; arXiv:2305.14314, section 3, calls it double quantization).

    w = quantize(x, bits=4, group_size=32)        # round to nearest between the least and the greatest

Bits a weight: bits + (16 + 16 | bits | 0) / group_size, more where K is no multiple of 32 (`packing.py` fills
blocks up); scales of b bits take b + (16 + b) / 16 in place of the first 16, at least.
Lossy: an error of at most half a scale inside the grid.
Letters: K inputs, N outputs, G = ceil(K / group_size) groups.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer

from jaxllm.ops.gather import gather, gather_codes
from jaxllm.ops.packing import Packed, pack, unpack, unpack_at
from jaxllm.pytree import pytree, static
from pallas_kernels.dequant_gemm import dequant_gemm

# Least scale that is stored: float16's least normal number, so that no scale is lost to rounding.
MIN_SCALE = 2.0**-14
OUTPUTS_PER_SCALE = 16  # outputs whose groups share a scale of scales


def check_rows(who: str, rows: jax.Array) -> None:
    """Raises ValueError where a weight is no number; traced ones cannot be looked at."""
    if not isinstance(rows, jax.core.Tracer) and not all_finite(rows):
        raise ValueError(f"{who}: weights must be finite, got NaN or infinity")


def all_finite(x: jax.Array) -> bool:
    """Whether there is neither NaN nor infinity; looked at on the host, where nothing is compiled for it."""
    return bool(np.isfinite(np.asarray(x)).all())


@pytree
class Affine:
    """A [K, N] weight in affine codes.

    holds: codes.shape == (N, K); with G = ceil(K / group_size): scale.shape == (G, N), or (N, G) if Affine;
      zero_point.shape == (G, N), with Packed codes zero_point.bits == codes.bits; 1 <= group_size <= K
    """

    codes: Packed  # [N, K]
    scale: "jax.Array | Affine"  # float16 (or a file's float type) [G, N], or an Affine [N, G]
    zero_point: Any  # float16 [G, N], or Packed codes [G, N], or None
    group_size: int = static()
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        (K, N), G = self.shape, -(-self.shape[0] // self.group_size)
        codes = jnp.pad(unpack(self.codes), ((0, 0), (0, G * self.group_size - K))).astype(jnp.float32)
        zero_point = zero_points(self)
        rows = (codes.reshape(N, G, self.group_size) - zero_point.T[:, :, None]) * scales(self).T[:, :, None]
        return rows.reshape(N, -1)[:, :K].astype(dtype)

    @property
    def can_gather_rows(self) -> bool:
        """False where scales are coded across rows."""
        return not isinstance(self.scale, Affine)

    def gather_rows(self, index: Int[Array, " n"]) -> "Affine":
        """The weight of some outputs; whole zeros, which are packed across outputs, as float16."""
        assert not isinstance(self.scale, Affine)
        zero_point = self.zero_point
        if isinstance(zero_point, Packed):
            zero_point = unpack_at(zero_point, index).astype(jnp.float16)
        elif zero_point is not None:
            zero_point = gather(zero_point, index, axis=1)
        return dataclasses.replace(
            self,
            codes=gather_codes(self.codes, index),
            scale=gather(self.scale, index, axis=1),
            zero_point=zero_point,
            shape=(self.shape[0], index.size),
        )

    def partition_specs(self, spec: P) -> "Affine":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        G = None if self.shape[0] <= self.group_size else K  # one group cannot be cut: every device has it
        zero_point = P(G, N, None) if isinstance(self.zero_point, Packed) else P(G, N)
        places: dict[str, Any] = {
            "codes": jax.tree.map(lambda _: P(N, K, None), self.codes),
            "scale": P(G, N),
            "zero_point": jax.tree.map(lambda _: zero_point, self.zero_point),
        }
        if isinstance(self.scale, Affine):  # small, and packed across outputs: whole on every device
            places["scale"] = self.scale.partition_specs(P(None, None))
        return dataclasses.replace(self, **places)


def matmul(x: Float[Array, "*B K"], w: Affine) -> Float[Array, "*B N"]:
    """`x @ w` in float32."""
    scale: Any = w.scale
    step = None
    if isinstance(scale, Affine):  # packed across outputs, whole zeros of 0
        scale, step = scale.codes.words, scale.scale
    zero_point = w.zero_point.words if isinstance(w.zero_point, Packed) else w.zero_point
    return dequant_gemm(x, w.codes.words, scale, zero_point, group_size=w.group_size, scale_step=step)


def scales(w: Affine) -> Float[Array, "G N"]:
    """The scale of each group."""
    return w.scale.dequantize_rows() if isinstance(w.scale, Affine) else w.scale.astype(jnp.float32)


def zero_points(w: Affine) -> Float[Array, "G N"]:
    """The zero point of each group, in units of codes."""
    if w.zero_point is None:
        return jnp.full((-(-w.shape[0] // w.group_size), w.shape[1]), 2.0 ** (w.codes.bits - 1), jnp.float32)
    return (unpack(w.zero_point) if isinstance(w.zero_point, Packed) else w.zero_point).astype(jnp.float32)


def grouped(rows: Float[Array, "N K"], group_size: int) -> tuple[Float[Array, "N G g"], Float[Array, "G g"]]:
    """Rows cut into groups, and 1 where a place is real, 0 where it fills up a short last group.

    Filling places repeat the row's last weight, so that they change neither a least nor a greatest.
    """
    N, K = rows.shape
    if not 1 <= group_size <= K:
        raise ValueError(f"affine: group_size must be 1 to K, got {group_size=}, {K=}")
    G = -(-K // group_size)
    real = (jnp.arange(G * group_size) < K).astype(rows.dtype).reshape(G, group_size)
    return jnp.pad(rows, ((0, 0), (0, G * group_size - K)), mode="edge").reshape(N, G, group_size), real


def round_to_grid(
    weights: Float[Array, "*B"], scale: Float[Array, "*S"], zero_point: Float[Array, "*S"], qmax: int
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """The nearest code 0 .. qmax of each weight, and what it stands for: (code - zero_point) * scale."""
    codes = jnp.clip(jnp.round(weights / scale + zero_point), 0, qmax)
    return codes, (codes - zero_point) * scale


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "integer_zero_point"), inline=True)
def round_to_storage(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"] | None,
    *,
    bits: int,
    group_size: int,
    integer_zero_point: bool = False,
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Scale and zero point, in float32, as they will be read back. Stored again they do not change.

    A group whose range is next to nothing, or whose zero point a float16 cannot hold, gets scale 1 and minus
    its mean, so that code 0 is the mean (with `integer_zero_point` or a symmetric grid: the least scale).
    """
    scale = jnp.maximum(scale.astype(jnp.float32), MIN_SCALE).astype(jnp.float16).astype(jnp.float32)
    if zero_point is None:
        return scale, jnp.full(scale.shape, 2.0 ** (bits - 1), jnp.float32)
    zero_point = zero_point.astype(jnp.float32)
    if integer_zero_point:
        return scale, jnp.clip(jnp.round(zero_point), 0, 2**bits - 1)
    g, real = grouped(rows.astype(jnp.float32), group_size)
    mean = (g * real[None]).sum(-1) / real.sum(-1)[None]
    flat = (jnp.max(g, -1) - jnp.min(g, -1) <= MIN_SCALE) | ~(jnp.abs(zero_point) < 60000.0)
    scale = jnp.where(flat, 1.0, scale)
    return scale, jnp.where(flat, -mean, zero_point).astype(jnp.float16).astype(jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("bits", "group_size", "dtype", "integer_zero_point"), inline=True
)
def from_codes(
    codes: Integer[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"] | None,
    *,
    bits: int,
    group_size: int,
    dtype=jnp.float32,
    integer_zero_point: bool = False,
) -> Affine:
    """The format of given codes under a grid of `round_to_storage`; zero_point None for a symmetric one."""
    (N, K), G = codes.shape, scale.shape[1]
    if not 1 <= bits <= 8 or G != -(-K // group_size):
        raise ValueError(
            f"affine: need G = ceil(K / group_size), bits 1 to 8, got {G=}, {K=}, {group_size=}, {bits=}"
        )
    kept: jax.Array | Packed | None = None
    if zero_point is not None:
        kept = (
            pack(zero_point.T.astype(jnp.uint8), bits)
            if integer_zero_point
            else zero_point.T.astype(jnp.float16)
        )
    return Affine(pack(codes, bits), scale.T.astype(jnp.float16), kept, group_size, (K, N), jnp.dtype(dtype))


def encode(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"] | None,
    *,
    bits: int,
    group_size: int,
    dtype=jnp.float32,
    integer_zero_point: bool = False,
    scale_bits: int | None = None,
) -> Affine:
    """Rounds scale and zero point to what is stored, then every weight to the nearest code under those.

    zero_point: in units of codes; None for a symmetric grid. integer_zero_point: store it as a whole code,
    not a float16. scale_bits: store the scales in codes of so many bits; the grid must then be symmetric or
    its zero points whole.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"affine: bits must be 1 to 8, got {bits=}")
    check_rows("affine", rows)
    return _encode(
        rows,
        scale,
        zero_point,
        bits=bits,
        group_size=group_size,
        dtype=jnp.dtype(dtype),
        integer_zero_point=integer_zero_point,
        scale_bits=scale_bits,
    )


@functools.partial(
    jax.jit, static_argnames=("bits", "group_size", "dtype", "integer_zero_point", "scale_bits"), inline=True
)
def _encode(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"] | None,
    *,
    bits: int,
    group_size: int,
    dtype,
    integer_zero_point: bool,
    scale_bits: int | None,
) -> Affine:
    scale, used = round_to_storage(
        rows, scale, zero_point, bits=bits, group_size=group_size, integer_zero_point=integer_zero_point
    )
    second = None if scale_bits is None else double_quantize_scales(scale, scale_bits)
    if second is not None:
        check_scale_bits("affine", scale_bits, zero_point is None or integer_zero_point)
        scale = second.dequantize_rows().T
    g, _ = grouped(rows.astype(jnp.float32), group_size)
    codes, _ = round_to_grid(g, scale[..., None], used[..., None], 2**bits - 1)
    codes = codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]].astype(jnp.uint8)
    kept = None if zero_point is None else used
    made = from_codes(
        codes,
        scale,
        kept,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        integer_zero_point=integer_zero_point,
    )
    return made if second is None else dataclasses.replace(made, scale=second)


def double_quantize_scales(scale: Float[Array, "N G"], bits: int) -> Affine:
    """Positive scales as codes between 0 and the greatest of each 16 outputs, an Affine [N, G]."""
    N, G = scale.shape
    group_size = min(OUTPUTS_PER_SCALE, N)
    g, _ = grouped(scale.T, group_size)  # [G, N / OUTPUTS_PER_SCALE, OUTPUTS_PER_SCALE]
    step = jnp.maximum(g.max(-1) / (2**bits - 1), MIN_SCALE).astype(jnp.float16).astype(jnp.float32)
    codes = jnp.clip(jnp.round(g / step[..., None]), 1, 2**bits - 1)  # a scale of 0 has no codes
    codes = codes.reshape(G, -1)[:, :N].astype(jnp.uint8)
    return from_codes(
        codes, step, jnp.zeros_like(step), bits=bits, group_size=group_size, integer_zero_point=True
    )


def check_scale_bits(who: str, scale_bits: int | None, fixed_zero: bool) -> None:
    """Raises ValueError for scales in codes under zeros that are relative to the exact scale."""
    if scale_bits is None:
        return
    if not 2 <= scale_bits <= 8:
        raise ValueError(f"{who}: scale_bits must be 2 to 8, got {scale_bits=}")
    if not fixed_zero:
        raise ValueError(
            f"{who}: scale_bits needs integer_zero_point=True or a symmetric grid, got {scale_bits=}"
        )


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric"), inline=True)
def min_max(
    rows: Float[Array, "N K"], *, bits: int, group_size: int, symmetric: bool = False, clip_ratio=1.0
) -> tuple[Float[Array, "N G"], Float[Array, "N G"] | None]:
    """Scale and zero point (in codes; None if symmetric) of the grid from the least to the greatest weight.

    clip_ratio: factors on the range, broadcast against [N, G]. The range always holds 0, so that a whole zero
    code serves it (Any-Precision dossier 2.5: what GPTQ does).
    """
    g, _ = grouped(rows.astype(jnp.float32), group_size)
    if symmetric:
        half = 2.0 ** (bits - 1) - 1 if bits > 1 else 0.5
        return jnp.maximum(jnp.abs(g).max(-1) * clip_ratio / half, MIN_SCALE), None
    low, high = jnp.minimum(g.min(-1), 0) * clip_ratio, jnp.maximum(g.max(-1), 0) * clip_ratio
    scale = jnp.maximum((high - low) / (2**bits - 1), MIN_SCALE)
    return scale, jnp.round(-low / scale)


def quantize(
    w: Float[Array, "K N"],
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    integer_zero_point: bool = True,
) -> Affine:
    """Round to nearest between each group's least and greatest weight."""
    scale, zero_point = min_max(w.T, bits=bits, group_size=group_size, symmetric=symmetric)
    return encode(
        w.T,
        scale,
        zero_point,
        bits=bits,
        group_size=group_size,
        dtype=w.dtype,
        integer_zero_point=integer_zero_point,
    )
