"""Rotation: a turn that loses nothing, statistics that turn with it, and what it saves at 4 bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.ops import hadamard
from jaxllm.quant.method_options import make_method
from jaxllm.quant.methods.rotate import Rotate, rotated
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import matmul
from jaxllm.weights.rotated import Rotated, activations, is_whole, whole_product

SIZES = [1, 2, 3, 8, 15, 96, 105, 128, 172, 344, 1024]


def mixed(n):
    """The matrix of `hadamard.mix`, from its definition."""
    return functools.reduce(np.kron, map(hadamard.hartley, hadamard.factors(n)), np.ones((1, 1)))


@pytest.mark.parametrize("n", SIZES)
def test_the_mix_is_symmetric_orthogonal_and_flat(n):
    matrix = mixed(n)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix, np.eye(n), atol=1e-12)
    bound = 1 if n & (n - 1) == 0 else np.sqrt(2)
    assert np.abs(matrix).max() * np.sqrt(n) <= bound + 1e-9
    assert np.prod(hadamard.factors(n)) == n and all(size <= 64 or size % 2 for size in hadamard.factors(n))


@pytest.mark.parametrize("n", [1, 8, 96, 105, 172])
def test_turning_back_gives_what_was_turned_and_lengths_stay(n):
    x = jax.random.normal(jax.random.key(n), (2, 3, n))
    turn = jax.jit(lambda x: (hadamard.rotate(x, 5), hadamard.unrotate(hadamard.rotate(x, 5), 5)))
    y, back = turn(x)
    np.testing.assert_allclose(back, x, atol=3e-6)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y, (np.asarray(x) * hadamard.signs(n, 5)) @ mixed(n), atol=3e-6)


def test_signs_are_fixed_by_the_seed_for_ever_and_balanced():
    assert hadamard.signs(16, 0).tolist() == SIGNS
    many = np.stack([hadamard.signs(4096, seed) for seed in range(6)])
    assert (np.abs(many.mean(1)) < 0.06).all()
    correlation = many @ many.T / 4096 - np.eye(6)
    assert np.abs(correlation).max() < 0.06
    assert np.abs((many[:, 1:] * many[:, :-1]).mean(1)).max() < 0.06


SIGNS = [1, -1, 1, -1, 1, 1, -1, -1, 1, 1, -1, 1, 1, 1, -1, 1]


@pytest.fixture(scope="module")
def layer():
    """Rows and inputs, of which three are thirty times as great as the others."""
    K, N = 96, 24
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (N, K)) * 0.1
    great = jnp.ones(K).at[jnp.array([3, 40, 77])].set(30.0)
    return rows, jax.random.normal(keys[1], (256, K)) * great[None]


def solve(method, rows, stats=None):
    return method.quantize(rows, Stats() if stats is None else stats, name="w", dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A base that rounds nothing."""

    required_stats = frozenset()

    def quantize(self, rows, stats, *, name, dtype):
        return Dense(rows.astype(dtype))


def test_without_rounding_the_product_is_that_of_the_weight_itself(layer):
    rows, x = layer
    w = solve(Rotate(base=Plain(), activation_bits=16), rows)
    want = x @ rows.T
    np.testing.assert_allclose(jax.jit(matmul)(x, w), want, atol=1e-5 * float(jnp.abs(want).max()))
    np.testing.assert_allclose(w.dequantize_rows(), rows, atol=1e-6)
    assert w.shape == (96, 24) and w.dtype == jnp.float32


def test_statistics_are_those_of_turned_inputs(layer):
    _, x = layer
    held, x = x[:64], x[64:]
    s = jnp.abs(jnp.sin(jnp.arange(len(x), dtype=jnp.float32)))
    guided = jnp.stack([(x * s[:, None]).T @ x, x.T @ x])
    given = Stats(hessian=x.T @ x, held_out=held.T @ held, guided_hessian=guided, sample=x[:9], tokens=256)
    got = rotated(given, 7)
    t, h = hadamard.rotate(x, 7), hadamard.rotate(held, 7)
    want = Stats(
        hessian=t.T @ t,
        held_out=h.T @ h,
        guided_hessian=jnp.stack([(t * s[:, None]).T @ t, t.T @ t]),
        sample=t[:9],
        hessian_diag=(t * t).sum(0) + (h * h).sum(0),
    )
    for name in ("hessian", "held_out", "guided_hessian", "sample", "hessian_diag"):
        a, b = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    np.testing.assert_array_equal(got.hessian, got.hessian.T)
    assert got.tokens == 256 and got.mean is None and rotated(Stats(), 0).hessian_diag is None


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_whole_codes_and_a_step_a_token(layer, bits):
    _, x = layer
    w = Rotated(None, bits, 1.0, 0)
    x = x.at[0].set(0.0)
    codes, step = jax.jit(activations)(x, w)
    top = 2 ** (bits - 1) - 1
    assert (codes == jnp.round(codes)).all() and (jnp.abs(codes[1:]).max(1) == top).all()
    assert (codes[0] == 0).all() and step.shape == (256, 1)
    assert (
        float(jnp.abs(codes * step - hadamard.rotate(x, 0)).max(1, keepdims=True).max() - step.max() / 2)
        < 1e-4
    )
    clipped, narrow = activations(x, dataclasses.replace(w, clip=0.5))
    np.testing.assert_allclose(narrow[1:], step[1:] / 2, rtol=1e-6)
    assert float(jnp.abs(clipped).max()) == top


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("zero_point", ["code", "float", "none"])
def test_the_whole_product_is_the_float_product_of_the_same_codes(bits, zero_point):
    rows = jax.random.normal(jax.random.key(bits), (24, 70))
    w = affine.quantize(
        rows.T,
        bits=bits,
        group_size=70,
        symmetric=zero_point == "none",
        integer_zero_point=zero_point == "code",
    )
    q = jnp.round(jax.random.uniform(jax.random.key(9), (2, 3, 70), minval=-127, maxval=127))
    want = q @ w.dequantize_rows().T
    got = jax.jit(whole_product)(q, w)
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()), rtol=2e-5)


def test_every_code_meets_every_activation_without_error():
    """All 256 weights of 8 bits, all 255 activations, all 16 x 15 at 4 bits: the exact integer."""
    for bits, top in ((8, 127), (4, 7)):
        codes = jnp.arange(2**bits, dtype=jnp.uint8)[:, None]  # [N, K = 1]
        scale, zero_point = jnp.ones((2**bits, 1)), jnp.full((2**bits, 1), 3.0)
        w = affine.from_codes(codes, scale, zero_point, bits=bits, group_size=1, integer_zero_point=True)
        q = jnp.arange(-top, top + 1, dtype=jnp.float32)[:, None]
        want = np.arange(-top, top + 1)[:, None] * (np.arange(2**bits)[None] - 3)
        np.testing.assert_array_equal(whole_product(q, w), want)


@pytest.mark.parametrize("group_size, whole", [(32, False), (96, True), (1000, True)])
def test_the_product_is_that_of_rounded_inputs_and_the_stored_weight(layer, group_size, whole):
    rows, x = layer
    w = solve(Rotate(base=jl.Rtn(bits=4, group_size=group_size), activation_bits=4), rows)
    assert is_whole(w) == whole
    codes, step = activations(x, w)
    want = (codes * step) @ w.base.dequantize_rows().T
    got = jax.jit(matmul)(x, w)
    np.testing.assert_allclose(got, want, atol=3e-6 * float(jnp.abs(want).max()))
    broken = jax.jit(matmul)(x.at[3, 3].set(jnp.nan), w)
    assert jnp.isnan(broken[3]).all() and jnp.isfinite(broken[4]).all()
    half = jax.jit(matmul)(x.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.1 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_at_four_bits_rotation_saves_what_great_inputs_would_drown():
    """Two of 1,024 inputs are thirty times the others and hardly weigh: unturned, they set the step alone."""
    keys = jax.random.split(jax.random.key(0), 2)
    great = jnp.ones(1024).at[jnp.array([3, 700])].set(30.0)
    rows = jax.random.normal(keys[0], (16, 1024)) / great[None]
    x = jax.random.normal(keys[1], (64, 1024)) * great[None]
    want = x @ rows.T
    step = jnp.abs(x).max(1, keepdims=True) / 7
    direct = jnp.linalg.norm(jnp.round(x / step) * step @ rows.T - want)
    errors = {}
    for bits in (4, 8):
        w = solve(Rotate(base=jl.Rtn(bits=8, group_size=1024), activation_bits=bits), rows)
        errors[bits] = float(jnp.linalg.norm(jax.jit(matmul)(x, w) - want) / direct)
    assert errors[4] < 0.35 and errors[8] < 0.05


def test_the_solver_works_on_turned_curvature(layer):
    rows, x = layer
    h = x.T @ x
    stats = Stats(hessian=h, guided_hessian=jnp.stack([h, 2 * h]), tokens=len(x))
    base = jl.Gptq(bits=3, group_size=32, guided=True, output_groups=2)
    method = Rotate(base=base, activation_bits=16)
    assert method.required_stats == base.required_stats and method.output_groups == base.output_groups
    w, plain = solve(method, rows, stats), solve(Rotate(base=jl.Rtn(bits=3), activation_bits=16), rows)

    def loss(w):
        return float(jnp.sum(((w.dequantize_rows() - rows) @ x.T) ** 2))

    assert loss(w) < 0.6 * loss(plain)


def test_linears_that_read_the_same_turn_it_once(usual_compiler):
    rows = jax.random.normal(jax.random.key(0), (2, 16, 96))

    def products(seeds):
        weights = [
            Rotate(base=jl.Rtn(bits=4, group_size=32), seed=seed).quantize(
                w, Stats(), name="q", dtype=jnp.float32
            )
            for w, seed in zip(rows, seeds, strict=True)
        ]
        both = jax.jit(lambda x, a, b: (matmul(x, a), matmul(x, b)))
        return (
            both.lower(jnp.ones((4, 96)), *weights)
            .compile(compiler_options=usual_compiler)
            .as_text()
            .count(" dot(")
        )

    turns = len(hadamard.factors(96))
    assert products((0, 0)) == products((0, 1)) - turns


def test_what_the_base_wants_is_what_is_measured_turned():
    assert Rotate(base=jl.Rtn(clip=True)).required_stats == {"hessian"}
    assert Rotate(base=jl.Rtn()).required_stats == frozenset()
    assert Rotate().required_stats == {"guided_hessian"}
    with pytest.raises(ValueError, match="rotate: calibration must give hessian, got none"):
        solve(Rotate(base=jl.Rtn(clip=True)), jnp.ones((4, 32)))
    made = make_method("rotate", {"base": {"method": "rtn", "bits": 3}, "activation_bits": 8})
    assert made == Rotate(base=jl.Rtn(bits=3), activation_bits=8)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"activation_bits": 5}, "activation_bits must be 4, 8 or 16, got 5"),
        ({"clip": 0.0}, r"clip must lie in \(0, 1\], got clip=0.0"),
        ({"base": jl.Awq()}, r"the base must not want what cannot be rotated, got \['mean'\]"),
        ({"base": jl.SqueezeLlm()}, r"what cannot be rotated, got \['fisher'\]"),
        ({"base": jl.DecDec(base=jl.Rtn())}, r"what cannot be rotated, got \['thresholds'\]"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, text):
    with pytest.raises(ValueError, match=f"rotate: .*{text}"):
        Rotate(**options)


@pytest.mark.slow
def test_a_model_in_four_bits_throughout_predicts_nearly_as_well():
    """W4A4KV4 with guided GPTQ: the whole way from calibration to perplexity."""
    config = dataclasses.replace(TINY, layers=1, width=64, head_dim=32, heads=2, kv_heads=1, ffn=96)
    model = Decoder(config, rngs=nnx.Rngs(0))
    text = np.asarray(jax.random.randint(jax.random.key(0), (6, 32), 0, 128))
    small = jl.quantize(model, Rotate(base=jl.Gptq(bits=4, group_size=32, guided=True)), text, progress=False)
    assert isinstance(small.layers[0].mlp.down.w.get_value(), Rotated)

    def measure(model, **more):
        return jl.perplexity(model, text.ravel(), context=32, **more).nll_per_token

    want, got = measure(model), measure(small, cache=jl.CacheOptions(bits=4))
    assert want != got and abs(got - want) < 0.15
