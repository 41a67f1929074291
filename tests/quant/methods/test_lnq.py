"""LNQ's two steps against dense least squares, the plain loop over inputs, and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.packing import unpack
from jaxllm.quant.methods.curvature import damped
from jaxllm.quant.methods.lnq import Lnq, descend, lnq, means, objective, refit
from jaxllm.quant.statistics import Stats
from jaxllm.weights.codebook import look_up

N, K, M = 8, 150, 8  # more than one block of 128


@pytest.fixture(scope="module")
def layer():
    """Rows, the curvature of inputs that go together (damped), codes and a table to start from."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (N, K))
    mix = jax.random.normal(keys[1], (K, K)) * jnp.exp(-jnp.linspace(0, 4, K))[:, None] + 0.2 * jnp.eye(K)
    x = jax.random.normal(keys[2], (400, K)) @ mix
    table = jnp.tile(jnp.linspace(-2.0, 2.0, M)[None], (N, 1))
    codes = jnp.argmin(jnp.abs(rows[..., None] - table[:, None]), -1).astype(jnp.uint8)
    return rows, damped(x.T @ x, 1e-4), codes, table


def exact(rows, hessian, codes, table):
    """The objective of each row in float64."""
    w, h, t = (np.asarray(a, np.float64) for a in (rows, hessian, table))
    e = w - np.take_along_axis(t, np.asarray(codes, int), 1)
    return ((e @ h) * e).sum(1)


def plain_descent(rows, hessian, codes, table, cycles):
    """Equation 11 as it stands, in float64, and the objective after every single input."""
    w, h, t = (np.asarray(a, np.float64) for a in (rows, hessian, table))
    codes, losses, every = np.array(codes, int), [], np.arange(len(rows))
    for _, i in itertools.product(range(cycles), range(w.shape[1])):
        e = np.take_along_axis(t, codes, 1) - w
        e[:, i] = 0
        u = w[:, i] - e @ h[:, i] / h[i, i]
        codes[:, i] = np.abs(u[:, None] - t).argmin(1)
        e[:, i] = t[every, codes[:, i]] - w[:, i]
        losses.append(((e @ h) * e).sum(1))
    return codes, np.array(losses)


def test_levels_are_those_of_dense_least_squares(layer):
    rows, hessian, codes, table = layer
    got = refit(rows, hessian, codes, table)
    root = np.linalg.cholesky(np.asarray(hessian, np.float64))
    for w, code, c in zip(np.asarray(rows, np.float64), np.asarray(codes), np.asarray(got), strict=True):
        p = np.eye(M)[code]
        want = np.linalg.lstsq(root.T @ p, root.T @ w, rcond=None)[0]
        np.testing.assert_allclose(c, want, atol=2e-4)
        gradient = p.T @ np.asarray(hessian, np.float64) @ (p @ c - w)
        assert np.abs(gradient).max() < 1e-4 * np.abs(p.T @ np.asarray(hessian, np.float64) @ w).max()


def test_levels_that_no_weight_uses_stay_and_the_others_are_solved_without_them(layer):
    rows, hessian, codes, table = layer
    codes = jnp.where(codes >= 6, codes - 3, codes)
    table = table.at[:, 6:].set(77.0)
    got = refit(rows, hessian, codes, table)
    np.testing.assert_array_equal(got[:, 6:], table[:, 6:])
    np.testing.assert_allclose(got[:, :6], refit(rows, hessian, codes, table[:, :6]), atol=1e-4)


@pytest.mark.parametrize("cycles", [1, 4])
def test_the_blocked_descent_is_the_plain_one_code_for_code(layer, cycles):
    rows, hessian, codes, table = layer
    want, losses = plain_descent(rows, hessian, codes, table, cycles)
    np.testing.assert_array_equal(descend(rows, hessian, codes, table, cycles=cycles), want)
    start = exact(rows, hessian, codes, table)[None]
    steps = np.diff(np.concatenate([start, losses]), axis=0)
    assert steps.max() <= 1e-12 * start.max()  # no single step raises the objective


def test_descent_reaches_the_optimum_of_a_diagonal_curvature_in_one_sweep_and_never_beats_it():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    x = rng.normal(size=(20, 6)) @ (rng.normal(size=(6, 6)) + 0.5)
    start = jnp.zeros((4, 6), jnp.uint8)
    all_codes = np.array(list(itertools.product(range(4), repeat=6)))
    for hessian, diagonal in ((np.diag(np.diag(x.T @ x)), True), (x.T @ x, False)):
        h = jnp.asarray(hessian, jnp.float32)
        least = [
            exact(jnp.tile(w[None], (4096, 1)), h, all_codes, np.tile(t, (4096, 1))).min()
            for w, t in zip(rows, table, strict=True)
        ]
        found = exact(rows, h, descend(rows, h, start, table, cycles=1 if diagonal else 10), table)
        assert (found >= np.array(least) * (1 - 1e-6)).all()
        assert (found <= exact(rows, h, start, table)).all()
        if diagonal:
            np.testing.assert_allclose(found, least, rtol=1e-5)


def test_alternation_never_raises_the_objective(layer):
    rows, hessian, codes, table = layer
    losses = [exact(rows, hessian, codes, table)]
    for _ in range(4):
        table = refit(rows, hessian, codes, table)
        losses.append(exact(rows, hessian, codes, table))
        codes = descend(rows, hessian, codes, table, cycles=2)
        losses.append(exact(rows, hessian, codes, table))
    assert (np.diff(losses, axis=0) <= 1e-5 * losses[0]).all()
    assert (losses[-1] < 0.6 * losses[0]).all()


def test_turns_keep_the_best_and_the_stored_table_is_the_one_that_was_descended(layer):
    rows, hessian, start, _ = layer
    before = np.inf
    for iterations in (0, 1, 2, 6):
        codes, table = lnq(rows, hessian[None], start, bits=3, iterations=iterations, damping=0.0)
        now = exact(rows, hessian, codes, table)
        assert table.dtype == jnp.float16
        assert (now <= before * (1 + 1e-3)).all()  # but for the table's rounding to float16
        before = now
    wide = table.astype(jnp.float32)
    swept = descend(rows, hessian, codes, wide, cycles=1)
    assert (exact(rows, hessian, swept, wide) <= now * (1 + 1e-6)).all()


def test_kept_weights_have_no_error_and_their_codes_have_no_say(layer):
    rows, hessian, codes, table = layer
    kept = np.random.default_rng(0).random((N, K)) < 0.1
    free, found = jnp.asarray(~kept, jnp.float32), []
    for there in (0, 1):
        w, c = jnp.where(kept, 9.0 * there, rows), jnp.where(kept, there, codes).astype(jnp.uint8)
        swept = descend(w, hessian, c, table, free, cycles=1)
        found.append((np.asarray(swept)[~kept], refit(w, hessian, c, table, free)))
        error = np.where(kept, 0.0, np.asarray(look_up(table, c)) - rows)
        np.testing.assert_allclose(
            objective(w, hessian, c, table, free), ((error @ np.asarray(hessian)) * error).sum(1), rtol=1e-4
        )
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
def test_outliers_are_float16_and_the_others_err_less_by_the_whole_curvature(layer):
    rows, hessian = np.random.default_rng(0).standard_t(2, (N, K)).astype(np.float32), layer[1]
    without, apart = (
        Lnq(bits=3, outliers=outliers).quantize(
            jnp.asarray(rows), Stats(hessian=hessian), name="w", dtype=jnp.float32
        )
        for outliers in (None, 0.02)
    )
    kept = np.asarray(apart.is_kept())
    np.testing.assert_array_equal(np.asarray(apart.dequantize_rows())[kept], rows.astype(np.float16)[kept])
    errors = [np.asarray(w.dequantize_rows()) - rows for w in (without, apart)]
    plain, less = (((e @ np.asarray(hessian)) * e).sum() for e in errors)
    assert less < 0.7 * plain


def test_the_objective_is_the_weighed_output_error(layer):
    rows, hessian, codes, table = layer
    np.testing.assert_allclose(
        objective(rows, hessian, codes, table), exact(rows, hessian, codes, table), rtol=1e-4
    )


def test_with_a_diagonal_curvature_its_fixed_points_are_those_of_k_means(layer):
    rows, hessian, start, _ = layer
    hessian_diag = jnp.linspace(1.0, 5.0, K)
    codes, table = lnq(rows, jnp.diag(hessian_diag)[None], start, bits=3, iterations=60, damping=0.0)
    wide = table.astype(jnp.float32)
    distance = np.abs(np.asarray(rows)[..., None] - np.asarray(wide)[:, None])
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    np.testing.assert_allclose(table, means(rows, hessian_diag, codes.astype(jnp.int32), m=M), atol=2e-3)


@pytest.mark.parametrize("power", [-60, -20, 20])
def test_the_scale_of_the_statistics_does_not_matter(layer, power):
    rows, hessian, start, _ = layer
    want = lnq(rows, hessian[None], start, bits=3)
    got = lnq(rows, hessian[None] * 2.0**power, start, bits=3)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_another_order_of_inputs_gives_another_answer_of_the_same_quality(layer):
    rows, hessian, start, _ = layer
    mixed = np.random.default_rng(0).permutation(K)
    codes, table = lnq(rows, hessian[None], start, bits=3)
    again, other = lnq(rows[:, mixed], hessian[mixed][:, mixed][None], start[:, mixed], bits=3)
    one = exact(rows, hessian, codes, table).sum()
    two = exact(rows[:, mixed], hessian[mixed][:, mixed], again, other).sum()
    assert 0.7 < one / two < 1.4


def test_inputs_that_are_always_zero_go_to_their_nearest_level_and_disturb_no_other(layer):
    rows, hessian, start, _ = layer
    dead = np.arange(0, K, 7)
    hessian = hessian.at[dead].set(0).at[:, dead].set(0)
    for damping in (1e-4, 0.0):
        codes, table = lnq(rows, hessian[None], start, bits=3, damping=damping)
        assert bool(jnp.isfinite(table).all())
        distance = np.abs(np.asarray(rows)[:, dead, None] - np.asarray(table, np.float32)[:, None])
        np.testing.assert_array_equal(np.asarray(codes)[:, dead], distance.argmin(-1))
    codes, table = lnq(rows, jnp.zeros((1, K, K)), start, bits=3)  # as if nothing had been measured
    np.testing.assert_array_equal(codes, lnq(rows, jnp.eye(K)[None], start, bits=3)[0])


@pytest.mark.slow
def test_constant_rows_and_fewer_distinct_weights_than_levels_come_back(layer):
    rows, hessian, _, _ = layer
    rows = rows.at[0].set(0.25).at[1].set(0.0).at[2].set(jnp.where(jnp.arange(K) % 3 == 0, 1.0, -0.5))
    stored = Lnq(bits=3).quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    np.testing.assert_allclose(stored.dequantize_rows()[:3], rows[:3], atol=1e-3)


def test_it_beats_its_start_and_guided_uses_each_groups_curvature(layer):
    rows, hessian, _, _ = layer
    other = hessian[::-1, ::-1]
    stats = Stats(hessian=hessian, guided_hessian=jnp.stack([hessian, other]))
    plain = Lnq(bits=3).quantize(rows, stats, name="w", dtype=jnp.bfloat16)
    guided = Lnq(bits=3, guided=True, output_groups=2).quantize(rows, stats, name="w", dtype=jnp.bfloat16)
    start = Lnq(bits=3, iterations=0, cycles=0).quantize(rows, stats, name="w", dtype=jnp.bfloat16)
    assert plain.shape == (K, N) and plain.dtype == jnp.bfloat16

    def loss(w, h):
        return exact(rows, h, unpack(w.codes), w.table)

    assert loss(plain, hessian).sum() < 0.6 * loss(start, hessian).sum()
    np.testing.assert_array_equal(guided.dequantize_rows()[:4], plain.dequantize_rows()[:4])
    assert loss(guided, other)[4:].sum() < loss(plain, other)[4:].sum()


def test_unguided_uses_no_gradients(layer):
    rows, hessian, _, _ = layer
    method, stats = Lnq(bits=3), Stats(hessian=hessian)
    assert method.required_stats == {"hessian"} and Lnq(guided=True).required_stats == {"guided_hessian"}
    one = method.quantize(rows, stats, name="w", dtype=jnp.float32)
    two = method.quantize(
        rows, Stats(hessian=hessian, guided_hessian=hessian[None] * 0), name="w", dtype=jnp.float32
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 129)])
def test_any_shape_works(shape):
    rows = jax.random.normal(jax.random.key(1), shape)
    codes, table = lnq(rows, (jnp.eye(shape[1]) + 0.1)[None], jnp.zeros(shape, jnp.uint8), bits=1)
    assert codes.shape == shape and table.shape == (shape[0], 2)
    np.testing.assert_allclose(look_up(table, codes).astype(jnp.float32), rows, atol=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "lnq: bits must be 1 to 8, got bits=0"),
        ({"cycles": -1}, "lnq: iterations and cycles must not be negative"),
        ({"damping": -1.0}, "lnq: damping must be finite and not negative, got damping=-1.0"),
        (
            {"output_groups": 2},
            "lnq: output_groups must be 1, or more if guided, got output_groups=2, guided=False",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lnq(**options)


def test_what_cannot_be_solved_is_refused(layer):
    rows, hessian, start, _ = layer
    with pytest.raises(ValueError, match="lnq: output_groups must divide N, got output_groups=3, N=8"):
        lnq(rows, jnp.stack([hessian] * 3), start, bits=3)
    with pytest.raises(ValueError, match="lnq: weights must be finite, got NaN"):
        Lnq().quantize(rows.at[0, 0].set(jnp.nan), Stats(hessian=hessian), name="w", dtype=jnp.float32)
    with pytest.raises(ValueError, match="lnq: calibration must give guided_hessian, got none"):
        Lnq(guided=True).quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
