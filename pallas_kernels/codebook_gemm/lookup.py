"""Levels in registers: tables of at most 16 numbers of 16 bits, looked up four codes an instruction (Triton).

The lower bytes of 8 levels fill two registers, the upper ones two more. The instruction `prmt` takes the
bytes of two registers that four cells of 3 bits name; a cell's fourth bit chooses between two such halves of
a table. Bytes become numbers again two at a time.

Letters: R rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.assembly import assemble
from pallas_kernels.codebook_gemm.cells import Instructions, plain_choose

MOST_BITS = 4  # of codes that are looked up in registers
CHOOSE = 0xE4  # of lop3: (a & mask) | (b & ~mask)
FIRST_PAIR, SECOND_PAIR = 0x6240, 0x7351  # of (lower bytes, upper bytes)


def byte_tables(
    table_ref, rows: jax.Array, bits: int, dtype, *, shape: tuple[int, int]
) -> list[list[jax.Array]]:
    """Registers of each row's levels, rounded to `dtype`, laid along the second axis of `shape`.

    table_ref: flat.

    Of each half of the table: lower bytes of levels 0-3 and 4-7, upper bytes of 0-3 and 4-7.
    """
    R, words = rows.size, 2 if bits <= 3 else 4
    block = (R, words, 4)
    entry = 4 * lax.broadcasted_iota(jnp.int32, block, 1) + lax.broadcasted_iota(jnp.int32, block, 2)
    row = lax.broadcast_in_dim(rows, block, (0,))
    # Fewer than 8 levels are repeated.
    levels = plgpu.load(table_ref.at[(row << bits) + (entry & jnp.int32(2**bits - 1))]).astype(dtype)
    number = lax.bitcast_convert_type(levels, jnp.uint16).astype(jnp.uint32)
    place = jnp.uint32(8) * lax.broadcasted_iota(jnp.uint32, block, 2)
    lower = jnp.sum((number & jnp.uint32(255)) << place, axis=2, dtype=jnp.uint32)
    upper = jnp.sum((number >> jnp.uint32(8)) << place, axis=2, dtype=jnp.uint32)
    registers = zip(*(_columns(half, words) for half in (lower, upper)), strict=True)
    wide = [[lax.broadcast_in_dim(r, shape, (0,)) for r in pair] for pair in registers]
    return [[*(w[0] for w in half), *(w[1] for w in half)] for half in (wide[:2], wide[2:]) if half]


def pairs(
    selectors: tuple[jax.Array, ...], table: list[list[jax.Array]], *, interpret: bool
) -> list[jax.Array]:
    """The levels of eight cells, two of 16 bits a word: of cells 0 and 2, 1 and 3, 4 and 6, 5 and 7."""
    permute = instructions(interpret).permute
    found = []
    for four in range(2):
        lower_and_upper = []
        for i in (0, 2):
            first, *second = (permute(half[i], half[i + 1], selectors[four]) for half in table)
            lower_and_upper.append(permute(first, second[0], selectors[2 + four]) if second else first)
        lower, upper = lower_and_upper
        found += [permute(lower, upper, pair) for pair in (FIRST_PAIR, SECOND_PAIR)]
    return found


def instructions(interpret: bool) -> Instructions:
    """Those of Triton."""
    permute = functools.partial(byte_permute, interpret=interpret)
    return Instructions(permute, plain_choose if interpret else choose)


def byte_permute(a: jax.Array, b: jax.Array, selector: jax.Array | int, *, interpret: bool) -> jax.Array:
    """The instruction prmt.b32: byte i of the result is what nibble i of the selector names."""
    if interpret:
        return _byte_permute(a, b, selector)
    if isinstance(selector, int):
        found = assemble(f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", a, b, dtype=jnp.int32)
    else:
        found = assemble("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", a, b, selector, dtype=jnp.int32)
    return lax.bitcast_convert_type(found, jnp.uint32)


def choose(a: jax.Array, b: jax.Array | int, mask: int) -> jax.Array:
    """The bits of `a` in the mask, those of `b` elsewhere, as one instruction; the interpreter has none."""
    other = jnp.full_like(a, b) if isinstance(b, int) else b
    found = assemble(f"lop3.b32 $0, $1, $2, {mask:#x}, {CHOOSE:#x};", "=r,r,r", a, other, dtype=jnp.int32)
    return lax.bitcast_convert_type(found, jnp.uint32)


def _byte_permute(a: jax.Array, b: jax.Array, selector: jax.Array | int) -> jax.Array:
    """`byte_permute` without the instruction."""
    selector = jnp.full(a.shape, selector, jnp.uint32) if isinstance(selector, int) else selector
    of_bytes, of_names = (jnp.arange(0, 32, by, dtype=jnp.uint32)[:, None, None] for by in (8, 4))
    given = jnp.concatenate([(word[None] >> of_bytes) & jnp.uint32(255) for word in (a, b)])
    name = (selector[None] >> of_names[:4]) & jnp.uint32(15)
    byte = jnp.take_along_axis(given, (name & jnp.uint32(7)).astype(jnp.int32), axis=0)
    sign = (byte >> jnp.uint32(7)) * jnp.uint32(255)
    return jnp.sum(jnp.where(name < 8, byte, sign) << of_bytes, axis=0, dtype=jnp.uint32)


def _columns(x: jax.Array, count: int) -> list[jax.Array]:
    return [c.reshape(c.shape[0]) for c in lax.split(x, (1,) * count, axis=1)]
