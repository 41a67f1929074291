"""Triton kernels: compute capability 8.0 and up, every width, any N, K and number of rows.

Up to 4 rows of x, 8 of float32, are `triton_few`'s. For more, of float16 and bfloat16, the weight's tile is
the first operand here, too, so that a tile of 8 rows of x costs no more than it must (y^T = W x^T). Words
become pairs of 16-bit numbers, offset + code, exactly (`decode`); for a step along K, of one group,

    total += scale (product - (offset + zero point) sums of x over the step)

in float32, with sums by XLA. Where a step of 64 inputs has several groups, zero point and scale are applied
to each weight instead, in float32, and the result is rounded to the type of x, as in the reference. An
infinite activation gives NaN where the reference may give infinity.

The sum over K is cut into `Tile.split` parts where N is small; XLA adds the parts in a fixed order.
Packed zero points and second-order scales are decoded in the kernel.

Checked: A (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0; h100, a100, l4). Never run on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels import tiles
from pallas_kernels.assembly import assemble, fma
from pallas_kernels.choice import target_capability
from pallas_kernels.compat import output
from pallas_kernels.dequant_gemm import int8, triton_few
from pallas_kernels.dequant_gemm.decode import (
    Fields,
    digits,
    in_order_of_pairs,
    pair,
    plain_and_or,
    spread,
    unit_size,
    units_of_block,
    whole_code,
    word_at,
)  # fmt: skip
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
from pallas_kernels.words import parts

FEW_ROWS = 4  # of 16 bits: more are faster as they are than as digits
FEW_ROWS_FLOAT32 = 8
UNIT = 8  # codes of a unit where groups are short
LEAST_K = 64  # inputs of a step: 8 units, 16 numbers a product of tensor cores


@tiles.measured("dequant_gemm triton")
def default_tile(
    M: int, N: int, K: int, group_size: int, dtype, bits: int, capability: tuple[int, int]
) -> Tile:
    """Guesses: no GPU has measured them."""
    few = _few(M, dtype)
    if few:  # two warps, which take the tensor cores of a warp and not of four
        m, k = triton_few.rows_and_step(M, K, group_size, bits)
        two = int8.tiles_of(m, k, group_size, K) == 2  # of x, loaded once for the outputs; more would spill
        n, num_warps, num_stages = 128 if two and N >= 4096 else 64, 2, 4
    elif M <= 16:
        m, n, k, num_warps, num_stages = 8 if M <= 8 else 16, 64, _step(128, K, group_size), 2, 4
    elif M <= 64:
        m, n, k, num_warps, num_stages = pl.next_power_of_2(M), 64, _step(128, K, group_size), 4, 3
    else:
        m, n, k, num_warps, num_stages = 128, 128, _step(128, K, group_size), 8, 3
    cores = 132 if capability >= (9, 0) else 108
    programs = pl.cdiv(M, m) * pl.cdiv(N, n)
    split = max(1, min((8 if few else 4) * cores // programs, pl.cdiv(K, k) // (2 if few else 4)))
    return Tile(m=m, n=n, k=k, split=split, num_warps=num_warps, num_stages=num_stages)


def _few(M: int, dtype) -> bool:
    """Whether the kernel for a few rows takes so many."""
    return M <= (FEW_ROWS_FLOAT32 if jnp.dtype(dtype) == jnp.float32 else FEW_ROWS)


def _step(most: int, K: int, group_size: int) -> int:
    """The widest step of at most `most` inputs that a group is a multiple of, at least 64."""
    k = min(most, max(LEAST_K, pl.next_power_of_2(K)))
    while group_size < K and group_size % k and k > LEAST_K:
        k //= 2
    return k


def _unit_size(bits: int, k: int, group_size: int, K: int) -> int:
    """Codes of a unit, in steps of k inputs."""
    return unit_size(bits) if _by_group(k, group_size, K) and k >= 8 * unit_size(bits) else UNIT


def _by_group(k: int, group_size: int, K: int) -> bool:
    """Whether all inputs of a step are of one group."""
    return group_size >= K or group_size % k == 0


def why_not(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    scale_step: Float[Array, "N_16 G"] | None,
    *,
    group_size: int,
) -> str | None:
    """Why it does not take these, None if it does."""
    K = x.shape[-1]
    if not x.size or not codes.size:
        return "takes no empty arrays"
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return f"takes float32, float16 and bfloat16, not {x.dtype}"
    if x.dtype == jnp.float32 and x.size > FEW_ROWS_FLOAT32 * K:
        return f"takes at most {FEW_ROWS_FLOAT32} rows of float32"
    if group_size < K and group_size % UNIT:
        return f"takes groups of a multiple of {UNIT}, or one group"
    if codes.size >= 2**31:
        return "takes fewer than 2**31 words"
    return None


def dequant_gemm(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    scale_step: Float[Array, "N_16 G"] | None,
    *,
    group_size: int,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "*B N"]:
    """The product by one of the two kernels."""
    lead, K = x.shape[:-1], x.shape[-1]
    N, blocks, bits = codes.shape
    x = x.reshape(-1, K)
    M = x.shape[0]
    if tile is None:
        tile = default_tile(M, N, K, group_size, x.dtype, bits, target_capability() or (9, 0))
    run = triton_few.dequant_gemm if _few(M, x.dtype) else _many_rows
    operands = (x, codes, scale, zero_point, scale_step)
    y = run(*operands, group_size=min(group_size, K), tile=tile, interpret=interpret)
    y = y[0] if tile.split == 1 else y.sum(axis=0)
    return y.reshape(*lead, N)


def _many_rows(
    x, codes, scale, zero_point, scale_step, *, group_size: int, tile: Tile, interpret: bool
) -> Float[Array, "split M N"]:
    """The product of more rows, in parts of the sum."""
    M, K = x.shape
    N, blocks, bits = codes.shape
    unit = _unit_size(bits, tile.k, group_size, K)
    padded = pl.cdiv(K, 4 * unit) * 4 * unit
    steps = jnp.pad(x, ((0, 0), (0, -K % tile.k))).astype(jnp.float32).reshape(M, -1, tile.k)
    sums = steps.sum(axis=-1)
    x = in_order_of_pairs(x, padded, unit)
    words = codes.reshape(N, blocks * bits)  # a row's words are neighbours
    arrays = [a for a in (x, words, sums, scale, zero_point, scale_step) if a is not None]
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tile=tile,
            bits=bits,
            group_size=padded if group_size == K else group_size,
            has_zero=zero_point is not None,
            has_step=scale_step is not None,
            interpret=interpret,
        ),
        out_shape=output((tile.split, M, N), jnp.float32, *arrays),
        grid=(pl.cdiv(N, tile.n), pl.cdiv(M, tile.m), tile.split),
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="dequant_gemm_triton",
    )(*arrays)


def _kernel(*refs, tile: Tile, bits: int, group_size: int, has_zero: bool, has_step: bool, interpret: bool):
    """Program (n, m, part): outputs by rows of x, over a part of the steps along K."""
    x_ref, words_ref, sums_ref, scale_ref, *rest, out_ref = refs
    zero_ref = rest.pop(0) if has_zero else None
    step_ref = rest.pop(0) if has_step else None
    M, K = x_ref.shape
    dtype = x_ref.dtype
    unit = _unit_size(bits, tile.k, group_size, K)
    units = tile.k // unit
    n = tile_range(pl.program_id(0), tile.n)
    m = tile_range(pl.program_id(1), tile.m)
    real_n, real_m = inside(n, out_ref.shape[2], tile.n), inside(m, M, tile.m)
    by_group = _by_group(tile.k, group_size, K)
    and_or = plain_and_or if interpret else _and_or

    def zeros():
        return jnp.zeros((tile.n, tile.m), jnp.float32)

    def times_x(w, i, j, acc):
        """acc + pair j of this step's weights times its activations."""
        at = jnp.arange(2 * units, dtype=jnp.int32)
        k = i * tile.k + 8 * j + lax.div(at, 8) * (4 * unit) + lax.rem(at, 8)
        x = load(x_ref, (m[:, None], k[None, :]), both(real_m, inside(k, K, tile.k), (tile.m, 2 * units)))
        return acc + dot(_halves(w, dtype), x)

    def step_of_group(i, total):
        g = jnp.minimum(lax.div(i * tile.k, group_size), scale_ref.shape[0] - 1)  # behind K x is 0
        s = scale_at(scale_ref, step_ref, (g, n), real_n)[:, None]
        z = zero_at(zero_ref, (g, n), real_n, bits)[:, None]
        fields = _unit(words_ref, n, i, units, real_n, bits, unit)
        accs = {digit: zeros() for digit in digits(bits, dtype)}
        for j in range(unit // 2):
            for digit in accs:
                accs[digit] = times_x(pair(fields, bits, j, digit, and_or), i, j, accs[digit])
        sums = load(sums_ref, (m, jnp.full_like(m, i)), real_m)[None, :]
        less = z + sum(float(digit.offset * 2**digit.low) for digit in accs)
        acc = sum(acc * float(2**digit.low) if digit.low else acc for digit, acc in accs.items())
        return fma(s, fma(less, -sums, acc, interpret), total, interpret)

    def step_of_units(i, total):
        first = (i * tile.k + jnp.arange(units, dtype=jnp.int32) * unit)[None, :]
        where = _outer(jnp.minimum(lax.div(first, group_size), scale_ref.shape[0] - 1), n)
        real = both(real_n, None, where[0].shape)
        s = scale_at(scale_ref, step_ref, where, real)
        z = zero_at(zero_ref, where, real, bits)
        fields = _unit(words_ref, n, i, units, real_n, bits, unit)
        for j in range(unit // 2):
            w = _rounded(_floats(whole_code(fields, bits, j), z, s), dtype, interpret)
            total = times_x(w, i, j, total)
        return total

    step = step_of_group if by_group else step_of_units
    total = over_part(step, lambda _: zeros(), pl.cdiv(K, tile.k), tile.split)
    store(out_ref, total, n[:, None], m[None, :], both(real_n, real_m, total.shape))


def _outer(g: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Groups [1, units] by outputs [n], as two indices [n, units]."""
    shape = (n.shape[0], g.shape[1])
    return jnp.broadcast_to(g, shape), jnp.broadcast_to(n[:, None], shape)


def _unit(words_ref, n, i, units: int, real_n, bits: int, unit: int) -> Fields:
    """Fields [n, units] of the units of step i of some rows."""
    u = tile_range(i, units)
    per_block = units_of_block(unit)
    real_u = inside(u, words_ref.shape[1] // bits * per_block, units)
    real = both(real_n, real_u, (n.shape[0], units))
    t = lax.rem(u, per_block)
    out, at = [], 0
    for p in parts(bits):
        if p == bits:  # the same places, said so that the compiler sees neighbours
            places = word_at(p, u, unit)
        else:
            block = lax.div(u, per_block) * bits + at
            places = tuple(block + place for place in word_at(p, t, unit))
        words = tuple(load(words_ref, (n[:, None], place[None, :]), real) for place in places)
        out.append(spread(words, p, t[None, :], unit))
        at += p
    return tuple(out)


def _and_or(a: jax.Array, mask: int, b: jax.Array | int) -> jax.Array:
    """(a & mask) | b in one instruction: left to itself, ptxas takes two where b is a constant."""
    b = jnp.full_like(a, b) if isinstance(b, int) else b
    a, b = (lax.bitcast_convert_type(v, jnp.int32) for v in (a, b))
    out = assemble(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", "=r,r,r", a, b, dtype=jnp.int32)
    return lax.bitcast_convert_type(out, jnp.uint32)


def _floats(v, z, s) -> tuple[jax.Array, jax.Array]:
    """Pairs of codes to two float32 numbers, (code - z) * s."""
    low = ((v << 15) & 0x007F8000) | 0x43800000  # 256 + code
    high = ((v >> 1) & 0x007F8000) | 0x43800000
    low, high = (lax.bitcast_convert_type(w, jnp.float32) - 256.0 for w in (low, high))
    return (low - z) * s, (high - z) * s


def _rounded(pair_of_floats, dtype, interpret: bool) -> jax.Array:
    """Two float32 numbers to a pair of 16-bit ones."""
    low, high = pair_of_floats
    if interpret:
        return _join(low.astype(dtype), high.astype(dtype))
    kind = "f16x2" if dtype == jnp.float16 else "bf16x2"
    out = assemble(f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f", low, high, dtype=jnp.int32)
    return lax.bitcast_convert_type(out, jnp.uint32)


def _split(v, dtype) -> tuple[jax.Array, jax.Array]:
    low, high = (v & 0xFFFF).astype(jnp.uint16), (v >> 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(low, dtype), lax.bitcast_convert_type(high, dtype)


def _join(low, high) -> jax.Array:
    low, high = (lax.bitcast_convert_type(h, jnp.uint16).astype(jnp.uint32) for h in (low, high))
    return low | (high << 16)


def _halves(v, dtype) -> jax.Array:
    """Pairs [n, units] as numbers [n, 2 units]."""
    low, high = _split(v, dtype)
    return jnp.concatenate([low[:, :, None], high[:, :, None]], axis=-1).reshape(v.shape[0], -1)
