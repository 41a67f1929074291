"""`any_precision_gemm`: reference against NumPy, kernels against the reference, widths known and traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from targets import lowered_text
from test_codebook_gemm import codes_of_cells

from pallas_kernels import kernels
from pallas_kernels.any_precision_gemm import any_precision_gemm, cases, cells, mosaic_gpu, reference, triton
from pallas_kernels.case import bytes_loaded
from pallas_kernels.codebook_gemm import lookup
from pallas_kernels.codebook_gemm.cells import in_order

SMALL = triton.Tile(rows=8, outputs=16, blocks=4)
SPLIT = triton.Tile(rows=16, outputs=32, blocks=4, splits=2)


def planes_of(codes: np.ndarray, bits: int) -> jax.Array:
    """Planes [bits, N, ceil(K / 32)] of codes [N, K], the highest bit first."""
    N, K = codes.shape
    wide = np.zeros((N, -(-K // 32) * 32), np.uint64)
    wide[:, :K] = codes
    digits = (wide[None] >> np.arange(bits, dtype=np.uint64)[::-1, None, None]) & np.uint64(1)
    words = (digits.reshape(bits, N, -1, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    return jnp.asarray(words.astype(np.uint32))


def example(M, N, K, seed_bits, parent_bits, dtype=jnp.float32, seed=0):
    """Operands, and the weights [K, N] of every width in float64."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((M, K)), dtype)
    codes = rng.integers(0, 2**parent_bits, (N, K))
    widths = range(seed_bits, parent_bits + 1)
    tables = [rng.standard_normal((N, 2**b)).astype(np.float16) for b in widths]
    weights = {
        b: np.take_along_axis(table.astype(np.float64), codes >> (parent_bits - b), axis=1).T
        for b, table in zip(widths, tables, strict=True)
    }
    return x, planes_of(codes, parent_bits), tuple(map(jnp.asarray, tables)), weights


def close(got, x, weight):
    """Whether a product has the error of its type: float32, or levels rounded to that of x."""
    error = {"float32": 2**-20, "float16": 2**-20, "bfloat16": 2**-8}[x.dtype.name]
    x = np.asarray(x.astype(jnp.float32), np.float64)
    limit = error * np.sqrt((x**2) @ (weight**2)) + 1e-6
    return bool((np.abs(np.asarray(got) - x @ weight) < 4 * limit).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_cells_have_the_codes_in_the_order_that_inputs_are_taken_in(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    taken = in_order(jnp.asarray(codes, jnp.float32), cells.ORDER, blocks=2)[:, 0]
    seen = set()
    for selectors, pairs in cells.cells(list(planes_of(codes, bits)), lookup.instructions(True)):
        for code, (pair, half) in zip(
            codes_of_cells(selectors, bits), [(p, h) for p in pairs for h in range(2)], strict=True
        ):
            np.testing.assert_array_equal(code, taken[:, pair, :, half])
            seen.add((pair, half))
    assert len(seen) == 32


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_reference_is_the_product_with_the_weight_at_each_width(bits):
    x, planes, tables, weights = example(2, 5, 70, 1, 8)
    assert close(any_precision_gemm(x, planes, tables, bits), x, weights[bits])


def test_the_reference_reads_a_width_that_is_traced():
    x, planes, tables, weights = example(2, 5, 70, 3, 6)
    product = jax.jit(any_precision_gemm)
    for bits in range(3, 7):
        assert close(product(x, planes, tables, jnp.int32(bits)), x, weights[bits])


@pytest.mark.parametrize(
    ("bits", "dtype", "tile"),
    [
        (4, jnp.bfloat16, SMALL),
        (7, jnp.float16, SMALL),
        (3, jnp.float32, SPLIT),
        *(
            pytest.param(bits, dtype, tile, marks=pytest.mark.slow)
            for bits in range(1, 9)
            for dtype in (jnp.float32, jnp.bfloat16)
            for tile in (SMALL, SPLIT)
        ),
    ],
)
def test_the_triton_kernel_is_the_product_with_the_weight(bits, dtype, tile):
    x, planes, tables, weights = example(2, 19, 32 * 9 + 5, 1, 8, dtype)  # tails, two steps and more
    got = triton.any_precision_gemm(x, planes, tables[bits - 1 : bits], tile=tile, interpret=True)
    assert got.dtype == jnp.float32
    assert close(got, x, weights[bits])


@pytest.mark.parametrize(
    ("widths", "tile"),
    [
        ((4, 5), SMALL),
        pytest.param((2, 6), SMALL, marks=pytest.mark.slow),
        pytest.param((3, 6), SPLIT, marks=pytest.mark.slow),
    ],
)
def test_a_traced_width_gives_what_the_same_width_gives_when_it_is_known(widths, tile):
    x, planes, tables, _ = example(2, 19, 32 * 9 + 5, *widths, jnp.bfloat16)
    product = functools.partial(triton.any_precision_gemm, tile=tile, interpret=True)
    traced = jax.jit(product)
    for bits, table in zip(range(widths[0], widths[1] + 1), tables, strict=True):
        got = traced(x, planes, tables, jnp.int32(bits))
        np.testing.assert_array_equal(got, product(x, planes, (table,)))
    nearest = traced(x, planes, tables, jnp.int32(9)), traced(x, planes, tables, jnp.int32(-1))
    np.testing.assert_array_equal(nearest[0], got)
    np.testing.assert_array_equal(nearest[1], product(x, planes, tables[:1]))


@pytest.mark.parametrize(
    ("sizes", "bits", "dtype", "tile"),
    [
        ((2, 64, 256), 3, jnp.float16, None),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [
                ((9, 128, 512), 4, jnp.bfloat16, mosaic_gpu.Tile(rows=8, warpgroups=2, stages=2, splits=2)),
                ((1, 64, 768), 4, jnp.bfloat16, mosaic_gpu.Tile(rows=8, warpgroups=1, stages=2)),
                ((1, 64, 256), 2, jnp.bfloat16, None),
                ((1, 64, 256), 1, jnp.float16, None),
                ((1, 64, 512), 5, jnp.bfloat16, None),
            ]
        ),
    ],
)
def test_the_mosaic_kernel_is_the_product_with_the_weight_without_races(sizes, bits, dtype, tile):
    x, planes, tables, weights = example(*sizes, 1, 5, dtype)
    got = mosaic_gpu.any_precision_gemm(x, planes, tables[bits - 1 : bits], tile=tile, interpret=True)
    assert got.dtype == jnp.float32
    assert close(got, x, weights[bits])


@pytest.mark.slow
def test_a_traced_width_in_the_mosaic_kernel():
    x, planes, tables, weights = example(2, 64, 512, 3, 5, jnp.bfloat16)
    tile = mosaic_gpu.Tile(rows=8, warpgroups=1, stages=2)
    product = jax.jit(functools.partial(mosaic_gpu.any_precision_gemm, tile=tile, interpret=True))
    for bits in (3, 4, 5):
        assert close(product(x, planes, tables, jnp.int32(bits)), x, weights[bits])


@pytest.mark.parametrize("traced", [False, True])
def test_the_mosaic_kernel_lowers_for_cuda(traced):
    x, planes, tables, _ = example(1, 128, 512, 3, 5, jnp.bfloat16)
    arrays = (x, planes, tables, jnp.int32(4)) if traced else (x, planes, tables[:1])
    assert "any_precision_gemm_mosaic" in lowered_text(mosaic_gpu.any_precision_gemm, *arrays)
    assert mosaic_gpu.why_not(*arrays) is None


def test_planes_beyond_the_width_are_not_read():
    x, planes, tables, weights = example(2, 5, 70, 3, 6)
    broken = planes[:4]  # the interpreter would fail, or read something else
    got = triton.any_precision_gemm(x, broken, tables[1:2], tile=SMALL, interpret=True)
    assert close(got, x, weights[4])


@pytest.mark.slow
def test_rows_that_are_not_finite_are_so_in_kernel_and_reference_and_others_are_whole():
    x, planes, tables, _ = example(4, 16, 64, 5, 5)
    x = x.at[1, 3].set(jnp.nan).at[2, 40].set(jnp.inf).at[3].set(0)
    got = triton.any_precision_gemm(x, planes, tables, tile=SMALL, interpret=True)
    want = reference.any_precision_gemm(x, planes, tables)
    np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
    np.testing.assert_array_equal(jnp.isinf(got), jnp.isinf(want))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[3], 0)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(("M", "traced"), [(1, True), (5, False)])
def test_the_triton_kernel_lowers_for_cuda(M, traced, gpu):
    x, planes, tables, _ = example(M, 70, 256, 4, 5, jnp.bfloat16)
    arrays = (x, planes, tables, jnp.int32(4)) if traced else (x, planes, tables[:1])
    assert "any_precision_gemm_triton" in lowered_text(triton.any_precision_gemm, *arrays, gpu=gpu)


def with_kernel(*arrays):
    with kernels("triton", interpret=True):
        return any_precision_gemm(*arrays)


@pytest.mark.slow
def test_gradients_in_x_are_those_of_the_reference():
    x, planes, tables, _ = example(2, 16, 64, 5, 6)

    def loss(x, f):
        return (f(x, planes, tables, jnp.int32(5)) ** 2).sum()

    got = jax.grad(loss)(x, with_kernel)
    want = jax.grad(loss)(x, functools.partial(any_precision_gemm, implementation="xla"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_vmap_over_rows_weights_and_widths():
    x, *weight, _ = example(2, 16, 64, 5, 6)
    other = example(2, 16, 64, 5, 6, seed=1)[1:3]
    planes, tables = jax.tree.map(lambda a, b: jnp.stack([a, b]), tuple(weight), other)
    close_to = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    bits = jnp.int32([5, 6])
    got = jax.vmap(with_kernel, (0, None, None, None))(x, *weight, bits[0])
    close_to(got, any_precision_gemm(x, *weight, 5))
    got = jax.vmap(with_kernel, (None, 0, 0, 0))(x, planes, tables, bits)
    want = [any_precision_gemm(x, *weight, 5), any_precision_gemm(x, *other, 6)]
    close_to(got, jnp.stack(want))


def test_every_row_may_have_a_width_of_its_own():
    x, planes, tables, weights = example(3, 16, 64, 5, 6)
    got = jax.vmap(with_kernel, (0, None, None, 0))(x, planes, tables, jnp.int32([5, 6, 5]))
    for row, bits in enumerate([5, 6, 5]):
        assert close(got[row], x[row], weights[bits])


def test_shard_map_over_outputs():
    x, planes, tables, _ = example(2, 64, 64, 5, 5)
    mesh = jax.make_mesh((8,), ("n",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(
        lambda *arrays: with_kernel(*arrays, 5),
        mesh=mesh,
        in_specs=(P(), P(None, "n"), P("n")),
        out_specs=P(None, "n"),
        check_vma=False,
    )
    want = any_precision_gemm(x, planes, tables, 5)
    np.testing.assert_allclose(f(x, planes, tables), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pallas", "triton", "mosaic_gpu"])
def test_a_named_implementation_does_not_fall_back(name):
    x, planes, tables, _ = example(2, 16, 64, 4, 4)
    with pytest.raises(NotImplementedError, match="any_precision_gemm: no .*: .* runs on NVIDIA GPUs"):
        any_precision_gemm(x, planes, tables, 4, implementation=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 96))}, r"planes must have ceil\(K / 32\) words, got blocks=2, K=96"),
        ({"planes": jnp.zeros((5, 16, 2), jnp.uint32)}, r"tables must be \[N, 2\*\*b\] for b = seed_bits"),
        ({"bits": 2}, "bits must be 3 to 4, as stored, got bits=2"),
        ({"bits": 5}, "bits must be 3 to 4, as stored, got bits=5"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    x, planes, tables, _ = example(2, 16, 64, 3, 4)
    given = {"x": x, "planes": planes, "tables": tables, "bits": 4, **change}
    with pytest.raises(ValueError, match=f"any_precision_gemm: {message}"):
        any_precision_gemm(**given)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_kernels_on_a_gpu_are_the_reference(case):
    arrays = case.operands()
    got, want = jax.jit(case.run)(*arrays), jax.jit(case.reference)(*arrays)
    size = float(jnp.sqrt((want**2).mean()))
    np.testing.assert_allclose(got, want, atol=0.05 * size)


@pytest.mark.parametrize(("M", "widths"), [(1, (2, 3, 4)), (8, (3, 4, 5, 6))])
def test_what_the_gpus_program_reads_falls_with_the_width_that_is_known_only_when_it_runs(M, widths):
    N, K = 128, 1024
    x, planes, tables, _ = example(M, N, K, widths[0], widths[-1], jnp.float16)
    tile = dataclasses.replace(
        triton.default_tile(M, N, K // 32, bits=widths[-1], capability=(9, 0)), splits=1, rows=8
    )
    run = functools.partial(triton.any_precision_gemm, tile=tile)
    traced = [
        bytes_loaded(run, x, planes, tables, jnp.int32(0), branch=branch) for branch in range(len(widths))
    ]
    assert [read["uint32"] for read in traced] == [bits * N * K // 8 for bits in widths]
    levels = [read["float16"] for read in traced]
    assert levels == sorted(levels) and levels[0] < levels[-1]
    known = bytes_loaded(run, x, planes[: widths[0]], tables[:1])
    assert known["uint32"] == traced[0]["uint32"] and known["float16"] == levels[0]
    looped = bytes_loaded(
        lambda xs: jax.lax.map(lambda x: run(x, planes, tables, jnp.int32(0)), xs), jnp.stack([x, x])
    )
    assert looped["uint32"] == 2 * traced[0]["uint32"]


def test_loops_of_unknown_length_are_not_counted():
    x, planes, tables, _ = example(1, 32, 512, 3, 3, jnp.float16)
    run = functools.partial(triton.any_precision_gemm, tile=SPLIT)
    with pytest.raises(NotImplementedError, match="a loop must have a length"):
        bytes_loaded(run, x, planes, tables)
