"""Columns of 2 and 4 bits with outliers: kernels against the reference, and the reference against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.mixed_two_bit_gemm import mixed_two_bit_gemm, mosaic_gpu, reference, triton
from pallas_kernels.mixed_two_bit_gemm.cases import CASES, GROUP4, random_weight, shapes
from pallas_kernels.mixed_two_bit_gemm.decode import places, shifted


def example(M, N, W, n4, outliers, dtype=jnp.float16, seed=0):
    return random_weight(shapes(M, N, W, n4, outliers, dtype), np.random.default_rng(seed))


def in_numpy(two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place):
    """The rows in float64, weight by weight, as the module's docstring has it."""
    N = (four if two is None else two).shape[0]
    n2, n4 = (0 if w is None else w.shape[1] for w in (two, four))
    rows = np.zeros((N, 16 * (n2 + n4)))
    for n in range(N):
        b, o = divmod(n, 16)
        for g in range(n2):
            s = int(step[b, g, o // 8]) >> 4 * (o % 8) & 15
            s2 = int(step_zero[b, g // 2]) >> 4 * (g % 2) & 15
            z = int(zero_point[b, g]) >> 2 * o & 3
            q = np.array([int(two[n, g]) >> 2 * i & 3 for i in range(16)])
            rows[n, 16 * g : 16 * g + 16] = (q - z) * (s + s2) * float(step_scale[b, g])
        for i in range(16 * n4):
            q, g = int(four[n, i // 16, i % 16 // 8]) >> 4 * (i % 8) & 15, i // GROUP4
            z = int(four_zero_point[b, g, o // 8]) >> 4 * (o % 8) & 15
            rows[n, 16 * n2 + i] = (q - z) * float(four_scale[n, g])
    if outlier is not None:
        R = reference.block_rows(rows.shape[1])
        for block in range(outlier.shape[0]):
            for value, at in zip(np.asarray(outlier[block]), np.asarray(place[block]), strict=True):
                n, i = block * R + int(at) // rows.shape[1], int(at) % rows.shape[1]
                if n < N:
                    rows[n, i] += float(value)
    return rows


def close(got, want, x):
    """Within what rounding weights to the type of x, and steps to float16, can make."""
    eps = 2.0**-9 if x.dtype == jnp.float16 else 2.0**-7
    spread = float(jnp.sqrt(jnp.mean(want**2)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * eps * spread)


@pytest.mark.parametrize("n4, outliers", [(0, 0), (8, 3), (3, 2)])
def test_reference_is_the_product_in_float64(n4, outliers):
    args = example(2, 20, 128, n4, outliers, jnp.float32)
    arrays = [None if a is None else np.asarray(a) for a in args[1:]]
    want = np.asarray(args[0], np.float64) @ in_numpy(*arrays).T
    np.testing.assert_allclose(reference.mixed_two_bit_gemm(*args, group4=GROUP4), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_pairs_beside_an_exponent_are_every_code_more_than_an_offset(bits, dtype):
    """And the product with a scale is rounded once, as the offset times it is exact."""
    words = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 64, np.uint32, endpoint=False))
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.001, 0.1, 64), dtype)
    for j, place in enumerate(places(bits, dtype)):
        pair = (shifted(words, place.shift) & place.mask) | place.exponent
        assert float(dtype(-place.offset)) == -place.offset
        for half in range(2):
            number = jax.lax.bitcast_convert_type((pair >> 16 * half).astype(jnp.uint16), dtype)
            code = (words >> (bits * j + 16 * half)) & (2**bits - 1)
            np.testing.assert_array_equal(number.astype(jnp.float32), code.astype(jnp.float32) + place.offset)
            less = scale * dtype(-place.offset)
            fused = np.asarray(number, np.float64) * np.asarray(scale, np.float64) + np.asarray(
                less, np.float64
            )
            np.testing.assert_array_equal(fused, np.asarray(code, np.float64) * np.asarray(scale, np.float64))


SLOW = pytest.mark.slow
BY_COLUMN, BY_WEIGHT = triton.Tile(tokens=1, rows=16, splits=2), triton.Tile(tokens=8, rows=16, splits=2)


@pytest.mark.parametrize(
    "M, N, n4, outliers, tile, dtype",
    [
        (1, 40, 4, 5, BY_COLUMN, jnp.float16),
        (3, 40, 4, 5, BY_WEIGHT, jnp.float16),
        pytest.param(1, 16, 0, 0, triton.Tile(tokens=1, rows=16), jnp.bfloat16, marks=SLOW),
        pytest.param(2, 33, 13, 0, triton.Tile(tokens=2, rows=32), jnp.bfloat16, marks=SLOW),
        pytest.param(17, 33, 13, 70, triton.Tile(tokens=16, rows=16), jnp.bfloat16, marks=SLOW),
        pytest.param(16, 48, 5, 0, triton.Tile(tokens=16, rows=32, words=16), jnp.float16, marks=SLOW),
    ],
)
def test_triton_is_the_reference_at_any_size(M, N, n4, outliers, tile, dtype):
    args = example(M, N, 208, n4, outliers, dtype)
    got = triton.mixed_two_bit_gemm(*args, group4=GROUP4, tile=tile, interpret=True)
    close(got, reference.mixed_two_bit_gemm(*args, group4=GROUP4), args[0])


@pytest.mark.slow
@pytest.mark.parametrize("tile", [BY_COLUMN, BY_WEIGHT])
def test_groups_of_4_bits_within_a_turn(tile):
    x, *weight = example(3, 16, 128, 8, 0)
    weight[6] = weight[6] * jnp.linspace(0.5, 1.5, 16, dtype=jnp.float16)[None]
    weight[7] = jnp.repeat(weight[7], 16, axis=1) ^ jnp.arange(16, dtype=jnp.uint32)[None, :, None]
    got = triton.mixed_two_bit_gemm(x, *weight, group4=8, tile=tile, interpret=True)
    close(got, reference.mixed_two_bit_gemm(x, *weight, group4=8), x)


@pytest.mark.parametrize(
    "M, W, n4, outliers, tile, dtype",
    [
        (3, 1024, 0, 0, mosaic_gpu.Tile(m=8), jnp.float16),
        pytest.param(9, 1536 + 128, 8, 3, mosaic_gpu.Tile(m=8), jnp.bfloat16, marks=SLOW),
        pytest.param(3, 1536, 0, 0, mosaic_gpu.Tile(m=8, split=2), jnp.bfloat16, marks=SLOW),
    ],
)
def test_mosaic_is_the_reference_and_has_no_races(M, W, n4, outliers, tile, dtype):
    args = example(M, 128, W, n4, outliers, dtype)
    got = mosaic_gpu.mixed_two_bit_gemm(*args, group4=GROUP4, tile=tile, interpret=True)
    close(got, reference.mixed_two_bit_gemm(*args, group4=GROUP4), args[0])


def test_outliers_alone_are_exact_and_ignore_the_places_that_fill_up():
    x, *_, outlier, place = example(2, 32, 128, 0, 4)
    outlier, place = outlier.at[:, 2:].set(0), place.at[:, 2:].set(0)
    got = triton.sparse(x, outlier, place, interpret=True)
    rows = reference.add_to_rows(jnp.zeros((32, 128)), outlier, place)
    want = jnp.dot(x.astype(jnp.float32), rows.T, precision="highest")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, pytest.param(8, marks=SLOW)])
def test_a_token_that_is_nan_or_zero_leaves_others_alone(tokens):
    x, *weight = example(3, 16, 128, 2, 2)
    x = x.at[0, 3].set(jnp.nan).at[1].set(0)
    tile = triton.Tile(tokens=tokens, rows=16)
    got = triton.mixed_two_bit_gemm(x, *weight, group4=GROUP4, tile=tile, interpret=True)
    assert np.isnan(got[0]).all() and not np.asarray(got[1]).any() and np.isfinite(got[2]).all()


def lowered(kernel, args, gpu: str) -> str:
    present = [a for a in args if a is not None]

    def f(*arrays):
        left = iter(arrays)
        return kernel(*(None if a is None else next(left) for a in args), group4=GROUP4)

    return lowered_text(f, *present, gpu=gpu)


@pytest.mark.parametrize("M, n4, outliers", [(1, 0, 0), (1, 4, 3), (3, 4, 0), (3, 13, 0)])
def test_triton_lowers_for_cuda(M, n4, outliers):
    text = lowered(triton.mixed_two_bit_gemm, example(M, 40, 208, n4, outliers), "a100")
    assert "mixed_two_bit_gemm" in text and ("mixed_two_bit_gemm_sparse" in text) == bool(outliers)


@pytest.mark.parametrize("M, dtype", [(1, jnp.float16), (40, jnp.bfloat16)])
def test_mosaic_lowers_for_cuda(M, dtype):
    text = lowered(mosaic_gpu.mixed_two_bit_gemm, example(M, 128, 1024, 0, 0, dtype), "h100")
    assert "mixed_two_bit_gemm_mosaic" in text


@pytest.mark.slow
def test_vmap_over_tokens_and_over_weights():
    x, *weight = example(4, 16, 128, 2, 2)
    f = functools.partial(mixed_two_bit_gemm, group4=GROUP4)
    want = f(x, *weight)
    stack = [jnp.stack([a, a]) for a in weight]
    with kernels("triton", interpret=True):
        close(jax.vmap(lambda x: f(x, *weight))(x.reshape(2, 2, 128)).reshape(4, 16), want, x)
        close(jax.vmap(f, in_axes=(None, *[0] * 10))(x, *stack)[1], want, x)


@pytest.mark.slow
def test_gradient_in_x_is_the_references():
    x, *weight = example(2, 16, 128, 2, 2)

    def loss(x, implementation):
        y = mixed_two_bit_gemm(x, *weight, group4=GROUP4, implementation=implementation)
        return (y * jnp.arange(16, dtype=jnp.float32)[None]).sum()

    with kernels("auto", interpret=True):
        got = jax.grad(loss)(x, "triton")
    np.testing.assert_array_equal(got.astype(jnp.float32), jax.grad(loss)(x, "xla").astype(jnp.float32))


@pytest.mark.slow
def test_shard_map_cuts_outputs_over_eight_devices():
    x, *weight = example(2, 128, 128, 2, 2)
    mesh = Mesh(np.array(jax.devices()[:8]), ("n",))
    specs = [P("n", *[None] * (a.ndim - 1)) for a in weight]

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), *specs), out_specs=P(None, "n"), check_vma=False
    )
    def f(x, *weight):
        return mixed_two_bit_gemm(x, *weight, group4=GROUP4)

    with kernels("triton", interpret=True):
        got = f(x, *weight)
    close(got, reference.mixed_two_bit_gemm(x, *weight, group4=GROUP4), x)


def test_auto_on_a_cpu_is_the_reference():
    args = example(2, 16, 128, 2, 2, jnp.float32)
    got = mixed_two_bit_gemm(*args, group4=GROUP4)
    np.testing.assert_array_equal(got, reference.mixed_two_bit_gemm(*args, group4=GROUP4))


def test_a_named_implementation_does_not_fall_back():
    args = example(2, 16, 128, 2, 2)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        mixed_two_bit_gemm(*args, group4=GROUP4, implementation="triton")
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        mixed_two_bit_gemm(*args, group4=GROUP4, implementation="mosaic_gpu")
    with kernels("mosaic_gpu", interpret=True), pytest.raises(NotImplementedError, match="N=16, 96"):
        mixed_two_bit_gemm(*args, group4=GROUP4)
    with kernels("triton", interpret=True), pytest.raises(NotImplementedError, match="group4=12"):
        mixed_two_bit_gemm(*args, group4=12)


def test_errors_say_what_must_hold():
    x, *weight = example(2, 16, 128, 2, 0)
    with pytest.raises(ValueError, match="W=128"):
        mixed_two_bit_gemm(x[:, 1:], *weight, group4=GROUP4)
    with pytest.raises(ValueError, match="group4=0"):
        mixed_two_bit_gemm(x, *weight, group4=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case_is_the_reference_on_a_gpu(case):
    args = case.operands()
    close(case.run(*args), case.reference(*args), args[0])
