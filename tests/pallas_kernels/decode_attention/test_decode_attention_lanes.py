"""Instructions of lanes, which no interpreter knows, on arrays of 128 threads: they do as their twins do."""

import types

import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import wgmma
from pallas_kernels.decode_attention import lanes
from pallas_kernels.decode_attention.coded import Code

THREAD = np.arange(128, dtype=np.uint32)
ROW, COLUMN = 16 * (THREAD // 32) + THREAD // 4 % 8, 2 * (THREAD % 4)  # of a lane's first number in 8 columns


def word(x):
    return np.broadcast_to(np.asarray(x, np.uint32), (128,))


def byte_permute(a, b, selector):
    of_both = np.stack([word(x) >> (8 * i) & 255 for x in (a, b) for i in range(4)])
    picked = [of_both[word(selector) >> (4 * i) & 7, np.arange(128)] << (8 * i) for i in range(4)]
    return np.bitwise_or.reduce(picked).astype(np.uint32)


def inline_asm(_, given, text, _constraints):
    name, *rest = text.rstrip(";").replace(",", "").split()
    if name == "prmt.b32":
        return byte_permute(*(given[int(x[1:]) - 1] if x[0] == "$" else int(x, 0) for x in rest[1:]))
    if name == "lop3.b32":
        assert rest[-1] == "0xEA"  # (a & b) | c
        return word(given[0]) & np.uint32(int(rest[2], 0)) | word(given[1])
    if name == "ex2.approx.ftz.f32":
        return np.exp2(given[0])
    kind = {"cvt.rn.f16x2.f32": np.float16, "cvt.rn.bf16x2.f32": ml_dtypes.bfloat16}[name]
    high, low = (x.astype(kind).view(np.uint16).astype(np.uint32) for x in given)
    return low | high << 16


class Anything:
    """A type of MLIR's, which NumPy's arrays know by themselves."""

    def __getattr__(self, _):
        return self

    def __call__(self, *_):
        return self


def element(pair, i):
    if isinstance(pair, list):
        return pair[i[0]]
    return (pair >> (16 * i[0])).astype(np.uint16).view(np.float16)


def insert(pair, x, i):
    return pair[: i[0]] + [x] + pair[i[0] + 1 :]


def other_type(_, x):
    return x.view({2: np.float16, 4: np.float32 if x.dtype == np.uint32 else np.uint32}[x.itemsize])


def store(x, place, alignment):
    memory, at = place
    memory[at] = word(x)


def registers_of(x):
    layout = lanes.plgpu.Layout.WGMMA.to_mgpu()
    registers = np.empty(layout.registers_shape(x.shape), dtype=object)
    for at in np.ndindex(registers.shape):
        registers[at] = [x[ROW + 8 * at[4], 8 * at[1] + COLUMN + i] for i in range(2)]
    return types.SimpleNamespace(registers=registers, layout=layout)


def array_of(registers):
    pairs = isinstance(registers.flat[0], list)
    x = np.zeros((64, 8 * registers.shape[1]), np.float32 if pairs else np.uint16)
    for at in np.ndindex(registers.shape):
        pair = registers[at] if pairs else [registers[at] & 0xFFFF, registers[at] >> 16]
        for i in range(2):
            x[ROW + 8 * at[4], 8 * at[1] + COLUMN + i] = pair[i]
    return x


def inline_mgpu(arg_types, return_type=None):
    def of(function):
        def run(*given):
            return function(None, *(x if x.ndim == 1 else registers_of(np.asarray(x)) for x in given))

        return run

    return of


@pytest.fixture
def threads(monkeypatch):
    """Lanes whose instructions are NumPy's, and so are their types."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    plgpu = lanes.plgpu
    arith = {
        "addi": lambda a, b: word(a) + word(b),
        "muli": lambda a, b: word(a) * word(b),
        "andi": lambda a, b: word(a) & word(b),
        "xori": lambda a, b: word(a) ^ word(b),
        "shli": lambda a, b: word(a) << word(b),
        "shrui": lambda a, b: word(a) >> word(b),
        "cmpi": lambda _, a, b: word(a) != word(b),
        "CmpIPredicate": types.SimpleNamespace(ne=None),
        "select": np.where,
        "trunci": lambda _, a: word(a).astype(np.uint16),
        "bitcast": other_type,
        "extf": lambda _, a: a.astype(np.float32),
    }
    llvm = {
        "inline_asm": inline_asm,
        "load": lambda _, place, alignment: place[0][place[1]],
        "store": store,
        "mlir_undef": lambda _: [None, None],
        "extractelement": element,
    }
    utils = {
        "thread_idx": lambda: THREAD,
        "c": lambda value, _: word(value & 0xFFFFFFFF),
        "bitcast": lambda x, _: x,
        "memref_ptr": lambda ref: (ref, 0),
        "getelementptr": lambda place, at, _: (place[0], place[1] + np.asarray(at[0]).astype(int)),
    }
    mgpu = types.SimpleNamespace(
        utils=types.SimpleNamespace(**utils), FragmentedArray=lambda _registers, **_: array_of(_registers)
    )
    pallas = types.SimpleNamespace(**{**vars(plgpu), "inline_mgpu": inline_mgpu})
    vector = types.SimpleNamespace(
        extract=lambda pair, _, at: element(pair, at), insert=lambda x, pair, _, at: insert(pair, x, at)
    )
    arith, llvm = types.SimpleNamespace(**arith), types.SimpleNamespace(**llvm)
    monkeypatch.setattr(wgmma, "vector", vector)
    for module in (lanes, wgmma):
        for name, fake in (("arith", arith), ("llvm", llvm), ("ir", Anything()), ("mgpu", mgpu)):
            monkeypatch.setattr(module, name, fake)
        monkeypatch.setattr(module, "plgpu", pallas)


def tiled(x, tiles):
    """Numbers of the last axes by tile, then by place in it, once for each of some tilings."""
    for tile in tiles:
        lead = x.ndim - len(tile)
        sizes = [n for size, of in zip(x.shape[lead:], tile, strict=True) for n in (size // of, of)]
        order = [lead + i for i in (*range(0, len(sizes), 2), *range(1, len(sizes), 2))]
        x = x.reshape(*x.shape[:lead], *sizes).transpose(*range(lead), *order)
    return x


def test_jax_lays_operands_and_sums_out_as_lanes_say():
    layout = wgmma.plgpu.Layout.WGMMA.to_mgpu()
    numbers = tiled(np.arange(64 * 32).reshape(64, 32), layout.tiling.tiles)
    axes = [numbers.ndim + axis for axis in (*layout.warp_dims, *layout.lane_dims)]
    numbers = np.moveaxis(numbers, axes, range(3)).reshape(128, -1, 2)  # thread, register, place there
    for index, at in enumerate(np.ndindex(wgmma.no_registers(32).shape)):
        assert at == wgmma.register_at(at[1], at[4])
        wanted = 32 * (ROW + 8 * at[4]) + 8 * at[1] + COLUMN
        np.testing.assert_array_equal(numbers[:, index], np.stack([wanted, wanted + 1], axis=1))


class Reference:
    """What a twin stores to."""

    def __setitem__(self, _, x):
        self.stored = np.asarray(x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("bits", "E"), [(4, 128), (8, 128), (2, 128), (4, 64), (8, 64)])
def test_lanes_read_codes_as_their_twins_do(threads, bits, E, dtype):
    form, rng = lanes.Format(E, Code(bits, E), dtype), np.random.default_rng(0)
    rows = rng.integers(0, 2**32, (128, form.width), np.uint32)
    grid = rng.uniform(0.5, 2, (2, 128)).astype(np.float16).view(np.uint16).astype(np.uint32)
    rows[:, 0] = grid[0] | grid[1] << 16
    memory, n = rows.reshape(-1), 16
    for block in range(2):
        for function, more in ((lanes.grid, (n,)), (lanes.keys, ()), (lanes.values, ())):
            got = function(memory, block, *more, form, interpret=False)
            wanted = function(jnp.asarray(rows), block, *more, form, interpret=True)
            wanted = np.asarray(wanted)
            wanted = wanted if wanted.dtype == np.float32 else wanted.view(np.uint16)
            np.testing.assert_array_equal(np.asarray(got).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("E", [64, 128])
def test_lanes_store_as_their_twins_do(threads, E, dtype):
    form, rng, n, twin = lanes.Format(E, Code(4, E), dtype), np.random.default_rng(0), 16, Reference()
    weights, memory = rng.random((64, n), np.float32), np.zeros(n * 32, np.uint32)
    got = lanes.store_weights(memory, weights, form, interpret=False)
    np.testing.assert_array_equal(got, lanes.store_weights(twin, jnp.asarray(weights), form, interpret=True))
    # tiles of 8 rows of 128 bytes, in which a row's pieces of 16 bytes stand at their number ^ the row's
    pieces = memory.view(np.uint16).reshape(n, 8, 8)
    plain = np.stack([pieces[i, np.arange(8) ^ i % 8] for i in range(n)]).reshape(n, 64)
    np.testing.assert_array_equal(plain, twin.stored.view(np.uint16))

    sums, memory = rng.random((E // 64, 64, n), np.float32), np.zeros(n * E, np.uint32)
    lanes.store_out(memory, list(sums), interpret=False)
    lanes.store_out(twin, list(jnp.asarray(sums)), interpret=True)
    np.testing.assert_array_equal(memory.view(np.float32).reshape(n, E), twin.stored)
    powers = wgmma.exp2(weights, interpret=False)
    np.testing.assert_allclose(powers, np.exp2(weights), rtol=1e-6)
