"""What both Mosaic GPU kernels are made of: words by lane, values along an axis."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels import compat
from pallas_kernels.wgmma import ROWS, WORDS

STEP = 128  # inputs of a stage


def broadcast(a, shape: tuple[int, int], axis: int, interpret: bool):
    """A value along one axis of an accumulator, in its layout."""
    return compat.lay(lax.broadcast_in_dim(a, shape, (axis,)), plgpu.Layout.WGMMA, interpret=interpret)


def words_at(words_smem, columns: np.ndarray, interpret: bool) -> jax.Array:
    """Columns of shared memory, four neighbouring ones to the four lanes of a row."""
    if interpret:
        whole = words_smem[...]
        return jnp.concatenate([whole[:, c : c + 1] for c in columns], axis=1)
    shape = (ROWS, columns.size)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=WORDS)
    )
    def load(_, ref):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        layout = WORDS.to_mgpu()

        def number(value):
            return arith.constant(index, value)

        thread = arith.remui(arith.index_cast(index, mgpu.utils.thread_idx()), number(128))
        row = arith.divui(thread, number(4))  # of the 8 of a warp's half, 4 warps apart by 16
        warp = arith.divui(thread, number(32))
        row = arith.addi(arith.remui(row, number(8)), arith.muli(warp, number(16)))
        lane = arith.remui(thread, number(4))
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        vector = ir.VectorType.get((1,), i32)
        for chunk in range(columns.size // 4):
            four = [int(c) for c in columns[4 * chunk : 4 * chunk + 4]]
            column = number(four[3])
            for i in (2, 1, 0):  # folded into one sum where places are evenly spaced
                is_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, number(i))
                column = arith.select(is_lane, number(four[i]), column)
            if len({b - a for a, b in zip(four, four[1:], strict=False)}) == 1:
                column = arith.addi(arith.muli(lane, number(four[1] - four[0])), number(four[0]))
            for half in range(2):
                word = memref.load(ref, [arith.addi(row, number(8 * half)), column])
                at = (0, chunk, 0, 0, half, 0, 0, 0, 0)
                registers[at] = mgpu.utils.bitcast(word, vector)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)

    return load(words_smem)
