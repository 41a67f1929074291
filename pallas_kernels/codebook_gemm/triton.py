"""Triton kernels for products with looked-up weights, of codes and of planes; compute capability 8.0 and up.

Levels go to the tensor cores as the first operand, a word's cells as neighbouring inputs, and are never
written anywhere; a tile of 8 rows of x then costs no more than it must. A program takes a tile of outputs and
rows and a part of the inputs, so that there are programs enough; the parts are added in a second step, in
order. Float32 activations are three rows of float16 (`pieces`).

Levels of codes up to 4 bits are looked up in registers (`lookup`); of wider ones in the first-level cache.
For few rows of x those are multiplied and added up in registers instead (`_sums`): there a warp asks for
tables of one or two outputs at a time, where an operand of tensor cores would ask for those of eight.

Levels are rounded to the type of x, as the reference does; for those few rows they are as they are stored.

Letters: M rows of x, N outputs, T tiles of W blocks of 32 inputs.

Checked: A and B on jax 0.10.2 and 0.12.0, C on 0.12.0 for h100, a100, l4, b200. Never run on a GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import choice, compat, tiles
from pallas_kernels.assembly import fma
from pallas_kernels.codebook_gemm import cells as code_cells
from pallas_kernels.codebook_gemm import lookup
from pallas_kernels.codebook_gemm.cells import Cells, Order
from pallas_kernels.codebook_gemm.pieces import by_pieces
from pallas_kernels.words import CODES_PER_BLOCK

TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
PROCESSORS = 132  # multiprocessors that programs are made for
FEW_ROWS = 4  # of x, that wide codes are multiplied by in registers
PAIRS_PER_PRODUCT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program takes: `outputs` of N, `rows` of x, `blocks` of 32 inputs a step."""

    rows: int
    outputs: int
    blocks: int
    splits: int = 1  # parts of the inputs
    warps: int = 4
    stages: int = 2  # of words and activations on their way

    def passes(self, M: int) -> int:
        """How often each weight is looked up."""
        return pl.cdiv(M, self.rows)

    @property
    def weights_per_turn(self) -> float:
        """Of a thread."""
        return self.outputs * self.blocks * CODES_PER_BLOCK / (32 * self.warps)


@tiles.measured("codebook_gemm triton")
def default_tile(M: int, N: int, blocks: int, *, bits: int, capability: tuple[int, int]) -> Tile:
    """A guess, which no GPU has measured.

    M: rows of 16-bit numbers; blocks: of 32 inputs, of an output; bits: the most that are read.
    """
    hopper = (9, 0) <= capability < (10, 0)
    if M <= 16:  # two warps, which take the tensor cores of a warp and not of four
        rows, outputs, warps, stages = 8 if M <= 8 else 16, 64 if bits <= 2 else 32, 2, 2
        size = 8 if bits == 8 else 16
    else:  # as many rows as registers hold without spilling
        most = (128 if hopper else 64) // (1 if bits <= lookup.MOST_BITS else 2)
        rows = min(most, pl.next_power_of_2(M))
        outputs = 64 if rows < 128 else 128
        warps, stages = outputs // 16, 1
        size = 16 if hopper else 8
    programs = pl.cdiv(M, rows) * pl.cdiv(N, outputs)
    splits = max(1, min(8 * PROCESSORS * 2 // (warps * programs), pl.cdiv(blocks, 4 * size)))
    return Tile(rows=rows, outputs=outputs, blocks=size, splits=splits, warps=warps, stages=stages)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a format's words are read.

    load(ref, rows, blocks, mask, bits): the words of these rows and blocks, arrays [rows, blocks], zero
      outside of the mask [blocks] if there is one; cells(words, bits, interpret): their cells. order: how
      inputs are taken. widths: what may be asked for, each with a table of its own.
    """

    load: Callable[[Any, jax.Array, jax.Array, jax.Array | None, int], tuple[jax.Array, ...]]
    cells: Callable[[Sequence[jax.Array], int, bool], Cells]
    order: Order
    widths: tuple[int, ...]
    name: str


def codebook_gemm(
    x: jax.Array, codes: jax.Array, table: jax.Array, *, tile: Tile | None = None, interpret: bool = False
) -> jax.Array:
    """See `pallas_kernels.codebook_gemm`; x [*B, K] -> float32 [*B, N]."""
    bits = codes.shape[-1]
    stored = Stored(
        load=_load, cells=_cells, order=code_cells.order(bits), widths=(bits,), name="codebook_gemm_triton",
    )  # fmt: skip
    run = functools.partial(_codebook_gemm, stored=stored, tile=tile, interpret=interpret)
    return choice.rows_together(run, stacked=jax.vmap(run))(x, codes, table)


def why_not(x: jax.Array, words: jax.Array, *_: Any) -> str | None:
    """Why the kernels do not take these arrays, None if they do."""
    if x.dtype not in TYPES:
        return "takes bfloat16, float16 and float32"
    if not x.size or not words.size:
        return "takes no empty arrays"
    if words.size >= 2**31:
        return "counts words in 32 bits"
    return None


def _codebook_gemm(x, codes, table, **options: Any) -> jax.Array:
    return product(x, codes, (table,), None, blocks=codes.shape[1], **options)


def _load(
    ref, rows: jax.Array, blocks: jax.Array, mask: jax.Array | None, bits: int
) -> tuple[jax.Array, ...]:
    """Words of codes [N, blocks, bits]."""
    shape: tuple[int, ...] = (rows.size, blocks.size)
    if bits in (2, 4, 8):  # neighbouring words, one load
        wide = (*shape, bits)
        word = lax.broadcasted_iota(jnp.int32, wide, 2)
        place = lax.broadcast_in_dim(rows, wide, (0,)), lax.broadcast_in_dim(blocks, wide, (1,))
        loaded = load_once(ref.at[(*place, word)], mask)
        return tuple(w.reshape(shape) for w in lax.split(loaded, (1,) * bits, axis=2))
    at = lax.broadcast_in_dim(rows, shape, (0,)), lax.broadcast_in_dim(blocks, shape, (1,))
    return tuple(load_once(ref.at[(*at, i)], mask) for i in range(bits))


def _cells(words: Sequence[jax.Array], bits: int, interpret: bool) -> Cells:
    return code_cells.cells(words, bits, lookup.instructions(interpret))


def load_once(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Words [rows, blocks, ..] that no other program reads, zero outside of the mask [blocks]."""
    if mask is None:
        return plgpu.load(ref, eviction_policy="evict_first")
    mask = lax.broadcast_in_dim(mask, ref.shape, (1,))
    return plgpu.load(ref, mask=mask, other=jnp.uint32(0), eviction_policy="evict_first")


def product(
    x: jax.Array,
    words: jax.Array,
    tables: Sequence[jax.Array],
    bits: jax.Array | None,
    *,
    stored: Stored,
    blocks: int,
    tile: Tile | None,
    interpret: bool,
) -> jax.Array:
    """x [*B, K] times a weight of `blocks` blocks a row, float32 [*B, N].

    tables: one for each of `stored.widths`, which rise by one; bits: an int32 scalar, the width that is read,
      or None for the first.
    """
    if x.dtype == jnp.float32:
        halves = functools.partial(
            product, words=words, tables=tables, bits=bits, stored=stored, blocks=blocks, tile=tile,
            interpret=interpret,
        )  # fmt: skip
        return by_pieces(halves, x)
    N = tables[0].shape[0]
    rows = x.reshape(-1, x.shape[-1])
    M = rows.shape[0]
    if tile is None:
        capability = choice.target_capability() or (9, 0)
        tile = default_tile(M, N, blocks, bits=max(stored.widths), capability=capability)
    inputs = code_cells.in_order(rows, stored.order, blocks=tile.blocks)
    T = inputs.shape[1]
    xs = [inputs.reshape(M, -1)]
    if M <= FEW_ROWS and stored.widths[-1] > lookup.MOST_BITS:  # for `_sums`: numbers of one place together
        xs.append(inputs.swapaxes(3, 4).astype(jnp.float32).reshape(M, -1))
    scalar = [] if bits is None else [bits.astype(jnp.int32).reshape(1)]
    out = pl.pallas_call(
        functools.partial(
            _kernel, tile=tile, stored=stored, sizes=(M, N, blocks, T), traced=bits is not None,
            interpret=interpret,
        ),
        grid=(pl.cdiv(N, tile.outputs), pl.cdiv(M, tile.rows), tile.splits),
        out_shape=compat.output((tile.splits, M, N), jnp.float32, x, words),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=stored.name,
    )(*xs, words, *(table.reshape(-1) for table in tables), *scalar)  # fmt: skip
    total = out[0] if tile.splits == 1 else jnp.sum(out, axis=0)
    return total.reshape(*x.shape[:-1], N)


def _kernel(x_ref, *refs, tile, stored, sizes, traced, interpret):
    """A program: `outputs` of `rows`, of one part of the inputs."""
    M, N, blocks, T = sizes
    few = M <= FEW_ROWS and stored.widths[-1] > lookup.MOST_BITS
    x_of_sums_ref, refs = (refs[0], refs[1:]) if few else (None, refs)
    words_ref, *refs, out_ref = refs
    place = _, _, part = tuple(pl.program_id(axis) for axis in range(3))
    each = pl.cdiv(T, tile.splits)
    steps = (0, T) if tile.splits == 1 else (part * each, jnp.minimum((part + 1) * each, T))

    def load(rows, t, bits):
        block = t * tile.blocks + lax.iota(jnp.int32, tile.blocks)
        return stored.load(words_ref, rows, block, block < blocks if blocks % tile.blocks else None, bits)

    def compute(bits, table_ref):
        by_sums = few and bits > lookup.MOST_BITS
        (_sums if by_sums else _products)(
            x_of_sums_ref if by_sums else x_ref, table_ref, out_ref, functools.partial(load, bits=bits),
            functools.partial(stored.cells, bits=bits, interpret=interpret),
            bits=bits, tile=tile, sizes=(M, N), place=place, steps=steps, interpret=interpret,
        )  # fmt: skip

    if not traced:
        compute(stored.widths[0], refs[0])
        return
    *tables, asked = refs
    branches = [
        functools.partial(compute, bits, table) for bits, table in zip(stored.widths, tables, strict=True)
    ]
    lax.switch(asked[0] - stored.widths[0], branches)  # of one outside, the nearest


def _products(x_ref, table_ref, out_ref, load, cells, *, bits, tile, sizes, place, steps, interpret):
    """By tensor cores."""
    (M, N), (n, m, part) = sizes, place
    dtype = x_ref.dtype
    outputs = n * tile.outputs + lax.iota(jnp.int32, tile.outputs)
    samples = m * tile.rows + lax.iota(jnp.int32, tile.rows)
    rows = jnp.minimum(outputs, jnp.int32(N - 1)) if N % tile.outputs else outputs
    shape = tile.outputs, tile.blocks
    in_registers = bits <= lookup.MOST_BITS
    table = lookup.byte_tables(table_ref, rows, bits, dtype, shape=shape) if in_registers else None
    columns = 2 * PAIRS_PER_PRODUCT * tile.blocks
    wide = tile.rows, columns
    mask = lax.broadcast_in_dim(samples < M, wide, (0,)) if M % tile.rows else None

    def activations(at):
        column = at * columns + lax.iota(jnp.int32, columns)
        index = lax.broadcast_in_dim(samples, wide, (0,)), lax.broadcast_in_dim(column, wide, (1,))
        return plgpu.load(x_ref.at[index], mask=mask, other=None if mask is None else jnp.zeros((), dtype))

    def step(t, total):
        weights = {}
        for selectors, pairs in cells(load(rows, t)):
            if table is None:
                levels = _gathered(*selectors, table_ref, rows, bits, interpret)
                found = [tuple(v.astype(dtype) for v in levels[i : i + 2]) for i in (0, 2)]
            else:
                found = [_halves(v, dtype) for v in lookup.pairs(selectors, table, interpret=interpret)]
            weights |= dict(zip(pairs, found, strict=True))
        for g in range(0, 16, PAIRS_PER_PRODUCT):
            total = total + lax.dot_general(
                _side_by_side([weights[p] for p in range(g, g + PAIRS_PER_PRODUCT)]),
                activations((16 * t + g) // PAIRS_PER_PRODUCT),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        return total

    total = lax.fori_loop(*steps, step, jnp.zeros((tile.outputs, tile.rows), jnp.float32))
    at = lax.broadcast_in_dim(samples, total.shape, (1,)), lax.broadcast_in_dim(outputs, total.shape, (0,))
    mask = (outputs < N)[:, None] & (samples < M)[None]
    plgpu.store(out_ref.at[(part, *at)], total, mask=mask)


def _sums(x_ref, table_ref, out_ref, load, cells, *, bits, tile, sizes, place, steps, interpret):
    """In registers: a thread has blocks of some outputs."""
    (M, N), (n, _, part) = sizes, place
    outputs = n * tile.outputs + lax.iota(jnp.int32, tile.outputs)
    rows = jnp.minimum(outputs, jnp.int32(N - 1)) if N % tile.outputs else outputs
    shape = tile.outputs, tile.blocks

    def activations(m, t, p):
        found = []
        for half in range(2):
            column = ((16 * t + p) * 2 + half) * tile.blocks + lax.iota(jnp.int32, tile.blocks)
            x = plgpu.load(x_ref.at[jnp.full_like(column, m), column])
            found.append(lax.broadcast_in_dim(x, shape, (1,)))
        return found

    def step(t, carry):
        totals, words = carry
        following = load(rows, jnp.minimum(t + 1, steps[1] - 1))  # asked for before this step's are used
        for (word,), pairs in cells(words):
            levels = [v.astype(jnp.float32) for v in _gathered(word, table_ref, rows, bits, interpret)]
            for p, two in zip(pairs, (levels[:2], levels[2:]), strict=True):
                for m in range(M):
                    for level, x in zip(two, activations(m, t, p), strict=True):
                        totals[m] = fma(level, x, totals[m], interpret)
        return totals, following

    zeros = [jnp.zeros(shape, jnp.float32) for _ in range(M)]
    # subtle: a part may be empty; then these words are read and not used
    totals, _ = lax.fori_loop(*steps, step, (zeros, load(rows, jnp.minimum(steps[0], steps[1] - 1))))
    for m, total in enumerate(totals):
        plgpu.store(out_ref.at[part, m, outputs], jnp.sum(total, axis=1), mask=outputs < N)


def _gathered(word, table_ref, rows, bits, interpret) -> list[jax.Array]:
    """The levels of a word's four cells of 8 bits, the lowest first; the table is flat."""
    first = (rows << bits).astype(jnp.uint32)
    if bits < 8:  # what of a row's first index lies in the lowest byte goes into all cells
        word = word | lax.broadcast_in_dim(
            (first & jnp.uint32(255)) * jnp.uint32(0x01010101), word.shape, (0,)
        )
    first = lax.broadcast_in_dim(first, word.shape, (0,))
    # Index i: a byte of the word, and the upper bytes of the first index.
    at = [lookup.byte_permute(word, first, 0x7650 + i, interpret=interpret) for i in range(4)]
    return [plgpu.load(table_ref.at[i.astype(jnp.int32)]) for i in at]


def _halves(v: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """The two numbers of each word."""
    low, high = (v & jnp.uint32(0xFFFF)).astype(jnp.uint16), (v >> jnp.uint32(16)).astype(jnp.uint16)
    return lax.bitcast_convert_type(low, dtype), lax.bitcast_convert_type(high, dtype)


def _side_by_side(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Pairs of arrays [n, w] as one [n, len(pairs) * w * 2], without moving anything between threads."""
    n, w = pairs[0][0].shape
    count = len(pairs)

    def joined(a: jax.Array, b: jax.Array) -> jax.Array:
        last = a.ndim
        return lax.concatenate([lax.expand_dims(a, (last,)), lax.expand_dims(b, (last,))], last)

    parts = [joined(*pair) for pair in pairs]
    while len(parts) > 1:
        parts = [joined(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    axes = (0, *range(parts[0].ndim - 1, 2, -1), 1, 2)
    return parts[0].transpose(axes).reshape(n, 2 * count * w)
