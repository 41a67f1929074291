"""What both Triton kernels are made of: the tile, masked loads, scales and zero points."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dequant_gemm.reference import OUTPUTS_PER_STEP
from pallas_kernels.words import CODES_PER_BLOCK, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """m, n: rows of x and outputs a program; k: inputs a step; split: programs that share the sum over K."""

    m: int
    n: int
    k: int
    split: int = 1
    num_warps: int = 4
    num_stages: int = 4


def tile_range(tile_index, size: int) -> jax.Array:
    """The indices of a tile."""
    return tile_index * size + jnp.arange(size, dtype=jnp.int32)


def over_part(step: Callable[..., Any], start: Callable[..., Any], steps: int, split: int) -> Any:
    """The loop over this program's part of the steps; start: what it begins with, of the first step."""
    each = pl.cdiv(steps, split)
    first = 0 if split == 1 else pl.program_id(2) * each
    end = steps if split == 1 else jnp.minimum(first + each, steps)
    return lax.fori_loop(first, end, step, start(first))


def inside(index: jax.Array, size: int, tile: int) -> jax.Array | None:
    """Which indices are real; None where tiles fill the axis, so that nothing is compared."""
    return index < size if size % tile else None


def both(rows, columns, shape: tuple[int, ...]) -> jax.Array | None:
    """What is real in both axes; None for all."""
    if rows is None and columns is None:
        return None
    real = jnp.ones(shape, bool) if rows is None else jnp.broadcast_to(rows[:, None], shape)
    return real if columns is None else real & jnp.broadcast_to(columns[None, :], shape)


def load(ref, index: tuple, real=None) -> jax.Array:
    """Zero where not real (None: all is)."""
    other = None if real is None else jnp.zeros((), ref.dtype)
    return plt.load(ref.at[_alike(index)], mask=real, other=other)


def store(ref, value, n, m, real) -> None:
    """Into this program's part of the output [split, M, N]."""
    part = pl.program_id(2)
    plt.store(ref.at[_alike((part, m, n))], value, mask=real)


def _alike(index: tuple) -> tuple:
    """Indices of one shape."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    return tuple(i if jnp.ndim(i) == 0 else jnp.broadcast_to(i, shape) for i in index)


def _code(ref, g, n, real) -> jax.Array:
    """uint32 codes of a packed array [G, N / 32, bits], at groups g and outputs n."""
    out, at = None, 0
    within = lax.rem(n, CODES_PER_BLOCK)
    for p in parts(ref.shape[-1]):
        word = load(ref, (g, lax.div(n, CODES_PER_BLOCK), at + lax.div(within, 32 // p)), real)
        field = (word >> (p * lax.rem(within, 32 // p)).astype(jnp.uint32)) & (2**p - 1)
        out = field if out is None else (out << p) | field
        at += p
    assert out is not None
    return out


def scale_at(scale_ref, step_ref, where: tuple, real) -> jax.Array:
    """float32 scales of groups and outputs."""
    g, n = where
    if step_ref is None:
        return load(scale_ref, (g, n), real).astype(jnp.float32)
    step = load(step_ref, (lax.div(n, OUTPUTS_PER_STEP), g), real).astype(jnp.float32)
    return _code(scale_ref, g, n, real).astype(jnp.int32).astype(jnp.float32) * step


def zero_at(zero_ref, where: tuple, real, bits: int) -> jax.Array:
    """float32 zero points of groups and outputs, in units of codes."""
    g, n = where
    if zero_ref is None:
        return jnp.full(jnp.shape(n), 2.0 ** (bits - 1), jnp.float32)
    if zero_ref.dtype == jnp.uint32:
        return _code(zero_ref, g, n, real).astype(jnp.int32).astype(jnp.float32)
    return load(zero_ref, (g, n), real).astype(jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [n, k] times b [m, k], whole numbers or floats of 16 bits, summed in 32 bits."""
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=kind)
