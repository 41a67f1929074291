"""The Triton kernel, for compute capability 8.0 and up: all modes by one loop over float16 operands.

    acc[rows, tokens] += w[rows, K] @ x[tokens, K].T        w float16, joined in registers from two bytes

In fp8 mode the operand is upper / 256, which is a float16: with `upper << 7` in place of the lower byte the
join gives just that, subnormals too, and `lower` is not read. Tokens are float8 numbers in 16 bits. So a GPU
without float8 tensor cores has this mode too, at half the bytes; one with them multiplies no faster than in
fp16 (the Mosaic kernel does). In traced mode a scalar in memory masks the loads of `lower`.

Checked, for jax 0.10.2 and 0.12: numbers in the interpreter, lowering; 0.12: compiled for h100, a100, l4 and
b200 without spills. Never run on a GPU.

Letters: M tokens, N outputs, K inputs, S parts that K is cut into.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import compat, tiles
from pallas_kernels.assembly import assemble
from pallas_kernels.nested_fp_gemm import ptx, reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of a block (powers of 2, at least 16), parts of K, warps and stages of the pipeline."""

    tokens: int
    rows: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


@tiles.measured("nested_fp_gemm triton")
def default_tile(M: int, N: int, K: int) -> Tile:
    """A guess, which no GPU has measured.

    Few tokens: narrow tiles and parts of K until two blocks a multiprocessor read at once.
    """
    if M <= 32:
        splits = 1
        while splits < 16 and splits * -(-N // 64) < 200 and K >= 1024 * splits:
            splits *= 2
        return Tile(tokens=16 if M <= 16 else 32, rows=64, depth=128, splits=splits)
    if M <= 64:
        return Tile(tokens=64, rows=64, depth=64)
    return Tile(tokens=128, rows=128, depth=64, warps=8, stages=3)


def why_not(x, upper, lower, switch=None) -> str | None:
    """Why these arrays are not taken, None if they are."""
    if lower is not None and x.dtype not in (jnp.float16, jnp.bfloat16):  # fp8 makes float8 of any
        return f"takes activations of 16 bits, not {x.dtype}"
    if max(upper.size, x.shape[-1] and x.size // x.shape[-1] * upper.shape[0]) >= 2**31:
        return "takes matrices below 2**31 numbers"
    return None if x.size and upper.size else "takes at least one token, input and output"


def nested_fp_gemm(
    x: Float[Array, "M K"],
    upper: UInt8[Array, "N K"],
    lower: UInt8[Array, "N K"] | None,
    switch: Int32[Array, ""] | None = None,
    *,
    mode: str,
    shift: int = 0,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float32[Array, "M N"]:
    """The product, in the mode that is named or, where it is "traced", that `switch` says (0 fp16)."""
    (M, K), N = x.shape, upper.shape[0]
    tile = default_tile(M, N, K) if tile is None else tile
    by_token = []  # factors
    if mode != "fp16":
        x8, scale = reference.quantize_tokens(x)
        factor = np.float32(2.0**shift) / scale[:, 0]
        if mode == "fp8":
            x = x8.astype(jnp.float16)
        else:
            x = jnp.where(switch == 0, x, x8.astype(x.dtype))
            factor = jnp.where(switch == 0, np.float32(2.0**shift), factor)
        by_token = [factor]
    steps = -(-K // (tile.depth * tile.splits))  # of each part
    padded = (-(-M // tile.tokens) * tile.tokens, steps * tile.splits * tile.depth)
    x = jnp.pad(x, ((0, padded[0] - M), (0, padded[1] - K)))
    by_token = [jnp.pad(factor, (0, padded[0] - M)) for factor in by_token]
    arrays = [x, upper, *([] if mode == "fp8" else [lower]), *by_token]
    arrays += [] if switch is None else [switch.reshape(1)]
    n_tiles = -(-N // tile.rows)
    parts = pl.pallas_call(
        functools.partial(_kernel, steps=steps, mode=mode, shift=shift, tile=tile, interpret=interpret),
        out_shape=compat.output((tile.splits, padded[0], n_tiles * tile.rows), jnp.float32, *arrays),
        grid=(n_tiles, padded[0] // tile.tokens, tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"nested_fp_gemm_{mode}",
    )(*arrays)
    y = parts[0] if tile.splits == 1 else parts.sum(axis=0)
    return y[:M, :N]


def _kernel(x_ref, upper_ref, *refs, steps: int, mode: str, shift: int, tile: Tile, interpret: bool):
    *others, out_ref = refs  # lower, factors by token, switch: those that the mode has
    n, m, part = (pl.program_id(axis) for axis in range(3))
    N, K = upper_ref.shape
    rows = pl.ds(n * tile.rows, tile.rows)
    tokens = pl.ds(m * tile.tokens, tile.tokens)
    nested = others[2][0] == 0 if mode == "traced" else None
    whole = N % tile.rows == 0 and K % (tile.depth * tile.splits) == 0

    def load(ref, k, only=None):
        """A tile of bytes, zeros where there are none or `only` says no."""
        if whole and only is None:
            return ref[rows, pl.ds(k, tile.depth)]
        if whole:
            where, mask = (rows, pl.ds(k, tile.depth)), None
        else:
            row = n * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)[:, None]
            column = k + jnp.arange(tile.depth, dtype=jnp.int32)[None, :]
            where, mask = (row, column), (row < N) & (column < K)
        if only is not None:
            only = jnp.broadcast_to(only, (tile.rows, tile.depth))
            mask = only if mask is None else mask & only
        return plgpu.load(ref.at[where], mask=mask, other=jnp.uint8(0))

    def step(i, acc):
        k = (part * steps + i) * tile.depth
        upper = load(upper_ref, k)
        lower = upper << jnp.uint8(7)  # of fp8
        if mode == "fp16":
            lower = load(others[0], k)
        elif mode == "traced":
            lower = jnp.where(nested, load(others[0], k, nested), lower)
        w = _join(upper, lower, interpret=interpret).astype(x_ref.dtype)
        x = x_ref[tokens, pl.ds(k, tile.depth)]
        return acc + plgpu.dot(w, x, trans_b=True)

    acc = lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.tokens), jnp.float32))
    if mode != "fp16":
        acc = acc * others[mode == "traced"][tokens][None, :]
    elif shift:
        acc = acc * np.float32(2.0**shift)
    out_ref[part, tokens, rows] = acc.T


def _join(upper, lower, *, interpret: bool):
    """Bytes of weights as the exact float16."""
    if interpret:
        return lax.bitcast_convert_type(reference.join(upper, lower), jnp.float16)
    return assemble(ptx.JOIN, ptx.CONSTRAINTS, upper, lower, dtype=jnp.float16, pack=4)
