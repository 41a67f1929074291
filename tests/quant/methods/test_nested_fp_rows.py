"""Outputs that are not eligible stay in float16 beside the two bytes of all others."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.quant.methods.nested_fp import NestedFp
from jaxllm.quant.statistics import Stats
from jaxllm.storage import former_names
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import stack
from jaxllm.weights.matmul import bits_per_weight, gather_rows, matmul
from jaxllm.weights.nested_float import NestedFloat, encode, find_shift, with_mode

N, K = 32, 40
OUT = [3, 17]  # the outputs of `rows()` that no shift makes eligible together with the others
product = jax.jit(matmul, static_argnames="out_dtype")


def rows(*large, dtype=jnp.float32):
    """Weights that a shift would change, and outputs with one that is too large without a shift."""
    w = np.random.default_rng(0).normal(0, 0.1, (N, K)).astype(np.float16)
    w[:, 0] = 2.0**-24
    w[list(large or OUT), 5] = [3.0, -1000.0, 1.875, 2.0][: len(large or OUT)]
    return jnp.asarray(w, dtype)


def nested(w, **options):
    return NestedFp(**options).quantize(w, Stats(), name="up", dtype=w.dtype)


def inputs(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


# -- which shift, which outputs


def drawn(seed):
    """A matrix [6, 4] of one of five kinds: any bits, usual weights, subnormals, large ones, rows of each."""
    rng = np.random.default_rng(seed)
    of_any = rng.integers(0, 1 << 16, (6, 4)).astype(np.uint16).view(np.float16)
    usual = (rng.normal(size=(6, 4)) * 2.0 ** rng.integers(-4, 4)).astype(np.float16)
    small = (rng.integers(-1023, 1024, (6, 4)) * 2.0**-24).astype(np.float16)
    large = (rng.integers(-31, 32, (6, 4)) * 2.0 ** rng.integers(-3, 11, (6, 1))).astype(np.float16)
    kinds = [of_any, usual, small, large]
    mixed = np.stack([kinds[rng.integers(0, 4)][i] for i in range(6)])
    return [*kinds, mixed][seed % 5]


def by_brute_force(w):
    """Every shift tried in float64."""
    wide, counts, choices = w.astype(np.float64), [], []
    for t in range(15):
        with np.errstate(over="ignore", invalid="ignore"):
            shifted = np.ldexp(wide, -t)
            fine = (shifted.astype(np.float16).astype(np.float64) == shifted) & (np.abs(shifted) < 1.875)
        choices.append(~fine.all(1))
        counts.append(choices[-1].sum())
    shift = int(np.argmin(counts))
    return shift, choices[shift]


def test_shift_and_rows_are_those_of_trying_every_shift():
    cases = np.stack([drawn(seed) for seed in range(500)])
    cases[0], cases[1], cases[2, 3, 1], cases[3, 0, 0] = 0.0, 65504.0, np.nan, np.inf
    want = [by_brute_force(w) for w in cases]
    shift, left_out = jax.jit(jax.vmap(find_shift))(jnp.asarray(cases))
    np.testing.assert_array_equal(shift, [t for t, _ in want])
    np.testing.assert_array_equal(left_out, [out for _, out in want])
    assert set(range(8)) <= set(shift.tolist())
    assert {0, 6} <= set(left_out.sum(1).tolist())  # none, and all rows: 65,504 is eligible at no shift


def test_a_tie_takes_the_least_shift():
    w = jnp.asarray([[2.0**-24], [3.0]], jnp.float16)  # one of both, at shift 0 and 1
    shift, left_out = find_shift(w)
    assert shift == 0 and left_out.tolist() == [False, True]
    w = jnp.asarray([[2.0**-24], [3.0], [6.0]], jnp.float16)
    shift, left_out = find_shift(w)
    assert shift == 2 and left_out.tolist() == [True, False, False]


@pytest.mark.parametrize("seed", [0, 3, 4, 9])
def test_whatever_is_left_out_the_weight_comes_back_bit_for_bit(seed):
    w = np.where(np.isfinite(drawn(seed)), drawn(seed), np.float16(-0.0))
    made = encode(jnp.asarray(w), max_exceptions=1.0)
    again = np.asarray(made.dequantize_rows(jnp.float16))
    assert (again.view(np.uint16) == w.view(np.uint16)).all()
    assert (made.dequantize_rows(jnp.float32) == w.astype(np.float32)).all()


def test_rows_are_kept_up_to_the_share_that_is_allowed_and_then_the_layer():
    w = nested(rows())  # 2 of 32 outputs: the default share
    assert isinstance(w, NestedFloat) and w.exceptions.shape == (2, K) and w.shift == 0
    assert w.exception_of_output.tolist() == [OUT.index(n) if n in OUT else -1 for n in range(N)]
    assert (np.asarray(w.upper)[OUT] == 0).all() and (np.asarray(w.lower)[OUT] == 0).all()
    assert bits_per_weight(w) == 16 + 16 * 2 / N + 32 / K
    for large, options in (
        ((3, 17, 20), {}),
        (OUT, {"max_exceptions": 1 / 32}),
        (OUT, {"exceptions": "layer"}),
    ):
        one = nested(rows(*large), **options)
        assert isinstance(one, Dense) and (one.rows == rows(*large, dtype=jnp.float16)).all()
    three = nested(rows(3, 17, 20), max_exceptions=0.1)
    assert isinstance(three, NestedFloat) and len(three.exceptions) == 3
    with pytest.raises(ValueError, match="nested_fp: weights must be finite, .* 2 of 32 rows that are not"):
        nested(rows(), exceptions="refuse")
    assert nested(rows().at[OUT, 5].set(0.0)).exceptions is None


def test_an_exception_that_is_not_finite_is_refused():
    for bad in (jnp.inf, jnp.nan):
        with pytest.raises(ValueError, match="finite in float16, got NaN or above 65504 in name='up'"):
            nested(rows().at[3, 5].set(bad))
        with pytest.raises(ValueError, match="nested_fp: weights must be finite"):
            encode(rows().at[3, 5].set(bad), max_exceptions=1.0)


def test_a_share_out_of_range_is_one_line():
    with pytest.raises(ValueError, match="^nested_fp: max_exceptions must be 0 to 1, a share, got .*=16"):
        NestedFp(max_exceptions=16.0)


# -- products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 10)])
def test_eligible_outputs_are_the_nested_product_and_exceptions_the_dense_one_in_every_mode(dtype, shape):
    x, w = inputs(*shape, K, dtype=dtype), nested(rows())
    rest = np.delete(np.arange(N), OUT)
    exact = product(x, Dense(rows(dtype=jnp.float16)[np.asarray(OUT)]), jnp.float32)
    whole = product(x, Dense(rows(dtype=jnp.float16)), jnp.float32)
    without = encode(rows().at[np.asarray(OUT)].set(0.0))
    for mode in ("fp16", "fp8"):
        y = product(x, with_mode(w, mode), jnp.float32)
        np.testing.assert_array_equal(y[..., OUT], exact)
        np.testing.assert_array_equal(
            y[..., rest], product(x, with_mode(without, mode), jnp.float32)[..., rest]
        )
        if mode == "fp16" and shape == (2, 10):  # more rows than are folded: one order of sums
            np.testing.assert_array_equal(y[..., rest], whole[..., rest])
    np.testing.assert_allclose(exact, whole[..., OUT], rtol=1e-6, atol=1e-4)


def test_a_traced_scalar_chooses_and_exceptions_stay_as_they_are():
    x, w = inputs(3, K), nested(rows(), mode="traced")
    run = jax.jit(lambda x, w, switch: matmul(x, with_mode(w, switch)))
    for i, mode in enumerate(("fp16", "fp8")):
        y = run(x, w, jnp.int32(i))
        np.testing.assert_allclose(y, product(x, with_mode(w, mode)), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(y[:, OUT], product(x, with_mode(w, "fp16"))[:, OUT])
    assert run._cache_size() == 1


def test_all_outputs_may_be_exceptions_and_no_row_of_activations_may_be_there():
    w = encode(jnp.full((4, 8), 40000.0), max_exceptions=1.0, mode="fp8")
    assert w.exceptions.shape == (4, 8)
    np.testing.assert_array_equal(matmul(jnp.ones((2, 8)), w), jnp.full((2, 4), 8 * 40000.0))
    assert matmul(jnp.ones((0, 8)), w).shape == (0, 4)


def test_gradients_go_through_exceptions():
    w = nested(rows())
    for shape in ((2, K), (20, K)):
        pulled = jax.grad(lambda x: matmul(x, w).sum())(inputs(*shape))
        want = jnp.broadcast_to(w.dequantize_rows(jnp.float32).sum(0), shape)
        np.testing.assert_allclose(pulled, want, rtol=1e-5, atol=1e-4)


def test_rows_read_alone_are_exceptions_where_they_are(index=(17, 0, 3, 3, 31)):
    w, at = nested(rows()), jnp.asarray(index)
    some = w.gather_rows(at)
    assert some.shape == (K, 5)
    np.testing.assert_array_equal(some.dequantize_rows(jnp.float32), rows()[at])
    np.testing.assert_array_equal(jax.jit(gather_rows)(w, at), rows()[at])
    x = inputs(2, K)
    np.testing.assert_allclose(product(x, some), product(x, w)[:, at], rtol=1e-6, atol=1e-4)


def test_experts_of_which_some_have_exceptions_are_stored_alike():
    each = [nested(rows(3)), nested(rows().at[:, 5].set(0.0)), nested(rows(1, 30))]
    w = stack(each)
    assert w.stack.exceptions.shape == (3, 2, K)
    for i, one in enumerate(each):
        np.testing.assert_array_equal(
            w.expert(i).dequantize_rows(jnp.float32), one.dequantize_rows(jnp.float32)
        )
        got = product(inputs(2, K), w.expert(i))
        np.testing.assert_allclose(got, product(inputs(2, K), one), rtol=1e-6, atol=1e-6)
    plain = stack([each[1], each[1]])
    assert len(jax.tree.leaves(plain)) == 2  # the leaves that there were before


# -- files


@pytest.fixture(scope="module")
def model():
    """A model of one layer, of whose `up` an output is an exception."""
    plain = Decoder(dataclasses.replace(TINY, layers=1), rngs=nnx.Rngs(0))
    name = "layers.0.mlp.up"
    up = linear_weights(plain)[name].rows.at[3, 5].set(3.0).at[0, 0].set(2.0**-24)
    return jl.quantize(replace_weights(plain, {name: Dense(up)}), NestedFp(), progress=False)


def test_exceptions_come_back_from_a_file_and_others_are_written_as_before(model, tmp_path):
    weights = linear_weights(model)
    jl.save(model, tmp_path / "out")
    again = linear_weights(jl.load(tmp_path / "out")[0])
    for name, w in weights.items():
        assert jax.tree.structure(again[name]) == jax.tree.structure(w)
        jax.tree.map(np.testing.assert_array_equal, again[name], w)
    assert weights["layers.0.mlp.up"].exceptions is not None
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())["weights"]
    assert list(said["layers.0.mlp.gate.w"]["fields"]) == ["upper", "lower", "switch"]
    assert {"exceptions", "exception_of_output"} < said["layers.0.mlp.up.w"]["fields"].keys()


def test_exceptions_that_do_not_fit_are_refused_in_one_line(model, tmp_path):
    jl.save(model, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    whole = file.read_text()
    for key, change in (
        ("exceptions", None),
        ("exceptions", {"type": "array", "shape": [0, 32], "dtype": "float16"}),
        ("exceptions", {"type": "array", "shape": [1, 32], "dtype": "float32"}),
        ("exception_of_output", {"type": "array", "shape": [9], "dtype": "int32"}),
    ):
        said = json.loads(whole)
        said["weights"]["layers.0.mlp.up.w"]["fields"][key] = change
        file.write_text(json.dumps(said))
        with pytest.raises(
            ValueError, match=r"up\.w must have parts that fit, got nested_fp: exceptions must"
        ):
            jl.load(tmp_path / "out", verify=False)


def test_an_output_that_names_no_exception_is_refused(model, tmp_path):
    up = linear_weights(model)["layers.0.mlp.up"]
    for i, bad in enumerate((1, -2)):
        broken = dataclasses.replace(up, exception_of_output=up.exception_of_output.at[7].set(bad))
        jl.save(replace_weights(model, {"layers.0.mlp.up": broken}), tmp_path / str(i))
        with pytest.raises(ValueError, match=r"up\.w/exception_of_output must be -1 to 0, got"):
            jl.load(tmp_path / str(i))


def test_a_stopped_run_that_kept_layers_is_known_again_by_its_former_name():
    now = former_names.method(repr(NestedFp(exceptions="layer")))
    assert now == former_names.method("NestedFp(mode='fp16', exceptions='layer')")
    assert now != former_names.method(repr(NestedFp()))
    assert former_names.method(repr(NestedFp())) != former_names.method(repr(NestedFp(max_exceptions=0.1)))
