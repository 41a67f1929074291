"""Triton kernel for a few rows of x, of any float type: whole numbers times bytes of words (`int8`).

For each output and column of the product, after each step along K, in float32,

    total += scale (unit product + start - zero point sum of x)

Columns are added up at the end. Bytes go from shared memory to the tensor cores through one instruction for
four of them and field. Scales, zero points and what else the end of a step needs are loaded a step before.
The product is exact but for x, of which 20 bits or more below the greatest of a step are kept. An infinite
activation gives NaN where the reference may give infinity, and so may one above 2**100.

Checked: A (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0; h100, a100, l4). Never run on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels.assembly import assemble, fma
from pallas_kernels.compat import output
from pallas_kernels.dequant_gemm import int8
from pallas_kernels.dequant_gemm.triton_parts import (
    Tile,
    both,
    dot,
    inside,
    load,
    over_part,
    scale_at,
    store,
    tile_range,
    zero_at,
)  # fmt: skip

MOST_TILES = 4  # of 8 columns a program


def rows_and_step(M: int, K: int, group_size: int, bits: int) -> tuple[int, int]:
    """Rows of x a program and inputs of a step: the longest step of those with the fewest columns."""
    most = pl.next_power_of_2(M)
    counts = {
        k: int8.tiles_of(most, k, group_size, K) for k in (32, 64, 128, 256) if k >= int8.least_step(bits)
    }
    k = max(k for k, count in counts.items() if count == min(counts.values()))
    while most > 1 and int8.tiles_of(most, k, group_size, K) > MOST_TILES:
        most //= 2
    return most, k


def dequant_gemm(
    x: Float[Array, "M K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    scale_step: Float[Array, "N_16 G"] | None,
    *,
    group_size: int,
    tile: Tile,
    interpret: bool,
) -> Float[Array, "split M N"]:
    """The product, in parts of the sum."""
    M, K = x.shape
    N, _, bits = codes.shape
    digits, factors = int8.in_digits(
        x, bits=bits, k=tile.k, group_size=group_size, m=tile.m, interpret=interpret
    )
    words = lax.bitcast_convert_type(codes, jnp.int8).reshape(N, -1)
    arrays = [a for a in (digits, factors, words, scale, zero_point, scale_step) if a is not None]
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tile=tile,
            bits=bits,
            group_size=group_size,
            groups=int8.groups_of_step(tile.k, group_size, K),
            has_zero=zero_point is not None,
            has_step=scale_step is not None,
            interpret=interpret,
        ),
        out_shape=output((tile.split, M, N), jnp.float32, *arrays),
        grid=(pl.cdiv(N, tile.n), pl.cdiv(M, tile.m), tile.split),
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="dequant_gemm_triton_few",
    )(*arrays)


def _kernel(
    *refs,
    tile: Tile,
    bits: int,
    group_size: int,
    groups: int,
    has_zero: bool,
    has_step: bool,
    interpret: bool,
):
    """Program (n, m, part): outputs by rows of x, over a part of the steps along K."""
    x_ref, factors_ref, words_ref, scale_ref, *rest, out_ref = refs
    zero_ref = rest.pop(0) if has_zero else None
    step_ref = rest.pop(0) if has_step else None
    steps, shape = factors_ref.shape[0], (tile.n, int8.COLUMNS)
    n, m = tile_range(pl.program_id(0), tile.n), pl.program_id(1)
    real_n = inside(n, out_ref.shape[2], tile.n)
    tiles = range(pl.cdiv(tile.m * int8.DIGITS * groups, int8.COLUMNS))
    columns = [tile_range(m * len(tiles) + j, int8.COLUMNS) for j in tiles]
    groups_of = [lax.div(tile_range(j, int8.COLUMNS), tile.m * int8.DIGITS)[None, :] for j in tiles]

    def ahead(i):
        """What the end of step i needs: long on its way, so asked for a step before."""
        i = jnp.minimum(i, steps - 1)
        first, last = lax.div(i * tile.k, group_size), scale_ref.shape[0] - 1
        where = [(jnp.minimum(first + h, last), n) for h in range(groups)]
        s = [scale_at(scale_ref, step_ref, at, real_n) for at in where]
        z = [zero_at(zero_ref, at, real_n, bits) for at in where]
        return s, z, [[load(factors_ref, (i, of, c)) for of in range(3)] for c in columns]

    def by_column(of_groups, j):
        """[n, 8] of what is [n] for each group."""
        out = of_groups[0][:, None]
        for h in range(1, groups):
            out = jnp.where(groups_of[j] >= h, of_groups[h][:, None], out)
        return out

    def step(i, carry):
        totals, (scales, zeros, factors) = list(carry[0]), carry[1]
        later = ahead(i + 1)
        accs = [jnp.zeros(shape, jnp.int32) for _ in tiles]
        for order, part in enumerate(int8.parts_of(bits)):
            for w, at in _fields(words_ref, n, real_n, i, part, bits, tile.k, interpret):
                for j in tiles:
                    x = load(x_ref, (order, columns[j][:, None], (i * tile.k + at)[None, :]))
                    accs[j] = accs[j] + dot(w, x)
        for j in tiles:
            of_column = [factor[None, :] for factor in factors[j]]
            start, of_zero, unit = (jnp.broadcast_to(factor, shape) for factor in of_column)
            codes = fma(accs[j].astype(jnp.float32), unit, start, interpret)
            codes = fma(by_column(zeros, j), of_zero, codes, interpret)
            totals[j] = fma(by_column(scales, j), codes, totals[j], interpret)
        return totals, later

    def start(first):
        return [jnp.zeros(shape, jnp.float32) for _ in tiles], ahead(first)

    totals, _ = over_part(step, start, steps, tile.split)
    total = sum(totals).reshape(tile.n, int8.COLUMNS // tile.m, tile.m).sum(axis=1)
    m = tile_range(m, tile.m)
    real = both(real_n, inside(m, out_ref.shape[1], tile.m), total.shape)
    store(out_ref, total, n[:, None], m[None, :], real)


def _fields(words_ref, n, real_n, i, part: int8.Part, bits: int, k: int, interpret: bool):
    """Bytes of a part's fields in step i, and where their inputs are among the step's."""
    size = k * part.p // 8  # bytes of an output
    byte = jnp.arange(size, dtype=jnp.int32)
    within = byte
    if part.p < bits:
        of_block = 4 * part.p
        within = lax.div(byte, of_block) * (4 * bits) + 4 * part.word + lax.rem(byte, of_block)
    where = i * (k * bits // 8) + within
    real = both(real_n, inside(where, words_ref.shape[1], k * bits // 8), (n.shape[0], size))
    words = load(words_ref, (n[:, None], where[None, :]), real)
    fields = [_masked(words, 255 << part.p * f & 255, interpret) for f in range(8 // part.p)]
    if size >= 2 * int8.LEAST_BYTES:
        return [(w, j * size + byte) for j, w in enumerate(fields)]
    both_at = jnp.arange(2 * size, dtype=jnp.int32)
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return [(_beside(*pair), 2 * j * size + both_at) for j, pair in enumerate(pairs)]


def _beside(a: jax.Array, b: jax.Array) -> jax.Array:
    """Two arrays [n, k] as one [n, 2 k]."""
    both = jnp.concatenate([a[:, :, None], b[:, :, None]], axis=-1)
    return both.transpose(0, 2, 1).reshape(a.shape[0], -1)


def _masked(words: jax.Array, mask: int, interpret: bool) -> jax.Array:
    """(byte & mask) - 128, of the four bytes of a word at once."""
    if interpret:
        return (words & jnp.asarray(mask, jnp.uint8).astype(jnp.int8)) ^ jnp.int8(-128)
    asm = f"lop3.b32 $0, $1, {mask * 0x01010101:#x}, 0x80808080, 0x6A;"
    return assemble(asm, "=r,r", words, dtype=jnp.int8, pack=4)
