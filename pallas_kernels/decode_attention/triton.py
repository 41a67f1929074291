"""Decode attention for Triton, sm_80 and up: two kernels, one over all rows and one that merges.

`_pieces` is a program per share of the rows (`work.py`). For each head that its share touches it walks over
tiles of rows with a running softmax, and writes what it found to the piece's slot. Cached rows are the first
operand of both products, 16 or more at a time as tensor cores want them, and the queries are its columns, of
which 8 are few enough: scores [rows, queries] = k q^T, out [E, queries] += v^T weights.

Rows in codes are never dequantized number by number. With x = code * scale + low of a group,

    q . x       = scale (q . code) + low sum(q)
    sum_r p x   = sum_r (p scale) code + sum_r p low

so scales and least numbers are work for a row, not for a number, and codes enter the tensor cores as they lie
in memory: a word's halves are two columns, and each digit of a half becomes a float by one bit operation on
the word (`digits.py`). What floats are too great by is taken off the scores by what their product begins
with, and off the outputs by the sum of the weights, which a product with ones gives. Number i of half h is
number 16 / bits h + i of the row: queries are read, and outputs written, in that order.

A product has 8 columns of queries or more. Up to 4 queries of rows in codes fill them twice: the tile has two
rows side by side, of which the first is for the first four columns, and so a score's work is shared. What
columns and rows do not share stays zero, and each part's softmax is a piece of its own (`columns.py`).

`_merge` is a program per head and query over its slots.

Checked: A (jax 0.10.2, 0.12.0.1), B (both), C (0.12.0.1: h100, a100, l4, b200). Never run on a GPU. The
interpreter knows no assembly: there, fields are taken by the same shifts and masks of single words.

Letters: J heads, N queries of a head, E head size, X columns, R rows of the pool.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import assembly, compat, tiles
from pallas_kernels.decode_attention.coded import Code, words_of_row
from pallas_kernels.decode_attention.columns import Chunk, Place, Rows
from pallas_kernels.decode_attention.digits import digits, floats, offset_of_field
from pallas_kernels.decode_attention.partial_softmax import (
    HIDDEN,
    LOG2E,
    MASK_VALUE,
    PartialSoftmax,
    soft_cap,
)
from pallas_kernels.decode_attention.work import Shares, Work, gpu_of

MAX_QUERIES = 256  # of a head: beyond, attention is no longer a matter of reading rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program works on.

    queries: columns of a product; rows: of the pool, at once; programs: in all, for each block of queries.
    paired: rows in codes stand side by side in two parts, and half of the queries' columns are for either.
    """

    queries: int
    rows: int
    programs: int
    warps: int
    stages: int
    paired: bool = False

    @property
    def parts(self) -> int:
        return 2 if self.paired else 1


@tiles.measured("decode_attention triton")
def default_tile(
    N: int, E: int, itemsize: int, code: Code | None, capability: tuple[int, int] | None
) -> Tile:
    """A guess, chosen so that registers suffice: no GPU measured it.

    One warp for 8 or 16 queries, so that a softmax waits for no other warp, and as many programs as a
    multiprocessor has room for: up to 8 warps of 255 registers, and the rows under way in shared memory.
    """
    queries = min(64, max(8, pl.next_power_of_2(N)))
    warps = max(1, queries // 16)
    single = code is not None and code.group_size >= E
    if code is not None and not single:  # sums of each group take registers
        queries, rows, warps = 8, 32, 1
    elif code is not None:
        small = queries == 8 and code.bits <= 4 and E <= 128
        rows = 32 if not small else 128 if E * code.bits <= 128 else 64
    elif itemsize == 4:
        rows, warps = 16, 4
    else:
        rows = max(16, 4096 // pl.next_power_of_2(E)) if queries <= 32 else 64
    stages, gpu = 2 if queries == 64 else 3, gpu_of(capability)
    under_way = 2 * rows * words_of_row(code, E) * (itemsize if code is None else 4) * (stages - 1) / 1024
    programs = max(1, min(8 // warps, int(gpu.shared / (under_way + 6))))
    return Tile(
        queries=queries,
        rows=rows,
        programs=programs * gpu.multiprocessors,
        warps=warps,
        stages=stages,
        paired=code is not None and single and code.bits < 8 and N <= 4 and E <= 128,
    )


def why_not(N: int, E: int, dtype: Any, stored: Any, R: int, S: int, code: Code | None) -> str | None:
    """Why the kernel does not take R rows, of which S lie together, for N queries of E numbers."""
    del S
    if N > MAX_QUERIES:
        return f"takes up to {MAX_QUERIES} queries a head, got {N}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes floats of 16 or 32 bits, got {dtype}"
    if code is not None and dtype == jnp.float32:
        return "reads codes for queries of 16 bits only"
    if code is None and dtype != stored:
        return f"takes rows and queries of one type, got {stored} and {dtype}"
    if E * jnp.dtype(dtype).itemsize > 512:
        return f"takes heads of up to 512 bytes, got {E=}"
    if R >= 2**31:
        return f"takes less than 2^31 rows, got {R}"
    return None


def _float16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)


def _halves(words: Shaped[Array, "R w"]) -> Shaped[Array, "R w2"]:
    """Words as 16-bit halves, the lower ones first: the same bytes."""
    return lax.bitcast_convert_type(words, jnp.uint16).reshape(len(words), -1)


def _pieces(
    q_ref,  # [J, N, E]
    keys_ref,  # [R, w]
    values_ref,  # [R, w]
    units_ref,  # [J + 1]
    first_ref,  # [J]
    end_ref,  # [J]
    *refs,  # keys and values as halves of words [R, 2 w], if in codes; positions of queries [B, N] and keys
    # [B, S], if rows are hidden; then the outputs: greatest [slots, N], total [slots, N], out [slots, N, E]
    tile: Tile,
    shares: Shares,
    code: Code | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool,
):
    *hidden, greatest_ref, total_ref, out_ref = refs
    halves, hidden = (hidden[:2], hidden[2:]) if code is not None else ((), hidden)
    J, N, E = q_ref.shape
    dtype, parts, lines = q_ref.dtype, tile.parts, tile.rows // tile.parts
    of_rows = Rows(E, code, parts)
    chunks, fields, groups = of_rows.chunks(), range(of_rows.fields), range(of_rows.groups)
    found = () if code is None else digits(code.bits, dtype)
    whole = of_rows.columns == of_rows.width and chunks[0].size <= parts * of_rows.width  # no column is idle
    unmasked = whole and keys_ref.shape[0] >= tile.rows
    exp2, fma = (functools.partial(f, interpret=interpret) for f in (assembly.exp2, assembly.fma))
    factor = scale * LOG2E if softcap is None else scale  # scores in powers of 2: one instruction each

    program = pl.program_id(0)
    query = lax.iota(jnp.int32, tile.queries)  # of each part the same ones
    part = lax.div(query, tile.queries // parts)
    n = pl.program_id(1) * (tile.queries // parts) + lax.rem(query, tile.queries // parts)
    real = n < N

    start, size = shares.first_and_size(units_ref, J)
    from_unit = start + program * size
    to_unit = jnp.minimum(from_unit + size, units_ref[J])
    # the heads of the first and the last unit: how many heads end at or before it
    j = lax.iota(jnp.int32, pl.next_power_of_2(J))
    ends = plgpu.load(units_ref.at[1 + j], mask=j < J, other=jnp.iinfo(jnp.int32).max)
    first_head = (ends <= from_unit).astype(jnp.int32).sum()
    last_head = jnp.where(from_unit < to_unit, (ends <= to_unit - 1).astype(jnp.int32).sum(), -1)

    def dot(x, y):
        """Float32 product of [M, K] and [K, N]."""
        return lax.dot_general(
            x,
            y,
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def by_query(of_part: Sequence[jax.Array]) -> jax.Array:
        """A number of each row, beside the queries that see the row's part of the tile."""
        whole = of_part[0][:, None]
        return whole if parts == 1 else jnp.where((part == 0)[None], whole, of_part[1][:, None])

    def numbers(chunk: Chunk, field: int, group: int) -> tuple[jax.Array, jax.Array]:
        """Of each column and query, which number of a head a field is, and if it is one for the query."""
        side, e, valid = chunk.numbers(field, group)
        mask = valid[:, None] & real[None]
        if chunk.size <= of_rows.width:  # of one row
            return e[:, None], mask
        mask = mask & (side[:, None] == part[None])
        return jnp.where(mask, e[:, None], E), mask  # subtle: no place twice, not even where none is written

    def by_lane(x):
        """Sums [8, n] of every eighth row: those of a lane."""
        return x.reshape(-1, 8, tile.queries).sum(0)

    def columns_of(which: int, at: Place, chunk: Chunk) -> jax.Array:
        """Some columns [lines, X] of a tile of rows."""
        side, column, valid = chunk.columns()
        line = lax.iota(jnp.int32, lines)[:, None] + (side * lines)[None]
        rows, column = at.row + line, jnp.broadcast_to(column[None], line.shape)
        if code is None:
            ref = (keys_ref, values_ref)[which].at[rows, column]
            return plgpu.load(ref, mask=valid[None] & at.holds(line), other=0.0)
        ref = halves[which].at[rows, 2 * of_rows.groups + column]
        if unmasked:  # a row that is not wanted counts nothing, whatever its codes
            return plgpu.load(ref)
        return plgpu.load(ref, mask=valid[None] & (rows < keys_ref.shape[0]), other=0)

    def floats_of(x) -> list[tuple[int, jax.Array]]:
        """Their floats, of each digit, beside the digit's field."""
        if code is None:
            return [(0, x)]
        return [(d.field, y) for d, y in zip(found, floats(x, found, dtype, interpret), strict=True)]

    def grid(ref, at: Place, group: int):
        """Scale and least number of each row's group, by query."""
        both = []
        for i in range(parts):
            line = i * lines + lax.iota(jnp.int32, lines)
            where = ref.at[at.row + line, jnp.full_like(line, group)]
            word = plgpu.load(where, mask=at.holds(line), other=0)
            both.append([_float16(half).astype(jnp.float32) for half in (word >> 16, word)])
        return tuple(map(by_query, zip(*both, strict=True)))

    def piece(head, _):
        begins, at = units_ref[head], first_ref[head]
        row = at + jnp.maximum(from_unit - begins, 0) * shares.unit
        stop = jnp.minimum(end_ref[head], at + (to_unit - begins) * shares.unit)
        # of each chunk and group the queries' numbers by field; of each group their sums, and what the floats
        # of its codes add to its scores
        asked: list[dict[int, list[jax.Array]]] = []
        sums = [jnp.zeros((tile.queries,), jnp.float32) for _ in groups]
        less = [jnp.zeros((tile.queries,), jnp.float32) for _ in groups]
        for chunk in chunks:
            asked.append({g: [] for g in chunk.groups()})
            for g in chunk.groups():
                for field in fields:
                    e, mask = numbers(chunk, field, g)
                    x = plgpu.load(q_ref.at[head, n[None], e], mask=mask, other=0.0)  # [X, n]
                    asked[-1][g].append(x)
                    if code is None:
                        continue
                    # subtle: a product that is not in the loop, too, keeps x there as tensor cores want it
                    whole = dot(jnp.ones((16, chunk.size), dtype), x).sum(0) / 16  # rows are alike
                    sums[g] = sums[g] + whole
                    less[g] = less[g] + offset_of_field(found, field) * whole
        if hidden:
            positions_ref, key_positions_ref = hidden
            B, S = key_positions_ref.shape
            request = head // (J // B)
            position = plgpu.load(positions_ref.at[request, n], mask=real, other=-1)

        def step(i, carry):
            greatest, total, outs, lows, weighed = carry
            at = Place.of(row + i * tile.rows, stop, None if code is None else keys_ref.shape[0] - tile.rows)
            products: list[Any] = [None for _ in groups]
            if code is not None:
                products = [jnp.broadcast_to(-x[None], (lines, tile.queries)) for x in less]
            for chunk, of_chunk in zip(chunks, asked, strict=True):
                for field, x in floats_of(columns_of(0, at, chunk)):
                    for g, of_group in of_chunk.items():
                        more = dot(x, of_group[field])  # [lines, n]
                        products[g] = more if products[g] is None else products[g] + more
            scores = products[0] if code is None else jnp.zeros((lines, tile.queries))
            for g in groups if code is not None else ():
                by, low = grid(keys_ref, at, g)
                scores = fma(products[g], by, fma(low, sums[g][None], scores))
            scores = scores * factor
            if softcap is not None:
                scores = soft_cap(scores, softcap) * LOG2E
            line = lax.iota(jnp.int32, lines)
            seen = at.holds(line[:, None] + (part * lines)[None])
            if hidden:
                of = []
                for i in range(parts):
                    where = key_positions_ref.at[request, at.row - head * S + i * lines + line]
                    of.append(plgpu.load(where, mask=at.holds(i * lines + line), other=-1))
                of = by_query(of)
                seen = seen & (of >= 0) & (of <= position[None])
                if window is not None:
                    seen = seen & (of > position[None] - window)
            scores = jnp.where(seen, scores, HIDDEN)
            new = jnp.maximum(greatest, scores.max(0))
            shrink = exp2(greatest - new)
            weights = exp2(scores - new[None])  # of a hidden row 0: `new` is MASK_VALUE or more
            total = fma(total, shrink[None], by_lane(weights))
            if code is None:
                of_group = {0: weights.astype(dtype)}
            else:
                of_group, lows, weighed = {}, list(lows), list(weighed)
                for g in groups:
                    by, low = grid(values_ref, at, g)
                    of_group[g] = (weights * by).astype(dtype)
                    lows[g] = fma(lows[g], shrink[None], by_lane(weights * low))
                    ones = jnp.ones((16, lines), dtype)
                    weighed[g] = weighed[g] * shrink[None] + dot(ones, of_group[g])
            outs = [[[out * shrink[None] for out in by_field] for by_field in by_group] for by_group in outs]
            for chunk, by_group in zip(chunks, outs, strict=True):
                for field, x in floats_of(columns_of(1, at, chunk).T):  # [X, lines]
                    for g, by_field in zip(chunk.groups(), by_group, strict=True):
                        by_field[field] = by_field[field] + dot(x, of_group[g])  # [X, n]
            return new, total, outs, lows, weighed

        zero = jnp.zeros((tile.queries,), jnp.float32)
        coded = groups if code is not None else ()
        none = (
            zero + MASK_VALUE * LOG2E,
            jnp.zeros((8, tile.queries)),
            [[[jnp.zeros((c.size, tile.queries))] * len(fields) for _ in c.groups()] for c in chunks],
            [jnp.zeros((8, tile.queries)) for _ in coded],
            [jnp.zeros((16, tile.queries)) for _ in coded],
        )
        steps = (jnp.maximum(stop - row, 0) + tile.rows - 1) // tile.rows
        greatest, total, outs, lows, weighed = lax.fori_loop(0, steps, step, none)
        total, lows = total.sum(0), [x.sum(0) for x in lows]
        slot = (program + head) * parts + part
        plgpu.store(greatest_ref.at[slot, n], greatest / LOG2E, mask=real)
        plgpu.store(total_ref.at[slot, n], total, mask=real)
        for chunk, by_group in zip(chunks, outs, strict=True):
            for g, by_field in zip(chunk.groups(), by_group, strict=True):
                for field, out in enumerate(by_field):
                    e, mask = numbers(chunk, field, g)
                    if code is not None:  # rows of `weighed` are alike
                        out = out - (weighed[g].sum(0) * (offset_of_field(found, field) / 16) - lows[g])[None]
                    plgpu.store(out_ref.at[slot[None], n[None], e], out, mask=mask)
        return _

    lax.fori_loop(first_head, last_head + 1, piece, jnp.int32(0))


def _merge(
    pieces_greatest_ref,  # [slots, N]
    pieces_total_ref,  # [slots, N]
    pieces_out_ref,  # [slots, N, E]
    units_ref,  # [J + 1]
    greatest_ref,  # [J, N]
    total_ref,  # [J, N]
    out_ref,  # [J, N, E]
    *,
    shares: Shares,
    parts: int,
):
    J, _, E = out_ref.shape
    merged = max(16, pl.next_power_of_2(E) // 8)  # pieces at once: what needs no more registers
    head, n = pl.program_id(0), pl.program_id(1)
    start, size = shares.first_and_size(units_ref, J)
    size = jnp.maximum(size, 1)
    begins, ends = units_ref[head] - start, units_ref[head + 1] - start
    first = (head + begins // size) * parts
    end = jnp.where(ends > begins, (head + (ends - 1) // size + 1) * parts, first)
    e = lax.iota(jnp.int32, pl.next_power_of_2(E))

    def step(i, carry):
        greatest, total, out = carry
        slot = first + i * merged + lax.iota(jnp.int32, merged)
        real = slot < end
        new = plgpu.load(pieces_greatest_ref.at[slot, n], mask=real, other=MASK_VALUE)
        top = jnp.maximum(greatest, new.max(0))
        factor = jnp.where(real, jnp.exp(new - top), 0.0)
        shrink = jnp.exp(greatest - top)
        totals = plgpu.load(pieces_total_ref.at[slot, n], mask=real, other=0.0)
        outs = plgpu.load(
            pieces_out_ref.at[slot[:, None], n, e[None]], mask=real[:, None] & (e < E)[None], other=0.0
        )
        total = total * shrink + (totals * factor).sum(0)
        return top, total, out * shrink + (outs * factor[:, None]).sum(0)

    none = jnp.float32(MASK_VALUE), jnp.float32(0), jnp.zeros(e.shape, jnp.float32)
    greatest, total, out = lax.fori_loop(0, (end - first + merged - 1) // merged, step, none)
    plgpu.store(greatest_ref.at[head, n], greatest)
    plgpu.store(total_ref.at[head, n], total)
    plgpu.store(out_ref.at[head, n, e], out, mask=e < E)


def attend(
    q: Float[Array, "J N E"],
    keys: Shaped[Array, "R w"],
    values: Shaped[Array, "R w"],
    work: Work,
    positions: Int[Array, "B N"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    *,
    shares: Shares,
    tile: Tile,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    code: Code | None = None,
    interpret: bool = False,
) -> PartialSoftmax:
    """The softmax of each head's queries over its rows.

    positions, key_positions: where queries and keys stand, if some of a head's rows are hidden from a query;
      the pool is then a dense cache of S rows a head.
    """
    J, N, E = q.shape
    hidden = () if positions is None else (positions, key_positions)
    halves = () if code is None else [_halves(x) for x in (keys, values)]
    arrays: list[Any] = [q, keys, values, *work, *halves, *hidden]
    shapes = [(N,), (N,), (N, E)]
    slots = shares.slots(J) * tile.parts
    pieces = pl.pallas_call(
        functools.partial(
            _pieces,
            tile=tile,
            shares=shares,
            code=code,
            scale=scale,
            softcap=softcap,
            window=window,
            interpret=interpret,
        ),
        out_shape=[compat.output((slots, *shape), jnp.float32, *arrays) for shape in shapes],
        grid=(shares.programs, pl.cdiv(N, tile.queries // tile.parts)),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="decode_attention_pieces",
    )(*arrays)
    merged = pl.pallas_call(
        functools.partial(_merge, shares=shares, parts=tile.parts),
        out_shape=[compat.output((J, *shape), jnp.float32, *arrays) for shape in shapes],
        grid=(J, N),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, pl.next_power_of_2(E) // 32), num_stages=1),
        interpret=interpret,
        name="decode_attention_merge",
    )(*pieces, work.units)
    return PartialSoftmax(*merged)
