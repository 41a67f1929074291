"""Levels looked up in the lanes of a warpgroup (Mosaic): instructions that Pallas has no primitive for.

An array of words [64, 4 n] has n words in each lane, for each of its two rows: as the first operand of wgmma
lies, which the levels become. The interpreter has a twin of each function, in jnp.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from pallas_kernels.codebook_gemm import lookup
from pallas_kernels.codebook_gemm.cells import Cells, Instructions
from pallas_kernels.wgmma import ROWS, WORDS

CHUNK = 128  # inputs that are looked up at once, a block a lane


def lane_words(ref, first: int, step: int, interpret: bool) -> jax.Array:
    """Words [64, 4]: to lane t of a row, column first + step * t."""
    if interpret:
        return ref[...][:, first : first + 3 * step + 1 : step]
    shape = (ROWS, 4)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=WORDS)
    )
    def load(_, source):
        row, lane = _row_and_lane()
        column = arith.addi(arith.muli(lane, _index(step)), _index(first))
        words = [memref.load(source, [arith.addi(row, _index(8 * half)), column]) for half in range(2)]
        return _by_lane([words])

    return load(ref)


def table_of(ref, bits: int, dtype, interpret: bool) -> jax.Array:
    """Each row's levels, rounded to `dtype`, as words [64, 4 * count]; word i is columns 4 i to 4 i + 3.

    Of each half of the table: lower bytes of levels 0-3 and 4-7, upper bytes of 0-3 and 4-7, as `lookup` has.
    """
    levels = 8 if bits <= 3 else 16
    entries = [i % 2**bits for i in range(levels)]  # fewer than 8 are repeated
    if interpret:
        numbers = lax.bitcast_convert_type(ref[...].astype(dtype), jnp.uint16).astype(jnp.uint32)
        numbers = jnp.concatenate([numbers[:, i : i + 1] for i in entries], axis=1).reshape(ROWS, -1, 4)
        place = jnp.arange(0, 32, 8, dtype=jnp.uint32)[None, None]
        lower = jnp.sum((numbers & jnp.uint32(255)) << place, axis=2, dtype=jnp.uint32)
        upper = jnp.sum((numbers >> jnp.uint32(8)) << place, axis=2, dtype=jnp.uint32)
        columns = [a[:, i + j] for i in range(0, levels // 4, 2) for a in (lower, upper) for j in range(2)]
        return jnp.repeat(jnp.stack(columns, axis=1), 4, axis=1)
    shape = (ROWS, 4 * (levels // 2))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=WORDS)
    )
    def load(_, source):
        row, _ = _row_and_lane()
        by_half: list[list[Any]] = []
        for half in range(2):
            at = arith.addi(row, _index(8 * half))
            number = [_as_number(memref.load(source, [at, _index(i)]), dtype) for i in range(2**bits)]
            fours = []
            for i in range(0, levels, 4):
                two = [_prmt(number[entries[i + j]], number[entries[i + j + 1]], 0x5410) for j in (0, 2)]
                fours.append([_prmt(*two, 0x6420), _prmt(*two, 0x7531)])  # lower, upper bytes
            by_half.append(
                [fours[i + j][part] for i in range(0, levels // 4, 2) for part in range(2) for j in range(2)]
            )
        return _by_lane(list(zip(*by_half, strict=True)))

    return load(ref)


def operand(cells: list[tuple[jax.Array, ...]], table: jax.Array, dtype, interpret: bool) -> jax.Array:
    """Levels of four times eight cells a lane, as a first operand [64, 128] of wgmma."""
    shape, count = (ROWS, CHUNK), table.shape[1] // 4
    if interpret:
        words = [table[:, 4 * i : 4 * i + 4] for i in range(count)]
        halves = [words[i : i + 4] for i in range(0, count, 4)]
        pairs = [v for selectors in cells for v in lookup.pairs(selectors, halves, interpret=True)]
        numbers = lax.bitcast_convert_type(jnp.stack(pairs, axis=-1), jnp.uint16)  # [64, lane, pair, 2]
        return lax.bitcast_convert_type(numbers, dtype).transpose(0, 2, 1, 3).reshape(shape)
    each = len(cells[0])

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * (1 + 4 * each),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    def look_up(_, entries, *words):
        kind = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for half in range(2):
            levels = [_word(entries, i, half) for i in range(count)]
            for j in range(4):
                selectors = [_word(array, 0, half) for array in words[each * j : each * (j + 1)]]
                for four in range(2):
                    lower_and_upper = []
                    for part in (0, 2):
                        at = range(part, count, 4)
                        picked = [_prmt(levels[i], levels[i + 1], selectors[four]) for i in at]
                        lower_and_upper.append(
                            _prmt(*picked, selectors[2 + four]) if each == 4 else picked[0]
                        )
                    for q, pair in enumerate((lookup.FIRST_PAIR, lookup.SECOND_PAIR)):
                        two = mgpu.utils.bitcast(_prmt(*lower_and_upper, pair), ir.VectorType.get((2,), kind))
                        registers[0, 4 * j + 2 * four + q, 0, 0, half, 0, 0, 0, 0] = two
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return look_up(table, *(word for selectors in cells for word in selectors))


def fill_table(table, levels, bits: int, dtype) -> None:
    """Levels of rows g and g + 8 of each lane, rounded to `dtype`, as words table[warp, code, lane].

    A lane has a column, and so a bank of its own: look-ups never wait for each other, nor for other lanes.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def fill(_, target, source):
        row, _ = _row_and_lane()
        loop = scf.ForOp(_index(0), _index(2**bits), _index(1))
        with ir.InsertionPoint(loop.body):
            code = loop.induction_variable
            low, high = (
                _as_number(memref.load(source, [arith.addi(row, _index(8 * half)), code]), dtype)
                for half in range(2)
            )
            memref.store(_prmt(low, high, 0x5410), target, [*_warp(code)])
            scf.YieldOp([])

    fill(table, levels)


def operand_by_memory(cells: Cells, table, dtype) -> jax.Array:
    """Levels of eight times four cells a lane, as a first operand [64, 128] of wgmma; see `fill_table`."""
    shape = ROWS, CHUNK

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(WORDS,) * len(cells)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    def look_up(_, source, *words):
        i32 = ir.IntegerType.get_signless(32)
        kind = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        shared = ir.Type.parse("!llvm.ptr<3>")
        warp, _, lane = _warp(_index(0))
        column = arith.addi(arith.muli(warp, _index(source.type.shape[1] * 32)), lane)
        first = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(source))
        first = arith.addi(first, arith.muli(arith.index_cast(i32, column), mgpu.utils.c(4, i32)))
        for (_, pairs), array in zip(cells, words, strict=True):
            for half in range(2):
                word, found = _word(array, 0, half), []
                for i in range(4):
                    code = _prmt(word, mgpu.utils.c(0, i32), 0x4440 + i)
                    at = arith.addi(first, arith.shli(code, mgpu.utils.c(7, i32)))
                    found.append(llvm.load(i32, llvm.inttoptr(shared, at)))
                for p, i in zip(pairs, (0, 2), strict=True):
                    two = _prmt(found[i], found[i + 1], 0x7632 if half else 0x5410)
                    registers[0, p, 0, 0, half, 0, 0, 0, 0] = mgpu.utils.bitcast(
                        two, ir.VectorType.get((2,), kind)
                    )
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return look_up(table, *(word for (word,), _ in cells))


def plain_operand_by_memory(cells: Cells, levels: jax.Array) -> jax.Array:
    """The twin of `operand_by_memory`, of a table [64, levels]."""
    pairs: list[Any] = [None] * 16
    for (word,), places in cells:
        codes = [((word >> jnp.uint32(8 * i)) & jnp.uint32(255)).astype(jnp.int32) for i in range(4)]
        found = [jnp.take_along_axis(levels, code, axis=1) for code in codes]
        for p, i in zip(places, (0, 2), strict=True):
            pairs[p] = jnp.stack(found[i : i + 2], axis=-1)
    return jnp.stack(pairs, axis=1).reshape(ROWS, CHUNK)  # [64, pair, lane, 2]


def instructions(interpret: bool) -> Instructions:
    """Those of Mosaic, on lanes' words [64, 4]."""
    return lookup.instructions(True) if interpret else Instructions(_permute, _choose)


def _permute(a: jax.Array, b: jax.Array, selector: jax.Array | int) -> jax.Array:
    """See `lookup.byte_permute`."""
    assert isinstance(selector, int)  # of cells; `operand` has those that are not
    return _of_words(lambda x, y: _prmt(x, y, selector), a, b)


def _choose(a: jax.Array, b: jax.Array | int, mask: int) -> jax.Array:
    """See `lookup.choose`."""

    def lop3(x, y=None):
        y = mgpu.utils.c(b, x.type) if isinstance(b, int) else y
        asm = f"lop3.b32 $0, $1, $2, {mask:#x}, {lookup.CHOOSE:#x};"
        return llvm.inline_asm(x.type, [x, y], asm, "=r,r,r")

    return _of_words(lop3, a) if isinstance(b, int) else _of_words(lop3, a, b)


def _of_words(instruction: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
    """An instruction on each of the lanes' words [64, 4]."""

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.uint32, layout=WORDS),
    )
    def of_each(_, *words):
        return _by_lane([[instruction(*(_word(w, 0, half) for w in words)) for half in range(2)]])

    return of_each(*arrays)


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    """The instruction; see `lookup.byte_permute`."""
    i32 = ir.IntegerType.get_signless(32)
    if isinstance(selector, int):
        return llvm.inline_asm(i32, [a, b], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")
    return llvm.inline_asm(i32, [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")


def _as_number(level: Any, dtype) -> Any:
    """The bits of a float16 rounded to `dtype`, as 32 bits."""
    if dtype == jnp.bfloat16:
        level = arith.truncf(ir.BF16Type.get(), arith.extf(ir.F32Type.get(), level))
    number = mgpu.utils.bitcast(level, ir.IntegerType.get_signless(16))
    return arith.extui(ir.IntegerType.get_signless(32), number)


def _warp(code: Any) -> tuple[Any, Any, Any]:
    """Where this thread's entry of `fill_table` is."""
    thread = arith.remui(arith.index_cast(ir.IndexType.get(), mgpu.utils.thread_idx()), _index(128))
    return arith.divui(thread, _index(32)), code, arith.remui(thread, _index(32))


def _index(value: int) -> Any:
    return mgpu.utils.c(value, ir.IndexType.get())


def _row_and_lane() -> tuple[Any, Any]:
    """Of this thread in `WORDS`: the first of its two rows, 8 apart, and its place among four lanes."""
    thread = arith.remui(arith.index_cast(ir.IndexType.get(), mgpu.utils.thread_idx()), _index(128))
    row = arith.remui(arith.divui(thread, _index(4)), _index(8))
    row = arith.addi(row, arith.muli(arith.divui(thread, _index(32)), _index(16)))
    return row, arith.remui(thread, _index(4))


def _by_lane(words: Sequence[Sequence[Any]]) -> Any:
    """An array [64, 4 * count] in `WORDS` of each lane's words, given for each of its two rows."""
    layout, vector = WORDS.to_mgpu(), ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = np.empty(layout.registers_shape((ROWS, 4 * len(words))), dtype=object)
    for i, halves in enumerate(words):
        for half, word in enumerate(halves):
            registers[0, i, 0, 0, half, 0, 0, 0, 0] = mgpu.utils.bitcast(word, vector)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)


def _word(array: Any, i: int, half: int) -> Any:
    """A lane's word of one of its rows."""
    return mgpu.utils.bitcast(array.registers[0, i, 0, 0, half, 0, 0, 0, 0], ir.IntegerType.get_signless(32))
