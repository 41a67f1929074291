"""What kernels on Hopper share whose first operand of wgmma comes from registers: what threads put there.

A thread of a warpgroup is lane t < 4 of group g < 8 of warp u < 4. Of an operand or a sum [64, columns] it
has rows 16 u + g and + 8, and of 8 columns two neighbours, 2 t and 2 t + 1, in one register.

Letters: n columns of the sum, k inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat

ROWS = 64  # of the first operand: what one wgmma takes
# One word a lane: the four lanes of a row, and the rows, as in the first operand.
WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def tiling(dtype, columns: int):
    """How TMA and wgmma want a tile of this many columns to lie."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def wgmma(acc, left, right, simulated, group, interpret: bool) -> None:
    """acc [64, n] += left [64, k] @ right [n, k].T, asynchronously; left: a value, or in shared memory.

    The interpreter knows no operand in registers: there both are staged in simulated[0] [groups, 64, K] and
    simulated[1] [groups, K, n], float32, so that order and synchronisation are checked.
    """
    if not interpret:
        plgpu.wgmma(acc, left, compat.transposed(right))
        return
    a, b = simulated
    k = right.shape[-1]
    left = left if isinstance(left, jax.Array) else left[...]
    a[group, :, :k] = left.astype(jnp.float32)
    b[group, :k] = right[...].astype(jnp.float32).T
    plgpu.commit_smem()
    plgpu.wgmma(acc, a.at[group, :, pl.ds(0, k)], b.at[group, pl.ds(0, k)])
    plgpu.wgmma_wait(0)


# Registers of a thread.


def operand_type(columns: int, dtype) -> plgpu.ShapeDtypeStruct:
    """[64, columns] as wgmma takes its first operand and leaves sums."""
    return plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=plgpu.Layout.WGMMA)


def no_registers(columns: int) -> np.ndarray:
    """Those of [64, columns], to be filled."""
    return np.empty(plgpu.Layout.WGMMA.to_mgpu().registers_shape((ROWS, columns)), dtype=object)


def register_at(chunk: int, half: int) -> tuple[int, ...]:
    """Which has the neighbours of some 8 columns, of the thread's first or second row."""
    return (0, chunk, 0, 0, half, 0, 0, 0, 0)


def operand(registers: np.ndarray):
    """The array that registers are."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def each(function: Callable[..., Any], x: Any, *more: Any):
    """Float32 by number: function(its register, 0 or 1 for its place there, what the arrays have there)."""
    registers = np.empty(x.registers.shape, dtype=object)
    for at in np.ndindex(registers.shape):
        found = []
        for e in range(2):
            found.append(function(at, e, *(vector.extract(a.registers[at], [], [e]) for a in (x, *more))))
        registers[at] = two_floats(*found)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """Float32 2^x [64, columns] in one instruction: below 2^-126 it may be 0."""
    if interpret:
        return jnp.exp2(x)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=operand_type(x.shape[1], jnp.float32))
    def power(_, x):
        f32 = ir.F32Type.get()
        return each(lambda _at, _e, a: llvm.inline_asm(f32, [a], "ex2.approx.ftz.f32 $0, $1;", "=f,f"), x)

    return power(x)


# Instructions, on 32-bit words of a thread.


def thread() -> tuple[ir.Value, ir.Value, ir.Value]:
    """Which one this is: u, g, t."""
    whole = masked(mgpu.utils.thread_idx(), 127)
    return arith.shrui(whole, constant(5)), masked(arith.shrui(whole, constant(2)), 7), masked(whole, 3)


def constant(value: int) -> ir.Value:
    """A word."""
    return mgpu.utils.c(int(np.uint32(value).view(np.int32)), ir.IntegerType.get_signless(32))


def add(*words: ir.Value) -> ir.Value:
    found, *rest = words
    for x in rest:
        found = arith.addi(found, x)
    return found


def times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, constant(factor))


def masked(x: ir.Value, mask: int) -> ir.Value:
    return arith.andi(x, constant(mask))


def asm(text: str, *words: ir.Value) -> ir.Value:
    """What an instruction makes of words."""
    i32 = ir.IntegerType.get_signless(32)
    result: Any = llvm.inline_asm(i32, list(words), text, "=r" + ",r" * len(words))
    return result


def and_or(x: ir.Value, mask: int, other: int) -> ir.Value:
    """(x & mask) | other in one instruction: left to itself, ptxas takes two where both are constants."""
    return asm(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", x, constant(other))


def two_halves(x: ir.Value, dtype) -> ir.Value:
    """A word as two floats of 16 bits."""
    kind = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
    return mgpu.utils.bitcast(x, ir.VectorType.get((2,), kind))


def two_floats(first: ir.Value, second: ir.Value) -> ir.Value:
    """A register of float32."""
    pair = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    pair = vector.insert(first, pair, [], [0])
    return vector.insert(second, pair, [], [1])
