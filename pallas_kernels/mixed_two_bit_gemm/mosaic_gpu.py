"""Mosaic GPU kernel for Hopper, of columns of 2 bits: words by TMA, weights made in registers, wgmma.

One warpgroup copies stages of 32 words a row into shared memory, some ahead; two multiply, 64 outputs each:

    acc[outputs, tokens] += (scale code)[outputs, inputs] @ x - (scale zero point)[outputs, words] @ sums of x

with weights in the type of x from registers: `decode`'s offset + code, then a multiply-add of pairs that
takes the offset away and rounds once (`lanes`). Steps and zero points of the next stage are decoded while
tensor cores multiply ("asynchronous dequantization"). The sum over words is cut into `Tile.split` parts where
outputs are few; XLA adds them in a fixed order.

Columns of 4 bits and single weights are Triton's; XLA adds them. An infinite activation gives NaN where the
reference may give infinity.

Checked: A with race detection (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0, sm_90a). Never run on a GPU.
The interpreter knows neither loads by lane nor wgmma on registers: there, both have a twin in jnp, and the
operand is staged in shared memory, so that order and synchronisation are checked, not those.

Letters: M tokens, N outputs, n words of a row.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import compat, tiles
from pallas_kernels.mixed_two_bit_gemm import decode, lanes, triton
from pallas_kernels.mixed_two_bit_gemm.lanes import WORDS_A_STAGE
from pallas_kernels.wgmma import ROWS, tiling, wgmma

WARPGROUPS = 2  # that multiply
OUTPUTS = ROWS * WARPGROUPS
BLOCKS = ROWS // 16  # of outputs that share a step's scale, of a warpgroup: one a warp
QUARTERS = 4  # of a stage: inputs of one wgmma's operand in registers
SHARED_BYTES = 227 * 1024  # of a block on sm_90


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """m: tokens, 8 to 64. stages: of 512 inputs in flight. split: blocks that share the sum over words."""

    m: int
    stages: int = 2
    split: int = 1


@tiles.measured("mixed_two_bit_gemm mosaic_gpu")
def default_tile(M: int, N: int, W: int) -> Tile:
    """A guess, which no GPU has measured."""
    m = min(64, max(8, pl.next_power_of_2(M)))
    programs = pl.cdiv(M, m) * (N // OUTPUTS)
    split = max(1, min(2 * 132 // programs, W // 512 // 2))
    stage = 2 * (16 * WORDS_A_STAGE + 2 * WORDS_A_STAGE) * m + WORDS_A_STAGE * (4 * OUTPUTS + OUTPUTS)
    most = (SHARED_BYTES // (2 if m < 32 else 1) - OUTPUTS * 4 * m - 2048) // stage  # two blocks a core
    return Tile(m=m, stages=max(2, min(4, most)), split=split)


def why_not(
    x, two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place,
    *, group4: int,
) -> str | None:  # fmt: skip
    """Why these arrays are not taken, None if they are."""
    if two is None:
        return "takes columns of 2 bits, of which there are none"
    N, n = two.shape
    if N % OUTPUTS or n % WORDS_A_STAGE:
        inputs = 16 * WORDS_A_STAGE
        return f"takes multiples of {OUTPUTS} outputs and of {inputs} inputs at 2 bits, not {N=}, {16 * n}"
    return triton.why_not(x, group4=group4)


def mixed_two_bit_gemm(
    x: Float[Array, "M W"],
    two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place,
    *, group4: int, tile: Tile | None = None, interpret: bool = False,
) -> Float32[Array, "M N"]:  # fmt: skip
    """The product: by this kernel, and with the weight's other parts by Triton's."""
    n = two.shape[1]
    y = two_bits(x[:, : 16 * n], two, step, zero_point, step_zero, step_scale, tile=tile, interpret=interpret)
    if four is not None:
        columns = (None,) * 5, (four, four_scale, four_zero_point), (None,) * 2
        of_four = triton.default_tile(len(x), len(four), 16 * four.shape[1])
        if of_four.words == 16:  # there are registers for more rows than with columns of 2 bits
            of_four = dataclasses.replace(of_four, rows=64)
        y = y + triton.mixed_two_bit_gemm(
            x[:, 16 * n :], *sum(columns, ()), group4=group4, tile=of_four, interpret=interpret
        )
    if outlier is not None:
        y = y + triton.sparse(x, outlier, place, interpret=interpret)[:, : y.shape[1]]
    return y


def two_bits(
    x, two, step, zero_point, step_zero, step_scale, *, tile: Tile | None, interpret: bool
) -> Float32[Array, "M N"]:
    """The part of columns of 2 bits."""
    M, (N, n) = x.shape[0], two.shape
    tile = default_tile(M, N, 16 * n) if tile is None else tile
    stages = n // WORDS_A_STAGE
    each = pl.cdiv(stages, tile.split)
    split = pl.cdiv(stages, each)  # no part is empty
    x = decode.by_word(jnp.pad(x, ((0, -M % tile.m), (0, 0))), 2, WORDS_A_STAGE)
    rows = x.shape[0]
    sums = lanes.in_order(decode.sums_in_two(x)[..., None])
    arrays = (
        lanes.in_order(x),
        sums,
        two,
        step.reshape(step.shape[0], -1),
        zero_point,
        step_zero,
        step_scale,
    )
    dtype = x.dtype
    scratch = [plgpu.SMEM((WARPGROUPS, ROWS, tile.m), jnp.float32, transforms=tiling(jnp.float32, tile.m))]
    for width in (16 * WORDS_A_STAGE // QUARTERS, 2 * WORDS_A_STAGE) if interpret else ():
        scratch += [  # operands of the simulated wgmma
            plgpu.SMEM((WARPGROUPS, ROWS, width), jnp.float32),
            plgpu.SMEM((WARPGROUPS, width, tile.m), jnp.float32),
        ]
    y = plgpu.kernel(
        functools.partial(_kernel, tile=tile, each=each, stages=stages, dtype=dtype, interpret=interpret),
        out_type=compat.output((split, N, rows), jnp.float32, *arrays),
        grid=(N // OUTPUTS, rows // tile.m, split),
        grid_names=("n", "m", "part"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="mixed_two_bit_gemm_mosaic",
        **compat.mosaic_options(interpret),
    )(*arrays)
    y = y[0] if split == 1 else y.sum(axis=0)
    return y[:, :M].T


def _kernel(*refs, tile: Tile, each: int, stages: int, dtype, interpret: bool):
    """A block: some outputs by some tokens, over a part of the words."""
    sources, (out_ref, staging, *simulated) = refs[:7], refs[7:]
    n, m, part = (lax.axis_index(name) for name in ("n", "m", "part"))
    group = lax.axis_index("warpgroup")
    first = part * each
    steps = jnp.minimum(each, stages - first)
    quarter, blocks = 16 * WORDS_A_STAGE // QUARTERS, BLOCKS * WARPGROUPS
    many_registers = tile.m > 16

    rings = [
        plgpu.SMEM((tile.stages, QUARTERS, tile.m, quarter), dtype, transforms=tiling(dtype, quarter)),
        plgpu.SMEM(
            (tile.stages, tile.m, 2 * WORDS_A_STAGE), dtype, transforms=tiling(dtype, 2 * WORDS_A_STAGE)
        ),
        plgpu.SMEM((tile.stages, OUTPUTS, WORDS_A_STAGE), jnp.uint32),
        plgpu.SMEM((tile.stages, blocks, 2 * WORDS_A_STAGE), jnp.uint32),
        plgpu.SMEM((tile.stages, blocks, WORDS_A_STAGE), jnp.uint32),
        plgpu.SMEM((tile.stages, blocks, WORDS_A_STAGE // 2), jnp.uint8),
        plgpu.SMEM((tile.stages, blocks, WORDS_A_STAGE), jnp.float16),
    ]

    def fill(buffers, full, empty):
        """The stages, one after the other."""
        if many_registers:
            plgpu.set_max_registers(40, action="decrease")
        x_ref, *others = sources
        x_smem, *rest = buffers
        of_m = pl.ds(m * tile.m, tile.m)
        rows = (of_m, pl.ds(n * OUTPUTS, OUTPUTS), *[pl.ds(n * blocks, blocks)] * 4)

        def of_step(i, _):
            slot, stage = lax.rem(i, tile.stages), first + i
            pl.when(i >= tile.stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            here = full.at[slot]
            for q in range(QUARTERS):
                k = pl.ds((stage * QUARTERS + q) * quarter, quarter)
                plgpu.copy_gmem_to_smem(x_ref.at[of_m, k], x_smem.at[slot, q], here)
            for source, ring, of_rows in zip(others, rest, rows, strict=True):
                size = ring.shape[-1]
                plgpu.copy_gmem_to_smem(source.at[of_rows, pl.ds(stage * size, size)], ring.at[slot], here)

        lax.fori_loop(0, steps, of_step, None)
        for ago in range(tile.stages, 0, -1):  # no barrier is left half way
            pl.when(steps >= ago)(
                lambda ago=ago: plgpu.barrier_wait(empty.at[lax.rem(steps - ago, tile.stages)])
            )

    def multiply(buffers, full, empty):
        """The sum over this part."""
        if many_registers:
            plgpu.set_max_registers(232, action="increase")
        x_smem, sums_smem, words_smem, *metadata = buffers
        of_group = pl.ds(group * BLOCKS, BLOCKS)

        def steps_of(i):
            slot = lax.rem(i, tile.stages)
            return lanes.steps(*(ring.at[slot, of_group] for ring in metadata), dtype, interpret=interpret)

        def over_stages(acc):
            plgpu.barrier_wait(full.at[0])

            def of_step(i, now):
                slot = lax.rem(i, tile.stages)
                words = lanes.words_of(words_smem.at[slot, pl.ds(group * ROWS, ROWS)], interpret=interpret)
                for q in range(QUARTERS):
                    weights = lanes.weights(words, now, q, QUARTERS, dtype, interpret=interpret)
                    wgmma(acc, weights, x_smem.at[slot, q], simulated[:2], group, interpret)
                    plgpu.wgmma_wait(1)  # no more than two operands are in registers
                zeros = lanes.zero_points(now, dtype, interpret=interpret)
                wgmma(acc, zeros, sums_smem.at[slot], simulated[2:], group, interpret)
                pl.when(i + 1 < steps)(lambda: plgpu.barrier_wait(full.at[lax.rem(i + 1, tile.stages)]))
                following = steps_of(jnp.minimum(i + 1, steps - 1))
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()  # registers have read what TMA writes next
                plgpu.barrier_arrive(empty.at[slot])
                return following

            lax.fori_loop(0, steps, of_step, steps_of(0))
            return acc[...]

        staging[group] = pl.run_scoped(over_stages, plgpu.ACC((ROWS, tile.m), jnp.float32))
        plgpu.commit_smem()
        of_n = pl.ds(n * OUTPUTS + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(staging.at[group], out_ref.at[part, of_n, pl.ds(m * tile.m, tile.m)])
        plgpu.wait_smem_to_gmem(0)

    def block(*shared):
        *buffers, full, empty = shared
        lax.cond(
            group == WARPGROUPS,
            functools.partial(fill, buffers, full, empty),
            functools.partial(multiply, buffers, full, empty),
        )

    pl.run_scoped(
        block,
        *rings,
        plgpu.Barrier(num_arrivals=QUARTERS + len(rings) - 1, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages),
        collective_axes="warpgroup",
    )
