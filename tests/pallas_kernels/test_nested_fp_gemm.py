"""The nested product: every float16 bit for bit, kernels against the reference, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.nested_fp_gemm import few_rows, mosaic_gpu, nested_fp_gemm, plain, ptx, reference, triton
from pallas_kernels.nested_fp_gemm.cases import CASES, encoded

PATTERNS = np.arange(2**16, dtype=np.uint16)
ELIGIBLE = PATTERNS[np.abs(PATTERNS.view(np.float16).astype(np.float32)) < 1.875]  # NaN is not
TRITON = triton.Tile(tokens=16, rows=32, depth=64)
MOSAIC = mosaic_gpu.Tile(tokens=8, depth=64, stages=2, splits=1, blocks=1)
ANY_SIZES = [(1, 32, 64, 1), (3, 100, 200, 2), (17, 33, 65, 1)]  # M, N, K, splits
MODES = ["fp16", "fp8", "traced"]


def bytes_of(bits):
    """Upper and lower bytes, by definition, of float16 bits."""
    upper = np.clip(bits.view(np.float16).astype(np.float32) * 256, -448, 448).astype(reference.F8)
    return jnp.asarray(upper.view(np.uint8)), jnp.asarray((bits & 0xFF).astype(np.uint8))


def example(M, N, K, dtype=jnp.float16, seed=0):
    rng = np.random.default_rng(seed)
    upper, lower = encoded(rng, N, K)
    return jnp.asarray(rng.standard_normal((M, K)), dtype), upper, lower


def operands(mode, x, upper, lower, switch=0):
    """What kernels and the reference take in a mode."""
    return x, upper, None if mode == "fp8" else lower, jnp.int32(switch) if mode == "traced" else None


def expected(x, upper, lower, fp8: bool, shift=0):
    """In float64, from the bits."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    if fp8:
        scale = 448 / np.abs(x).max(-1, keepdims=True)
        x8 = np.clip(x * scale, -448, 448).astype(np.float32).astype(reference.F8).astype(np.float64)
        return x8 @ np.asarray(upper).view(reference.F8).astype(np.float64).T * 2.0 ** (shift - 8) / scale
    u, low = (np.asarray(a).astype(np.int64) for a in (upper, lower))
    overlap = (u & 1) ^ (low >> 7)  # the paper's checksum: the upper byte was rounded up
    bits = ((u & 0x80) | (((u - overlap) >> 1) & 0x3F)) << 8 | low
    return x @ bits.astype(np.uint16).view(np.float16).astype(np.float64).T * 2.0**shift


def run_ptx(text, upper, lower):
    """The instructions of `ptx.JOIN` on arrays of words."""
    values = {"$2": upper, "$3": lower}

    def prmt(a, b, selector):
        source = np.stack([w >> np.uint32(8 * i) & np.uint32(0xFF) for w in (a, b) for i in range(4)])
        picks = [int(selector) >> 4 * i & 7 for i in range(4)]
        return functools.reduce(np.bitwise_or, [source[p] << np.uint32(8 * i) for i, p in enumerate(picks)])

    def number(name):
        return values[name] if name in values else np.uint32(int(name, 0))

    operations = {
        "shr": np.right_shift, "and": np.bitwise_and, "or": np.bitwise_or, "sub": np.subtract, "prmt": prmt
    }  # fmt: skip
    for name, to, *args in re.findall(r"(\w+)\.[bu]32 (\S+), (\S+), (\S+?)(?:, (\S+))?;", text):
        values[to] = operations[name](*(number(a) for a in args if a))
    return values["$0"], values["$1"]


def test_there_are_32512_eligible_patterns():
    assert ELIGIBLE.size == 32512


def test_join_gives_back_every_eligible_float16_bit_for_bit():
    upper, lower = bytes_of(ELIGIBLE)
    np.testing.assert_array_equal(reference.join(upper, lower), ELIGIBLE)
    as_float32 = np.asarray(reference.join_float32(upper, lower)).view(np.uint32)
    np.testing.assert_array_equal(as_float32, ELIGIBLE.view(np.float16).astype(np.float32).view(np.uint32))


def test_the_instructions_join_every_eligible_float16_beside_any_other():
    rng = np.random.default_rng(0)
    bits = np.concatenate([rng.permutation(ELIGIBLE) for _ in range(4)])
    upper, lower = bytes_of(bits)
    words = [np.asarray(a).view(np.uint32) for a in (upper, lower)]
    halves = np.stack(run_ptx(ptx.JOIN, *words), axis=-1)
    np.testing.assert_array_equal(halves.astype(np.uint32).view(np.uint16).ravel(), bits)


def test_upper_is_the_float16_in_fp8_where_lower_is_upper_shifted():
    """As the Triton kernel has it: upper / 256 for all finite float8."""
    upper = np.array([u for u in range(256) if u & 0x7F != 0x7F], np.uint8)
    got = reference.join(jnp.asarray(upper), jnp.asarray(upper << 7))
    value = upper.view(reference.F8).astype(np.float32) / 256
    np.testing.assert_array_equal(np.asarray(got).view(np.float16), value.astype(np.float16))


def test_kernel_multiplies_by_every_eligible_weight_exactly():
    bits = np.concatenate([ELIGIBLE, ELIGIBLE[:256]]).reshape(256, 128)
    upper, lower = bytes_of(bits)
    eye = jnp.eye(128, dtype=jnp.float16)
    tile = triton.Tile(tokens=128, rows=128, depth=128)
    y = triton.nested_fp_gemm(eye, upper, lower, mode="fp16", tile=tile, interpret=True)
    np.testing.assert_array_equal(y.T, bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_reference_is_the_product_in_float64(mode, dtype):
    x, upper, lower = example(5, 24, 40, dtype)
    for switch in (0, 3):
        got = reference.nested_fp_gemm(*operands(mode, x, upper, lower, switch), mode=mode, shift=2)
        fp8 = mode == "fp8" or (mode == "traced" and switch != 0)
        np.testing.assert_allclose(got, expected(x, upper, lower, fp8, shift=2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "M, N, K, splits", [ANY_SIZES[1], *(pytest.param(*s, marks=pytest.mark.slow) for s in ANY_SIZES[::2])]
)
def test_triton_is_the_reference_at_any_size(mode, M, N, K, splits):
    x, upper, lower = example(M, N, K, jnp.bfloat16 if M == 17 else jnp.float16)
    tile = triton.Tile(tokens=16, rows=32, depth=64, splits=splits)
    args = operands(mode, x, upper, lower, switch=M % 2)
    got = triton.nested_fp_gemm(*args, mode=mode, shift=1, tile=tile, interpret=True)
    want = reference.nested_fp_gemm(*args, mode=mode, shift=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_mosaic_is_the_reference_and_has_no_race():
    x, upper, lower = example(3, 128, 256)
    got = mosaic_gpu.nested_fp_gemm(x, upper, lower, mode="fp16", tile=MOSAIC, interpret=True)
    np.testing.assert_allclose(got, reference.fp16(x, upper, lower, 0), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode, switch", [("fp16", 0), ("fp8", 0), ("traced", 0), ("traced", 1)])
@pytest.mark.parametrize("depth, splits, blocks", [(64, 1, 3), (128, 2, 2)])
def test_mosaic_is_the_reference_in_all_modes(mode, switch, depth, splits, blocks):
    x, upper, lower = example(20, 256, 512, jnp.bfloat16 if depth == 64 else jnp.float16)
    tile = mosaic_gpu.Tile(tokens=16, depth=depth, stages=2, splits=splits, blocks=blocks, stripe=2)
    args = operands(mode, x, upper, lower, switch)
    got = mosaic_gpu.nested_fp_gemm(*args, mode=mode, shift=3, tile=tile, interpret=True)
    want = reference.nested_fp_gemm(*args, mode=mode, shift=3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-3)


@pytest.mark.slow
def test_plain_is_a_product_of_float16():
    x, upper, lower = example(16, 128, 256)
    w = jax.lax.bitcast_convert_type(reference.join(upper, lower), jnp.float16)
    tile = mosaic_gpu.Tile(tokens=16, depth=64, stages=2, splits=1, blocks=1)
    got = plain.plain_gemm(x, w, tile=tile, interpret=True)
    np.testing.assert_allclose(got, expected(x, upper, lower, False), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("mode", ["fp16", "fp8"])
def test_a_token_that_is_not_finite_or_zero_leaves_others_alone(mode):
    x, upper, lower = example(4, 32, 64)
    x = x.at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf).at[2].set(0)
    args = operands(mode, x, upper, lower)
    got = triton.nested_fp_gemm(*args, mode=mode, tile=TRITON, interpret=True)
    want = reference.nested_fp_gemm(*args, mode=mode)
    assert np.isnan(got[0]).all() and not np.isfinite(got[1]).any() and not np.asarray(got[2]).any()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_token_of_twice_the_size_gives_twice_the_output_in_fp8():
    x, upper, lower = example(2, 32, 64)
    y = reference.fp8(x, upper, 0)
    np.testing.assert_array_equal(reference.fp8(x * jnp.float16(2), upper, 0), 2 * y)


def kernel_of(backend, mode):
    """A kernel of arrays alone, in the mode's order."""

    def f(x, upper, *rest):
        lower, switch = (*rest, None) if mode == "fp16" else rest if mode == "traced" else (None, None)
        return backend.nested_fp_gemm(x, upper, lower, switch, mode=mode)

    return f


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend, gpu", [(triton, "a100"), (mosaic_gpu, "h100")])
def test_kernel_lowers_for_cuda(backend, gpu, mode):
    arrays = [a for a in operands(mode, *example(40, 256, 256)) if a is not None]
    assert f"nested_fp_gemm_{mode}" in lowered_text(kernel_of(backend, mode), *arrays, gpu=gpu)


def test_plain_lowers_for_cuda():
    x, w = jnp.zeros((64, 256), jnp.float16), jnp.zeros((128, 256), jnp.float16)
    assert "plain_fp16_gemm" in lowered_text(plain.plain_gemm, x, w)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_tiles_of_cases_fit(case):
    if "mosaic" not in case.name:
        return
    (M, K), N = case.arrays[0].shape, case.arrays[1].shape[0]
    mode = "fp16" if case.name.startswith("plain") else case.name.split()[1]
    tile = mosaic_gpu.default_tile(M, N, K, mode)
    assert K % (tile.splits * mosaic_gpu.STEP) == 0 and N % mosaic_gpu.ROWS == 0 and tile.stages >= 2


def test_vmap_over_tokens_is_one_product_and_over_weights_several():
    x, upper, lower = example(6, 32, 64)
    with kernels("triton", interpret=True):
        many = jax.vmap(lambda x: nested_fp_gemm(x, upper, lower))(x.reshape(2, 3, 64))
        stack = [jnp.stack([a, a[::-1]]) for a in (upper, lower)]
        stacked = jax.vmap(nested_fp_gemm, in_axes=(None, 0, 0))(x[0], *stack)
    want = reference.fp16(x, upper, lower, 0)
    np.testing.assert_allclose(many.reshape(6, 32), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(stacked, jnp.stack([want[0], want[0, ::-1]]), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_gradient_in_x_is_the_references():
    x, upper, lower = example(2, 32, 64, jnp.bfloat16)

    def loss(x, implementation):
        y = nested_fp_gemm(x, upper, lower, implementation=implementation)
        return (y * jnp.arange(32, dtype=jnp.float32)[None]).sum()

    with kernels("auto", interpret=True):
        got = jax.grad(loss)(x, "triton")
    np.testing.assert_array_equal(got.astype(jnp.float32), jax.grad(loss)(x, "xla").astype(jnp.float32))


def test_shard_map_cuts_outputs_over_eight_devices():
    x, upper, lower = example(2, 256, 64)
    mesh = Mesh(np.array(jax.devices()[:8]), ("n",))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("n", None), P("n", None)),
        out_specs=P(None, "n"),
        check_vma=False,
    )
    def f(x, upper, lower):
        return nested_fp_gemm(x, upper, lower)

    with kernels("triton", interpret=True):
        got = f(x, upper, lower)
    np.testing.assert_allclose(got, reference.fp16(x, upper, lower, 0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 24, 64), (3, 24, 40), (2, 2 * few_rows.OUTPUTS + 5, 37)])
def test_a_few_rows_on_a_cpu_give_the_product_of_the_bits(mode, dtype, M, N, K):
    x, upper, lower = example(M, N, K, dtype)
    switch = 1 if mode == "traced" else 0
    arrays = operands(mode, x, upper, lower, switch)
    assert few_rows.takes(x)
    got = few_rows.nested_fp_gemm(*arrays, mode=mode, shift=2)
    want = expected(x, upper, lower, mode == "fp8" or bool(switch), 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_every_float16_is_joined_bit_for_bit_by_a_few_rows():
    upper, lower = (a.reshape(-1, 1) for a in bytes_of(ELIGIBLE))
    for M in (1, 2):
        got = few_rows.nested_fp_gemm(jnp.ones((M, 1)), upper, lower, mode="fp16")
        want = np.broadcast_to(ELIGIBLE.view(np.float16).astype(np.float32), (M, ELIGIBLE.size))
        np.testing.assert_array_equal(got, want)


def test_auto_on_a_cpu_is_the_reference_or_what_a_few_rows_take():
    x, upper, lower = example(9, 32, 64, jnp.float32)
    np.testing.assert_array_equal(nested_fp_gemm(x, upper, lower), reference.fp16(x, upper, lower, 0))
    few = few_rows.nested_fp_gemm(x[:2], upper, lower, mode="fp16")
    np.testing.assert_array_equal(nested_fp_gemm(x[:2], upper, lower), few)


@pytest.mark.parametrize("name", ["pallas", "triton", "mosaic_gpu"])
def test_a_named_implementation_does_not_fall_back(name):
    x, upper, lower = example(2, 32, 64)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        nested_fp_gemm(x, upper, lower, implementation=name)


def test_kernels_say_what_they_do_not_take():
    x, upper, lower = example(2, 32, 64, jnp.float32)
    with kernels("triton", interpret=True), pytest.raises(NotImplementedError, match="16 bits, not float32"):
        nested_fp_gemm(x, upper, lower)
    with kernels("mosaic_gpu", interpret=True), pytest.raises(NotImplementedError, match="N=32, K=64"):
        nested_fp_gemm(x.astype(jnp.float16), upper, lower)


def test_errors_say_what_must_hold():
    x, upper, lower = example(2, 32, 64)
    with pytest.raises(ValueError, match=r"must be \[N, K\]"):
        nested_fp_gemm(x, upper, lower[1:])
    with pytest.raises(ValueError, match="must be uint8, got upper.dtype=dtype.float8_e4m3fn"):
        beneath = getattr(nested_fp_gemm, "__wrapped__", nested_fp_gemm)  # the tests' type check
        beneath(x, upper.view(reference.F8), lower)
    with pytest.raises(ValueError, match=r"x must have upper's K inputs"):
        nested_fp_gemm(x[:, 1:], upper, lower)
    with pytest.raises(ValueError, match="a switch is for mode traced"):
        nested_fp_gemm(x, upper, lower, mode="traced")
    with pytest.raises(ValueError, match="switch must be one number"):
        nested_fp_gemm(x, upper, lower, jnp.zeros(2, jnp.int32), mode="traced")
    with pytest.raises(ValueError, match="two stages"):
        one = mosaic_gpu.Tile(tokens=8, depth=64, stages=1, splits=1)
        mosaic_gpu.nested_fp_gemm(*example(2, 128, 128), mode="fp16", tile=one, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case_is_the_reference_on_a_gpu(case):
    args = case.operands()
    got, want = case.run(*args), case.reference(*args)
    spread = float(jnp.sqrt(jnp.mean(want.astype(jnp.float32) ** 2)))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * spread)
