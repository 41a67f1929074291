"""Mosaic GPU kernel for Hopper: words by TMA, levels looked up in registers or shared memory, wgmma.

One warpgroup copies stages of 256 inputs into shared memory, ahead; the others multiply, 64 outputs each:

    acc[outputs, rows of x] += levels[outputs, K] @ x[rows, K].T                 levels from registers

A lane has the words of whole blocks of two outputs, and their tables of up to 16 levels, in registers. Wider
tables lie in shared memory, once for each of the four lanes of a row and each lane's in a bank of its own:
512 bytes a level and warpgroup, 128 KiB for 8 bits, which leaves room for one block on a multiprocessor.

Looked up, a block is the lane's part of a first operand of wgmma for 128 inputs, for which x has the order in
which levels come. While the tensor cores multiply one half of a stage, the other half is looked up. Levels
are rounded to the type of x, as the reference does; float32 activations are three rows of float16 (`pieces`).
The sum over K is cut into `Tile.splits` parts, which XLA adds in a fixed order.

A width that is known only when the kernel runs (`pallas_kernels.any_precision_gemm`) chooses between loops.

Checked: A with race detection (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0, sm_90a). Never run on a GPU.
The interpreter knows neither loads by lane nor `prmt` nor wgmma on registers: there, words and wide tables
are indexed, bytes permuted by shifts, and the operand is staged in shared memory, so that order and
synchronisation are checked, not those three.

Letters: M rows of x, N outputs, K inputs, S stages of 256 inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, tiles
from pallas_kernels.codebook_gemm import cells as code_cells
from pallas_kernels.codebook_gemm import lookup
from pallas_kernels.codebook_gemm.cells import Cells, Order
from pallas_kernels.codebook_gemm.lanes import (
    CHUNK,
    fill_table,
    instructions,
    lane_words,
    operand,
    operand_by_memory,
    plain_operand_by_memory,
    table_of,
)
from pallas_kernels.codebook_gemm.pieces import by_pieces
from pallas_kernels.wgmma import ROWS, tiling, wgmma
from pallas_kernels.words import CODES_PER_BLOCK

CHUNKS = 2
STEP = CHUNK * CHUNKS  # inputs of a stage
BLOCKS = STEP // CODES_PER_BLOCK
WEIGHTS_PER_TURN = ROWS * STEP / 128  # of a thread
SHARED_BYTES = 227 * 1024  # of a block on sm_90


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a block takes.

    rows: of x, 8 to 128. warpgroups: that multiply, 64 outputs each. stages: of 256 inputs in flight, 2 or
      more. splits: blocks that share the sum over K.
    """

    rows: int
    warpgroups: int = 2
    stages: int = 4
    splits: int = 1


@tiles.measured("codebook_gemm mosaic_gpu")
def default_tile(M: int, N: int, K: int, bits: int) -> Tile:
    """A guess, which no GPU has measured; bits: the most that are read."""
    in_registers = bits <= lookup.MOST_BITS
    rows = min(128 if in_registers else 32, max(8, pl.next_power_of_2(M)))
    warpgroups = 2 if in_registers and N % (2 * ROWS) == 0 and N >= 8192 else 1
    programs = pl.cdiv(M, rows) * (N // (ROWS * warpgroups))
    blocks = 2 if rows < 128 and bits <= 6 else 1  # of a multiprocessor, by their shared memory
    splits = max(1, min(blocks * 132 // (programs * warpgroups), K // STEP // 4))
    stage = STEP * (2 * rows + ROWS * warpgroups * bits // 8)
    other = 512 * warpgroups * _levels_in_memory(bits) + 4 * ROWS * warpgroups * min(rows, 64) + 2048
    most = (SHARED_BYTES // blocks - other) // stage
    stages = 2 ** (max(2, min(8, most)).bit_length() - 1)  # a power of two: a turn has no division then
    return Tile(rows=rows, warpgroups=warpgroups, stages=stages, splits=splits)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a format's words come to the lanes.

    stage(outputs, bits): shape of a stage. copied(ref, outputs, s, bits), part(ring, bits): what of the array
      is stage s, and where in a stage it goes. word(stage, rows, i): an array [rows, ..] of which column
      first + step * lane is word i of the lane's first block, with first, step, and what to add for the next.
    cells(words, bits, interpret), order: as in `pallas_kernels.codebook_gemm.triton`.
    """

    stage: Callable[[int, int], tuple[int, ...]]
    copied: Callable[[Any, Any, Any, int], Any]
    part: Callable[[Any, int], Any]
    word: Callable[[Any, Any, int, int], tuple[Any, int, int, int]]
    cells: Callable[[Sequence[jax.Array], int, bool], Cells]
    order: Order
    name: str


def codebook_gemm(
    x: jax.Array, codes: jax.Array, table: jax.Array, *, tile: Tile | None = None, interpret: bool = False
) -> jax.Array:
    """See `pallas_kernels.codebook_gemm`; x [*B, K] -> float32 [*B, N]."""
    N, blocks, bits = codes.shape
    stored = Stored(
        stage=lambda outputs, bits: (outputs, BLOCKS * bits),
        copied=lambda ref, outputs, s, bits: ref.at[outputs, pl.ds(s * BLOCKS * bits, BLOCKS * bits)],
        part=lambda stage, bits: stage,
        word=lambda stage, rows, i, bits: (stage.at[rows], i, CHUNKS * bits, bits),
        cells=lambda words, bits, interpret: code_cells.cells(words, bits, instructions(interpret)),
        order=code_cells.order(bits),
        name="codebook_gemm",
    )
    words = codes.reshape(N, blocks * bits)
    return product(x, words, (table,), None, stored=stored, tile=tile, interpret=interpret)


def why_not(x: jax.Array, codes: jax.Array, table: jax.Array) -> str | None:
    """Why it does not take these, None if it does."""
    return why_not_sizes(x, table.shape[0])


def why_not_sizes(x: jax.Array, N: int) -> str | None:
    """Why it does not take these sizes, None if it does."""
    K = x.shape[-1]
    if not x.size or not N:
        return "takes no empty arrays"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "takes bfloat16, float16 and float32"
    if K % STEP or N % ROWS:
        return f"takes multiples of {STEP} inputs and {ROWS} outputs, not {K=}, {N=}"
    return None


def product(
    x: jax.Array,
    words: jax.Array,
    tables: Sequence[jax.Array],
    bits: jax.Array | None,
    *,
    stored: Stored,
    tile: Tile | None,
    interpret: bool,
) -> jax.Array:
    """x [*B, K] times a weight, float32 [*B, N].

    tables: of the widths that may be read, which rise by one; bits: an int32 scalar, one of them, or None for
      the first.
    """
    if x.dtype == jnp.float32:
        halves = functools.partial(
            product, words=words, tables=tables, bits=bits, stored=stored, tile=tile, interpret=interpret
        )
        return by_pieces(halves, x)
    lead, K, N = x.shape[:-1], x.shape[-1], tables[0].shape[0]
    x = x.reshape(-1, K)
    M = x.shape[0]
    widths = [table.shape[1].bit_length() - 1 for table in tables]
    tile = default_tile(M, N, K, widths[-1]) if tile is None else tile
    x = _in_lanes(jnp.pad(x, ((0, -M % tile.rows), (0, 0))), stored.order)
    arrays = [x, words, *tables, *([] if bits is None else [bits.astype(jnp.int32).reshape(1)])]
    chunk = min(tile.rows, 64)
    scratch = [plgpu.SMEM((tile.warpgroups, chunk, ROWS), jnp.float32, transforms=tiling(jnp.float32, ROWS))]
    if interpret:  # operands of the simulated wgmma
        scratch += [
            plgpu.SMEM((tile.warpgroups, ROWS, CHUNK), jnp.float32),
            plgpu.SMEM((tile.warpgroups, CHUNK, tile.rows), jnp.float32),
        ]
    parts = plgpu.kernel(
        functools.partial(
            _kernel, tile=tile, stored=stored, widths=widths, traced=bits is not None, interpret=interpret
        ),
        out_type=compat.output((tile.splits, x.shape[0], N), jnp.float32, *arrays),
        grid=(N // (ROWS * tile.warpgroups), x.shape[0] // tile.rows, tile.splits),
        grid_names=("n", "m", "part"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=f"{stored.name}_mosaic",
        **compat.mosaic_options(interpret),
    )(*arrays)
    y = parts[0] if tile.splits == 1 else parts.sum(axis=0)
    return y[:M].reshape(*lead, N)


def _in_lanes(x: jax.Array, order: Order) -> jax.Array:
    """Inputs [M, K] in the order in which levels come to the tensor cores: by stage, chunk, pair, lane.

    Lane t has blocks 2 t and 2 t + 1 of a stage, one in each chunk; of every 8 columns two are a lane's.
    """
    M = x.shape[0]
    x = code_cells.in_order(x, order, blocks=1)  # [M, blocks, pairs, 1, 2]
    return x.reshape(M, -1, 4, CHUNKS, 16, 2).transpose(0, 1, 3, 4, 2, 5).reshape(M, -1)


def _kernel(*refs, tile: Tile, stored: Stored, widths: list[int], traced: bool, interpret: bool):
    """A block: some outputs by some rows of x, over a part of K."""
    (x_ref, words_ref), refs = refs[:2], refs[2:]
    table_refs, refs = refs[: len(widths)], refs[len(widths) :]
    asked, refs = (refs[0], refs[1:]) if traced else (None, refs)
    out_ref, staging, *simulated = refs
    K, dtype = x_ref.shape[1], x_ref.dtype
    outputs = ROWS * tile.warpgroups
    n, m, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    group = lax.axis_index("warpgroup")
    each = pl.cdiv(K // STEP, tile.splits)
    first = part * each
    steps = jnp.maximum(jnp.minimum(each, K // STEP - first), 0)

    def fill(bits, buffers, full, empty):
        """The stages, one after the other."""
        x_smem, words_smem, *_ = buffers

        def of_step(i, _):
            slot, s = lax.rem(i, tile.stages), first + i
            pl.when(i >= tile.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            here = full.at[slot]
            source = stored.copied(words_ref, pl.ds(n * outputs, outputs), s, bits)
            plgpu.copy_gmem_to_smem(source, stored.part(words_smem.at[slot], bits), here)
            for c in range(CHUNKS):
                inputs = x_ref.at[pl.ds(m * tile.rows, tile.rows), pl.ds(s * STEP + c * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(inputs, x_smem.at[slot, c], here)

        lax.fori_loop(0, steps, of_step, None)
        for ago in range(tile.stages, 0, -1):  # no barrier is left half way
            pl.when(steps >= ago)(
                lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(steps - ago, tile.stages)])
            )

    def multiply(bits, buffers, full, empty):
        """The sum over this part of K."""
        x_smem, words_smem, tables_smem = buffers
        mine = pl.ds(n * outputs + group * ROWS, ROWS)
        table_ref = table_refs[bits - widths[0]] if traced else table_refs[0]
        if bits <= lookup.MOST_BITS:
            table = table_of(table_ref.at[mine], bits, dtype, interpret)
        elif interpret:
            table = table_ref[mine].astype(dtype)
        else:
            table = tables_smem.at[group]
            fill_table(table, table_ref.at[mine], bits, dtype)

        def release(step):
            plgpu.barrier_arrive(empty.at[lax.rem(step, tile.stages)])

        def scope(acc_ref):
            def of_step(i, _):
                slot = lax.rem(i, tile.stages)
                plgpu.barrier_wait(full.at[slot])
                rows = pl.ds(group * ROWS, ROWS)
                for c in range(CHUNKS):
                    words = []
                    for w in range(bits):
                        ref, at, step, following = stored.word(words_smem.at[slot], rows, w, bits)
                        words.append(lane_words(ref, at + c * following, step, interpret))
                    cells = stored.cells(words, bits, interpret)
                    if bits <= lookup.MOST_BITS:
                        a = operand([selectors for selectors, _ in cells], table, dtype, interpret)
                    elif interpret:
                        a = plain_operand_by_memory(cells, table)
                    else:
                        a = operand_by_memory(cells, table, dtype)
                    wgmma(acc_ref, a, x_smem.at[slot, c], simulated, group, interpret)
                    plgpu.wgmma_wait(1)  # the one before: its registers may be written again
                    if c == 0:
                        pl.when(i > 0)(functools.partial(release, i - 1))
                plgpu.commit_smem()  # words were read as other threads' memory is, and TMA writes there next

            lax.fori_loop(0, steps, of_step, None)
            return acc_ref[...]

        acc = pl.run_scoped(scope, plgpu.ACC((ROWS, tile.rows), jnp.float32))
        pl.when(steps > 0)(lambda: release(steps - 1))
        _store(acc, out_ref.at[part], staging, m * tile.rows, mine, group, interpret)

    def block(*shared):
        *buffers, full, empty = shared

        def at_width(bits):
            lax.cond(
                group == tile.warpgroups,
                functools.partial(fill, bits, buffers, full, empty),
                functools.partial(multiply, bits, buffers, full, empty),
            )

        if traced:
            lax.switch(asked[0] - widths[0], [functools.partial(at_width, bits) for bits in widths])
        else:
            at_width(widths[0])

    pl.run_scoped(
        block,
        plgpu.SMEM((tile.stages, CHUNKS, tile.rows, CHUNK), dtype, transforms=tiling(dtype, CHUNK)),
        plgpu.SMEM((tile.stages, *stored.stage(outputs, widths[-1])), jnp.uint32),
        plgpu.SMEM((tile.warpgroups, 4, _levels_in_memory(widths[-1]), 32), jnp.uint32),
        plgpu.Barrier(num_arrivals=1 + CHUNKS, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        collective_axes="warpgroup",
    )


def _levels_in_memory(bits: int) -> int:
    """Entries a lane of tables in shared memory; one, which is not used, where all are in registers."""
    return 2**bits if bits > lookup.MOST_BITS else 1


def _store(acc, out_ref, staging, first, columns, group, interpret: bool) -> None:
    """The tile [64, rows] of a warpgroup to the output [M, N], by way of shared memory."""
    chunk = staging.shape[1]
    if not interpret:
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
    for at in range(0, acc.shape[1], chunk):
        piece = acc[:, at : at + chunk]
        if interpret:
            staging[group] = piece.T
        else:
            compat.transposed(staging.at[group])[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[group], out_ref.at[pl.ds(first + at, chunk), columns])
        plgpu.wait_smem_to_gmem(0)
