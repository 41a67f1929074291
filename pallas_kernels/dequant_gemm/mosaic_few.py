"""Mosaic GPU kernel for a few rows of x on Hopper: whole numbers times bytes of words (`int8`).

One warpgroup copies stages into shared memory, some ahead; the others multiply, 64 outputs each. A word goes
to registers as four bytes of the first operand, one instruction for it and each field, and all fields of a
part are one product with the digits of x. After each step of 128 inputs a float32 total of each column gets

    total += scale (unit product + start - zero point sum of x)

and XLA adds up the columns of a row, and the parts of the sum. Packed zero points and coded scales are turned
into floats by XLA beforehand. Numbers are as exact as in `triton_few`.

Checked: A with race detection (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0, sm_90a). Never run on a GPU.
What the interpreter does not know is told in `mosaic_gpu`.
"""

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
from jaxtyping import Array, Float, UInt32

from pallas_kernels import compat
from pallas_kernels.dequant_gemm import int8
from pallas_kernels.dequant_gemm.mosaic_parts import STEP, broadcast, words_at
from pallas_kernels.wgmma import ROWS, WORDS, tiling, wgmma
from pallas_kernels.words import CODES_PER_BLOCK


def steps_of_stage(K: int, group_size: int) -> int:
    """Two where stages are whole so and have the scales of neighbouring groups, or of one."""
    one = group_size >= K or group_size % (2 * STEP) == 0
    return 2 if K % (2 * STEP) == 0 and (one or group_size <= STEP) else 1


def bytes_of_stage(M: int, outputs: int, bits: int) -> int:
    """Shared memory of a stage of two steps."""
    columns = int8.COLUMNS * int8.tiles_of(pl.next_power_of_2(M), STEP, STEP, STEP)
    digits = len(int8.parts_of(bits)) * columns * STEP
    return 2 * (digits + outputs * (STEP * bits // 8 + 8) + 16 * columns)


def dequant_gemm(
    x: Float[Array, "M K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Float[Array, "G N"],
    zero_point: Float[Array, "G N"] | None,
    *,
    group_size: int,
    m: int,
    warpgroups: int,
    stages: int,
    split: int,
    interpret: bool,
) -> Float[Array, "M N"]:
    """The product; m: rows of x a block, a power of two."""
    M, K = x.shape
    N, blocks, bits = codes.shape
    S = steps_of_stage(K, group_size)
    digits, factors = int8.in_digits(x, bits=bits, k=STEP, group_size=group_size, m=m, interpret=interpret)
    columns, parts = int8.COLUMNS * int8.tiles_of(m, STEP, group_size, K), digits.shape[0]
    words = codes.reshape(N, blocks * bits)
    arrays = [digits, words, factors, scale, *([] if zero_point is None else [zero_point])]
    outputs, of_scale = ROWS * warpgroups, max(1, S * STEP // min(group_size, K))
    rings = [
        plgpu.SMEM((stages, S, parts, columns, STEP), jnp.int8, transforms=tiling(jnp.int8, STEP)),
        plgpu.SMEM((stages, outputs, S * STEP // CODES_PER_BLOCK * bits), jnp.uint32),
        plgpu.SMEM((stages, S, 4, columns), jnp.float32),
        *(plgpu.SMEM((stages, of_scale, outputs), by_output.dtype) for by_output in arrays[3:]),
    ]
    scratch = [plgpu.SMEM((warpgroups, ROWS, columns), jnp.float32, transforms=tiling(jnp.float32, columns))]
    if interpret:  # operands of the simulated wgmma
        scratch.append(plgpu.SMEM((warpgroups, ROWS, STEP), jnp.float32))
        scratch.append(plgpu.SMEM((warpgroups, STEP, columns), jnp.float32))
    y = plgpu.kernel(
        functools.partial(
            _kernel,
            rings=rings,
            bits=bits,
            group_size=min(group_size, K),
            m=m,
            split=split,
            interpret=interpret,
        ),
        out_type=compat.output((split, N, factors.shape[2]), jnp.float32, *arrays),
        grid=(N // outputs, factors.shape[2] // columns, split),
        grid_names=("n", "m", "part"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="dequant_gemm_mosaic_few",
        **compat.mosaic_options(interpret),
    )(*arrays)
    y = y.reshape(split, N, -1, columns // m, m).sum(axis=(0, 3))
    return y.reshape(N, -1)[:, :M].T


def _kernel(*refs, rings, bits: int, group_size: int, m: int, split: int, interpret: bool):
    """A block: some outputs by some rows of x, over a part of K."""
    sources = refs[: len(rings)]
    out_ref, staging, *simulated = refs[len(rings) :]
    stages, S, _, columns, _ = rings[0].shape
    _, outputs, words = rings[1].shape
    of_scale, warpgroups = rings[3].shape[1], outputs // ROWS
    n, tile, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    group = lax.axis_index("warpgroup")
    all_steps = sources[0].shape[2] // (S * STEP)
    each = pl.cdiv(all_steps, split)
    first = part * each
    steps = jnp.minimum(each, all_steps - first)
    parts = int8.parts_of(bits)

    def fill(buffers, full, empty):
        """The stages, one after the other."""
        of_n, of_m = pl.ds(n * outputs, outputs), pl.ds(tile * columns, columns)

        def of_step(i, _):
            slot, step = lax.rem(i, stages), first + i
            pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            here = full.at[slot]
            plgpu.copy_gmem_to_smem(
                sources[1].at[of_n, pl.ds(step * words, words)], buffers[1].at[slot], here
            )
            for q in range(S):
                k = pl.ds((step * S + q) * STEP, STEP)
                for order in range(len(parts)):
                    plgpu.copy_gmem_to_smem(
                        sources[0].at[order, of_m, k], buffers[0].at[slot, q, order], here
                    )
            of_these = sources[2].at[pl.ds(step * S, S), :, of_m]
            plgpu.copy_gmem_to_smem(of_these, buffers[2].at[slot], here)
            groups = pl.ds(lax.div(step * (S * STEP), group_size), of_scale)
            for source, ring in zip(sources[3:], buffers[3:], strict=True):
                plgpu.copy_gmem_to_smem(source.at[groups, of_n], ring.at[slot], here)

        lax.fori_loop(0, steps, of_step, None)
        for ago in range(stages, 0, -1):  # no barrier is left half way
            pl.when(steps >= ago)(lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(steps - ago, stages)]))

    def multiply(buffers, full, empty):
        """The sum over this part of K."""
        x_smem, words_smem, factors_smem, scale_smem = buffers[:4]
        rows, shape = pl.ds(group * ROWS, ROWS), (ROWS, columns)
        H = int8.groups_of_step(STEP, group_size, sources[0].shape[2])
        column = compat.iota(shape, 1, plgpu.Layout.WGMMA, interpret=interpret) if H > 1 else None

        def along(axis, ring, index):
            """Numbers of each output (axis 0) or column."""
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            a = compat.load(ring, index, layout, interpret=interpret, optimized=False)
            return broadcast(a.astype(jnp.float32), shape, axis, interpret)

        def of_groups(ring, slot, q):
            """Numbers of each output, for each column those of its group in step q."""
            first = q * H if H > 1 else min(q, of_scale - 1)
            out = along(0, ring, (slot, first, rows))
            for h in range(1, H):
                behind = column >= h * (int8.DIGITS * m)
                out = jnp.where(behind, along(0, ring, (slot, first + h, rows)), out)
            return out

        def of_step(i, total):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            for q in range(S):
                lefts = [_operand(words_smem.at[slot, rows], part, q, bits, interpret) for part in parts]

                def products(acc, q=q, lefts=lefts):
                    for order, left in enumerate(lefts):
                        wgmma(acc, left, x_smem.at[slot, q, order], simulated, group, interpret)
                    return acc[...]

                # subtle: simulated in float32, which holds these whole numbers
                kind = jnp.float32 if interpret else jnp.int32
                acc = pl.run_scoped(products, plgpu.ACC(shape, kind))
                start, of_zero, unit = (along(1, factors_smem, (slot, q, of, slice(None))) for of in range(3))
                z = of_groups(buffers[4], slot, q) if len(buffers) > 4 else np.float32(2 ** (bits - 1))
                codes = acc.astype(jnp.float32) * unit + start + z * of_zero
                total = total + of_groups(scale_smem, slot, q) * codes
            plgpu.commit_smem()  # registers have read what TMA writes next
            plgpu.barrier_arrive(empty.at[slot])
            return total

        zero = compat.lay(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA, interpret=interpret)
        staging[group] = lax.fori_loop(0, steps, of_step, zero)
        plgpu.commit_smem()
        of_n = pl.ds(n * outputs + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(staging.at[group], out_ref.at[part, of_n, pl.ds(tile * columns, columns)])
        plgpu.wait_smem_to_gmem(0)

    def block(*shared):
        *buffers, full, empty = shared
        lax.cond(
            group == warpgroups,
            functools.partial(fill, buffers, full, empty),
            functools.partial(multiply, buffers, full, empty),
        )

    pl.run_scoped(
        block,
        *rings,
        plgpu.Barrier(num_arrivals=len(rings) - 1 + S * len(parts), num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        collective_axes="warpgroup",
    )


def _operand(words_smem, part: int8.Part, q: int, bits: int, interpret: bool) -> jax.Array:
    """All fields of a part in step q of a stage, as a first operand [outputs, STEP] of wgmma."""
    block = np.arange(STEP // CODES_PER_BLOCK)[:, None] + q * (STEP // CODES_PER_BLOCK)
    columns = (block * bits + part.word + np.arange(part.p)).reshape(-1)
    words = words_at(words_smem, columns, interpret)
    masks = [(255 << part.p * f & 255) * 0x01010101 for f in range(8 // part.p)]
    if interpret:
        fields = jnp.concatenate([words & jnp.uint32(mask) for mask in masks], axis=1)
        four = jnp.stack([(fields >> (8 * b)) & jnp.uint32(255) for b in range(4)], axis=-1)
        return four.reshape(ROWS, STEP).astype(jnp.float32) - 128.0
    shape = (ROWS, STEP)

    @plgpu.inline_mgpu(
        arg_types=(WORDS,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def assemble(_, array):
        layout, i32 = plgpu.Layout.WGMMA_8BIT.to_mgpu(), ir.IntegerType.get_signless(32)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        chunks = columns.size // 4
        for f, mask in enumerate(masks):
            asm = f"lop3.b32 $0, $1, {mask:#x}, 0x80808080, 0x6A;"
            for chunk in range(chunks):
                for half in range(2):
                    word = mgpu.utils.bitcast(array.registers[0, chunk, 0, 0, half, 0, 0, 0, 0], i32)
                    word = llvm.inline_asm(i32, [word], asm, "=r,r")
                    four = mgpu.utils.bitcast(word, ir.VectorType.get((4,), ir.IntegerType.get_signless(8)))
                    registers[0, f * chunks + chunk, 0, 0, half, 0, 0, 0, 0] = four
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return assemble(words)
