"""Pieces of decode attention over rows in codes, for Mosaic GPU on Hopper: codes to operands in registers.

A block is one warpgroup and one share of the rows (`work.py`), as for plain rows (`mosaic_gpu.py`), but here
cached rows are the first operand of both products, and the queries are as few columns as they are, eights:

    scores [64 rows, n]   = keys [64 rows, C] q^T               keys from registers, q from shared memory
    out [64 numbers, n]  += values^T [64, 64 rows] weights      values from registers, weights stored

As in Triton's kernel, scales and least numbers are work for a row, and what digits as floats are too great by
is taken off scores and outputs (`triton.py`, `digits.py`); how lanes have what wgmma wants is in `lanes.py`.
Of scores a lane has two rows: a query's greatest one takes shuffles and a meeting of the four warps, its
total is added up by lane until the end.

Taken are rows with one scale, of 128 numbers, or of 64 in 4 or 8 bits, and up to 16 queries a head.

A row is w words, an odd number: TMA sees four rows as one. So a tile begins at a multiple of four rows, and
hides those before its share.

Checked: A with race detection (jax 0.10.2, 0.12.0.1), B (both), C (0.12.0.1: h100). Never run on a GPU. The
interpreter knows neither loads by lane nor wgmma on registers: there, rows are decoded by jnp and operands
staged in shared memory, so that order and synchronisation are checked, not those two.

Letters: J heads, n queries of a head, filled up to eights, E head size, R rows of the pool, w words of a row,
C columns of the first operand of scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import compat
from pallas_kernels.decode_attention import lanes
from pallas_kernels.decode_attention.coded import Code, words_of_row
from pallas_kernels.decode_attention.digits import fields_of_half, offset_of_field
from pallas_kernels.decode_attention.partial_softmax import HIDDEN, LOG2E, MASK_VALUE, soft_cap
from pallas_kernels.decode_attention.work import Shares, Work, head_of
from pallas_kernels.wgmma import ROWS, exp2, tiling, wgmma

FOLDED = 4  # rows that TMA sees as one
MOST_QUERIES = 16  # of a head: for more, scores would take more time than rows


def default_sizes(N: int, E: int, code: Code) -> tuple[int, int, int]:
    """Guesses: rows of a tile, tiles under way, and blocks that a multiprocessor has room for."""
    blocks = 2 if N > 8 or code.bits == 8 else 3
    rows = ROWS if N > 8 and E * code.bits == 1024 else 2 * ROWS  # more need more registers, fewer meet often
    stages = 196608 // blocks // (2 * rows * 4 * words_of_row(code, E))
    return rows, max(2, min(4, stages)), blocks


def why_not(N: int, E: int, dtype: Any, R: int, S: int, code: Code) -> str | None:
    """As `triton.why_not`."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes queries of 16 bits, got {dtype}"
    if not lanes.takes(E, code):
        return (
            "takes codes with one scale a row, in heads of 128 numbers, or of 64 and 4 or 8 bits, got "
            f"{E=}, {code}"
        )
    if N > MOST_QUERIES:
        return f"takes up to {MOST_QUERIES} queries a head, got {N}"
    if R % FOLDED or S % FOLDED or S < ROWS or R >= 2**31:
        return f"takes {ROWS} rows together or more, by {FOLDED}, and less than 2^31 in all, got {S} and {R}"
    return None


def _pieces(
    q_ref,  # [J, n, C]
    sums_ref,  # [J, 2, n]: of a query's numbers, and what digits are too great by, times these
    keys_ref,  # [R / 4, 4 w]
    values_ref,  # [R / 4, 4 w]
    units_ref,  # [J + 1]
    first_ref,  # [J]
    end_ref,  # [J]
    *refs,  # positions of queries [B, n] and keys [B, S], if rows are hidden; the outputs greatest
    # [slots, n], total [slots, n], out [slots, n, 128]; shared memory
    form: lanes.Format,
    rows: int,
    stages: int,
    shares: Shares,
    hides: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool,
):
    hidden, refs = (refs[:2], refs[2:]) if hides else ((), refs)
    greatest_ref, total_ref, out_ref, q_smem, k_smem, v_smem, p_smem, *rest = refs
    greatest_smem, total_smem, out_smem, *staged, q_barrier, k_barrier, v_barrier = rest
    (J, n, _), R, E = q_ref.shape, FOLDED * keys_ref.shape[0], form.E
    shape, blocks, tiles = (ROWS, n), range(rows // ROWS), range(E // 64)
    by_query, by_row = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
    factor = scale * LOG2E if softcap is None else scale
    lay = functools.partial(compat.lay, interpret=interpret)
    load = functools.partial(compat.load, interpret=interpret, optimized=False)

    program = lax.axis_index("share")
    start, size = shares.first_and_size(units_ref, J)
    from_unit = start + program * size
    to_unit = jnp.minimum(from_unit + size, units_ref[J])
    first_head = head_of(units_ref, from_unit, J)
    last_head = jnp.where(from_unit < to_unit, head_of(units_ref, to_unit - 1, J), -1)

    def wide(x: jax.Array, axis: int = 1) -> jax.Array:
        """A number for each query (axis 1), or for each row (0), along the other axis."""
        return lay(lax.broadcast_in_dim(x, shape, (axis,)), plgpu.Layout.WGMMA)

    def line() -> jax.Array:
        """Numbers along the rows of a block."""
        return compat.iota(shape, 0, plgpu.Layout.WGMMA, interpret=interpret)

    def piece(head, _):
        begins, at = units_ref[head], first_ref[head]
        row = at + jnp.maximum(from_unit - begins, 0) * shares.unit
        stop = jnp.minimum(end_ref[head], at + (to_unit - begins) * shares.unit)
        aligned = row - lax.rem(row, FOLDED)
        steps = lax.div(jnp.maximum(stop - aligned, 0) + rows - 1, rows)

        def place(i):
            """Where tile i begins: not past the pool, nor past the head's rows if these have positions."""
            last = (head + 1) * hidden[1].shape[1] if hidden else R
            return jnp.minimum(aligned + i * rows, last - rows)

        def fetch(i, slot):
            of = pl.ds(lax.div(place(i), FOLDED), rows // FOLDED)
            plgpu.copy_gmem_to_smem(keys_ref.at[of], k_smem.at[slot], k_barrier.at[slot])
            plgpu.copy_gmem_to_smem(values_ref.at[of], v_smem.at[slot], v_barrier.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[head], q_smem, q_barrier)
        for i in range(stages):
            pl.when(i < steps)(functools.partial(fetch, jnp.int32(i), i))
        of_q, less = (wide(load(sums_ref, (head, i, pl.ds(0, n)), by_query)) for i in range(2))
        plgpu.barrier_wait(q_barrier)
        if hidden:
            positions_ref, key_positions_ref = hidden
            B, S = key_positions_ref.shape
            request = lax.div(head, J // B)
            asked = wide(load(positions_ref, (request, pl.ds(0, n)), by_query))

        def step(i, carry):
            slot, greatest, total, lows, weighed, *outs = carry
            here = place(i)
            low = jnp.maximum(row, aligned + i * rows) - here  # the tile's rows that are new, and the piece's
            high = stop - here
            plgpu.barrier_wait(k_barrier.at[slot])
            scores, top = [], greatest
            for b in blocks:

                def score(acc_ref, b=b):
                    left = lanes.keys(k_smem.at[slot], b, form, interpret=interpret)
                    wgmma(acc_ref, left, q_smem, staged, 0, interpret)
                    return acc_ref[...]

                products = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
                by, least = lanes.grid(k_smem.at[slot], b, n, form, interpret=interpret)
                found = (by * (products - less) + least * of_q) * factor
                if softcap is not None:
                    found = soft_cap(found, softcap) * LOG2E
                seen = (line() >= low - b * ROWS) & (line() < high - b * ROWS)
                if hidden:
                    where = pl.ds(here - head * S + b * ROWS, ROWS)
                    of = wide(load(key_positions_ref, (request, where), by_row), 0)
                    seen = seen & (of >= 0) & (of <= asked)
                    if window is not None:
                        seen = seen & (of > asked - window)
                scores.append(jnp.where(seen, found, HIDDEN))
            of_lane = functools.reduce(jnp.maximum, scores)
            # subtle: here all warps meet, so that none stores weights that others still multiply by
            top = jnp.maximum(greatest, of_lane.max(axis=0))
            shrink = wide(jnp.exp2(greatest - top))
            total, lows, weighed = (x * shrink for x in (total, lows, weighed))
            plgpu.barrier_wait(v_barrier.at[slot])
            for b, found in zip(blocks, scores, strict=True):
                weights = exp2(found - wide(top), interpret)  # of a hidden row 0: `top` is MASK_VALUE or more
                by, least = lanes.grid(v_smem.at[slot], b, n, form, interpret=interpret)
                own = (line() >= low - b * ROWS) & (line() < high - b * ROWS)
                by, least = (jnp.where(own, x, 0.0) for x in (by, least))  # of another head it may be a NaN
                total, lows = total + weights, lows + weights * least
                stored = lanes.store_weights(p_smem.at[b], weights * by, form, interpret=interpret)
                weighed = weighed + stored
            plgpu.commit_smem()  # all warps have stored weights, and read the slot of the step before
            before = jnp.where(slot == 0, stages, slot) - 1
            pl.when((i > 0) & (i - 1 + stages < steps))(functools.partial(fetch, i - 1 + stages, before))

            def add(*acc_refs):
                for b in blocks:
                    lefts = lanes.values(v_smem.at[slot], b, form, interpret=interpret)
                    for acc_ref, of_tile in zip(acc_refs, lefts, strict=True):
                        for left in of_tile:
                            wgmma(acc_ref, left, p_smem.at[b], staged, 0, interpret)
                return tuple(acc_ref[...] for acc_ref in acc_refs)

            more = pl.run_scoped(add, *(plgpu.ACC(shape, jnp.float32) for _ in tiles))
            outs = [x * shrink + y for x, y in zip(outs, more, strict=True)]
            return jnp.where(slot == stages - 1, 0, slot + 1), top, total, lows, weighed, *outs

        zero = lay(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        none = lay(jnp.full((n,), MASK_VALUE * LOG2E, jnp.float32), by_query)
        found = lax.fori_loop(0, steps, step, (jnp.int32(0), none, zero, zero, zero, *(zero for _ in tiles)))
        _, greatest, total, lows, weighed, *outs = found
        total, lows, weighed = (x.sum(axis=0) for x in (total, lows, weighed))
        second = lax.rem(lax.div(line(), 8), 2) > 0  # of a lane's two numbers
        for m in tiles:
            offset = [np.float32(_offset(form, 2 * m + i)) for i in range(2)]
            outs[m] = outs[m] - (wide(weighed) * jnp.where(second, offset[1], offset[0]) - wide(lows))
        slot = program + head
        greatest_smem[...], total_smem[...] = greatest / LOG2E, total
        lanes.store_out(out_smem, outs, interpret=interpret)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(greatest_smem, greatest_ref.at[slot])
        plgpu.copy_smem_to_gmem(total_smem, total_ref.at[slot])
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[slot, :, pl.ds(0, E)])
        plgpu.wait_smem_to_gmem(0)
        return _

    lax.fori_loop(first_head, last_head + 1, piece, jnp.int32(0))


def _offset(form: lanes.Format, number: int) -> float:
    """What a lane's number is too great by."""
    return offset_of_field(form.digits, number % fields_of_half(form.code.bits))


def pieces(
    q: Float[Array, "J N E"],
    keys: UInt32[Array, "R w"],
    values: UInt32[Array, "R w"],
    work: Work,
    positions: Int[Array, "B N"] | None,
    key_positions: Int[Array, "B S"] | None,
    *,
    shares: Shares,
    rows: int,
    stages: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    code: Code,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each piece its greatest scores and totals [slots, n], and sums [slots, n, 128]."""
    (_, N, E), R, slots = q.shape, len(keys), shares.slots(q.shape[0])
    n, form = -(-N // 8) * 8, lanes.Format(E, code, q.dtype)
    q = jnp.pad(q, ((0, 0), (0, n - N), (0, 0)))
    offsets = [_offset(form, e) for e in range(E)]
    exact = q.astype(jnp.float32)
    too_great = (exact * jnp.asarray(offsets, jnp.float32)[None, None]).sum(-1)
    sums = jnp.stack([exact.sum(-1), too_great], axis=1)
    folded = (x.reshape(R // FOLDED, FOLDED * form.width) for x in (keys, values))
    arrays: list[Any] = [q[..., lanes.order_of_keys(form)], sums, *folded, *work]
    if positions is not None:
        arrays += [jnp.pad(positions, ((0, 0), (0, n - N)), constant_values=-1), key_positions]

    def swizzled(shape):
        return plgpu.SMEM(shape, q.dtype, transforms=tiling(q.dtype, ROWS))

    cached = plgpu.SMEM((stages, rows // FOLDED, FOLDED * form.width), jnp.uint32)
    scratch: list[Any] = [swizzled((n, form.columns)), cached, cached]
    scratch += [swizzled((rows // ROWS, n, ROWS))]
    scratch += [plgpu.SMEM(shape, jnp.float32) for shape in ((n,), (n,), (n, E))]
    if interpret:  # operands of the simulated wgmma
        width = max(form.columns, ROWS)
        scratch += [plgpu.SMEM(shape, jnp.float32) for shape in ((1, ROWS, width), (1, width, n))]
    scratch += [plgpu.Barrier(), *[plgpu.Barrier(num_barriers=stages)] * 2]
    greatest, total, out = plgpu.kernel(
        functools.partial(
            _pieces,
            form=form,
            rows=rows,
            stages=stages,
            shares=shares,
            hides=positions is not None,
            scale=scale,
            softcap=softcap,
            window=window,
            interpret=interpret,
        ),
        out_type=[
            compat.output(shape, jnp.float32, *arrays) for shape in ((slots, n), (slots, n), (slots, n, 128))
        ],
        grid=(shares.programs,),
        grid_names=("share",),
        scratch_types=scratch,
        kernel_name="decode_attention_coded_pieces",
        **compat.mosaic_options(interpret),
    )(*arrays)
    return greatest, total, out
