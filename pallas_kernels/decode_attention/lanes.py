"""What the lanes of a warpgroup do with rows in codes, on Hopper: operands of wgmma without a shuffle.

A tile of shared memory holds blocks of 64 rows of w words, one after the other. Lane t of the four of group g
of warp u (of a warpgroup: t < 4, g < 8, u < 4) has, where wgmma wants them,

    keys      first operand [64 rows, C]: rows 16 u + g and + 8, and of each a quarter of its words; a digit
              of a word's two halves (`digits.py`) makes two neighbours, and queries have that order, too
              (`order_of_keys`)
    scores    of those rows, and of queries 8 i + 2 t and + 1
    weights   second operand: those two rows are neighbours in the order of the sum over rows
    values    first operand [64 numbers, 64 rows]: numbers E / 32 (8 u + g) and those behind it, two of which
              are in the first operand, others in a second; rows 16 i + 4 j + t and + 8, of whose words halves
              (or bytes) are put side by side, so that a digit of both makes two neighbours again

Each function has a twin in jnp, for the interpreter.

Letters: E head size, w words of a row, n queries.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.decode_attention.coded import Code, words_of_row
from pallas_kernels.decode_attention.digits import Digit, digits, fields_of_half
from pallas_kernels.wgmma import (
    ROWS,
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
    tiling,
    times,
    two_floats,
    two_halves,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """Rows of E numbers in codes, one scale a row, read as floats of a type."""

    E: int
    code: Code
    dtype: Any

    @property
    def width(self) -> int:
        """Words of a row."""
        return words_of_row(self.code, self.E)

    @property
    def of_lane(self) -> int:
        """Words of a row of keys that a lane takes."""
        return (self.width - 1) // 4

    @property
    def unit(self) -> int:
        """Bytes of a row of values that a lane takes."""
        return self.E * self.code.bits // 256

    @property
    def digits(self) -> tuple[Digit, ...]:
        return digits(self.code.bits, self.dtype)

    @property
    def columns(self) -> int:
        """Of the first operand of scores."""
        return 8 * self.of_lane * len(self.digits)

    def of_number(self, number: int) -> tuple[Digit, ...]:
        """The digits of a number of a lane."""
        field = number % fields_of_half(self.code.bits)
        return tuple(d for d in self.digits if d.field == field)

    @property
    def numbers_of_part(self) -> int:
        """Of a lane in 16 bits of values, or in the 8 bits that it takes."""
        return min(fields_of_half(self.code.bits), self.E // 32)

    @property
    def terms(self) -> int:
        """Digits of a number."""
        return len(self.of_number(0))


def takes(E: int, code: Code) -> bool:
    """Whether lanes have whole bytes of a row, and rows one scale."""
    return E in (64, 128) and E * code.bits >= 256 and code.group_size >= E


def order_of_keys(form: Format) -> np.ndarray:
    """Which number of a row each column of the first operand is: [word of a lane, digit, lane, half]."""
    bits, found = form.code.bits, []
    for c in range(form.of_lane):
        for digit in form.digits:
            for t in range(4):
                for half in range(2):
                    word = t * form.of_lane + c
                    found.append(word * (32 // bits) + half * (16 // bits) + digit.field)
    return np.asarray(found)


def grid(ref, block: int, n: int, form: Format, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Scale and least number of a block's rows, beside each query: float32 [64, n]."""
    if interpret:
        word = _rows(ref, block, form)[:, :1]
        both = (
            lax.bitcast_convert_type(x.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            for x in (word >> 16, word & 0xFFFF)
        )
        scale, low = (jnp.broadcast_to(x, (ROWS, n)) for x in both)
        return scale, low
    kind = operand_type(n, jnp.float32)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(kind, kind))
    def load(_, ref):
        warp, row, _t = thread()
        line = add(times(warp, 16), row, constant(ROWS * block))
        found: list[np.ndarray] = [no_registers(n) for _ in range(2)]
        for half in range(2):
            word = _load(ref, times(line, form.width), 8 * half * form.width)
            for registers, shift in zip(found, (16, 0), strict=True):
                bits = arith.trunci(ir.IntegerType.get_signless(16), arith.shrui(word, constant(shift)))
                number = arith.extf(ir.F32Type.get(), arith.bitcast(ir.F16Type.get(), bits))
                for i in range(n // 8):
                    registers[register_at(i, half)] = two_floats(number, number)
        return tuple(operand(registers) for registers in found)

    scale, low = load(ref)
    return scale, low


def keys(ref, block: int, form: Format, *, interpret: bool) -> jax.Array:
    """The first operand [64 rows, columns]: digits of keys as floats."""
    if interpret:
        words = _rows(ref, block, form)[:, 1:].reshape(ROWS, 4, form.of_lane)
        both = [
            jnp.stack([_float(x, d, form) for d in form.digits], -1) for x in (words & 0xFFFF, words >> 16)
        ]
        return jnp.stack(both, -1).transpose(0, 2, 3, 1, 4).reshape(ROWS, -1)  # [.., t, c, digit, half]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=operand_type(form.columns, form.dtype))
    def load(_, ref):
        warp, row, t = thread()
        line = add(times(warp, 16), row)
        base = add(times(line, form.width), times(t, form.of_lane))
        registers = no_registers(form.columns)
        for c in range(form.of_lane):
            for half in range(2):
                word = _load(ref, base, (ROWS * block + 8 * half) * form.width + 1 + c)
                for j, number in enumerate(_floats(word, form.digits)):
                    registers[register_at(c * len(form.digits) + j, half)] = two_halves(number, form.dtype)
        return operand(registers)

    return load(ref)


def values(ref, block: int, form: Format, *, interpret: bool) -> list[list[jax.Array]]:
    """First operands [64 numbers, 64 rows], E / 64 times, each so often as numbers have digits."""
    tiles = form.E // 64
    if interpret:
        words = _in_order(_rows(ref, block, form)[:, 1:])
        places = range(0, 32, 8 if form.unit == 1 else 16)
        parts = jnp.stack([words >> at for at in places], -1).reshape(
            ROWS, -1
        )  # what is above does not count
        found = []
        for term in range(form.terms):
            by_field = [
                _float(parts, form.of_number(number)[term], form) for number in range(form.numbers_of_part)
            ]
            x = jnp.stack(by_field, -1).reshape(ROWS, 4, 8, tiles, 2)  # [row, u, g, tile, first or second]
            found.append(x.transpose(3, 1, 4, 2, 0).reshape(tiles, 64, ROWS))
        return [[found[term][m] for term in range(form.terms)] for m in range(tiles)]
    kinds = tuple(operand_type(ROWS, form.dtype) for _ in range(tiles * form.terms))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=kinds)
    def load(_, ref):
        warp, row, t = thread()
        byte = times(add(times(warp, 8), row), form.unit)
        base = add(times(t, form.width), arith.shrui(byte, constant(2)))
        selectors = [constant(0x5410), constant(0x7632)]
        if form.unit == 2:
            odd = arith.cmpi(arith.CmpIPredicate.ne, masked(row, 1), constant(0))
            selectors = [arith.select(odd, selectors[1], selectors[0])]
        elif form.unit == 1:
            selectors = [add(times(masked(row, 3), 0x1111), constant(0x4400))]
        found: list[np.ndarray] = [no_registers(ROWS) for _ in kinds]
        for chunk in range(ROWS // 8):
            line = ROWS * block + 16 * (chunk // 2) + 4 * (chunk % 2)
            two = [_load(ref, base, (line + 8 * i) * form.width + 1) for i in range(2)]
            for h, selector in enumerate(selectors):
                pair = asm("prmt.b32 $0, $1, $2, $3;", *two, selector)
                numbers = range(h * form.numbers_of_part, (h + 1) * form.numbers_of_part)
                wanted = [(e, term, d) for e in numbers for term, d in enumerate(form.of_number(e))]
                for (e, term, _d), x in zip(wanted, _floats(pair, [d for *_, d in wanted]), strict=True):
                    found[e // 2 * form.terms + term][register_at(chunk, e % 2)] = two_halves(x, form.dtype)
        return tuple(operand(registers) for registers in found)

    flat = load(ref)
    return [list(flat[m * form.terms : (m + 1) * form.terms]) for m in range(tiles)]


def store_weights(ref, weights: jax.Array, form: Format, *, interpret: bool) -> jax.Array:
    """Float32 weights [64 rows, n] to the second operand [n, 64 rows], in the order of the rows of `values`.

    Gives what they are when rounded to the operand's type.
    """
    n = weights.shape[1]
    if interpret:
        rounded = weights.astype(form.dtype)
        ref[...] = _in_order(rounded).T
        return rounded.astype(jnp.float32)
    is_half = form.dtype == jnp.float16
    convert = f"cvt.rn.{'f16x2' if is_half else 'bf16x2'}.f32 $0, $1, $2;"

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(tiling(form.dtype, ROWS)), plgpu.Layout.WGMMA),
        return_type=operand_type(n, jnp.float32),
    )
    def store(_, ref, array):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        warp, row, t = thread()
        # Of query 8 i + 2 t (+ 1), as 8 rows of 128 bytes lie whose 16 bytes are swizzled: its row's bytes
        # 32 u + 4 g and the three behind.
        piece = add(times(warp, 2), arith.shrui(row, constant(2)))
        within = masked(row, 3)
        places = []
        for second in range(2):
            query = add(times(t, 2), constant(second))
            places.append(add(times(query, 32), times(arith.xori(piece, query), 4), within))
        registers = no_registers(n)
        for i in range(n // 8):
            rounded: list[list[ir.Value]] = [[], []]  # of the lane's first and second row
            for second, place in enumerate(places):
                low, high = (_element(array.registers[register_at(i, half)], second) for half in range(2))
                word = llvm.inline_asm(i32, [high, low], convert, "=r,f,f")
                _store(ref, place, i * 256, word)
                if is_half:
                    two = two_halves(word, form.dtype)
                    floats = [arith.extf(f32, _element(two, half)) for half in range(2)]
                else:
                    words = arith.shli(word, constant(16)), masked(word, 0xFFFF0000)
                    floats = [arith.bitcast(f32, x) for x in words]
                for of_row, x in zip(rounded, floats, strict=True):
                    of_row.append(x)
            for half in range(2):
                registers[register_at(i, half)] = two_floats(*rounded[half])
        return operand(registers)

    return store(ref, weights)


def store_out(ref, out: Sequence[jax.Array], *, interpret: bool) -> None:
    """Sums [64 numbers, n], E / 64 times, to [n, E], where numbers have their own order."""
    n, each = out[0].shape[1], 2 * len(out)
    if interpret:
        x = jnp.stack(out).reshape(len(out), 4, 2, 8, n)  # [tile, u, first or second, g, query]
        ref[...] = x.transpose(4, 1, 3, 0, 2).reshape(n, 64 * len(out))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WGMMA,) * len(out)))
    def store(_, ref, *arrays):
        i32 = ir.IntegerType.get_signless(32)
        warp, row, t = thread()
        base = add(times(add(times(warp, 8), row), each), times(t, 2 * 32 * each))
        for m, array in enumerate(arrays):
            for i in range(n // 8):
                for half in range(2):
                    for second in range(2):
                        number = _element(array.registers[register_at(i, half)], second)
                        at = (8 * i + second) * 32 * each + 2 * m + half
                        _store(ref, base, at, arith.bitcast(i32, number))

    store(ref, *out)


# The twins' parts.


def _rows(ref, block: int, form: Format) -> jax.Array:
    return ref[...].reshape(-1, form.width)[ROWS * block : ROWS * (block + 1)]


def _in_order(x: jax.Array) -> jax.Array:
    """Rows [64, ..] in the order of the sum over them: 16 u + g, then 16 u + g + 8."""
    return x.reshape(4, 2, 8, -1).transpose(0, 2, 1, 3).reshape(ROWS, -1)


def _float(halves: jax.Array, d: Digit, form: Format) -> jax.Array:
    bits = ((halves >> d.shift) & d.mask) | d.exponent
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), form.dtype)


# Instructions, on 32-bit words of a lane.


def _element(pair: ir.Value, i: int) -> ir.Value:
    return llvm.extractelement(pair, constant(i))


def _floats(word: ir.Value, wanted: Sequence[Digit]) -> list[ir.Value]:
    """Digits of both halves of a word, beside their exponents."""
    moved = {d.shift: arith.shrui(word, constant(d.shift)) if d.shift else word for d in wanted}
    return [and_or(moved[d.shift], d.mask * 0x10001, d.exponent * 0x10001) for d in wanted]


def _place(ref, at: ir.Value, offset: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], i32)
    return mgpu.utils.getelementptr(pointer, [offset], i32)


def _load(ref, at: ir.Value, offset: int) -> ir.Value:
    """A word of shared memory."""
    return llvm.load(ir.IntegerType.get_signless(32), _place(ref, at, offset), alignment=4)


def _store(ref, at: ir.Value, offset: int, word: ir.Value) -> None:
    llvm.store(word, _place(ref, at, offset), alignment=4)
