"""Mosaic GPU kernel for Hopper: words by TMA, codes to 16-bit floats in registers, wgmma.

Up to 8 rows of x, fewer where groups are short, are `mosaic_few`'s. For more, of float16 and bfloat16:
one warpgroup copies stages into shared memory, some ahead; the others multiply, 64 outputs each:

    acc[outputs, rows of x] = (offset + code)[outputs, K] @ x[rows, K].T          codes from registers

The weights are the first operand, since only that one may come from registers; x has the order in which codes
come (`decode`). After each span of inputs, of one group, a float32 total gets

    total += scale (acc - (offset + zero point) sums of x over the span)

The sums are a wgmma with ones for up to 16 rows of x, and XLA's beside the reordering of x for more. The sum
over K is cut into `Tile.split` parts where outputs are few; XLA adds the parts in a fixed order. Packed zero
points and coded scales are turned into floats by XLA beforehand, which moves 4 to 8 bytes more for a group of
an output. An infinite activation gives NaN where the reference may give infinity.

Checked: A with race detection (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0, sm_90a). Never run on a GPU.
The interpreter knows neither loads by lane nor wgmma on registers: there, words are indexed and the operand
is staged in shared memory, so that order and synchronisation are checked, not those two.

Letters: M rows of x, N outputs, K inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels import compat, tiles
from pallas_kernels.dequant_gemm import mosaic_few, reference
from pallas_kernels.dequant_gemm.decode import (
    Fields,
    digits,
    in_order_of_pairs,
    pair,
    plain_and_or,
    spread,
    unit_size,
    units_of_block,
)
from pallas_kernels.dequant_gemm.mosaic_parts import STEP, broadcast, words_at
from pallas_kernels.wgmma import ROWS, WORDS, tiling, wgmma
from pallas_kernels.words import CODES_PER_BLOCK, parts

FEW_ROWS = 8  # of x, which become digits; times groups of a step
MOST_ROWS_OWN_SUM = 16  # of a tile of x whose sums a wgmma makes
SHARED_BYTES = 227 * 1024  # of a block on sm_90


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """m: rows of x, 8 to 128. warpgroups: that multiply, 64 outputs each. stages: of 128 inputs in flight.
    split: blocks that share the sum over K.
    """

    m: int
    warpgroups: int = 2
    stages: int = 4
    split: int = 1


@tiles.measured("dequant_gemm mosaic_gpu")
def default_tile(M: int, N: int, K: int, bits: int) -> Tile:
    """Guesses: no GPU has measured them."""
    m = min(128, max(8, pl.next_power_of_2(M)))
    warpgroups = 2 if N % (2 * ROWS) == 0 else 1
    programs = pl.cdiv(M, m) * (N // (ROWS * warpgroups))
    split = max(1, min(2 * 132 // programs, K // STEP // 4))
    stage = STEP * (2 * m + ROWS * warpgroups * bits // 8) + 8 * ROWS * warpgroups
    if M <= FEW_ROWS:
        stage = mosaic_few.bytes_of_stage(M, ROWS * warpgroups, bits)
    rest = ROWS * warpgroups * (4 * m + 128) + 2048
    most = (SHARED_BYTES // (2 if m < 128 else 1) - rest) // stage  # two blocks a core
    return Tile(m=m, warpgroups=warpgroups, stages=max(2, min(8, most)), split=split)


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
    del scale, zero_point, scale_step
    K, N = x.shape[-1], codes.shape[0]
    if not x.size or not codes.size:
        return "takes no empty arrays"
    kinds = (jnp.float16, jnp.bfloat16, *((jnp.float32,) if _few(x.size // K, K, group_size) else ()))
    if x.dtype not in kinds:
        return f"takes float16 and bfloat16, and {FEW_ROWS} rows of float32, not {x.size // K} of {x.dtype}"
    if K % STEP or N % ROWS:
        return f"takes multiples of {STEP} inputs and {ROWS} outputs, not {K=}, {N=}"
    short = group_size < K and group_size % STEP
    if short and group_size not in _spans(codes.shape[-1]) and not _few(x.size // K, K, group_size):
        return f"takes groups of a multiple of {STEP}, of {_spans(codes.shape[-1])}, or one group"
    return None


def inputs_of_turn(M: int, K: int, group_size: int) -> int:
    """Of the loop: what instructions are counted by."""
    return STEP * (mosaic_few.steps_of_stage(K, group_size) if _few(M, K, group_size) else 1)


def _few(M: int, K: int, group_size: int) -> bool:
    """Whether the kernel for a few rows takes these."""
    if group_size >= K or group_size % STEP == 0:
        return M <= FEW_ROWS
    return group_size in (32, 64) and M * (STEP // group_size) <= FEW_ROWS


def _spans(bits: int) -> tuple[int, ...]:
    """Groups smaller than a stage: of whole chunks of 4 units."""
    return tuple(span for span in (32, 64) if span % (4 * unit_size(bits)) == 0)


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
    """The product."""
    lead, K = x.shape[:-1], x.shape[-1]
    N, blocks, bits = codes.shape
    x = x.reshape(-1, K)
    M = x.shape[0]
    tile = default_tile(M, N, K, bits) if tile is None else tile
    span = STEP if group_size >= K else min(group_size, STEP)
    if scale_step is not None:
        scale = reference.scales(scale, scale_step, N)
    if zero_point is not None and zero_point.dtype == jnp.uint32:
        zero_point = reference.zero_points(zero_point, (scale.shape[0], N), bits).astype(jnp.float16)
    if _few(M, K, group_size):
        y = mosaic_few.dequant_gemm(
            x,
            codes,
            scale,
            zero_point,
            group_size=group_size,
            m=pl.next_power_of_2(M),
            warpgroups=tile.warpgroups,
            stages=tile.stages,
            split=tile.split,
            interpret=interpret,
        )
        return y.reshape(*lead, N)
    x = in_order_of_pairs(jnp.pad(x, ((0, -M % tile.m), (0, 0))), K, unit_size(bits))
    sums = None
    if tile.m > MOST_ROWS_OWN_SUM:
        sums = x.astype(jnp.float32).reshape(x.shape[0], -1, span).sum(axis=-1).T  # [spans, M]
    words = codes.reshape(N, blocks * bits)
    arrays = [x, words, scale, *(a for a in (zero_point, sums) if a is not None)]
    columns = min(span, 64)  # of ones: a row of 128 bytes
    scratch = [
        plgpu.SMEM((tile.warpgroups, ROWS, tile.m), jnp.float32, transforms=tiling(jnp.float32, tile.m))
    ]
    if sums is None:
        ones = (tile.warpgroups, ROWS, columns)
        scratch.append(plgpu.SMEM(ones, x.dtype, transforms=tiling(x.dtype, columns)))
    if interpret:  # operands of the simulated wgmma
        scratch += [
            plgpu.SMEM((tile.warpgroups, ROWS, span), jnp.float32),
            plgpu.SMEM((tile.warpgroups, span, tile.m), jnp.float32),
        ]
    y = plgpu.kernel(
        functools.partial(
            _kernel,
            tile=tile,
            bits=bits,
            group_size=min(group_size, K),
            span=span,
            has_zero=zero_point is not None,
            interpret=interpret,
        ),
        out_type=compat.output((tile.split, N, x.shape[0]), jnp.float32, *arrays),
        grid=(N // (ROWS * tile.warpgroups), x.shape[0] // tile.m, tile.split),
        grid_names=("n", "m", "part"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="dequant_gemm_mosaic",
        **compat.mosaic_options(interpret),
    )(*arrays)
    y = y[0] if tile.split == 1 else y.sum(axis=0)
    return y[:, :M].T.reshape(*lead, N)


def _kernel(*refs, tile: Tile, bits: int, group_size: int, span: int, has_zero: bool, interpret: bool):
    """A block: some outputs by some rows of x, over a part of K."""
    own_sums = tile.m <= MOST_ROWS_OWN_SUM
    many_registers = tile.m == 128 and tile.warpgroups == 2  # which the 168 of each thread are too few for
    count = 3 + has_zero + (not own_sums)
    sources, (out_ref, staging, *simulated) = refs[:count], refs[count:]
    ones = simulated.pop(0) if own_sums else None
    x_ref, words_ref, scale_ref, *rest = sources
    zero_ref = rest.pop(0) if has_zero else None
    K, dtype = x_ref.shape[1], x_ref.dtype
    spans, outputs = STEP // span, ROWS * tile.warpgroups
    unit, words = unit_size(bits), STEP // CODES_PER_BLOCK * bits
    n, m, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    group = lax.axis_index("warpgroup")
    each = pl.cdiv(K // STEP, tile.split)
    first = part * each
    steps = jnp.minimum(each, K // STEP - first)

    rings = [
        plgpu.SMEM((tile.stages, spans, tile.m, span), dtype, transforms=tiling(dtype, span)),
        plgpu.SMEM((tile.stages, outputs, words), jnp.uint32),
        plgpu.SMEM((tile.stages, spans, outputs), scale_ref.dtype),
    ]
    if zero_ref is not None:
        rings.append(plgpu.SMEM((tile.stages, spans, outputs), zero_ref.dtype))
    if not own_sums:
        rings.append(plgpu.SMEM((tile.stages, spans, tile.m), jnp.float32))

    def fill(buffers, full, empty):
        """The stages, one after the other."""
        if many_registers:
            plgpu.set_max_registers(40, action="decrease")
        x_smem, words_smem, scale_smem, *more = buffers
        of_n, of_m = pl.ds(n * outputs, outputs), pl.ds(m * tile.m, tile.m)

        def of_step(i, _):
            slot, step = lax.rem(i, tile.stages), first + i
            pl.when(i >= tile.stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            here = full.at[slot]
            plgpu.copy_gmem_to_smem(words_ref.at[of_n, pl.ds(step * words, words)], words_smem.at[slot], here)
            for q in range(spans):
                k = pl.ds(step * STEP + q * span, span)
                plgpu.copy_gmem_to_smem(x_ref.at[of_m, k], x_smem.at[slot, q], here)
            groups = pl.ds(lax.div(step * STEP, group_size), spans)
            by_output = [(scale_ref, scale_smem)] + ([(zero_ref, more[0])] if has_zero else [])
            for source, ring in by_output:
                plgpu.copy_gmem_to_smem(source.at[groups, of_n], ring.at[slot], here)
            if not own_sums:
                plgpu.copy_gmem_to_smem(
                    rest[-1].at[pl.ds(step * spans, spans), of_m], more[-1].at[slot], here
                )

        lax.fori_loop(0, steps, of_step, None)
        for ago in range(tile.stages, 0, -1):  # no barrier is left half way
            pl.when(steps >= ago)(
                lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(steps - ago, tile.stages)])
            )

    def multiply(buffers, full, empty):
        """The sum over this part of K."""
        if many_registers:
            plgpu.set_max_registers(232, action="increase")
        x_smem, words_smem, scale_smem, *more = buffers
        rows = pl.ds(group * ROWS, ROWS)
        kinds = digits(bits, dtype)
        if ones is not None:
            all_ones = jnp.ones(ones.shape[1:], dtype)
            ones[group] = compat.lay(all_ones, plgpu.Layout.WGMMA, interpret=interpret)
            plgpu.commit_smem()

        def by_row(ring, slot, q):
            """Of each output, for all rows of x."""
            layout = plgpu.Layout.WGMMA.reduce(1)
            a = compat.load(ring, (slot, q, rows), layout, interpret=interpret, optimized=False)
            return broadcast(a.astype(jnp.float32), (ROWS, tile.m), 0, interpret)

        def of_step(i, total):
            slot = lax.rem(i, tile.stages)
            plgpu.barrier_wait(full.at[slot])
            fields = _fields(words_smem.at[slot, rows], bits, unit, interpret)
            and_or = plain_and_or if interpret else _and_or
            operands = [
                _operand([pair(fields, bits, j, digit, and_or) for j in range(unit // 2)], dtype, interpret)
                for digit in kinds
            ]
            for q in range(spans):
                lefts = [a[:, q * span : (q + 1) * span] if spans > 1 else a for a in operands]

                def products(*accs, q=q, lefts=lefts):
                    for acc, left in zip(accs, lefts, strict=not own_sums):
                        wgmma(acc, left, x_smem.at[slot, q], simulated, group, interpret)
                    for k in range(0, span if own_sums else 0, ones.shape[-1] if own_sums else 1):
                        x = x_smem.at[slot, q, :, pl.ds(k, ones.shape[-1])]
                        wgmma(accs[-1], ones.at[group], x, simulated, group, interpret)
                    return tuple(acc[...] for acc in accs)

                accs = [plgpu.ACC((ROWS, tile.m), jnp.float32)] * (len(kinds) + own_sums)
                done = pl.run_scoped(products, *accs)
                if own_sums:
                    sums = done[-1]
                else:
                    layout = plgpu.Layout.WGMMA.reduce(0)
                    index = (slot, q, slice(None))
                    sums = compat.load(more[-1], index, layout, interpret=interpret, optimized=False)
                    sums = broadcast(sums, (ROWS, tile.m), 1, interpret)
                offset = np.float32(sum(d.offset * 2**d.low for d in kinds))
                less = by_row(more[0], slot, q) + offset if has_zero else offset + np.float32(2 ** (bits - 1))
                acc = done[0] * np.float32(2 ** kinds[0].low) + done[1] if len(kinds) > 1 else done[0]
                total = total + by_row(scale_smem, slot, q) * (acc - less * sums)
            plgpu.commit_smem()  # registers have read what TMA writes next
            plgpu.barrier_arrive(empty.at[slot])
            return total

        zero = jnp.zeros((ROWS, tile.m), jnp.float32)
        zero = compat.lay(zero, plgpu.Layout.WGMMA, interpret=interpret)
        staging[group] = lax.fori_loop(0, steps, of_step, zero)
        plgpu.commit_smem()
        of_n = pl.ds(n * outputs + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(staging.at[group], out_ref.at[part, of_n, pl.ds(m * tile.m, tile.m)])
        plgpu.wait_smem_to_gmem(0)

    def block(*shared):
        *buffers, full, empty = shared
        lax.cond(
            group == tile.warpgroups,
            functools.partial(fill, buffers, full, empty),
            functools.partial(multiply, buffers, full, empty),
        )

    copies = spans + 2 + has_zero + (not own_sums)
    pl.run_scoped(
        block,
        *rings,
        plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        collective_axes="warpgroup",
    )


def _fields(words_smem, bits: int, unit: int, interpret: bool) -> Fields:
    """Fields [outputs, units] of the codes of a stage."""
    units, per_block = STEP // unit, units_of_block(unit)
    t = np.arange(units) % per_block
    out, at = [], 0
    for p in parts(bits):
        places = [np.arange(units) // per_block * bits + at + np.asarray(w) for w in _places(p, t, unit)]
        words = tuple(words_at(words_smem, place, interpret) for place in places)
        lanes = None
        if unit * p < 32:
            lanes = compat.iota((ROWS, units), 1, WORDS, interpret=interpret)
            lanes = lax.rem(lanes, per_block)
        out.append(spread(words, p, lanes, unit))
        at += p
    return tuple(out)


def _places(p: int, t: np.ndarray, unit: int) -> tuple[np.ndarray, ...]:
    """`word_at` of numbers that are known now."""
    words = unit * p // 32
    return tuple(words * t + i for i in range(words)) if words else (t // (32 // (unit * p)),)


def _and_or(a: jax.Array, mask: int, b: jax.Array | int) -> jax.Array:
    """(a & mask) | b in one instruction: left to itself, ptxas takes two where b is a constant."""
    asm = f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;"
    given = () if isinstance(b, int) else (b,)

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * (1 + len(given)),
        return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.uint32, layout=WORDS),
    )
    def and_or(_, x, *others):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty(x.registers.shape, dtype=object)
        for i in np.ndindex(registers.shape):
            word = mgpu.utils.bitcast(x.registers[i], i32)
            third = mgpu.utils.bitcast(others[0].registers[i], i32) if others else mgpu.utils.c(b, i32)
            word = llvm.inline_asm(i32, [word, third], asm, "=r,r,r")
            registers[i] = mgpu.utils.bitcast(word, ir.VectorType.get((1,), i32))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=False)

    return and_or(a, *given)


def _operand(pairs: list[jax.Array], dtype, interpret: bool) -> jax.Array:
    """Pairs [outputs, units] as a first operand [outputs, K] of wgmma: each word as it is."""
    outputs, units = pairs[0].shape
    shape = (outputs, units * 2 * len(pairs))
    if interpret:
        v = jnp.stack(pairs, axis=-1).reshape(outputs, units // 4, 4, len(pairs))  # [.., chunk, t, i]
        halves = jnp.stack([v & 0xFFFF, v >> 16], axis=-1).astype(jnp.uint16)  # [.., chunk, t, i, h]
        return lax.bitcast_convert_type(halves.transpose(0, 1, 3, 2, 4).reshape(shape), dtype)

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(pairs),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    def assemble(_, *arrays):
        layout = plgpu.Layout.WGMMA.to_mgpu()
        kind = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for chunk in range(units // 4):
            for i, array in enumerate(arrays):
                for half in range(2):
                    word = array.registers[0, chunk, 0, 0, half, 0, 0, 0, 0]
                    two = mgpu.utils.bitcast(word, ir.VectorType.get((2,), kind))
                    registers[0, chunk * len(arrays) + i, 0, 0, half, 0, 0, 0, 0] = two
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return assemble(*pairs)
