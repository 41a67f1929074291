"""Two bytes hold a float16 weight exactly, and the upper one is the correctly rounded 8-bit weight."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxllm.models import layers
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.quant.methods.nested_fp import NestedFp
from jaxllm.quant.statistics import Stats
from jaxllm.weights import nested_float
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import matmul as any_matmul
from jaxllm.weights.nested_float import NestedFloat, encode, with_mode

BITS = np.arange(65536, dtype=np.uint16)
ALL = BITS.view(np.float16)
WIDE = ALL.astype(np.float32)
ELIGIBLE = np.isfinite(WIDE) & (np.abs(WIDE) < 1.875)
W = ALL[ELIGIBLE]
VALUE = WIDE[ELIGIBLE]


@pytest.fixture(scope="module")
def halves():
    """Upper and lower byte of every eligible pattern."""
    return tuple(np.asarray(x) for x in jax.jit(nested_float.split)(jnp.asarray(W)))


def as_float8(upper):
    return upper.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


product = jax.jit(nested_float.matmul)


def weight(N=24, K=40, seed=0, scale=0.1):
    return scale * jax.random.normal(jax.random.key(seed), (N, K))


def nested(rows, **options):
    return NestedFp(**options).quantize(rows, Stats(), name="up", dtype=rows.dtype)


def find_shift(weights):
    """The shift at which all of these are eligible, as one row."""
    shift, left_out = nested_float.find_shift(jnp.asarray(weights).reshape(1, -1))
    return None if left_out[0] else int(shift)


def test_eligible_are_just_the_32512_finite_patterns_below_1_875():
    alone = jnp.stack([jnp.asarray(ALL), jnp.full(65536, 2.0**-24, jnp.float16)], 1)  # which allows no shift
    shift, left_out = nested_float.find_shift(alone)
    assert shift == 0 and (np.asarray(left_out) == ~ELIGIBLE).all() and ELIGIBLE.sum() == 32512
    assert np.abs(VALUE).max() == np.float32(1.8740234375)


def test_every_eligible_pattern_comes_back_bit_for_bit(halves):
    assert (np.asarray(jax.jit(nested_float.join)(*halves)) == BITS[ELIGIBLE]).all()
    wide = np.asarray(jax.jit(nested_float.join_float32)(*halves))
    assert (wide.view(np.uint32) == VALUE.view(np.uint32)).all()  # -0.0 and subnormals too
    w = encode(jnp.asarray(W.reshape(-1, 64)))
    assert (np.asarray(w.dequantize_rows(jnp.float16)).view(np.uint16).ravel() == BITS[ELIGIBLE]).all()
    assert (np.asarray(w.dequantize_rows(jnp.float32)).ravel() == VALUE).all()


def test_the_upper_byte_is_the_rounded_8_bit_weight_and_never_nan(halves):
    upper, lower = halves
    want = np.clip(VALUE * 256, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert (upper == want).all() and not np.isin(upper, (0x7F, 0xFF)).any()
    assert (lower == (BITS[ELIGIBLE] & 0xFF)).all()
    assert len(set(zip(upper.tolist(), lower.tolist(), strict=True))) == 32512


def test_the_8_bit_weight_is_near_monotone_and_odd(halves):
    upper, lower = halves
    near, size = as_float8(upper) / 256, np.abs(VALUE)
    error = np.abs(near - VALUE)
    usual = (size >= 2**-14) & (size <= 1.75)
    assert (error[usual] <= size[usual] / 17 * (1 + 1e-6)).all()
    assert error[size < 2**-14].max() <= 2.0**-18
    assert error[size > 1.75].max() <= 0.1241 and (error / np.maximum(size, 1e-9))[size > 1.75].max() < 0.0663
    assert ((near == 0) & (size > 0)).sum() == 128 and size[near == 0].max() == 2.0**-18
    order = np.argsort(VALUE, kind="stable")
    assert (np.diff(near[order]) >= 0).all()
    positive, negative = (BITS[ELIGIBLE] & 0x8000) == 0, (BITS[ELIGIBLE] & 0x8000) != 0
    assert (upper[positive] ^ 0x80 == upper[negative]).all() and (lower[positive] == lower[negative]).all()
    assert upper[BITS[ELIGIBLE] == 0] == 0 and upper[BITS[ELIGIBLE] == 0x8000] == 0x80


def test_the_three_other_published_forms_rebuild_the_same_bits(halves):
    u, low = (x.astype(np.int64) for x in halves)
    bits = BITS[ELIGIBLE].astype(np.int64)
    checksum = (u & 1) ^ (low >> 7)
    assert (((u & 0x80) | (((u - checksum) >> 1) & 0x3F)) << 8 | low == bits).all()
    rounded_up = (bits >> 7 & 0x7F) != (u & 0x7F)  # against the truncated code
    saturated = np.abs(VALUE) > 1.8125
    assert checksum.sum() == 16002 and (checksum == rounded_up)[~saturated].all()
    lanes = np.random.default_rng(0).integers(0, len(W), (100_000, 4))  # four weights in a 32-bit word
    U, L = (halves[i][lanes].copy().view(np.uint32) for i in (0, 1))
    H = (((U - ((L & 0x80808080) >> 7)) >> 1) & 0x3F3F3F3F) | (U & 0x80808080)
    rebuilt = H.view(np.uint8).astype(np.uint16) << 8 | L.view(np.uint8)
    assert (rebuilt == BITS[ELIGIBLE][lanes]).all()


@pytest.mark.parametrize("bad", [1.875, -1.9375, 2.0, np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_eligible_is_refused_never_corrupted(bad):
    rows = jnp.asarray([[2.0**-24, 1.0, bad]], jnp.float16)  # the first forbids any shift
    with pytest.raises(ValueError, match=r"must be finite, below 1\.875 .* got worst=.*, 1 of 1 rows"):
        encode(rows)
    with pytest.raises(ValueError, match="nested_fp: weights must be finite"):
        nested(rows, exceptions="refuse")


@pytest.mark.parametrize("mode", ["fp16", "fp8"])
def test_one_large_weight_makes_a_layer_an_exception_the_same_in_every_mode(mode):
    rows = weight().at[3, 5].set(3.0).at[0, 0].set(2.0**-24)
    w = with_mode(nested(rows, mode=mode, exceptions="layer"), "fp8")
    assert isinstance(w, Dense)
    assert (w.rows == rows.astype(jnp.float16)).all()
    with pytest.raises(ValueError, match="finite in float16, got NaN or above 65504 in name='up'"):
        nested(rows.at[0, 0].set(1e5))


@pytest.mark.parametrize(
    "shift", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)]
)
def test_larger_weights_are_shifted_where_that_loses_nothing(shift):
    rows = jnp.asarray([[1.5 * 2**shift, -(2.0**-18), 0.125]], jnp.float16)
    w = encode(rows)
    assert w.shift == shift
    assert (w.dequantize_rows(jnp.float16) == rows).all() and (
        w.dequantize_rows(jnp.float32) == rows.astype(jnp.float32)
    ).all()
    x = jnp.eye(3)
    got = product(x, with_mode(w, "fp8"))
    np.testing.assert_allclose(got[0, 0], 1.5 * 2**shift, rtol=1 / 17)
    lossy = rows.at[0, 1].set(2.0**-24)
    assert find_shift(lossy) is None and isinstance(nested(lossy), Dense)


def test_a_shift_is_lossless_for_all_patterns_or_not_taken():
    for t in (1, 3, 14):
        size = np.abs(WIDE)
        some = ALL[np.isfinite(WIDE) & (size < 1.875 * 2**t)]
        exact = np.ldexp(some.astype(np.float64), -t) == np.ldexp(some.astype(np.float64), -t).astype(
            np.float16
        )
        top = np.float16(1.5 * 2**t)
        assert find_shift(np.append(some[exact], top)) == t
        if t == 1:
            assert (~exact).sum() == 2048
        for one in some[~exact][:: max(1, (~exact).sum() // 5)]:
            assert find_shift(np.array([one, top])) is None
        again = encode(jnp.asarray(some[exact].reshape(1, -1)))
        assert (
            np.asarray(again.dequantize_rows(jnp.float16)).view(np.uint16) == some[exact].view(np.uint16)
        ).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_fp16_mode_is_the_dense_float16_product_bit_for_bit(dtype):
    rows, x = weight(K=39), jax.random.normal(jax.random.key(1), (2, 5, 39)).astype(dtype)
    got = product(x, nested(rows))
    want = any_matmul(x, Dense(rows.astype(jnp.float16)), jnp.float32)
    assert got.dtype == jnp.float32 and (got == want).all()


def reference_fp8(x, w):
    x = np.asarray(x, np.float32)
    scale = np.float32(448) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(2.0**-100))
    x8 = np.clip(x * scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return (x8 / scale) @ (as_float8(np.asarray(w.upper)).astype(np.float64).T / 256 * 2.0**w.shift)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_fp8_mode_is_the_product_of_the_8_bit_numbers(scale):
    rows = jnp.round(weight(K=1000, scale=scale) * 256) / 256
    w, x = nested(rows, mode="fp8"), jax.random.normal(jax.random.key(1), (2, 5, 1000))
    assert isinstance(w, NestedFloat) and (w.shift > 0) == (scale > 1)
    want = reference_fp8(x, w)
    np.testing.assert_allclose(product(x, w), want, atol=1e-5 * scale * 1000**0.5)
    for power in (-20, 3):
        assert (product(x * 2.0**power, w) == product(x, w) * 2.0**power).all()


def test_rows_of_zeros_nan_and_none_at_all_are_served():
    w = nested(weight(), mode="fp8")
    x = jnp.ones((4, 40)).at[1].set(0.0).at[2, 7].set(jnp.nan).at[3].set(1e-38)
    y = np.asarray(product(x, w))
    assert np.isfinite(y[[0, 1, 3]]).all() and (y[1] == 0).all() and np.isnan(y[2]).all()
    for mode in ("fp16", "fp8"):
        assert nested_float.matmul(x[:0], with_mode(w, mode)).shape == (0, 24)


def reads_lower(jaxpr) -> list[bool]:
    """Of the first choice in a program: whether each branch reads the lower bytes.

    Bytes [N, K] come to a branch from outside: the upper ones, and the lower ones unless they are not read.
    """
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            body = getattr(inner, "jaxpr", inner)
            if equation.primitive.name != "cond" and hasattr(body, "eqns"):
                if found := reads_lower(body):
                    return found
        if equation.primitive.name == "cond":
            return [number_of_bytes_read(branch.jaxpr) == 2 for branch in equation.params["branches"]]
    return []


def number_of_bytes_read(jaxpr) -> int:
    """How many arrays of bytes that come from outside are used."""
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    return sum(v.aval.dtype == jnp.uint8 and v.aval.ndim == 2 and id(v) in used for v in jaxpr.invars)


def test_both_bytes_are_the_float16_in_size_and_fp8_mode_reads_one_of_them():
    w, x = nested(weight()), jnp.ones((2, 40))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(w)) == 2 * 24 * 40
    for rows in (x, jnp.ones((9, 40))):  # few and many
        assert number_of_bytes_read(jax.make_jaxpr(nested_float.matmul)(rows, w).jaxpr) == 2
        assert number_of_bytes_read(jax.make_jaxpr(nested_float.matmul)(rows, with_mode(w, "fp8")).jaxpr) == 1
    compiled = jax.jit(nested_float.matmul).lower(x, with_mode(w, "fp8")).as_text()
    assert compiled.split("{\n    ")[0].count("24x40xui8") == 1 and "f8E4M3FN" in compiled
    constants = jax.make_jaxpr(lambda x: nested_float.matmul(x, with_mode(w, "fp8")))(x).consts
    assert sum(jnp.asarray(c).dtype == jnp.uint8 for c in constants) == 1


def test_a_traced_scalar_chooses_and_its_fp8_branch_does_not_read_the_lower_bytes():
    w, x = nested(weight(), mode="traced"), jax.random.normal(jax.random.key(1), (3, 40))
    run = jax.jit(lambda x, w, switch: nested_float.matmul(x, with_mode(w, switch)))
    for i, mode in enumerate(("fp16", "fp8")):
        want = product(x, with_mode(w, mode))
        np.testing.assert_allclose(run(x, w, jnp.int32(i)), want, rtol=1e-6, atol=1e-6)
    assert run._cache_size() == 1
    for rows in (x, jnp.ones((9, 40))):  # few and many
        assert sorted(reads_lower(jax.make_jaxpr(nested_float.matmul)(rows, w).jaxpr)) == [False, True]


def test_a_mode_for_each_row_is_refused():
    w = nested(weight())
    with pytest.raises(
        ValueError, match=r"a mode is for all rows, an int32 scalar, got switch\.shape=\(3,\)"
    ):
        with_mode(w, jnp.zeros(3, jnp.int32))
    by_row = dataclasses.replace(w, mode="traced", switch=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="a mode is for all rows"):
        nested_float.matmul(jnp.ones((3, 40)), by_row)
    with pytest.raises(ValueError, match="a mode is for all rows"):
        with_mode(w, jnp.float32(1))
    with pytest.raises(ValueError, match="mode must be fp16, fp8 or an int32 scalar, got mode='int8'"):
        getattr(with_mode, "__wrapped__", with_mode)(w, "int8")  # beneath the tests' type check


def test_what_a_cast_to_float16_changes_is_counted():
    exact = weight().astype(jnp.float16).astype(jnp.float32)
    assert nested_float.changed_by_float16(exact) == 0
    assert nested_float.changed_by_float16(exact.at[0, :3].add(1e-6)) == 3
    tiny = jnp.asarray([[1.8671875, 2.0**-14, 2.0**-17, 1.0078125 * 2.0**-18]], jnp.bfloat16)
    assert nested_float.changed_by_float16(tiny) == 1  # of bfloat16 only what lies below 2**-17
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    usual = every[np.isfinite(every) & (np.abs(every) >= 2**-14) & (np.abs(every) < 1.875)]
    assert usual.size == 3808 and nested_float.changed_by_float16(jnp.asarray(usual.reshape(1, -1))) == 0


def test_it_survives_tree_map_vmap_and_has_specs():
    pair = [nested(weight(seed=i)) for i in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    x = jnp.ones((2, 40))
    out = jax.vmap(lambda w: nested_float.matmul(x, w))(stack)
    np.testing.assert_allclose(out[1], product(x, pair[1]), atol=1e-5)
    spec = nested(weight(), mode="traced").partition_specs(P("a", "b"))
    assert (spec.upper, spec.lower, spec.switch) == (P("b", "a"), P("b", "a"), P())


@pytest.mark.slow
def test_switching_amid_a_generation_changes_only_the_steps_in_between(monkeypatch):
    def either(x, w, out_dtype=None):
        if isinstance(w, NestedFloat):
            return nested_float.matmul(x, w).astype(x.dtype if out_dtype is None else out_dtype)
        return any_matmul(x, w, out_dtype)

    monkeypatch.setattr(layers, "matmul", either)
    config = dataclasses.replace(TINY, layers=1)
    plain = Decoder(config, rngs=nnx.Rngs(0))

    def turn(w):
        return nested(w.rows, mode="traced") if isinstance(w, Dense) else w

    model = jax.tree.map(turn, plain, is_leaf=lambda w: isinstance(w, Dense))
    step = jax.jit(lambda model, token, cache: model(token, cache))
    tokens = jax.random.randint(jax.random.key(0), (8, 1, 1), 0, config.vocab)

    def run(modes):
        cache, logits, caches = plain.make_cache(1, 16), [], []
        for token, mode in zip(tokens, modes, strict=True):
            caches.append(cache)
            out, cache = step(with_mode(model, jnp.int32(mode)), token, cache)
            logits.append(np.asarray(out))
        return np.stack(logits), caches

    fp16, _ = run([0] * 8)
    mixed, caches = run([0, 0, 0, 1, 1, 0, 0, 0])
    assert (mixed[:3] == fp16[:3]).all()
    assert (np.abs(mixed[3:5] - fp16[3:5]).max((1, 2, 3)) > 0).all()
    for i in (5, 7):  # back in fp16: as an fp16 model that is fed the same cache
        again, _ = step(with_mode(model, jnp.int32(0)), tokens[i], caches[i])
        assert (np.asarray(again) == mixed[i]).all()
