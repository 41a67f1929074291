"""Affine codes by group: (code - zero) * scale, at 1 to 8 bits. What most rivals store, too.

A [K, N] weight is cut along K into groups of `group` inputs of one output (the last may be shorter), each
with a scale and a zero; group = K is one a column ("per channel"). The meaning is

    w[k, n] = (codes[n, k] - zero[k // group, n]) * scale[k // group, n]           in float32

`zero` is a float16 in units of codes (what least squares gives), or a whole code, packed at the width of the
codes (what a grid through zero needs), or None for a symmetric grid about the middle code 2**(bits - 1).

    w = quantize(x, bits=4, group=32)        # round to nearest between the least and the greatest

Bits a weight: bits + (16 + 16 | bits | 0) / group. Lossy: an error of at most half a scale inside the grid.
Letters: K inputs, N outputs, G = ceil(K / group) groups.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from jaxllm.pytree import pytree, static
from jaxllm.quant.packing import Packed, pack, unpack

# Least scale that is stored: float16's least normal number, so that no scale is lost to rounding.
TINY = 2.0**-14


@pytree
class Affine:
    """A [K, N] weight in affine codes."""

    codes: Packed  # [N, K]
    scale: jax.Array  # float16 [G, N]
    zero: jax.Array | Packed | None  # float16 [G, N], or codes [G, N], or None
    group: int = static()
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    def as_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        (K, N), G = self.shape, self.scale.shape[0]
        codes = jnp.pad(unpack(self.codes), ((0, 0), (0, G * self.group - K))).astype(jnp.float32)
        zero = zeros(self)
        rows = (codes.reshape(N, G, self.group) - zero.T[:, :, None]) * self.scale.astype(jnp.float32).T[
            :, :, None
        ]
        return rows.reshape(N, -1)[:, :K].astype(dtype)

    def specs(self, spec: P) -> "Affine":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        place = {"codes": P(N, K, None), "scale": P(K, N), "zero": P(K, N)}
        if isinstance(self.zero, Packed):
            place["zero"] = P(K, N, None)
        return jax.tree.map_with_path(lambda path, _: place[path[0].name], self)


def zeros(w: Affine) -> Float[Array, "G N"]:
    """The zero of each group, in units of codes."""
    if w.zero is None:
        return jnp.full(w.scale.shape, 2.0 ** (w.codes.bits - 1), jnp.float32)
    return (unpack(w.zero) if isinstance(w.zero, Packed) else w.zero).astype(jnp.float32)


def grouped(rows: Float[Array, "N K"], group: int) -> tuple[Float[Array, "N G g"], Float[Array, "G g"]]:
    """Rows cut into groups, and 1 where a place is real, 0 where it fills up a short last group.

    Filling places repeat the row's last weight, so that they change neither a least nor a greatest.
    """
    N, K = rows.shape
    if not 1 <= group <= K:
        raise ValueError(f"affine: group must be 1 to K, got {group=}, {K=}")
    G = -(-K // group)
    real = (jnp.arange(G * group) < K).astype(rows.dtype).reshape(G, group)
    return jnp.pad(rows, ((0, 0), (0, G * group - K)), mode="edge").reshape(N, G, group), real


def stored(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero: Float[Array, "N G"] | None,
    *,
    bits: int,
    group: int,
    zero_code: bool = False,
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Scale and zero, in float32, as they will be read back. Stored again they do not change.

    A group whose range is next to nothing, or whose zero a float16 cannot hold, gets scale 1 and zero minus
    its mean, so that code 0 is the mean (with `zero_code` or a symmetric grid: the least scale).
    """
    scale = jnp.maximum(scale.astype(jnp.float32), TINY).astype(jnp.float16).astype(jnp.float32)
    if zero is None:
        return scale, jnp.full(scale.shape, 2.0 ** (bits - 1), jnp.float32)
    zero = zero.astype(jnp.float32)
    if zero_code:
        return scale, jnp.clip(jnp.round(zero), 0, 2**bits - 1)
    g, real = grouped(rows.astype(jnp.float32), group)
    mean = (g * real[None]).sum(-1) / real.sum(-1)[None]
    flat = (jnp.max(g, -1) - jnp.min(g, -1) <= TINY) | ~(jnp.abs(zero) < 60000.0)
    scale = jnp.where(flat, 1.0, scale)
    return scale, jnp.where(flat, -mean, zero).astype(jnp.float16).astype(jnp.float32)


def from_codes(
    codes: Integer[Array, "N K"],
    scale: Float[Array, "N G"],
    zero: Float[Array, "N G"] | None,
    *,
    bits: int,
    group: int,
    dtype=jnp.float32,
    zero_code: bool = False,
) -> Affine:
    """The format of given codes under a grid that `stored` gave; zero None for a symmetric one."""
    (N, K), G = codes.shape, scale.shape[1]
    if not 1 <= bits <= 8 or G != -(-K // group):
        raise ValueError(f"affine: need G = ceil(K / group), bits 1 to 8, got {G=}, {K=}, {group=}, {bits=}")
    kept: jax.Array | Packed | None = None
    if zero is not None:
        kept = pack(zero.T.astype(jnp.uint8), bits) if zero_code else zero.T.astype(jnp.float16)
    return Affine(pack(codes, bits), scale.T.astype(jnp.float16), kept, group, (K, N), jnp.dtype(dtype))


def encode(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero: Float[Array, "N G"] | None,
    *,
    bits: int,
    group: int,
    dtype=jnp.float32,
    zero_code: bool = False,
) -> Affine:
    """Rounds scale and zero to what is stored, then every weight to the nearest code under those.

    zero: in units of codes; None for a symmetric grid. zero_code: store it as a whole code, not a float16.
    """
    _check(rows, bits)
    scale, used = stored(rows, scale, zero, bits=bits, group=group, zero_code=zero_code)
    g, _ = grouped(rows.astype(jnp.float32), group)
    codes = jnp.clip(jnp.round(g / scale[..., None] + used[..., None]), 0, 2**bits - 1)
    codes = codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]].astype(jnp.uint8)
    kept = None if zero is None else used
    return from_codes(codes, scale, kept, bits=bits, group=group, dtype=dtype, zero_code=zero_code)


def _check(rows, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"affine: bits must be 1 to 8, got {bits=}")
    if not isinstance(rows, jax.core.Tracer) and not bool(jnp.isfinite(rows).all()):
        raise ValueError("affine: weights must be finite, got NaN or infinity")


def min_max(
    rows: Float[Array, "N K"], *, bits: int, group: int, symmetric: bool = False, shrink=1.0
) -> tuple[Float[Array, "N G"], Float[Array, "N G"] | None]:
    """Scale and zero (in codes; None if symmetric) of the grid from the least to the greatest weight.

    shrink: factors on the range, broadcast against [N, G]. The range always holds 0, so that a whole zero
    code serves it (Any-Precision dossier 2.5: what GPTQ does).
    """
    g, _ = grouped(rows.astype(jnp.float32), group)
    if symmetric:
        half = 2.0 ** (bits - 1) - 1 if bits > 1 else 0.5
        return jnp.maximum(jnp.abs(g).max(-1) * shrink / half, TINY), None
    low, high = jnp.minimum(g.min(-1), 0) * shrink, jnp.maximum(g.max(-1), 0) * shrink
    scale = jnp.maximum((high - low) / (2**bits - 1), TINY)
    return scale, jnp.round(-low / scale)


def quantize(
    w: Float[Array, "K N"], *, bits: int, group: int, symmetric: bool = False, zero_code: bool = True
) -> Affine:
    """Round to nearest between each group's least and greatest weight."""
    _check(w, bits)
    scale, zero = min_max(w.T, bits=bits, group=group, symmetric=symmetric)
    return encode(w.T, scale, zero, bits=bits, group=group, dtype=w.dtype, zero_code=zero_code)
