"""What a lane of a warpgroup does with words of 2-bit codes, their steps and zero points, on Hopper.

A warpgroup has 64 outputs, each of its warps 16, which share a step's scale. Lane t of the four that share
rows r and r + 8 takes words 8 t .. 8 t + 7 of the 32 of a stage, by loads of 16 bytes. What is stored for
both rows is in the two halves of one word, or soon is: one instruction decodes two.

An array [64, 32] here has word 8 t + c of a row at column 4 c + t; operands [64, K] of wgmma have the order
of `in_order`. Each function has a twin in jnp, for the interpreter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from pallas_kernels.mixed_two_bit_gemm.decode import places
from pallas_kernels.wgmma import (
    ROWS,
    WORDS,
    add,
    and_or,
    asm,
    constant,
    masked,
    no_registers,
    operand,
    operand_type,
    register_at,
    thread,
    times,
    two_halves,
)

WORDS_A_STAGE = 32
EACH = WORDS_A_STAGE // 4  # words of a row that a lane takes
SHAPE = (ROWS, WORDS_A_STAGE)


def in_order(x: Float[Array, "M n 2 P"]) -> Float[Array, "M K"]:
    """Inputs in the order of operands: of each stage [c, pair, t, half]."""
    M = x.shape[0]
    x = x.reshape(M, -1, 4, EACH, 2, x.shape[3])  # [M, stage, t, c, half, pair]
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(M, -1)


def words_of(ref, *, interpret: bool) -> jax.Array:
    """The words [64, 32] of a warpgroup's rows."""
    if interpret:
        return _by_lane(ref[...])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_words_type())
    def load(_, ref):
        warp, row, t = thread()
        registers = _registers()
        for half in range(2):
            at = add(times(warp, 16 * 32), times(row, 32), times(t, EACH), constant(8 * half * 32))
            for c, word in enumerate(_load(ref, at, EACH)):
                registers[register_at(c, half)] = word
        return _array(registers)

    return load(ref)


def steps(step_ref, zero_ref, step_zero_ref, scale_ref, dtype, *, interpret: bool) -> jax.Array:
    """[64, 32]: in row r < 8 of each 16 the scales of rows r and r + 8; in r + 8 those times zero points.

    Of four blocks of outputs: step [4, 64], zero point [4, 32], step_zero [4, 16], scale [4, 32].
    """
    if interpret:
        return _steps_in_jnp(step_ref[...], zero_ref[...], step_zero_ref[...], scale_ref[...], dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4, return_type=_words_type())
    def decode(_, step_ref, zero_ref, step_zero_ref, scale_ref):
        warp, row, t = thread()
        step = _load(step_ref, add(times(warp, 64), times(t, 2 * EACH)), 2 * EACH)
        zero = _load(zero_ref, add(times(warp, 32), times(t, EACH)), EACH)
        [step_zero] = _load(step_zero_ref, add(times(warp, 16), times(t, EACH // 2)), 1)
        scale = _load(scale_ref, add(times(warp, 32), times(t, EACH)), EACH // 2)
        # A row's code of 4 bits is at its byte of the word, in the lower or upper half of it: it becomes
        # 1024 or 64 + code, as a float16, without a shift.
        odd = arith.cmpi(arith.CmpIPredicate.ne, masked(row, 1), constant(0))
        byte = add(times(arith.shrui(row, constant(1)), 0x1111), constant(0x4400))
        mask = arith.select(odd, constant(0x00F000F0), constant(0x000F000F))
        exponent = arith.select(odd, constant(0x54005400), constant(0x64006400))
        less = [arith.select(odd, _pair(-64.0 - own), _pair(-1024.0 - own)) for own in (1024, 64)]
        twice_row = times(row, 2)
        registers = _registers()
        for c in range(EACH):
            of_row = asm("prmt.b32 $0, $1, $2, $3;", step[2 * c], step[2 * c + 1], byte)
            of_row = asm("lop3.b32 $0, $1, $2, $3, 0xEA;", of_row, mask, exponent)
            shared = asm(f"prmt.b32 $0, $1, $1, {c // 2 * 0x1111:#x};", step_zero)
            shared = and_or(shared, 0x00F000F0 if c % 2 else 0x000F000F, 0x54005400 if c % 2 else 0x64006400)
            shared = asm("add.rn.f16x2 $0, $1, $2;", shared, less[c % 2])
            of_row = asm("add.rn.f16x2 $0, $1, $2;", of_row, shared)  # whole numbers: exactly
            own = asm(f"prmt.b32 $0, $1, $1, {0x3232 if c % 2 else 0x1010:#x};", scale[c // 2])
            s = asm("mul.rn.f16x2 $0, $1, $2;", of_row, own)
            z = arith.shrui(zero[c], twice_row)
            if dtype == jnp.float16:
                z = asm("add.rn.f16x2 $0, $1, $2;", and_or(z, 0x00030003, 0x64006400), _pair(-1024.0))
            else:
                s = asm(
                    "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; "
                    "cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 $0, b, a; }",
                    s,
                )
                z = and_or(z, 0x00030003, 0x43004300)
                z = _fma(z, _pair(1.0, dtype), _pair(-128.0, dtype), dtype)
            registers[register_at(c, 0)] = s
            registers[register_at(c, 1)] = _fma(z, s, _pair(-0.0, dtype), dtype)
        return _array(registers)

    return decode(step_ref, zero_ref, step_zero_ref, scale_ref)


def weights(words, steps, q: int, of: int, dtype, *, interpret: bool) -> jax.Array:
    """Part q of so many of a stage's operand [64, K]: scale times code."""
    mine = range(q * EACH // of, (q + 1) * EACH // of)
    if interpret:
        scale, _ = _apart(steps, dtype)
        words, scale = (a[:, 4 * mine.start : 4 * mine.stop] for a in (words, scale))
        at = jnp.arange(0, 32, 2, dtype=jnp.uint32)
        codes = ((words[..., None] >> at[None, None]) & 3).astype(jnp.int32).astype(jnp.float32)
        w = (
            (codes * scale[..., None]).astype(dtype).reshape(ROWS, len(mine), 4, 2, 8)
        )  # [.., c, t, half, pair]
        return w.transpose(0, 1, 4, 2, 3).reshape(ROWS, -1)

    @plgpu.inline_mgpu(arg_types=(WORDS, WORDS), return_type=operand_type(64 * len(mine), dtype))
    def make(_, words, steps):
        registers = no_registers(64 * len(mine))
        for c in mine:
            for half in range(2):
                word, scale = (_bits(words, c, half), _of_row(_bits(steps, c, 0), half))
                less = {}
                for j, place in enumerate(places(2, dtype)):
                    if place.offset not in less:
                        less[place.offset] = _fma(
                            scale, _pair(-float(place.offset), dtype), _pair(-0.0, dtype), dtype
                        )
                    shifted = word
                    if place.shift:
                        move = arith.shrui if place.shift > 0 else arith.shli
                        shifted = move(word, constant(abs(place.shift)))
                    code = and_or(shifted, place.mask, place.exponent)
                    w = _fma(code, scale, less[place.offset], dtype)
                    registers[register_at((c - mine.start) * 8 + j, half)] = two_halves(w, dtype)
        return operand(registers)

    return make(words, steps)


def zero_points(steps, dtype, *, interpret: bool) -> jax.Array:
    """The operand [64, 64] of the sums of a stage's words: scale times zero point, twice each."""
    if interpret:
        _, zero = _apart(steps, dtype)
        return jnp.repeat(zero, 2, axis=1)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=operand_type(2 * WORDS_A_STAGE, dtype))
    def make(_, steps):
        registers = no_registers(2 * WORDS_A_STAGE)
        for c in range(EACH):
            for half in range(2):
                zero = _of_row(_bits(steps, c, 1), half)
                registers[register_at(c, half)] = two_halves(zero, dtype)
        return operand(registers)

    return make(steps)


# The twins' parts.


def _by_lane(a: jax.Array) -> jax.Array:
    """[rows, 32] with word 8 t + c at column 4 c + t."""
    return jnp.swapaxes(a.reshape(-1, 4, EACH), 1, 2).reshape(-1, WORDS_A_STAGE)


def _steps_in_jnp(step, zero, step_zero, scale, dtype) -> jax.Array:
    def codes(words, bits: int):  # [4, words, 32 / bits]
        at = jnp.arange(0, 32, bits, dtype=jnp.uint32)
        return ((words[..., None] >> at[None, None]) & (2**bits - 1)).astype(jnp.int32).astype(jnp.float32)

    blocks = step.shape[0]
    step = codes(step, 4).reshape(blocks, WORDS_A_STAGE, 16)
    shared = jnp.stack([step_zero & 15, step_zero >> 4], axis=-1).reshape(blocks, WORDS_A_STAGE, 1)
    shared = shared.astype(jnp.int32).astype(jnp.float32)
    s = ((step + shared) * scale.astype(jnp.float32)[..., None]).astype(jnp.float16).astype(dtype)
    z = (codes(zero, 2) * s.astype(jnp.float32)).astype(dtype)
    pairs = []
    for v in (s, z):  # [4, 32, 16] -> [4, 8, 32]
        low, high = (
            _by_lane(jnp.swapaxes(h, 1, 2).reshape(-1, WORDS_A_STAGE)) for h in (v[..., :8], v[..., 8:])
        )
        low, high = (lax.bitcast_convert_type(h, jnp.uint16).astype(jnp.uint32) for h in (low, high))
        pairs.append((low | (high << 16)).reshape(blocks, 8, WORDS_A_STAGE))
    return jnp.concatenate(pairs, axis=1).reshape(SHAPE)


def _apart(steps: jax.Array, dtype) -> list[jax.Array]:
    """float32 scales [64, 32], and those times zero points, of `steps`."""
    out = []
    for v in jnp.split(steps.reshape(4, 16, WORDS_A_STAGE), 2, axis=1):
        halves = [lax.bitcast_convert_type(h.astype(jnp.uint16), dtype) for h in (v & 0xFFFF, v >> 16)]
        out.append(jnp.concatenate(halves, axis=1).reshape(SHAPE).astype(jnp.float32))
    return out


# Instructions, on 32-bit words of a lane.


def _words_type():
    return plgpu.ShapeDtypeStruct(SHAPE, jnp.uint32, layout=WORDS)


def _registers() -> np.ndarray:
    return np.empty(WORDS.to_mgpu().registers_shape(SHAPE), dtype=object)


def _array(registers: np.ndarray):
    vector = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    for at in np.ndindex(registers.shape):
        word: Any = registers[at]
        registers[at] = mgpu.utils.bitcast(word, vector)
    return mgpu.FragmentedArray(_registers=registers, _layout=WORDS.to_mgpu(), _is_signed=False)


def _bits(array, c: int, half: int) -> ir.Value:
    return mgpu.utils.bitcast(array.registers[register_at(c, half)], ir.IntegerType.get_signless(32))


def _load(ref, at: ir.Value, count: int) -> list[ir.Value]:
    """So many neighbouring words, from an element of the reference on."""
    i32 = ir.IntegerType.get_signless(32)
    kind = ir.MemRefType(ref.type).element_type
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], kind)
    together = min(count, 4)
    vector = ir.VectorType.get((together,), i32)
    found: list[ir.Value] = []
    for i in range(0, count, together):
        here = mgpu.utils.getelementptr(pointer, [i], i32)
        four = llvm.load(vector, here, alignment=4 * together)
        found += [llvm.extractelement(four, constant(j)) for j in range(together)]
    return found


def _pair(number: float, dtype=jnp.float16) -> ir.Value:
    """A number in both halves."""
    return constant(0x00010001 * int(np.asarray(number, dtype).view(np.uint16)))


def _fma(a: ir.Value, b: ir.Value, c: ir.Value, dtype) -> ir.Value:
    """a b + c of pairs."""
    kind = "f16x2" if dtype == jnp.float16 else "bf16x2"
    return asm(f"fma.rn.{kind} $0, $1, $2, $3;", a, b, c)


def _of_row(pair: ir.Value, half: int) -> ir.Value:
    """A number of a pair, twice."""
    return asm(f"prmt.b32 $0, $1, $1, {0x3232 if half else 0x1010:#x};", pair)
