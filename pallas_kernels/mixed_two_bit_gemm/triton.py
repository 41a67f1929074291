"""The Triton kernels, for compute capability 8.0 and up: of columns of 2 and 4 bits, and of single weights.

A word of codes becomes pairs of 16-bit floats, offset + code, by `decode`. Words of a row are neighbours
along the sum of a tensor core's product, so that each of its lanes takes whole words. Scales are applied to

sums, for one or two tokens (`_by_column`). Eight words of a row, each against its own inputs alone, are the
eight columns that a tensor core's product has at least; in float32, columns added up at the end:

    acc[output, word] = start[word] + sum of (offset + code) x over the word's inputs
    total[output, word] += scale[output, word] (acc - zero point[output, word] sum of x over them)

weights, for more tokens (`_by_weight`), in the type of x. At 2 bits a multiply-add that takes the offset away
rounds once, and zero points are a product of their own; at 4 bits they are subtracted before, exactly:

    acc[output, token] += (scale code)[output, inputs] @ x - (scale zero point)[output, words] @ sums of x
    acc[output, token] += (scale (code - zero point))[output, inputs] @ x

Scales and zero points of the next words are decoded while these are multiplied ("asynchronous
dequantization"): they wait for no code, and go round the loop as numbers that are ready. An infinite
activation gives NaN where the reference may give infinity.

Checked, for jax 0.10.2 and 0.12: numbers in the interpreter, lowering; 0.12: compiled for h100, a100, l4 and
b200 without spills. Never run on a GPU.

Letters: M tokens, N outputs, n words of a row (of 16 codes at 2 bits, of 8 at 4), S parts that n is cut into.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import compat, tiles
from pallas_kernels.assembly import assemble, fma
from pallas_kernels.mixed_two_bit_gemm import decode, reference
from pallas_kernels.mixed_two_bit_gemm.decode import Place, places

COLUMNS = 8  # of a tensor core's product
OUTLIERS = 64  # that a turn of the sparse kernel takes
SPARSE_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of a block: tokens, 1, 2 or 8 and more; rows, a multiple of 16; words of a turn, 8 with 1 or 2
    tokens; all powers of 2. Parts of the words, warps and stages.
    """

    tokens: int
    rows: int = 64
    words: int = COLUMNS
    splits: int = 1
    warps: int = 1
    stages: int = 4


@tiles.measured("mixed_two_bit_gemm triton")
def default_tile(M: int, N: int, W: int) -> Tile:
    """A guess, which no GPU has measured: parts of the words until eight warps a multiprocessor run."""
    if M > 16:
        tokens = 32 if M <= 32 else 64 if M <= 64 else 128
        return Tile(tokens=tokens, warps=4, stages=2 if tokens == 128 else 3)  # fits 99 KiB of an L4
    splits, tokens = 1, 8 if M <= 8 else 16
    rows = 64 if M <= 2 else 32
    while splits < 16 and splits * -(-N // rows) < 1000 and W >= 512 * splits:
        splits *= 2
    if M <= 2:
        return Tile(tokens=M, splits=splits)
    return Tile(tokens=tokens, rows=rows, words=16, splits=splits)


def why_not(x, *weight, group4: int) -> str | None:
    """Why these arrays are not taken, None if they are."""
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        return f"takes activations of 16 bits, not {x.dtype}"
    if group4 % 8:
        return f"takes 4-bit groups of whole words, not {group4=}"
    return None if x.size else "takes at least one token"


def mixed_two_bit_gemm(
    x: Float[Array, "M W"],
    two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place,
    *, group4: int, tile: Tile | None = None, interpret: bool = False,
) -> Float32[Array, "M N"]:  # fmt: skip
    """The product: of columns in groups, and of the outliers if there are."""
    M, W = x.shape
    N = (four if two is None else two).shape[0]
    tile = default_tile(M, N, W) if tile is None else tile
    padded, n_tiles = -(-M // tile.tokens) * tile.tokens, -(-N // tile.rows)
    n2 = 0 if two is None else two.shape[1]
    parts, arrays = [], []
    for bits, inputs, words, metadata in (
        (2, x[:, : 16 * n2], two, (step, zero_point, step_zero, step_scale)),
        (4, x[:, 16 * n2 :], four, (four_scale, four_zero_point)),
    ):
        if words is not None:
            own = [*_ordered(inputs, bits, padded, tile), words.reshape(N, -1), *metadata]
            parts.append((bits, len(own)))
            arrays += own
    y = pl.pallas_call(
        functools.partial(
            _kernel, parts=parts, group4=group4, N=N, tile=tile, dtype=x.dtype, interpret=interpret
        ),
        out_shape=compat.output((tile.splits, padded, n_tiles * tile.rows), jnp.float32, *arrays),
        grid=(n_tiles, padded // tile.tokens, tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="mixed_two_bit_gemm",
    )(*arrays)
    y = (y[0] if tile.splits == 1 else y.sum(axis=0))[:M, :N]
    return y if outlier is None else y + sparse(x, outlier, place, interpret=interpret)[:, :N]


def _ordered(x, bits: int, tokens: int, tile: Tile) -> tuple[jax.Array, ...]:
    """Inputs as the kernel of a tile takes them, with what it needs to know of their sums."""
    x = jnp.pad(x, ((0, tokens - x.shape[0]), (0, 0)))
    x = decode.by_word(x, bits, tile.words * tile.splits)
    if tile.tokens < COLUMNS:
        return decode.columns(x)
    sums = (decode.sums_in_two(x).reshape(tokens, -1),) if bits == 2 else ()
    x = x.reshape(tokens, -1, tile.words, *x.shape[2:])  # [tokens, turn, word, half, pair]
    return x.transpose(0, 1, 4, 2, 3).reshape(tokens, -1), *sums


def _kernel(*refs, parts, group4: int, N: int, tile: Tile, dtype, interpret: bool):
    """Program (outputs, tokens, part): the columns of one width after those of the other."""
    *inputs, out_ref = refs
    by_column = tile.tokens < COLUMNS
    n, m, part = (pl.program_id(axis) for axis in range(3))
    of_n = pl.ds(n * tile.rows, tile.rows)
    total: Any
    if by_column:
        total = (jnp.zeros((tile.rows, COLUMNS), jnp.float32),) * tile.tokens
    else:
        total = jnp.zeros((tile.rows, tile.tokens), jnp.float32)
    for bits, count in parts:
        own, inputs = inputs[:count], inputs[count:]
        add = _by_column if by_column else _by_weight
        total = add(total, own, n, m, part, bits, group4, N, tile, dtype, interpret)
    if not by_column:
        out_ref[part, pl.ds(m * tile.tokens, tile.tokens), of_n] = total.T
        return
    for t, of_token in enumerate(total):
        out_ref[part, m * tile.tokens + t, of_n] = of_token.sum(axis=1)


def _by_column(totals, refs, n, m, part, bits: int, group4: int, N: int, tile: Tile, dtype, interpret: bool):
    """Totals [rows, words] of each token, with those of the block's columns of one width."""
    x_ref, start_ref, sums_ref, words_ref, *metadata = refs
    column = jnp.arange(COLUMNS, dtype=jnp.int32)
    own = jnp.where(column[:, None] == column[None, :], -1, 0).astype(jnp.int32)
    shape = (tile.rows, COLUMNS)

    def add(i, words, ready, totals):
        scale, zero = (jnp.broadcast_to(a, shape) for a in ready)
        at = pl.ds(i * COLUMNS, COLUMNS)
        tokens = [m * tile.tokens + t for t in range(tile.tokens)]
        accs = [jnp.broadcast_to(start_ref[token, at][None, :], shape) for token in tokens]
        inputs = [_apart(x_ref[token, at, :]) for token in tokens]
        for j, place in enumerate(places(bits, dtype)):
            w = _halves(_pair(words, place, interpret), dtype)
            for t, pairs in enumerate(inputs):
                accs[t] = accs[t] + _dot(w, _halves(pairs[j][None, :] & own, dtype))
        out = []
        for token, acc, total in zip(tokens, accs, totals, strict=True):
            sums = jnp.broadcast_to(sums_ref[token, at][None, :], shape)
            out.append(fma(scale, fma(zero, sums, acc, interpret), total, interpret))
        return tuple(out)

    def ready(scale, zero):
        return scale, zero

    return _over_words(add, ready, totals, words_ref, metadata, n, part, bits, group4, N, tile, interpret)


def _by_weight(acc, refs, n, m, part, bits: int, group4: int, N: int, tile: Tile, dtype, interpret: bool):
    """acc [rows, tokens] and the product with the block's columns of one width."""
    x_ref, *rest = refs
    sums_ref = rest.pop(0) if bits == 2 else None
    words_ref, *metadata = rest
    tokens = pl.ds(m * tile.tokens, tile.tokens)
    shape, size, of_pairs = (tile.rows, tile.words), 2 * tile.words, places(bits, dtype)

    def ready(scale, zero):
        """Pairs of the scale, and of the scale times the zero point, or at 4 bits of minus the zero point."""
        zero = zero - np.float32(2.0**bits)
        zero = zero * scale if bits == 2 else -zero
        return _twice(scale, dtype, interpret), _twice(zero, dtype, interpret)

    def add(i, words, ready, acc):
        scale, zero = (jnp.broadcast_to(a, shape) for a in ready)
        fma = functools.partial(_fma_pairs, dtype=dtype, interpret=interpret)
        one, nothing = (jnp.full(shape, _constant(v, dtype)) for v in (1.0, -0.0))
        offsets = {p.offset: jnp.full(shape, _constant(-float(p.offset), dtype)) for p in of_pairs}
        if bits == 2:
            less = {offset: fma(scale, minus, nothing) for offset, minus in offsets.items()}
        else:
            less = {offset: fma(zero, one, minus) for offset, minus in offsets.items()}
        for j, place in enumerate(of_pairs):
            w = _pair(words, place, interpret)
            if bits == 2:
                w = fma(w, scale, less[place.offset])
            else:  # first whole numbers, as the scale times 15 would be rounded more than the weight is
                w = fma(fma(w, one, less[place.offset]), scale, nothing)
            acc = acc + _dot(_halves(w, dtype), x_ref[tokens, pl.ds((i * len(of_pairs) + j) * size, size)])
        if bits == 4:
            return acc
        return acc + _dot(_halves(zero, dtype), sums_ref[tokens, pl.ds(i * size, size)])

    return _over_words(add, ready, acc, words_ref, metadata, n, part, bits, group4, N, tile, interpret)


def _over_words(
    add, ready, total, words_ref, metadata, n, part, bits: int, group4: int, N: int, tile: Tile, interpret
):  # fmt: skip
    """The loop: `total = add(turn, words, what is ready, total)`; of the next turn, `ready(scale, zero)`."""
    size = words_ref.shape[1]
    steps = -(-size // (tile.words * tile.splits))
    whole = N % tile.rows == 0 and size == steps * tile.splits * tile.words
    of_steps = _two_bit_steps if bits == 2 else functools.partial(_four_bit_steps, group4=group4)

    def steps_of(i):
        return ready(*of_steps(metadata, n, i, size, N, whole, tile, interpret))

    def turn(k, carry):
        total, now = carry
        i = part * steps + k
        if whole:
            words = words_ref[pl.ds(n * tile.rows, tile.rows), pl.ds(i * tile.words, tile.words)]
        else:
            row, column = _range(n, tile.rows)[:, None], _range(i, tile.words)[None, :]
            words = _load(words_ref, (row, column), (row < N) & (column < size))
        following = steps_of(jnp.minimum(i + 1, (part + 1) * steps - 1))  # ready when the next words are
        return add(i, words, now, total), following

    total, _ = lax.fori_loop(0, steps, turn, (total, steps_of(part * steps)))
    return total


def _two_bit_steps(refs, n, i, size: int, N: int, whole: bool, tile: Tile, interpret: bool):
    """Scales, and 4 + zero points [rows, words], float32, of words of 16 codes.

    Loaded a block of 16 outputs each, of which a lane's rows r and r + 8 share what is not their own.
    """
    step_ref, zero_ref, step_zero_ref, scale_ref = refs
    blocks = tile.rows // 16
    block, column = _range(n, blocks)[:, None], _range(i, tile.words)[None, :]
    mask = None if whole else (block < zero_ref.shape[0]) & (column < size)
    low, high = (_load(step_ref, (block, column, jnp.int32(half)), mask) for half in range(2))
    shared = _load(step_zero_ref, (block, column >> 1), mask).astype(jnp.uint32)
    scale = _load(scale_ref, (block, column), mask).astype(jnp.float32)
    step_zero = _beside(shared, 4 * (column & 1), 4, interpret) - 32.0
    eight = jnp.concatenate([low[:, :, None], high[:, :, None]], axis=-1).transpose(0, 2, 1)
    eight = jnp.broadcast_to(eight[:, :, None, :], (blocks, 2, 8, tile.words)).reshape(tile.rows, tile.words)
    output = jnp.arange(tile.rows, dtype=jnp.int32)[:, None]
    step = _beside(eight, 4 * (output & 7), 4, interpret)  # 16 more than it is, as step_zero is 16 less
    zero = _beside(_by_output(_load(zero_ref, (block, column), mask)), 2 * (output & 15), 2, interpret)
    return fma(step, _by_output(scale), _by_output(step_zero * scale), interpret), zero


def _four_bit_steps(refs, n, i, size: int, N: int, whole: bool, tile: Tile, interpret: bool, *, group4: int):
    """Scales, and 16 + zero points, of words of 8 codes; [rows, 1] where a turn has one group."""
    del whole
    scale_ref, zero_ref = refs
    row, column = _range(n, tile.rows)[:, None], _range(i, tile.words)[None, :]
    if group4 % (8 * tile.words) == 0:
        column = jnp.full((1, 1), i * tile.words, jnp.int32)
    mask = None if N % tile.rows == 0 and 8 * size <= group4 * scale_ref.shape[1] else row < N
    group = jnp.minimum(lax.div(column, jnp.int32(group4 // 8)), scale_ref.shape[1] - 1)  # behind, x is 0
    zero = _load(zero_ref, (row >> 4, group, (row >> 3) & 1), mask)
    return _load(scale_ref, (row, group), mask).astype(jnp.float32), _beside(
        zero, 4 * (row & 7), 4, interpret
    )


def _range(index, size: int) -> jax.Array:
    return index * size + jnp.arange(size, dtype=jnp.int32)


def _load(ref, index, mask):
    """`ref[index]`, zeros where the mask says no."""
    shape = jnp.broadcast_shapes(*(i.shape for i in index))
    at = ref.at[tuple(jnp.broadcast_to(i, shape) for i in index)]
    if mask is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype))


def _by_output(a):
    """Of blocks of 16 outputs [blocks, words], for each output [rows, words]."""
    blocks, words = a.shape
    return jnp.broadcast_to(a[:, None, :], (blocks, 16, words)).reshape(blocks * 16, words)


def _apart(pairs) -> list[jax.Array]:
    """Columns of an array [words, a power of two], which Triton cuts in two only."""
    words, count = pairs.shape
    if count == 1:
        return [pairs.reshape(words)]
    even, odd = (
        _apart(half.reshape(words, count // 2))
        for half in lax.split(pairs.reshape(words, count // 2, 2), (1, 1), axis=2)
    )
    return [column for two in zip(even, odd, strict=True) for column in two]


def _dot(a, b) -> jax.Array:
    """float32 a [rows, k] times b [tokens, k]."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _split(pairs, dtype) -> list[jax.Array]:
    """Both numbers of each pair."""
    words = lax.bitcast_convert_type(pairs, jnp.uint32)
    return [lax.bitcast_convert_type(h.astype(jnp.uint16), dtype) for h in (words & 0xFFFF, words >> 16)]


def _halves(pairs, dtype) -> jax.Array:
    """Pairs [rows, n] as numbers [rows, 2 n]."""
    low, high = _split(pairs, dtype)
    return jnp.concatenate([low[:, :, None], high[:, :, None]], axis=-1).reshape(pairs.shape[0], -1)


def _join(low, high) -> jax.Array:
    """Two numbers of 16 bits as a pair."""
    low, high = (lax.bitcast_convert_type(h, jnp.uint16).astype(jnp.uint32) for h in (low, high))
    return lax.bitcast_convert_type(low | (high << 16), jnp.int32)


def _pair(words, place: Place, interpret: bool) -> jax.Array:
    """offset + code of one pair of each word. The mask goes in as an instruction's constant."""
    words = decode.shifted(words, place.shift)
    if interpret:
        return lax.bitcast_convert_type((words & place.mask) | place.exponent, jnp.int32)
    exponent = jnp.full(words.shape, place.exponent, jnp.int32)
    return assemble(
        f"lop3.b32 $0, $1, {place.mask:#x}, $2, 0xEA;", "=r,r,r", words, exponent, dtype=jnp.int32
    )


def _beside(words, at, bits: int, interpret: bool) -> jax.Array:
    """The float32 number 2**bits + the code at a bit of each word: turned to the top of the mantissa."""
    turn = ((23 - bits - at) & 31).astype(jnp.uint32)
    mask, exponent = (2**bits - 1) << (23 - bits), (127 + bits) << 23
    if interpret:
        words = (words << turn) | (words >> ((32 - turn) & 31))
        return lax.bitcast_convert_type((words & mask) | exponent, jnp.float32)
    asm = f"{{ .reg .b32 w; shf.l.wrap.b32 w, $1, $1, $2; lop3.b32 $0, w, {mask:#x}, $3, 0xEA; }}"
    word = assemble(asm, "=r,r,r,r", words, turn, jnp.int32(exponent), dtype=jnp.int32)
    return lax.bitcast_convert_type(word, jnp.float32)


def _twice(a, dtype, interpret: bool) -> jax.Array:
    """float32 numbers as pairs of twice the same of 16 bits."""
    if interpret:
        return _join(a.astype(dtype), a.astype(dtype))
    return assemble(f"cvt.rn.{_kind(dtype)}.f32 $0, $1, $1;", "=r,f", a, dtype=jnp.int32)


def _constant(number: float, dtype) -> jax.Array:
    """A pair of twice this number."""
    bits = int(np.asarray(number, dtype).view(np.uint16))
    return jnp.int32(np.uint32(0x00010001 * bits).view(np.int32))


def _fma_pairs(a, b, c, *, dtype, interpret: bool) -> jax.Array:
    """a b + c of pairs, rounded once."""
    if not interpret:
        return assemble(f"fma.rn.{_kind(dtype)} $0, $1, $2, $3;", "=r,r,r,r", a, b, c, dtype=jnp.int32)
    numbers = [[half.astype(jnp.float32) for half in _split(v, dtype)] for v in (a, b, c)]
    return _join(*((x * y + z).astype(dtype) for x, y, z in zip(*numbers, strict=True)))


def _kind(dtype) -> str:
    return "f16x2" if dtype == jnp.float16 else "bf16x2"


def sparse(
    x: Float[Array, "M W"], outlier: Array, place: Array, *, interpret: bool = False
) -> Float32[Array, "M _"]:
    """Outliers' part of the product: those of a block of outputs together, in one order."""
    M, W = x.shape
    blocks, R = outlier.shape[0], reference.block_rows(W)
    x = jnp.pad(x, ((0, -M % SPARSE_TOKENS), (0, 0)))
    y = pl.pallas_call(
        functools.partial(_sparse_kernel, W=W),
        out_shape=compat.output((x.shape[0], blocks * 16), jnp.float32, x, outlier, place),
        grid=(blocks, x.shape[0] // SPARSE_TOKENS),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=2),
        interpret=interpret,
        name="mixed_two_bit_gemm_sparse",
    )(x, outlier, place)
    return y.reshape(-1, blocks, 16)[:M, :, :R].reshape(M, -1)


def _sparse_kernel(x_ref, outlier_ref, place_ref, out_ref, *, W: int):
    block, m = pl.program_id(0), pl.program_id(1)
    token = m * SPARSE_TOKENS + jnp.arange(SPARSE_TOKENS, dtype=jnp.int32)[None, :]
    size = outlier_ref.shape[1]

    def turn(i, acc):
        at = i * OUTLIERS + jnp.arange(OUTLIERS, dtype=jnp.int32)
        some = jnp.full((OUTLIERS,), block, jnp.int32)
        value = plgpu.load(outlier_ref.at[some, at], mask=at < size, other=jnp.float16(0))
        place = plgpu.load(place_ref.at[some, at], mask=at < size, other=jnp.uint16(0)).astype(jnp.int32)
        index = (
            jnp.broadcast_to(token, (OUTLIERS, SPARSE_TOKENS)),
            jnp.broadcast_to((place % W)[:, None], (OUTLIERS, SPARSE_TOKENS)),
        )
        x = x_ref[index]
        own = jnp.arange(16, dtype=jnp.int32)[:, None] == (place // W)[None, :]
        a = jnp.where(own, value.astype(jnp.float32)[None, :], 0.0)
        high = a.astype(x.dtype)
        acc = acc + plgpu.dot(high, x)
        if x.dtype == jnp.float16:
            return acc
        return acc + plgpu.dot((a - high.astype(jnp.float32)).astype(x.dtype), x)  # the last 3 bits of it

    acc = lax.fori_loop(0, -(-size // OUTLIERS), turn, jnp.zeros((16, SPARSE_TOKENS), jnp.float32))
    out_ref[pl.ds(m * SPARSE_TOKENS, SPARSE_TOKENS), pl.ds(block * 16, 16)] = acc.T
