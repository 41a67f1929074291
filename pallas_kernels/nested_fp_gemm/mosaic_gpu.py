"""The Mosaic GPU kernels, for Hopper: both bytes to an exact float16 in registers, or the upper as float8.

One warpgroup copies tiles into shared memory by TMA, some stages ahead; two multiply, 64 weight rows each.
The weights are the left operand, since only that one may come from registers:

    fp16    acc[rows, tokens] += join(upper, lower)[rows, K] @ x[tokens, K].T     join in registers, wgmma
    fp8     acc[rows, tokens] += upper[rows, K] @ x8[tokens, K].T                 both from shared memory
    traced  a scalar in memory chooses one of the two within one kernel: in fp8 `lower` is never fetched

While the tensor cores multiply one half of a tile, the next half is joined: a wgmma stays in flight, and its
registers are written again only after it was waited for. The sums of float8 products are rounded to about 14
bits within the tensor cores of Hopper, so that they are added up in float32 every 128 inputs.

Checked, for jax 0.10.2 and 0.12: numbers and races in the interpreter, lowering; 0.12: compiled for sm_90a
without spills. Never run on a GPU. With A in registers the interpreter cannot multiply: there, both operands
are copied to shared memory as float32 first, so that order and synchronisation are checked, not wgmma itself.

Letters: M tokens, N outputs, K inputs, S parts that K is cut into.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import compat, tiles
from pallas_kernels.nested_fp_gemm import ptx, reference
from pallas_kernels.wgmma import tiling, wgmma

WARPGROUPS = 2  # that multiply
ROWS = 64 * WARPGROUPS  # weight rows of a tile: 64 is what one wgmma takes
HALF = 64  # inputs that one turn joins and multiplies: a row of 128 bytes of x, the widest swizzle
STEP = 2 * HALF  # inputs of a turn of the loop, and of a float8 tile
SHARED_BYTES = 227 * 1024  # of a block on sm_90
BYTES_LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # of bytes that become 16-bit operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How the work is cut.

    tokens: rows of x of a tile, a multiple of 8 up to 256 (128 in fp8, whose sums are kept twice).
    depth: inputs of a stage in fp16, 64 or 128. stages: tiles in flight, at least 2. splits: parts of K that
      XLA adds up. blocks: that run at once, each of which takes one tile after the other. stripe: token tiles
      side by side that neighbouring blocks work on, so that weights are read from the second-level cache.
    """

    tokens: int
    depth: int
    stages: int
    splits: int
    blocks: int = 132
    stripe: int = 8


@tiles.measured("nested_fp_gemm mosaic_gpu")
def default_tile(M: int, N: int, K: int, mode: str) -> Tile:
    """A guess, which no GPU has measured.

    tokens: what ends first by a count of cycles: for 128 inputs of a tile, tensor cores take 8 a token (4 in
      fp8), joining 700 however few there are, and shared memory moves 128 bytes; blocks take tiles in turns.
    """

    def cost(tokens: int) -> tuple[int, int]:
        tiles = -(-M // tokens) * (N // ROWS)
        cycles = 256 + 3 * tokens if mode == "fp8" else max(700, 512 + 6 * tokens, 8 * tokens)
        return -(-tiles // 132) * cycles, -tokens

    largest = 256 if mode == "fp16" else 128
    tokens = next((t for t in (8, 16, 32, 64) if M <= t), 0)
    tokens = tokens or min((t for t in (64, 128, 256) if t <= largest), key=cost)
    splits, tiles, steps = 1, -(-M // tokens) * (N // ROWS), K // STEP
    while 2 * splits * tiles <= 132 and M <= 256 and steps % (2 * splits) == 0 and steps >= 8 * splits:
        splits *= 2
    depth = HALF if tokens == 256 else STEP
    return Tile(tokens=tokens, depth=depth, stages=most_stages(tokens, depth, mode), splits=splits)


def most_stages(tokens: int, depth: int, mode: str) -> int:
    """Stages that fit shared memory beside the tiles of the output, at most 6."""
    stage = (1 if mode == "fp8" else 2) * depth * (tokens + ROWS)
    return min(6, (SHARED_BYTES - 1024 - WARPGROUPS * 4 * 64 * min(tokens, 64)) // stage)


def why_not(x, upper, lower, switch=None) -> str | None:
    """Why these arrays are not taken, None if they are."""
    N, K = upper.shape
    if lower is not None and x.dtype not in (jnp.float16, jnp.bfloat16):  # fp8 makes float8 of any
        return f"takes activations of 16 bits, not {x.dtype}"
    if N % ROWS or K % STEP:
        return f"takes multiples of {ROWS} outputs and {STEP} inputs, not {N=}, {K=}"
    return None if x.size else "takes at least one token"


def nested_fp_gemm(
    x: Float[Array, "M K"],
    upper: UInt8[Array, "N K"],
    lower: UInt8[Array, "N K"] | None,
    switch: Int32[Array, ""] | None = None,
    *,
    mode: str,
    shift: int = 0,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float32[Array, "M N"]:
    """The product, in the mode that is named or, where it is "traced", that `switch` says (0 fp16)."""
    M, K = x.shape
    N = upper.shape[0]
    tile = default_tile(M, N, K, mode) if tile is None else tile
    pad = -M % tile.tokens
    x = jnp.pad(x, ((0, pad), (0, 0)))

    def in_fp16():
        name = "nested_fp_gemm_fp16"
        return gemm(x, (upper, lower), tile=tile, shift=shift, name=name, interpret=interpret)

    if mode == "fp16":
        y = in_fp16()
    else:
        x8, scale = reference.quantize_tokens(x)
        upper8 = lax.bitcast_convert_type(upper, reference.F8)  # the same memory
        inverse = np.float32(2.0 ** (shift - 8)) / scale[:, 0]

        def in_fp8():
            return gemm8(x8, inverse, upper8, tile=tile, interpret=interpret)

        if mode == "fp8":
            y = in_fp8()
        elif interpret and not compat.INTERPRETER_KNOWS_LAYOUTS:  # nor buffers in a branch of a kernel
            y = lax.cond(switch == 0, in_fp16, in_fp8)
        else:
            weights = upper, upper8, lower
            y = gemm_traced(x, x8, inverse, weights, switch, tile=tile, shift=shift, interpret=interpret)
    return y[:M] if pad else y


def gemm(x, weights, *, tile: Tile, shift: int = 0, name: str, interpret: bool):
    """x @ w.T, where the weights are (upper, lower) or, for comparison, one float16 array."""
    (M, K), N = x.shape, weights[0].shape[0]

    def kernel(*refs):
        _fp16(*refs, tile=tile, shift=shift, nested=len(weights) == 2, interpret=interpret)

    return _launch(kernel, (M, N, K), x, *weights, tile=tile, name=name, interpret=interpret)


def gemm8(x8, inverse, upper8, *, tile: Tile, interpret: bool):
    """x8 @ upper8.T, both float8, each token times `inverse`."""
    (M, K), N = x8.shape, upper8.shape[0]

    def kernel(*refs):
        _fp8(*refs, tile=tile, interpret=interpret)

    name = "nested_fp_gemm_fp8"
    return _launch(kernel, (M, N, K), x8, inverse, upper8, tile=tile, name=name, interpret=interpret)


def gemm_traced(x, x8, inverse, weights, switch, *, tile: Tile, shift: int, interpret: bool):
    """One of the two, as `switch` says when it runs; weights: upper as bytes and as float8, lower."""
    (M, K), N = x.shape, weights[0].shape[0]

    def kernel(switch_ref, x_ref, x8_ref, inverse_ref, upper_ref, upper8_ref, lower_ref, out_ref, *scratch):
        lax.cond(
            switch_ref[0] == 0,
            functools.partial(
                _fp16, x_ref, upper_ref, lower_ref, out_ref, *scratch,
                tile=tile, shift=shift, nested=True, interpret=interpret,
            ),
            functools.partial(
                _fp8, x8_ref, inverse_ref, upper8_ref, out_ref, *scratch, tile=tile, interpret=interpret
            ),
        )  # fmt: skip

    arrays = (switch.reshape(1), x, x8, inverse, *weights)
    name = "nested_fp_gemm_traced"
    return _launch(kernel, (M, N, K), *arrays, tile=tile, name=name, interpret=interpret)


def _launch(kernel, sizes: tuple[int, int, int], *arrays, tile: Tile, name: str, interpret: bool):
    """The kernel on every block; parts of K are added up afterwards, in one order."""
    M, N, K = sizes
    if tile.stages < 2:  # one is still multiplied when the next is waited for
        raise ValueError(f"nested_fp_gemm: a tile needs two stages or more, got {tile.stages=}")
    chunk = min(tile.tokens, 64)
    scratch = [plgpu.SMEM((WARPGROUPS, chunk, 64), jnp.float32, transforms=tiling(jnp.float32, 64))]
    if interpret:  # operands of the simulated wgmma
        scratch += [
            plgpu.SMEM((WARPGROUPS, 64, STEP), jnp.float32),
            plgpu.SMEM((WARPGROUPS, STEP, tile.tokens), jnp.float32),
        ]
    items = tile.splits * (M // tile.tokens) * (N // ROWS)
    parts = plgpu.kernel(
        kernel,
        out_type=compat.output((tile.splits, M, N), jnp.float32, *arrays),
        grid=(min(tile.blocks, items),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        **compat.mosaic_options(interpret),
    )(*arrays)
    return parts[0] if tile.splits == 1 else parts.sum(axis=0)


def _fp16(x_ref, *refs, tile: Tile, shift: int, nested: bool, interpret: bool):
    """A block's tiles in fp16 mode; `refs`: the weights' arrays, the output, staging."""
    weights, (out_ref, staging, *simulated) = refs[: 1 + nested], refs[1 + nested :]
    (M, K), N, depth = x_ref.shape, weights[0].shape[0], tile.depth
    stages_per_item = K // tile.splits // depth

    def copies(place, stage):
        part, m, n = place
        k = pl.ds((part * stages_per_item + stage) * depth, depth)
        yield x_ref.at[pl.ds(m * tile.tokens, tile.tokens), k]
        for w in weights:
            yield w.at[pl.ds(n * ROWS, ROWS), k]

    def multiply(acc_ref, buffers, first, ready, release):
        x_smem, *w_smem = buffers
        group = lax.axis_index("warpgroup")
        rows = pl.ds(group * 64, 64)

        def turn(i, _):
            bytes_ = ()
            for half in range(2):
                ahead = half * HALF // depth  # stages of this turn before this one
                stage = i * (STEP // depth) + ahead
                slot = lax.rem(first + stage, tile.stages)
                new = half == 0 or depth == HALF
                columns = pl.ds(0 if depth == HALF else half * HALF, HALF)
                if new:
                    ready(slot)
                    if nested:
                        bytes_ = tuple(
                            compat.load(w.at[slot], (rows, slice(None)), BYTES_LAYOUT, interpret=interpret)
                            for w in w_smem
                        )
                if nested:
                    at = 0 if depth == HALF else half * HALF
                    a = _join(*(b[:, at : at + HALF] for b in bytes_), x_ref.dtype, interpret=interpret)
                else:
                    a = w_smem[0].at[slot, rows, columns]
                wgmma(acc_ref, a, x_smem.at[slot, :, columns], simulated, group, interpret)
                plgpu.wgmma_wait(1)  # the one before: its registers and its stage may be written again
                if new:
                    if nested:  # bytes were read as other threads' memory is, and TMA writes there next
                        plgpu.commit_smem()
                    pl.when(stage > 0)(functools.partial(release, first + stage - 1))

        lax.fori_loop(0, K // tile.splits // STEP, turn, None)
        return acc_ref

    def block(*shared):
        *buffers, full, empty = shared

        def item(place, first):
            def scope(acc_ref):
                multiply(
                    acc_ref,
                    buffers,
                    first,
                    lambda slot: plgpu.barrier_wait(full.at[slot]),
                    lambda stage: plgpu.barrier_arrive(empty.at[lax.rem(stage, tile.stages)]),
                )
                acc = acc_ref[...]
                plgpu.barrier_arrive(empty.at[lax.rem(first + stages_per_item - 1, tile.stages)])
                _store(acc * np.float32(2.0**shift) if shift else acc, out_ref, staging, place, interpret)

            pl.run_scoped(scope, plgpu.ACC((64, tile.tokens), jnp.float32))

        _specialised(copies, item, buffers, full, empty, (M, N), stages_per_item, tile)

    _with_buffers(
        block,
        [
            (x_ref.dtype, tile.tokens, depth),
            *((w.dtype, ROWS, depth) for w in weights),
        ],
        tile.stages,
    )


def _fp8(x_ref, inverse_ref, upper_ref, out_ref, staging, *simulated, tile: Tile, interpret: bool):
    """A block's tiles in fp8 mode."""
    (M, K), N = x_ref.shape, upper_ref.shape[0]
    stages_per_item = K // tile.splits // STEP

    def copies(place, stage):
        part, m, n = place
        k = pl.ds((part * stages_per_item + stage) * STEP, STEP)
        yield x_ref.at[pl.ds(m * tile.tokens, tile.tokens), k]
        yield upper_ref.at[pl.ds(n * ROWS, ROWS), k]

    def block(x_smem, upper_smem, full, empty):
        group = lax.axis_index("warpgroup")
        rows = pl.ds(group * 64, 64)

        def item(place, first):
            def turn(stage, total):
                slot = lax.rem(first + stage, tile.stages)
                plgpu.barrier_wait(full.at[slot])

                def scope(acc_ref):
                    a = upper_smem.at[slot, rows]
                    a = a[...] if interpret else a
                    wgmma(acc_ref, a, x_smem.at[slot], simulated, group, interpret)
                    return acc_ref[...]

                part = pl.run_scoped(scope, plgpu.ACC((64, tile.tokens), jnp.float32))
                plgpu.barrier_arrive(empty.at[slot])
                return total + part

            zero = jnp.zeros((64, tile.tokens), jnp.float32)
            zero = compat.lay(zero, plgpu.Layout.WGMMA, interpret=interpret)
            total = lax.fori_loop(0, stages_per_item, turn, zero)
            tokens = pl.ds(place[1] * tile.tokens, tile.tokens)
            by_token = compat.load(
                inverse_ref, (tokens,), plgpu.Layout.WGMMA.reduce(0), interpret=interpret, optimized=False
            )
            by_token = lax.broadcast_in_dim(by_token, total.shape, (1,))
            by_token = compat.lay(by_token, plgpu.Layout.WGMMA, interpret=interpret)
            _store(total * by_token, out_ref, staging, place, interpret)

        _specialised(copies, item, (x_smem, upper_smem), full, empty, (M, N), stages_per_item, tile)

    _with_buffers(block, [(x_ref.dtype, tile.tokens, STEP), (upper_ref.dtype, ROWS, STEP)], tile.stages)


def _with_buffers(block, tiles, stages: int):
    """`block` with a ring of each tile (dtype, rows, columns) and barriers for full and empty stages."""
    rings = [plgpu.SMEM((stages, rows, k), dtype, transforms=tiling(dtype, k)) for dtype, rows, k in tiles]
    full = plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages)
    empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    pl.run_scoped(block, *rings, full, empty, collective_axes="warpgroup")


def _specialised(copies, item, buffers, full, empty, sizes, stages_per_item: int, tile: Tile):
    """The last warpgroup fills stages, the others call `item(place, first stage)` for each of the tiles."""
    M, N = sizes
    m_tiles, n_tiles = M // tile.tokens, N // ROWS
    items, blocks = tile.splits * m_tiles * n_tiles, lax.axis_size("block")
    block, group = lax.axis_index("block"), lax.axis_index("warpgroup")
    mine = (items - block + blocks - 1) // blocks

    def place(i):
        number = block + i * blocks
        m, n = plgpu.planar_snake(lax.rem(number, m_tiles * n_tiles), (m_tiles, n_tiles), 0, tile.stripe)
        return number // (m_tiles * n_tiles), m, n

    def producer():
        plgpu.set_max_registers(56, action="decrease")

        def of_item(i, _):
            where = place(i)

            def of_stage(stage, _):
                number = i * stages_per_item + stage
                slot = lax.rem(number, tile.stages)
                pl.when(number >= tile.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                for source, ring in zip(copies(where, stage), buffers, strict=True):
                    plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

            lax.fori_loop(0, stages_per_item, of_stage, None)

        lax.fori_loop(0, mine, of_item, None)
        total = mine * stages_per_item
        for ago in range(tile.stages, 0, -1):  # no barrier is left half way
            pl.when(total >= ago)(
                lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(total - ago, tile.stages)])
            )

    def consumer():
        plgpu.set_max_registers(224, action="increase")
        lax.fori_loop(0, mine, lambda i, _: item(place(i), i * stages_per_item), None)

    lax.cond(group == WARPGROUPS, producer, consumer)


def _store(acc, out_ref, staging, place, interpret: bool):
    """The tile [64, tokens] of a warpgroup to the output [S, M, N], by way of shared memory."""
    part, m, n = place
    group, tokens = lax.axis_index("warpgroup"), acc.shape[1]
    chunk = staging.shape[1]
    columns = pl.ds(n * ROWS + group * 64, 64)
    if not interpret:
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
    for at in range(0, tokens, chunk):
        piece = acc[:, at : at + chunk]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if interpret:
            staging[group] = piece.T
        else:
            compat.transposed(staging.at[group])[...] = piece
        plgpu.commit_smem()
        rows = pl.ds(m * tokens + at, chunk)
        plgpu.copy_smem_to_gmem(staging.at[group], out_ref.at[part, rows, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _join(upper, lower, dtype, *, interpret: bool):
    """Bytes of weights as an operand in registers: the exact float16, and what it is in `dtype`."""
    if interpret:
        half = lax.bitcast_convert_type(reference.join(upper, lower), jnp.float16)
    else:
        half = _join_words(upper, lower)
    if dtype != jnp.float16:
        half = half.astype(jnp.float32).astype(dtype)
    return half if interpret else plgpu.layout_cast(half, plgpu.Layout.WGMMA)


def _join_words(upper, lower):
    """Bytes of weights as the exact float16, by the instructions of `ptx`; the interpreter knows none."""

    @plgpu.inline_mgpu(
        arg_types=(BYTES_LAYOUT, BYTES_LAYOUT),
        return_type=plgpu.ShapeDtypeStruct(upper.shape, jnp.float16, layout=BYTES_LAYOUT),
    )
    def join(_, u, low):
        i32 = ir.IntegerType.get_signless(32)
        pair, four = ir.VectorType.get((1,), i32), ir.VectorType.get((4,), ir.F16Type.get())
        registers = np.empty(u.registers.shape, dtype=object)
        for i in np.ndindex(registers.shape):
            words = [mgpu.utils.bitcast(a.registers[i], i32) for a in (u, low)]
            two = llvm.inline_asm(ir.Type.parse("!llvm.struct<(i32, i32)>"), words, ptx.JOIN, ptx.CONSTRAINTS)
            halves = [mgpu.utils.bitcast(llvm.extractvalue(i32, two, [at]), pair) for at in range(2)]
            registers[i] = mgpu.utils.bitcast(mgpu.utils.vector_concat(halves), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=u.layout, _is_signed=None)

    return join(upper, lower)
