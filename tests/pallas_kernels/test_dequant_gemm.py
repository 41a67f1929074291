"""`dequant_gemm`: the reference against NumPy, kernels against the reference, lowering, transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.dequant_gemm import cases, dequant_gemm, few_rows, int8, mosaic_gpu, reference, triton
from pallas_kernels.fold import FEW_ROWS
from pallas_kernels.words import from_blocks, parts, to_words


def packed(codes: np.ndarray, bits: int) -> jax.Array:
    """Words of codes, as `pallas_kernels.words` says."""
    n, blocks = codes.shape[-1], -(-codes.shape[-1] // 32)
    wide = np.zeros((*codes.shape[:-1], blocks, 32), np.uint32)
    wide.reshape(*codes.shape[:-1], -1)[..., :n] = codes
    out, below = [], bits
    for p in parts(bits):
        below -= p
        out.append(to_words(jnp.asarray((wide >> below) & (2**p - 1)), p))
    return jnp.concatenate(out, axis=-1)


def example(M, N, K, bits, group_size, dtype=jnp.float32, zero="whole", scale_bits=None, seed=0):
    """Operands, and the weight [K, N] in float64."""
    rng = np.random.default_rng(seed)
    G = -(-K // group_size)
    x = jnp.asarray(rng.standard_normal((M, K)), jnp.float32).astype(dtype)
    codes = rng.integers(0, 2**bits, (N, K))
    step = None
    if scale_bits is None:
        scale = jnp.asarray(rng.uniform(0.01, 0.1, (G, N)), jnp.float16)
        s = np.asarray(scale, np.float64)
    else:
        of_scales = rng.integers(1, 2**scale_bits, (G, N))
        scale = packed(of_scales, scale_bits)
        step = jnp.asarray(rng.uniform(0.001, 0.002, (-(-N // 16), G)), jnp.float16)
        s = of_scales * np.repeat(np.asarray(step, np.float64).T, 16, axis=1)[:, :N]
    z, zero_point = np.full((G, N), 2.0 ** (bits - 1)), None
    if zero == "whole":
        z = rng.integers(0, 2**bits, (G, N))
        zero_point = packed(z, bits)
    elif zero == "float":
        zero_point = jnp.asarray(rng.uniform(0, 2**bits, (G, N)), jnp.float16)
        z = np.asarray(zero_point, np.float64)
    group = np.arange(K) // group_size
    return (x, packed(codes, bits), scale, zero_point, step), (codes.T - z[group]) * s[group]


def close(got, x, weight, dtype):
    """Whether a product has the error of its type: float32, or weights rounded to 16 bits."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    error = {jnp.float32: 2**-20, jnp.float16: 2**-10, jnp.bfloat16: 2**-7}[dtype]
    limit = error * np.sqrt((x**2) @ (weight**2)) + 1e-6
    return bool((np.abs(np.asarray(got) - x @ weight) < 4 * limit).all())


SHAPES = [  # M, N, K, bits, group_size, dtype, zero, scale_bits
    (1, 70, 256, 4, 128, jnp.bfloat16, "whole", None),
    (3, 33, 200, 3, 64, jnp.float16, "float", 6),  # tails in all axes, a short last group
    (20, 40, 192, 5, 32, jnp.bfloat16, "float", None),
    (2, 17, 192, 8, 192, jnp.bfloat16, None, None),
    (1, 20, 130, 7, 16, jnp.float32, "float", 3),
    (8, 40, 256, 6, 128, jnp.float16, "whole", None),
    (17, 24, 256, 2, 256, jnp.bfloat16, "float", None),
    (2, 16, 31, 1, 31, jnp.float16, None, None),
    (3, 16, 96, 4, 24, jnp.float32, "whole", None),
]
IDS = [f"{s[0]}x{s[1]}x{s[2]}, {s[3]} bits, groups of {s[4]}, {s[5].__name__}" for s in SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_the_reference_is_the_product_with_the_weight(shape):
    *sizes, dtype, zero, scale_bits = shape
    arrays, weight = example(*sizes, dtype, zero, scale_bits)
    got = jax.jit(functools.partial(reference.dequant_gemm, group_size=shape[4]))(*arrays)
    assert got.dtype == jnp.float32
    assert close(got, arrays[0], weight, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_the_triton_kernel_is_the_product_with_the_weight(shape):
    *sizes, dtype, zero, scale_bits = shape
    arrays, weight = example(*sizes, dtype, zero, scale_bits)
    got = triton.dequant_gemm(*arrays, group_size=shape[4], interpret=True)
    assert close(got, arrays[0], weight, dtype)


def test_weights_that_16_bits_hold_give_the_same_in_kernel_and_reference():
    (x, codes, _, zero_point, _), _ = example(2, 32, 128, 4, 64, jnp.bfloat16)
    scale = jnp.full((2, 32), 0.5, jnp.float16)
    x = jnp.round(x * 4) / 4  # sums are exact, too
    arrays = (x, codes, scale, zero_point, None)
    got = triton.dequant_gemm(*arrays, group_size=64, interpret=True)
    np.testing.assert_array_equal(got, reference.dequant_gemm(*arrays, group_size=64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("M", "dtype"), [(2, jnp.bfloat16), (9, jnp.bfloat16), (9, jnp.float16), (2, jnp.float32)]
)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [8, 32, 64, 128, 192])
def test_every_width_and_group_in_the_triton_kernels(bits, group_size, M, dtype):
    arrays, weight = example(M, 33, 192, bits, group_size, dtype, "float")
    got = triton.dequant_gemm(*arrays, group_size=group_size, interpret=True)
    assert close(got, arrays[0], weight, dtype)


@pytest.mark.parametrize(
    "bits", [3, 8, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 2, 4, 5, 6, 7))]
)
def test_bytes_times_digits_are_codes_times_activations_to_the_precision_said(bits):
    k, group_size = int8.least_step(bits), 24
    (x, codes, *_), _ = example(3, 5, 2 * k, bits, group_size)
    x = x.at[0, 3].set(1000.0).at[1].set(0.0)  # a great one among others, and none
    digits, factors = int8.in_digits(x, bits=bits, k=k, group_size=group_size, m=2, interpret=True)
    words = np.asarray(codes).view(np.uint8).reshape(5, -1, bits, 4)  # [outputs, blocks, words, bytes]
    columns = np.zeros((2, 5, digits.shape[1]))
    for part, of_part in zip(int8.parts_of(bits), np.asarray(digits, np.float64), strict=True):
        of_words = words[:, :, part.word : part.word + part.p].reshape(5, 2, -1)
        masks = [255 << part.p * f & 255 for f in range(8 // part.p)]
        fields = np.concatenate([(of_words & mask) - 128.0 for mask in masks], axis=-1)  # [outputs, 2, k]
        columns += np.einsum("nik,cik->inc", fields, of_part.reshape(-1, 2, k))
    start, total, unit = np.asarray(factors, np.float64)[:, :3].swapaxes(0, 1)[:, :, None]
    H = int8.groups_of_step(k, group_size, 2 * k)
    shape = (2, 5, 2, -1, int8.DIGITS, 2)  # [step, output, tile, group, digit, row]
    got = (columns * unit + start).reshape(shape)[:, :, :, :H].sum(axis=-2)
    of_x = np.broadcast_to(total, columns.shape).reshape(shape)[:, :, :, :H].sum(axis=-2)
    values = np.asarray(from_blocks(codes, 2 * k), np.float64).reshape(5, 2, k)
    at = np.arange(2 * k).reshape(2, k)
    own = (at // group_size - at[:, :1] // group_size)[..., None] == np.arange(H)
    inputs = np.pad(np.asarray(x, np.float64), ((0, 1), (0, 0))).reshape(2, 2, 2, k)
    want = np.einsum("nik,ikh,trik->inthr", values, own, inputs)
    below, _ = int8.precision(bits)
    limit = 2.0 ** (1 - below) * np.abs(inputs).max(-1).transpose(2, 0, 1)[:, None, :, None]  # of each input
    assert (np.abs(got - want) <= limit * np.einsum("nik,ikh->inh", values, own)[:, :, None, :, None]).all()
    want = -np.einsum("ikh,trik->ithr", own, inputs)
    assert (np.abs(of_x - want[:, None]) <= limit * own.sum(1)[:, None, None, :, None]).all()


def test_a_great_activation_leaves_the_precision_of_float32_to_the_others():
    arrays, _ = example(1, 16, 256, 3, 128)
    x = arrays[0].at[0, 7].set(1000.0)
    _, codes, scale, zero_point, _ = arrays
    zero = np.asarray(from_blocks(zero_point, 16))[0]  # the great one's weight is nothing
    values = np.array(from_blocks(codes, 256))
    values[:, 7] = zero
    codes = packed(values, 3)
    weight = np.asarray(reference.rows(codes, scale.astype(jnp.float32), zero_point_of(zero_point), 256, 128))
    got = triton.dequant_gemm(x, codes, scale, zero_point, None, group_size=128, interpret=True)
    want = np.asarray(x, np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(got, want, atol=0.002)


def zero_point_of(words):
    """Whole zero points [2, 16] of 3 bits."""
    return reference.zero_points(words, (2, 16), 3)


def test_a_split_sum_is_the_same_sum():
    arrays, weight = example(2, 32, 640, 4, 64, jnp.bfloat16)
    tile = triton.Tile(m=8, n=32, k=64, split=3, num_warps=2)
    got = triton.dequant_gemm(*arrays, group_size=64, tile=tile, interpret=True)
    assert close(got, arrays[0], weight, jnp.bfloat16)


@pytest.mark.parametrize("group_size", [64, 32])
def test_rows_that_are_not_finite_are_so_in_kernel_and_reference_and_others_are_whole(group_size):
    arrays, _ = example(4, 16, 64, 4, group_size, jnp.bfloat16)
    x = arrays[0].at[1, 3].set(jnp.nan).at[2, 40].set(jnp.inf).at[3].set(0)
    arrays = (x, *arrays[1:])
    got = triton.dequant_gemm(*arrays, group_size=group_size, interpret=True)
    want = reference.dequant_gemm(*arrays, group_size=group_size)
    np.testing.assert_array_equal(jnp.isfinite(got), jnp.isfinite(want))
    np.testing.assert_allclose(got[0], want[0], atol=0.05)
    np.testing.assert_array_equal(got[3], 0)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(
    ("M", "dtype", "name"),
    [
        (3, jnp.bfloat16, "dequant_gemm_triton_few"),
        (20, jnp.bfloat16, "dequant_gemm_triton"),
        (8, jnp.float32, "dequant_gemm_triton_few"),
    ],
)
def test_the_triton_kernels_lower_for_cuda(M, dtype, name, gpu):
    arrays, _ = example(M, 70, 256, 3, 128, dtype, "float", 6)
    text = lowered_text(functools.partial(triton.dequant_gemm, group_size=128), *arrays, gpu=gpu)
    assert name in text
    assert ("dequant_gemm_digits" in text) == name.endswith("few")


def test_auto_on_a_cpu_is_the_reference_or_what_a_few_rows_take():
    (x, *operands), _ = example(9, 16, 64, 4, 32)
    got = dequant_gemm(x, *operands[:3], group_size=32)
    np.testing.assert_array_equal(got, reference.dequant_gemm(x, *operands, group_size=32))
    got = dequant_gemm(x[:2], *operands[:3], group_size=32)
    np.testing.assert_array_equal(got, few_rows.dequant_gemm(x[:2], *operands, group_size=32))


FEW = [s for s in SHAPES if s[0] <= FEW_ROWS and (s[4] % 32 == 0 or s[4] == s[2])]


@pytest.mark.parametrize("shape", FEW, ids=[IDS[SHAPES.index(s)] for s in FEW])
def test_a_few_rows_on_a_cpu_give_the_product_with_the_weight(shape):
    *sizes, dtype, zero, scale_bits = shape
    arrays, weight = example(*sizes, dtype, zero, scale_bits)
    assert few_rows.takes(arrays[0], shape[4])
    got = jax.jit(functools.partial(few_rows.dequant_gemm, group_size=shape[4]))(*arrays)
    assert close(got, arrays[0], weight, jnp.float32)  # weights are never rounded to the type of x


def test_vmap_of_single_rows_makes_more_rows_of_them():
    (x, *operands), _ = example(20, 16, 64, 4, 32)
    product = functools.partial(dequant_gemm, group_size=32)
    got = jax.vmap(lambda row: product(row, *operands[:3]))(x)
    np.testing.assert_array_equal(got, product(x, *operands[:3]))


def test_what_is_no_number_is_not_lost_in_a_few_rows():
    (x, *operands), _ = example(2, 16, 64, 3, 32)
    x = x.at[0, 5].set(jnp.nan).at[1, 6].set(jnp.inf)
    got = dequant_gemm(x, *operands[:3], group_size=32)
    assert np.isnan(got[0]).all() and not np.isfinite(got[1]).any()


MOSAIC_SHAPES = [  # M, N, K, bits, group_size, dtype, zero, scale_bits
    pytest.param((3, 64, 384, 3, 128, jnp.float16, "float", None), id="3 bits, float16"),
    *(
        pytest.param(shape, id=name, marks=pytest.mark.slow)
        for name, shape in {
            "1 bit": (1, 64, 384, 1, 128, jnp.bfloat16, "whole", None),
            "2 bits, coded scales": (9, 64, 256, 2, 64, jnp.bfloat16, None, 6),
            "4 bits, groups of 32": (2, 128, 512, 4, 32, jnp.bfloat16, "float", None),
            "5 bits, one group": (2, 64, 384, 5, 384, jnp.float16, "whole", None),
            "6 bits, two steps a stage": (1, 64, 512, 6, 128, jnp.bfloat16, "whole", None),
            "3 bits, 8 rows of float32": (8, 64, 512, 3, 256, jnp.float32, "float", None),
            "4 bits, 12 rows, groups of 32": (12, 64, 256, 4, 32, jnp.bfloat16, "float", None),
            "7 bits": (1, 64, 384, 7, 128, jnp.bfloat16, "whole", None),
            "8 bits, 33 rows, two digits": (33, 128, 256, 8, 128, jnp.bfloat16, None, None),
            "4 bits, 100 rows": (100, 128, 384, 4, 128, jnp.bfloat16, "whole", None),
            "8 bits, float16": (1, 64, 128, 8, 32, jnp.float16, "float", None),
        }.items()
    ),
]


@pytest.mark.parametrize("shape", MOSAIC_SHAPES)
def test_the_mosaic_kernel_is_the_product_with_the_weight_without_races(shape):
    *sizes, dtype, zero, scale_bits = shape
    arrays, weight = example(*sizes, dtype, zero, scale_bits)
    tile = dataclasses.replace(mosaic_gpu.default_tile(*shape[:4]), stages=2)  # which are used again
    got = mosaic_gpu.dequant_gemm(*arrays, group_size=shape[4], tile=tile, interpret=True)
    assert close(got, arrays[0], weight, dtype)


@pytest.mark.slow
def test_a_split_sum_in_the_mosaic_kernel_is_the_same_sum():
    arrays, weight = example(2, 64, 640, 4, 128, jnp.bfloat16)
    tile = mosaic_gpu.Tile(m=8, warpgroups=1, stages=2, split=2)
    got = mosaic_gpu.dequant_gemm(*arrays, group_size=128, tile=tile, interpret=True)
    assert close(got, arrays[0], weight, jnp.bfloat16)


@pytest.mark.parametrize(
    ("M", "bits", "group_size", "name"),
    [
        (1, 3, 128, "dequant_gemm_mosaic_few"),
        (2, 2, 32, "dequant_gemm_mosaic_few"),
        (40, 8, 32, "dequant_gemm_mosaic"),
    ],
)
def test_the_mosaic_kernels_lower_for_cuda(M, bits, group_size, name):
    arrays, _ = example(M, 128, 256, bits, group_size, jnp.bfloat16)
    text = lowered_text(functools.partial(mosaic_gpu.dequant_gemm, group_size=group_size), *arrays)
    assert name in text


def test_a_named_implementation_never_falls_back():
    arrays, _ = example(2, 16, 64, 4, 32)
    with pytest.raises(NotImplementedError, match="dequant_gemm: no triton kernel: triton runs on NVIDIA"):
        dequant_gemm(*arrays[:4], group_size=32, implementation="triton")


def test_a_shape_that_no_kernel_takes_is_told():
    x, codes, scale, zero_point, _ = example(2, 16, 64, 4, 12)[0]
    assert "multiple of 8" in triton.why_not(x, codes, scale, zero_point, None, group_size=12)
    rows = jnp.zeros((9, 64), jnp.float32)
    assert "8 rows" in triton.why_not(rows, codes, scale, zero_point, None, group_size=64)
    assert "multiples of 128" in mosaic_gpu.why_not(
        x.astype(jnp.bfloat16), codes, scale, zero_point, None, group_size=64
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size must be 1 to K"),
        ({"x": jnp.zeros((2, 96))}, r"codes need ceil\(K / 32\) blocks"),
        ({"scale": jnp.zeros((3, 16))}, r"scale must have shape \(2, 16\), got scale.shape=\(3, 16\)"),
        ({"zero_point": jnp.zeros((2, 15))}, r"zero_point must have shape \(2, 16\)"),
        ({"scale_step": jnp.zeros((1, 2))}, "scale needs words"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    x, codes, scale, zero_point, _ = example(2, 16, 64, 4, 32)[0]
    given = {"x": x, "codes": codes, "scale": scale, "zero_point": zero_point, "group_size": 32, **change}
    with pytest.raises(ValueError, match=f"dequant_gemm: {message}"):
        dequant_gemm(**given)


def with_kernel(x, codes, scale, zero_point, group_size):
    with kernels("triton", interpret=True):
        return dequant_gemm(x, codes, scale, zero_point, group_size=group_size)


def test_gradients_in_x_are_those_of_the_reference():
    x, codes, scale, zero_point, _ = example(2, 16, 64, 4, 32)[0]

    def loss(x, f):
        return (f(x, codes, scale, zero_point, group_size=32) ** 2).sum()

    got = jax.grad(loss)(x, with_kernel)
    want = jax.grad(loss)(x, functools.partial(dequant_gemm, implementation="xla"))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_vmap_over_rows_and_over_weights():
    (x, *weight, _), _ = example(2, 16, 64, 4, 32)
    both = [jnp.stack([a, b]) for a, b in zip(weight, example(2, 16, 64, 4, 32, seed=1)[0][1:4], strict=True)]
    f = functools.partial(with_kernel, group_size=32)
    plain = functools.partial(dequant_gemm, group_size=32)
    np.testing.assert_allclose(
        jax.vmap(f, (0, None, None, None))(x, *weight), plain(x, *weight), rtol=1e-4, atol=1e-4
    )
    want = jnp.stack([plain(x, *(a[i] for a in both)) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(f, (None, 0, 0, 0))(x, *both), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_vmap_over_rows_and_over_weights_of_the_mosaic_kernel():
    (x, *weight, _), _ = example(2, 64, 128, 4, 128, jnp.bfloat16)
    other = example(2, 64, 128, 4, 128, seed=1)[0][1:4]
    both = [jnp.stack([a, b]) for a, b in zip(weight, other, strict=True)]

    def f(x, codes, scale, zero_point):
        with kernels("mosaic_gpu", interpret=True):
            return dequant_gemm(x[None], codes, scale, zero_point, group_size=128)[0]

    plain = functools.partial(dequant_gemm, group_size=128)
    got = jax.vmap(f, (0, None, None, None))(x, *weight)
    np.testing.assert_allclose(got, plain(x, *weight), atol=0.1)
    got = jax.vmap(f, (None, 0, 0, 0))(x[0], *both)
    np.testing.assert_allclose(
        got, jnp.stack([plain(x[0], *(a[i] for a in both)) for i in range(2)]), atol=0.1
    )


def test_more_rows_of_float32_than_a_tile_has():
    arrays, weight = example(5, 33, 64, 4, 32)
    tile = triton.Tile(m=2, n=32, k=64)
    got = triton.dequant_gemm(*arrays, group_size=32, tile=tile, interpret=True)
    assert close(got, arrays[0], weight, jnp.float32)


def test_shard_map_over_outputs():
    (x, codes, scale, _, _), _ = example(2, 64, 64, 4, 32)
    mesh = jax.make_mesh((8,), ("n",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("n"), P(None, "n")),
        out_specs=P(None, "n"),
        check_vma=False,
    )
    def f(x, codes, scale):
        return with_kernel(x, codes, scale, None, 32)

    want = dequant_gemm(x, codes, scale, None, group_size=32)
    np.testing.assert_allclose(f(x, codes, scale), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_kernels_on_a_gpu_are_the_reference(case):
    arrays = case.operands()
    got, want = jax.jit(case.run)(*arrays), jax.jit(case.reference)(*arrays)
    size = float(jnp.sqrt((want**2).mean()))
    np.testing.assert_allclose(got, want, atol=0.05 * size)
