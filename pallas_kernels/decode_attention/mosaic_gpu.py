"""Decode attention for Mosaic GPU on Hopper: tiles of rows by TMA, wgmma for both products.

A block is one warpgroup and one share of the rows (`work.py`); two or three of them live on a multiprocessor,
so that one computes while another waits. For each head that its share touches it has the queries in shared
memory, filled up to the 64 rows of a wgmma, keeps some tiles of 64 cached rows under way, and goes over them
with a running softmax in registers: a query's scores lie in four lanes, so its maximum takes two shuffles.
The tensor cores do eight times the work that 8 queries need, a third of what they could in the time that the
rows take to come.

A tile may begin before a share or end behind it: TMA takes any row to begin with, but no row behind the pool.
Its other rows are hidden, and their values made zero, so that no other head's NaN is met.

Rows in codes are `mosaic_coded`'s, up to the pieces.

`_merge` is a block per head and query over its pieces, some at a time.

Checked: A with race detection (jax 0.10.2, 0.12.0.1), B (both), C (0.12.0.1: h100). Never run on a GPU. The
interpreter knows no wgmma with an operand in registers, and jax 0.10's no transposed one: there, both are
staged in shared memory.

Letters: J heads, N queries of a head, E head size, R rows of the pool.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import compat, tiles
from pallas_kernels.decode_attention import mosaic_coded
from pallas_kernels.decode_attention.coded import Code
from pallas_kernels.decode_attention.partial_softmax import LOG2E, MASK_VALUE, PartialSoftmax, soft_cap
from pallas_kernels.decode_attention.work import Shares, Work, gpu_of, head_of
from pallas_kernels.wgmma import tiling

QUERIES = 64  # rows of a wgmma
LANES = 128  # of a warpgroup
COLUMNS = 64  # of an output that are written at once: shared memory is for rows under way
MERGED = 8  # pieces that are read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a block works on. rows: of the pool, at once; stages: tiles under way; programs: blocks in all."""

    rows: int
    stages: int
    programs: int
    warps: int = 4


@tiles.measured("decode_attention mosaic_gpu")
def default_tile(
    N: int, E: int, itemsize: int, code: Code | None, capability: tuple[int, int] | None
) -> Tile:
    """A guess: no GPU measured it. 36 to 68 KB of rows under way a block, two or three a multiprocessor."""
    cores = gpu_of(capability).multiprocessors
    if code is not None:
        rows, stages, blocks = mosaic_coded.default_sizes(N, E, code)
        return Tile(rows=rows, stages=stages, programs=blocks * cores)
    stages = max(2, 32768 // (64 * E * itemsize))
    return Tile(rows=64, stages=stages, programs=2 * cores)


def why_not(N: int, E: int, dtype: Any, stored: Any, R: int, S: int, code: Code | None) -> str | None:
    """As `triton.why_not`."""
    if code is not None:
        return mosaic_coded.why_not(N, E, dtype, R, S, code)
    if dtype not in (jnp.bfloat16, jnp.float16) or dtype != stored:
        return f"takes rows and queries of one type of 16 bits, got {stored} and {dtype}"
    if E not in (64, 128):
        return f"takes heads of 64 or 128 numbers, got {E}"
    if N > QUERIES:
        return f"takes up to {QUERIES} queries a head, got {N}"
    if S < 64 or R >= 2**31:
        return f"takes 64 rows together or more, and less than 2^31 in all, got {S} and {R}"
    return None


def _pieces(
    q_ref,  # [J, 64, E]
    keys_ref,  # [R, E]
    values_ref,  # [R, E]
    units_ref,  # [J + 1]
    first_ref,  # [J]
    end_ref,  # [J]
    *refs,  # positions of queries [B, 64] and keys [B, S], if rows are hidden; the outputs greatest
    # [slots, 64], total [slots, 64], out [slots, N, 128]; shared memory
    tile: Tile,
    shares: Shares,
    hides: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool,
):
    hidden, refs = (refs[:2], refs[2:]) if hides else ((), refs)
    greatest_ref, total_ref, out_ref, q_smem, k_smem, v_smem, greatest_smem, total_smem, out_smem, *rest = (
        refs
    )
    *staged, q_barrier, k_barrier, v_barrier = rest
    (J, _, E), R, N = q_ref.shape, keys_ref.shape[0], out_ref.shape[1]
    dtype, rows = q_ref.dtype, tile.rows
    lay = functools.partial(compat.lay, interpret=interpret)
    iota = functools.partial(compat.iota, (QUERIES, rows), layout=plgpu.Layout.WGMMA, interpret=interpret)
    by_query, by_row = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    factor = scale * LOG2E if softcap is None else scale

    program = lax.axis_index("share")
    start, size = shares.first_and_size(units_ref, J)
    from_unit = start + program * size
    to_unit = jnp.minimum(from_unit + size, units_ref[J])
    first_head = head_of(units_ref, from_unit, J)
    last_head = jnp.where(from_unit < to_unit, head_of(units_ref, to_unit - 1, J), -1)

    def wide(x: jax.Array, columns: int, axis: int = 0) -> jax.Array:
        """A number for each query (axis 0), or for each row (1), along the other axis."""
        return lax.broadcast_in_dim(x, (QUERIES, columns), (axis,))

    def piece(head, _):
        begins, at = units_ref[head], first_ref[head]
        row = at + jnp.maximum(from_unit - begins, 0) * shares.unit
        stop = jnp.minimum(end_ref[head], at + (to_unit - begins) * shares.unit)
        steps = lax.div(jnp.maximum(stop - row, 0) + rows - 1, rows)

        def place(i):
            """Where tile i begins: not past the pool, nor past the head's rows if these have positions."""
            last = (head + 1) * hidden[1].shape[1] if hidden else R
            return jnp.minimum(row + i * rows, last - rows)

        def fetch(i):
            slot, of = lax.rem(i, tile.stages), pl.ds(place(i), rows)
            plgpu.copy_gmem_to_smem(keys_ref.at[of], k_smem.at[slot], k_barrier.at[slot])
            plgpu.copy_gmem_to_smem(values_ref.at[of], v_smem.at[slot], v_barrier.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[head], q_smem, q_barrier)
        for i in range(tile.stages):
            pl.when(i < steps)(functools.partial(fetch, jnp.int32(i)))
        plgpu.barrier_wait(q_barrier)
        if hidden:
            positions_ref, key_positions_ref = hidden
            B, S = key_positions_ref.shape
            request = lax.div(head, J // B)
            position = compat.load(
                positions_ref, (request, pl.ds(0, QUERIES)), by_query, interpret=interpret, optimized=False
            )

        def step(i, carry):
            greatest, total, out = carry
            slot = lax.rem(i, tile.stages)
            here = place(i)
            low, high = row + i * rows - here, stop - here  # the tile's rows that are new, and the piece's
            plgpu.barrier_wait(k_barrier.at[slot])

            def score(acc_ref):
                plgpu.wgmma(acc_ref, q_smem, transposed(k_smem, slot))
                return acc_ref[...]

            scores = pl.run_scoped(score, plgpu.ACC((QUERIES, rows), jnp.float32)) * factor
            if softcap is not None:
                scores = soft_cap(scores, softcap) * LOG2E
            column = iota(1)
            seen = (column >= low) & (column < high)
            if hidden:
                of = compat.load(
                    key_positions_ref,
                    (request, pl.ds(here - head * S, rows)),
                    by_row,
                    interpret=interpret,
                    optimized=False,
                )
                of, asked = wide(of, rows, 1), wide(position, rows)
                seen = seen & (of >= 0) & (of <= asked)
                if window is not None:
                    seen = seen & (of > asked - window)
            scores = jnp.where(seen, scores, MASK_VALUE * LOG2E)
            new = jnp.maximum(greatest, scores.max(axis=1))
            shrink = jnp.exp2(greatest - new)
            weights = jnp.where(seen, jnp.exp2(scores - wide(new, rows)), 0.0)
            total = total * shrink + weights.sum(axis=1)
            plgpu.barrier_wait(v_barrier.at[slot])

            @pl.when((low > 0) | (high < rows))
            def _():
                values = compat.load(v_smem, (slot,), plgpu.Layout.WGMMA, interpret=interpret)
                number = compat.iota((rows, E), 0, plgpu.Layout.WGMMA, interpret=interpret)
                own = (number >= low) & (number < high)
                v_smem[slot] = jnp.where(own, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            weights = weights.astype(dtype)
            if interpret:
                staged[0][...] = weights
                weights = staged[0]

            def add(acc_ref):
                plgpu.wgmma(acc_ref, weights, v_smem.at[slot])
                return acc_ref[...]

            out = out * wide(shrink, E) + pl.run_scoped(add, plgpu.ACC((QUERIES, E), jnp.float32))
            plgpu.commit_smem()  # all warps have read the slot
            pl.when(i + tile.stages < steps)(functools.partial(fetch, i + tile.stages))
            return new, total, out

        def transposed(ref, slot):
            if interpret and not compat.INTERPRETER_KNOWS_LAYOUTS:
                staged[1][...] = ref[slot].T
                return staged[1]
            return compat.transposed(ref.at[slot])

        zero = jnp.zeros((QUERIES,), jnp.float32)
        none = (
            lay(zero + MASK_VALUE * LOG2E, by_query),
            lay(zero, by_query),
            lay(jnp.zeros((QUERIES, E), jnp.float32), plgpu.Layout.WGMMA),
        )
        greatest, total, out = lax.fori_loop(0, steps, step, none)
        slot, queries = program + head, pl.ds(0, N)
        greatest_smem[...], total_smem[...] = greatest / LOG2E, total
        for column in range(0, E, COLUMNS):
            out_smem[...] = out[:, column : column + COLUMNS]
            plgpu.commit_smem()
            if column == 0:
                plgpu.copy_smem_to_gmem(greatest_smem, greatest_ref.at[slot])
                plgpu.copy_smem_to_gmem(total_smem, total_ref.at[slot])
            plgpu.copy_smem_to_gmem(out_smem.at[queries], out_ref.at[slot, queries, pl.ds(column, COLUMNS)])
            plgpu.wait_smem_to_gmem(0)
        return _

    lax.fori_loop(first_head, last_head + 1, piece, jnp.int32(0))


def _merge(
    pieces_greatest_ref,  # [slots, 64]
    pieces_total_ref,  # [slots, 64]
    pieces_out_ref,  # [slots, N, 128]
    units_ref,  # [J + 1]
    greatest_ref,  # [J, N, 128], a number 128 times over
    total_ref,  # [J, N, 128]
    out_ref,  # [J, N, 128]
    *,
    shares: Shares,
    interpret: bool,
):
    J = out_ref.shape[0]
    head, n = lax.axis_index("head"), lax.axis_index("query")
    start, size = shares.first_and_size(units_ref, J)
    size = jnp.maximum(size, 1)
    begins, ends = units_ref[head] - start, units_ref[head + 1] - start
    first = head + lax.div(begins, size)
    end = jnp.where(ends > begins, head + lax.div(ends - 1, size) + 1, first)
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    def step(i, carry):
        greatest, total, out = carry
        read = []
        for k in range(MERGED):  # all of them, before any is waited for
            slot = first + i * MERGED + k
            real = slot < end
            slot = jnp.minimum(slot, end - 1)
            piece = compat.load(pieces_out_ref, (slot, n, pl.ds(0, LANES)), layout, interpret=interpret)
            score = jnp.where(real, pieces_greatest_ref[slot, n], MASK_VALUE)
            read.append((real, score, pieces_total_ref[slot, n], piece))
        top = greatest
        for _, score, *_ in read:
            top = jnp.maximum(top, score)
        shrink = jnp.exp(greatest - top)
        total, out = total * shrink, out * shrink
        for real, score, more, piece in read:
            share = jnp.exp(score - top)
            total = total + jnp.where(real, more * share, 0.0)
            out = out + jnp.where(real, piece * share, 0.0)
        return top, total, out

    zero = compat.lay(jnp.zeros((LANES,), jnp.float32), layout, interpret=interpret)
    none = zero + MASK_VALUE, zero, zero
    found = lax.fori_loop(0, lax.div(end - first + MERGED - 1, MERGED), step, none)
    for ref, x in zip((greatest_ref, total_ref, out_ref), found, strict=True):
        ref[head, n, pl.ds(0, LANES)] = x


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
    """As `triton.attend`."""
    S = len(keys) if key_positions is None else key_positions.shape[1]
    tile = dataclasses.replace(tile, rows=min(tile.rows, S // 64 * 64))  # it may be measured with more rows
    if code is not None:
        found = mosaic_coded.pieces(
            q,
            keys,
            values,
            work,
            positions,
            key_positions,
            shares=shares,
            rows=tile.rows,
            stages=tile.stages,
            scale=scale,
            softcap=softcap,
            window=window,
            code=code,
            interpret=interpret,
        )
        return _merged(found, work, q.shape, shares, interpret)
    (_, N, E), dtype, slots = q.shape, q.dtype, shares.slots(q.shape[0])
    rows = -(-N // 8) * 8  # of the output: what a copy takes
    arrays: list[Any] = [jnp.pad(q, ((0, 0), (0, QUERIES - N), (0, 0))), keys, values, *work]
    if positions is not None:
        arrays += [jnp.pad(positions, ((0, 0), (0, QUERIES - N)), constant_values=-1), key_positions]

    def shared(shape, dtype=dtype):
        return plgpu.SMEM(shape, dtype, transforms=tiling(dtype, shape[-1]))

    cached = (tile.stages, tile.rows, E)
    scratch: list[Any] = [shared((QUERIES, E)), shared(cached), shared(cached)]
    scratch += [plgpu.SMEM((QUERIES,), jnp.float32)] * 2 + [shared((QUERIES, COLUMNS), jnp.float32)]
    if interpret:
        scratch += [plgpu.SMEM((QUERIES, tile.rows), dtype), plgpu.SMEM((E, tile.rows), dtype)]
    scratch += [plgpu.Barrier(), *[plgpu.Barrier(num_barriers=tile.stages)] * 2]
    shapes = [(slots, QUERIES), (slots, QUERIES), (slots, rows, LANES)]
    pieces = plgpu.kernel(
        functools.partial(
            _pieces,
            tile=tile,
            shares=shares,
            hides=positions is not None,
            scale=scale,
            softcap=softcap,
            window=window,
            interpret=interpret,
        ),
        out_type=[compat.output(shape, jnp.float32, *arrays) for shape in shapes],
        grid=(shares.programs,),
        grid_names=("share",),
        scratch_types=scratch,
        kernel_name="decode_attention_pieces",
        **compat.mosaic_options(interpret),
    )(*arrays)
    return _merged(pieces, work, q.shape, shares, interpret)


def _merged(
    pieces: Sequence[jax.Array], work: Work, shape: tuple[int, ...], shares: Shares, interpret: bool
) -> PartialSoftmax:
    """What each head's pieces make together, for q of this shape."""
    (J, N, E), arrays = shape, (*pieces, work.units)
    greatest, total, out = plgpu.kernel(
        functools.partial(_merge, shares=shares, interpret=interpret),
        out_type=[compat.output((J, N, LANES), jnp.float32, *arrays)] * 3,
        grid=(J, N),
        grid_names=("head", "query"),
        kernel_name="decode_attention_merge",
        **compat.mosaic_options(interpret),
    )(*arrays)
    return PartialSoftmax(greatest[..., 0], total[..., 0], out[..., :E])
