"""`codebook_gemm`: the reference against NumPy, kernels against the reference, lowering, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.codebook_gemm import (
    cases,
    cells,
    codebook_gemm,
    few_rows,
    lookup,
    mosaic_gpu,
    pieces,
    reference,
    triton,
)
from pallas_kernels.words import parts, to_words

SMALL = triton.Tile(rows=8, outputs=16, blocks=4)
SPLIT = triton.Tile(rows=16, outputs=32, blocks=4, splits=2)


def codes_of_cells(selectors, bits):
    """Codes of a word's cells of up to 8 bits in the order in which pairs of levels come: [cells, ..]."""
    if bits > 4:
        (word,) = (np.asarray(s) for s in selectors)
        return np.stack([(word >> (8 * i)) & 255 for i in range(4)])
    found = []
    for four in range(2):
        three, *fourth = (np.asarray(s) for s in selectors[four::2])
        for i in (0, 2, 1, 3):
            code = (three >> (4 * i)) & 15
            for choice in fourth:
                code = code + 2 * (((choice >> (4 * i)) & 15) - i)
            found.append(code)
    return np.stack(found)


def packed(codes: np.ndarray, bits: int) -> jax.Array:
    """Words of codes [N, K], as `pallas_kernels.words` says."""
    N, K = codes.shape
    wide = np.zeros((N, -(-K // 32), 32), np.uint32)
    wide.reshape(N, -1)[:, :K] = codes
    out, below = [], bits
    for p in parts(bits):
        below -= p
        out.append(to_words(jnp.asarray((wide >> below) & (2**p - 1)), p))
    return jnp.concatenate(out, axis=-1)


def example(M, N, K, bits, dtype=jnp.float32, seed=0):
    """Operands, and the weight [K, N] in float64."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((M, K)), dtype)
    codes = rng.integers(0, 2**bits, (N, K))
    table = rng.standard_normal((N, 2**bits)).astype(np.float16)
    weight = np.take_along_axis(table.astype(np.float64), codes, axis=1).T
    return (x, packed(codes, bits), jnp.asarray(table)), weight


def close(got, x, weight):
    """Whether a product has the error of its type: float32, or levels rounded to that of x."""
    error = {"float32": 2**-20, "float16": 2**-20, "bfloat16": 2**-8}[x.dtype.name]
    x = np.asarray(x.astype(jnp.float32), np.float64)
    limit = error * np.sqrt((x**2) @ (weight**2)) + 1e-6
    return bool((np.abs(np.asarray(got) - x @ weight) < 4 * limit).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_cells_have_the_codes_in_the_order_that_inputs_are_taken_in(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    words = packed(codes, bits)
    taken = cells.in_order(jnp.asarray(codes, jnp.float32), cells.order(bits), blocks=2)[:, 0]
    seen = set()
    for selectors, pairs in cells.cells(
        [words[..., i] for i in range(bits)], bits, lookup.instructions(True)
    ):
        for code, (pair, half) in zip(
            codes_of_cells(selectors, bits), [(p, h) for p in pairs for h in range(2)], strict=True
        ):
            np.testing.assert_array_equal(code, taken[:, pair, :, half])
            seen.add((pair, half))
    assert len(seen) == 32


def test_inputs_beyond_the_last_are_zeros():
    taken = cells.in_order(jnp.ones((1, 33)), cells.order(3), blocks=4)
    assert taken.shape == (1, 1, 16, 4, 2) and float(taken.sum()) == 33


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", range(1, 5))
def test_levels_looked_up_in_registers_are_those_of_the_table(bits, dtype):
    rng = np.random.default_rng(bits)
    table = jnp.asarray(rng.standard_normal(2**bits), jnp.float16).astype(dtype)
    codes = rng.integers(0, 2**bits, (1, 8))
    word = jnp.full((1, 1), int((codes << (4 * np.arange(8))).sum()), jnp.uint32)
    levels = np.resize(np.asarray(table).view(np.uint16), 8 if bits <= 3 else 16).astype(np.uint32)
    lower = ((levels.reshape(-1, 4) & 255) << (8 * np.arange(4, dtype=np.uint32))).sum(1)
    upper = ((levels.reshape(-1, 4) >> 8) << (8 * np.arange(4, dtype=np.uint32))).sum(1)
    halves = [(lower[i], lower[i + 1], upper[i], upper[i + 1]) for i in range(0, lower.size, 2)]
    registers = [[jnp.full((1, 1), int(r), jnp.uint32) for r in half] for half in halves]
    instructions = lookup.instructions(True)
    selectors = cells.by_four_bits(word, instructions) if bits == 4 else (word, word >> 16)
    found = jnp.stack(lookup.pairs(selectors, registers, interpret=True))[:, 0, 0]
    halves = jnp.stack([found & 0xFFFF, found >> 16], axis=1).astype(jnp.uint16)
    np.testing.assert_array_equal(
        lax.bitcast_convert_type(halves, dtype).reshape(-1), table[codes[0, [0, 2, 1, 3, 4, 6, 5, 7]]]
    )


def test_float32_is_three_pieces_of_float16_of_which_an_infinite_number_is_in_the_first():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 50)) * 10.0 ** rng.uniform(-30, 30, (4, 1)), jnp.float32)
    seen = []
    got = pieces.by_pieces(lambda halves: seen.append(halves) or halves.astype(jnp.float32), x)
    assert seen[0].dtype == jnp.float16 and seen[0].shape == (3, 4, 50)
    assert (np.abs(np.asarray(got - x)) <= 2.0**-24 * np.abs(np.asarray(x)).max(1, keepdims=True)).all()
    strange = jnp.float32([[jnp.inf, 1, -2], [jnp.nan, 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
        pieces.by_pieces(lambda halves: halves.astype(jnp.float32), strange), strange
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_reference_is_the_product_with_the_weight(bits):
    arrays, weight = example(2, 5, 70, bits)
    assert close(reference.codebook_gemm(*arrays), arrays[0], weight)


@pytest.mark.parametrize(
    ("bits", "dtype", "tile"),
    [
        (4, jnp.bfloat16, SMALL),
        (4, jnp.float32, SPLIT),
        (3, jnp.float16, SPLIT),
        (6, jnp.bfloat16, SPLIT),
        *(
            pytest.param(bits, dtype, tile, marks=pytest.mark.slow)
            for bits in range(1, 9)
            for dtype in (jnp.float32, jnp.bfloat16)
            for tile in (SMALL, SPLIT)
        ),
    ],
)
def test_the_triton_kernel_is_the_product_with_the_weight(bits, dtype, tile):
    arrays, weight = example(2, 19, 32 * 9 + 5, bits, dtype)  # tails in N and K, two steps and more
    got = triton.codebook_gemm(*arrays, tile=tile, interpret=True)
    assert got.dtype == jnp.float32
    assert close(got, arrays[0], weight)


def test_wide_codes_of_more_than_a_few_rows_go_to_tensor_cores():
    M = triton.FEW_ROWS + 1
    arrays, weight = example(M, 19, 32 * 5, 6, jnp.float16)
    assert close(triton.codebook_gemm(*arrays, tile=SMALL, interpret=True), arrays[0], weight)


@pytest.mark.parametrize(
    ("sizes", "bits", "dtype", "tile"),
    [
        ((2, 64, 256), 3, jnp.float16, None),
        ((2, 64, 256), 6, jnp.bfloat16, None),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [
                ((9, 128, 512), 4, jnp.bfloat16, mosaic_gpu.Tile(rows=8, warpgroups=2, stages=2, splits=2)),
                ((70, 64, 768), 4, jnp.float16, mosaic_gpu.Tile(rows=128, warpgroups=1, stages=2)),
                ((1, 64, 768), 4, jnp.bfloat16, mosaic_gpu.Tile(rows=8, warpgroups=1, stages=2)),
                ((1, 64, 256), 2, jnp.bfloat16, None),
                ((1, 64, 256), 1, jnp.float16, None),
                ((2, 64, 256), 3, jnp.float32, None),
                ((2, 64, 512), 8, jnp.float16, None),
                ((40, 64, 256), 5, jnp.bfloat16, None),
                ((1, 64, 256), 7, jnp.float32, None),
                ((1, 64, 768), 4, jnp.bfloat16, mosaic_gpu.Tile(rows=8, warpgroups=1, stages=2, splits=4)),
            ]
        ),
    ],
)
def test_the_mosaic_kernel_is_the_product_with_the_weight_without_races(sizes, bits, dtype, tile):
    arrays, weight = example(*sizes, bits, dtype)
    got = mosaic_gpu.codebook_gemm(*arrays, tile=tile, interpret=True)
    assert got.dtype == jnp.float32
    assert close(got, arrays[0], weight)


@pytest.mark.parametrize(("M", "bits"), [(1, 3), (40, 4), (1, 8)])
def test_the_mosaic_kernel_lowers_for_cuda(M, bits):
    arrays, _ = example(M, 128, 512, bits, jnp.bfloat16)
    assert "codebook_gemm_mosaic" in lowered_text(mosaic_gpu.codebook_gemm, *arrays)


def test_what_the_mosaic_kernel_does_not_take_is_told():
    told = {
        "takes bfloat16, float16 and float32": (
            jnp.zeros((1, 256), jnp.int8),
            *example(1, 64, 256, 4)[0][1:],
        ),
        "multiples of 256 inputs": example(1, 64, 288, 4, jnp.bfloat16)[0],
        "64 outputs": example(1, 65, 256, 4, jnp.bfloat16)[0],
    }
    for words, arrays in told.items():
        assert words in mosaic_gpu.why_not(*arrays)
    assert mosaic_gpu.why_not(*example(1, 64, 256, 4, jnp.bfloat16)[0]) is None


@pytest.mark.slow
def test_vmap_over_rows_and_over_weights_of_the_mosaic_kernel():
    (x, *weight), _ = example(2, 64, 256, 2, jnp.float16)
    other = example(2, 64, 256, 2, seed=1)[0][1:]
    both = [jnp.stack([a, b]) for a, b in zip(weight, other, strict=True)]

    def product(*arrays):
        with kernels("mosaic_gpu", interpret=True):
            return codebook_gemm(*arrays)

    close_to = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-2)
    close_to(jax.vmap(product, (0, None, None))(x, *weight), codebook_gemm(x, *weight))
    want = jnp.stack([codebook_gemm(x, *(a[i] for a in both)) for i in range(2)])
    close_to(jax.vmap(product, (None, 0, 0))(x, *both), want)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 5, 31), (1, 300, 64), (3, 70, 1100), (17, 33, 4), (130, 129, 70)])
def test_default_tiles_take_any_sizes(shape):
    arrays, weight = example(*shape, 4, jnp.bfloat16)
    assert close(triton.codebook_gemm(*arrays, interpret=True), arrays[0], weight)


@pytest.mark.slow
def test_rows_that_are_not_finite_are_so_in_kernel_and_reference_and_others_are_whole():
    (x, codes, table), _ = example(4, 16, 64, 5)
    x = x.at[1, 3].set(jnp.nan).at[2, 40].set(jnp.inf).at[3].set(0)
    for tile in (SMALL, SPLIT):
        got = triton.codebook_gemm(x, codes, table, tile=tile, interpret=True)
        want = reference.codebook_gemm(x, codes, table)
        np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
        np.testing.assert_array_equal(jnp.isinf(got), jnp.isinf(want))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got[3], 0)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(("M", "bits"), [(1, 3), (1, 8), (5, 6)])
def test_the_triton_kernel_lowers_for_cuda(M, bits, gpu):
    arrays, _ = example(M, 70, 256, bits, jnp.bfloat16)
    assert "codebook_gemm_triton" in lowered_text(triton.codebook_gemm, *arrays, gpu=gpu)


def with_kernel(*arrays):
    with kernels("triton", interpret=True):
        return codebook_gemm(*arrays)


@pytest.mark.slow
def test_gradients_in_x_are_those_of_the_reference():
    (x, codes, table), _ = example(2, 16, 64, 5)

    def loss(x, f):
        return (f(x, codes, table) ** 2).sum()

    got = jax.grad(loss)(x, with_kernel)
    want = jax.grad(loss)(x, functools.partial(codebook_gemm, implementation="xla"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_vmap_over_rows_and_over_weights():
    (x, *weight), _ = example(2, 16, 64, 5)
    both = [jnp.stack([a, b]) for a, b in zip(weight, example(2, 16, 64, 5, seed=1)[0][1:], strict=True)]
    close_to = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close_to(jax.vmap(with_kernel, (0, None, None))(x, *weight), codebook_gemm(x, *weight))
    want = jnp.stack([codebook_gemm(x, *(a[i] for a in both)) for i in range(2)])
    close_to(jax.vmap(with_kernel, (None, 0, 0))(x, *both), want)


def test_shard_map_over_outputs():
    arrays, _ = example(2, 64, 64, 5)
    mesh = jax.make_mesh((8,), ("n",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(
        with_kernel, mesh=mesh, in_specs=(P(), P("n"), P("n")), out_specs=P(None, "n"), check_vma=False
    )
    np.testing.assert_allclose(f(*arrays), codebook_gemm(*arrays), rtol=1e-4, atol=1e-4)


def test_auto_on_a_cpu_is_the_reference_or_what_a_few_rows_take():
    (x, codes, table), _ = example(9, 16, 64, 4)
    np.testing.assert_array_equal(codebook_gemm(x, codes, table), reference.codebook_gemm(x, codes, table))
    few = x[:2], codes, table
    assert few_rows.takes(few[0], 4)
    np.testing.assert_array_equal(codebook_gemm(*few), few_rows.codebook_gemm(*few))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_few_rows_on_a_cpu_give_the_product_with_the_weight(bits):
    arrays, weight = example(2, 5, 70, bits)
    assert close(codebook_gemm(*arrays), arrays[0], weight)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e33])
def test_a_few_rows_on_a_cpu_may_be_of_any_size(size):
    (x, codes, table), weight = example(3, 5, 64, 4)
    x = jnp.asarray(x, jnp.float32) * jnp.float32([[size], [1], [0]])
    want = np.asarray(x, np.float64) @ weight
    found = np.asarray(few_rows.codebook_gemm(x, codes, table), np.float64)
    assert np.isfinite(found).all()
    assert (np.abs(found - want) <= 1e-5 * np.abs(want).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_row_that_is_not_finite_gives_nothing_finite_on_a_cpu_and_spoils_no_other(bad):
    (x, codes, table), weight = example(2, 5, 64, 4)
    found = few_rows.codebook_gemm(jnp.asarray(x, jnp.float32).at[0, 3].set(bad), codes, table)
    assert not np.isfinite(found[0]).any()
    assert close(found[1:], x[1:], weight)


@pytest.mark.parametrize("name", ["pallas", "triton", "mosaic_gpu"])
def test_a_named_implementation_does_not_fall_back(name):
    arrays, _ = example(2, 16, 64, 4)
    with pytest.raises(NotImplementedError, match="codebook_gemm: no .* kernel: .* runs on NVIDIA GPUs"):
        codebook_gemm(*arrays, implementation=name)
    with pytest.raises(NotImplementedError, match="takes no empty arrays"), kernels(name, interpret=True):
        codebook_gemm(arrays[0][:0], *arrays[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((16, 2, 9), jnp.uint32)}, r"codes must have 1 to 8 bits, got codes.shape="),
        ({"x": jnp.zeros((2, 96))}, r"codes must have ceil\(K / 32\) blocks, got blocks=2, K=96"),
        ({"table": jnp.zeros((16, 8), jnp.float16)}, r"table must be \[N, 2\*\*bits\], got table.shape="),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    x, codes, table = example(2, 16, 64, 4)[0]
    with pytest.raises(ValueError, match=f"codebook_gemm: {message}"):
        codebook_gemm(**{"x": x, "codes": codes, "table": table, **change})


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_kernels_on_a_gpu_are_the_reference(case):
    arrays = case.operands()
    got, want = jax.jit(case.run)(*arrays), jax.jit(case.reference)(*arrays)
    size = float(jnp.sqrt((want**2).mean()))
    np.testing.assert_allclose(got, want, atol=0.05 * size)
