"""GPTQ against the published recursion in float64, column by column, and what must hold of its results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.packing import unpack
from jaxllm.quant.methods.curvature import averaged, damped
from jaxllm.quant.methods.gptq import Gptq, feedback, fit_round, refitted
from jaxllm.quant.methods.rtn import Rtn
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine

N, K, GROUP = 8, 150, 32  # a short last group, and more than one block of 128


@pytest.fixture(scope="module")
def layer():
    """Rows with a few large weights, and the curvature of inputs that go together."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = jax.random.normal(keys[0], (N, K)) * jnp.exp(0.5 * jax.random.normal(keys[1], (N, K)))
    mix = jax.random.normal(keys[2], (K, K)) * jnp.exp(-jnp.linspace(0, 4, K))[:, None] + 0.1 * jnp.eye(K)
    x = jax.random.normal(keys[3], (400, K)) @ mix * jnp.exp(jnp.linspace(-1, 1, K))[None]
    return rows, x.T @ x


def loss(rows, stored, hessian):
    """The objective of each row, in float64."""
    e, h = (np.asarray(a, np.float64) for a in (rows - stored.dequantize_rows(), hessian))
    return ((e @ h) * e).sum(1)


def published(rows, hessian, quantize, order, damping=0.01):
    """Algorithm 1 of the paper: the inverse, its Cholesky factor, weights updated column by column."""
    w = np.asarray(rows, np.float64)[:, order]
    h = np.asarray(hessian, np.float64)[np.ix_(order, order)]
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros(w.shape, int)
    for i in range(w.shape[1]):
        codes[:, i], q = quantize(w, i)
        error = (w[:, i] - q) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[None, i, i:]
    return codes[:, np.argsort(order)]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("act_order", [True, False])
def test_feedback_gives_the_codes_of_the_published_recursion(layer, bits, act_order):
    rows, hessian = layer
    scale, zero_point = Rtn(bits=bits, group_size=GROUP, integer_zero_point=False).grid(rows)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(K)
    s, z = np.asarray(scale, np.float64), np.asarray(zero_point, np.float64)

    def quantize(w, i):
        g = order[i] // GROUP
        code = np.clip(np.round(w[:, i] / s[:, g] + z[:, g]), 0, 2**bits - 1)
        return code, (code - z[:, g]) * s[:, g]

    want = published(rows, hessian, quantize, order)
    got = feedback(rows, hessian, scale, zero_point, bits=bits, group_size=GROUP, act_order=act_order)
    np.testing.assert_array_equal(got, want)


def test_a_groups_grid_is_fitted_to_weights_that_hold_every_correction(layer):
    rows, hessian = layer
    grid, scales, zeros = Rtn(bits=3, group_size=GROUP), [], []

    def quantize(w, i):
        if i % GROUP == 0:
            part = jnp.asarray(w[:, i : i + GROUP], jnp.float32)
            fit = dataclasses.replace(grid, group_size=part.shape[1]).grid(part)
            scales.append(np.asarray(fit[0][:, 0], np.float64))
            zeros.append(np.asarray(fit[1][:, 0], np.float64))
        code = np.clip(np.round(w[:, i] / scales[-1] + zeros[-1]), 0, 7)
        return code, (code - zeros[-1]) * scales[-1]

    want = published(rows, hessian, quantize, np.arange(K))
    codes, scale, zero_point = refitted(rows, hessian, grid)
    np.testing.assert_allclose(scale, np.stack(scales, 1), rtol=1e-3)  # a float16 may round the other way
    np.testing.assert_array_equal(zero_point, np.stack(zeros, 1))
    np.testing.assert_array_equal(codes, want)


@pytest.mark.parametrize("diagonal", ["falling", "ones", "zeros"])
def test_without_correlations_it_is_round_to_nearest_on_the_same_grid(layer, diagonal):
    rows, _ = layer
    hessian_diag = {"falling": jnp.linspace(5.0, 1.0, K), "ones": jnp.ones(K), "zeros": jnp.zeros(K)}[
        diagonal
    ]
    method = {"bits": 2, "group_size": GROUP, "clip": False}
    want = Rtn(**method).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    for act_order in (True, False):
        stats = Stats(hessian=jnp.diag(hessian_diag))
        got = Gptq(**method, act_order=act_order, rounds=1).quantize(rows, stats, name="w", dtype=jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("bits", [2, *(pytest.param(b, marks=pytest.mark.slow) for b in (3, 4))])
def test_on_correlated_inputs_it_beats_round_to_nearest_by_far(layer, bits):
    rows, hessian = layer
    stats = Stats(hessian=hessian, hessian_diag=jnp.diag(hessian))
    sizes = {"bits": bits, "group_size": GROUP, "clip": True}
    plain = Rtn(**sizes).quantize(rows, stats, name="w", dtype=jnp.float32)
    for act_order in (True, False):
        ours = Gptq(**sizes, act_order=act_order).quantize(rows, stats, name="w", dtype=jnp.float32)
        assert loss(rows, ours, hessian).sum() < 0.6 * loss(rows, plain, hessian).sum()


def test_what_was_made_up_for_is_what_is_stored(layer):
    rows, hessian = layer
    method = Gptq(bits=3, group_size=GROUP, integer_zero_point=False)
    stored = method.quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    scale, zero_point = stored.scale.T.astype(jnp.float32), stored.zero_point.T.astype(jnp.float32)
    codes = feedback(rows, hessian, scale, zero_point, bits=3, group_size=GROUP)
    np.testing.assert_array_equal(codes, unpack(stored.codes))


@pytest.mark.parametrize("act_order", [True, False])
def test_more_rounds_never_raise_a_rows_loss(layer, act_order):
    rows, hessian = layer
    stats, before = Stats(hessian=hessian), np.inf
    for rounds in (1, 2, 4):
        method = Gptq(bits=2, group_size=GROUP, act_order=act_order, rounds=rounds)
        stored = method.quantize(rows, stats, name="w", dtype=jnp.float32)
        now = loss(rows, stored, damped(hessian, 0.01))
        assert (now <= before * (1 + 1e-5)).all()
        before = now


@pytest.mark.parametrize("clip", [True, False])
def test_no_row_is_worse_than_with_grids_fitted_when_they_are_reached(layer, clip):
    rows, hessian = layer
    grid = Rtn(bits=3, group_size=GROUP, clip=clip)
    codes, scale, zero_point = (np.asarray(x, np.float64) for x in refitted(rows, hessian, grid))
    method = Gptq(bits=3, group_size=GROUP, act_order=False, clip=clip)
    stored = method.quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    of = np.arange(K) // GROUP
    error = np.asarray(rows, np.float64) - (codes - zero_point[:, of]) * scale[:, of]
    reached = np.einsum("nk,kl,nl->n", error, np.asarray(damped(hessian, 0.01), np.float64), error)
    ours = np.asarray(loss(rows, stored, damped(hessian, 0.01)))
    assert (ours <= reached * (1 + 1e-5)).all() and (ours < reached * (1 - 1e-3)).any()


def test_with_one_grid_a_row_the_order_of_inputs_does_not_matter(layer):
    rows, hessian = layer
    mixed = np.random.default_rng(0).permutation(K)
    scale, zero_point = Rtn(bits=3, group_size=K).grid(rows)
    codes = feedback(rows, hessian, scale, zero_point, bits=3, group_size=K)
    again = feedback(rows[:, mixed], hessian[mixed][:, mixed], scale, zero_point, bits=3, group_size=K)
    np.testing.assert_array_equal(again, codes[:, mixed])


@pytest.mark.parametrize("act_order", [True, False])
def test_the_scale_of_the_statistics_does_not_matter(layer, act_order):
    rows, hessian = layer
    method = Gptq(bits=3, group_size=GROUP, act_order=act_order)
    one, *others = (
        method.quantize(rows, Stats(hessian=hessian * 2.0**power), name="w", dtype=jnp.float32)
        for power in (0, -60, 40)
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, one)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_inputs_that_are_always_zero_are_rounded_and_disturb_no_other(layer, act_order, damping):
    rows, hessian = layer
    dead = np.arange(0, K, 7)
    hessian = hessian.at[dead].set(0).at[:, dead].set(0)
    scale, zero_point = Rtn(bits=4, group_size=GROUP).grid(rows)
    options = {"bits": 4, "group_size": GROUP, "act_order": act_order, "damping": damping}
    codes = feedback(rows, hessian, scale, zero_point, **options)
    plain = Rtn(bits=4, group_size=GROUP).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    np.testing.assert_array_equal(codes[:, dead], unpack(plain.codes)[:, dead])
    moved = feedback(rows.at[:, dead].set(0.0), hessian, scale, zero_point, **options)
    alive = np.setdiff1d(np.arange(K), dead)
    np.testing.assert_array_equal(moved[:, alive], codes[:, alive])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("integer_zero_point", [True, False])
def test_a_constant_row_comes_back(layer, act_order, integer_zero_point):
    rows, hessian = layer
    rows = rows.at[3].set(0.5).at[4].set(0.0)
    method = Gptq(bits=3, group_size=GROUP, act_order=act_order, integer_zero_point=integer_zero_point)
    got = method.quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32).dequantize_rows()
    np.testing.assert_allclose(got[3:5], rows[3:5], atol=2e-3)


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 129)])
def test_any_shape_and_groups_wider_than_it_work(shape):
    rows = jax.random.normal(jax.random.key(1), shape)
    stats = Stats(hessian=jnp.eye(shape[1]) + 0.1)
    for act_order in (True, False):
        stored = Gptq(bits=8, group_size=200, act_order=act_order).quantize(
            rows, stats, name="w", dtype=jnp.bfloat16
        )
        assert stored.shape == shape[::-1] and stored.dtype == jnp.bfloat16
        np.testing.assert_allclose(stored.dequantize_rows(), rows, atol=0.05)


def test_symmetric_grids_store_no_zero(layer):
    rows, hessian = layer
    method = Gptq(bits=4, group_size=GROUP, symmetric=True)
    stored = method.quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    plain = Rtn(bits=4, group_size=GROUP, symmetric=True).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    assert stored.zero_point is None
    assert loss(rows, stored, hessian).sum() < loss(rows, plain, hessian).sum()


def test_guided_solves_each_group_of_outputs_with_its_own_curvature(layer):
    rows, hessian = layer
    other = hessian[::-1, ::-1]
    method = Gptq(bits=3, group_size=GROUP, guided=True, output_groups=2)
    stats = Stats(guided_hessian=jnp.stack([hessian, other]))
    got = method.quantize(rows, stats, name="w", dtype=jnp.float32).dequantize_rows()
    plain = Gptq(bits=3, group_size=GROUP)
    for half, h in ((slice(0, 4), hessian), (slice(4, 8), other)):
        want = plain.quantize(rows, Stats(hessian=h), name="w", dtype=jnp.float32).dequantize_rows()
        np.testing.assert_array_equal(got[half], want[half])


def test_guided_with_equal_gradients_and_one_group_is_plain(layer):
    rows, hessian = layer
    guided = Gptq(bits=3, group_size=GROUP, guided=True)
    got = guided.quantize(rows, Stats(guided_hessian=hessian[None]), name="w", dtype=jnp.float32)
    want = Gptq(bits=3, group_size=GROUP).quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert guided.required_stats == {"guided_hessian"} and Gptq().required_stats == {"hessian"}


def test_guided_curvature_is_the_squared_error_weighed_by_gradients():
    """Equations 4, 6 and 7: one H an output gives 4 itself; a group's is symmetric, PSD and the mean."""
    random = np.random.default_rng(0)
    x, g, e = random.normal(size=(40, 12)), random.normal(size=(40, 8)), random.normal(size=(12, 8))
    each = np.einsum("ta,tj,tb->jab", x, g**2, x)  # H_j
    np.testing.assert_allclose(((g * (x @ e)) ** 2).sum(), np.einsum("aj,jab,bj->", e, each, e), rtol=1e-12)
    for output_groups in (1, 2, 4, 8):
        s = (g**2).reshape(40, output_groups, -1).mean(-1)
        direct = np.einsum("ta,tj,tb->jab", x, s, x)
        got = averaged(jnp.asarray(each, jnp.float32), output_groups)
        np.testing.assert_allclose(got, direct, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got, got.swapaxes(1, 2), atol=1e-4)
        assert np.linalg.eigvalsh(got).min() > -1e-3
    turn, _ = np.linalg.qr(random.normal(size=(8, 8)))  # of the outputs: what a mean over all of them keeps
    np.testing.assert_allclose(((g @ turn) ** 2).mean(1), (g**2).mean(1), rtol=1e-12)


def test_stored_grids_are_fixed_points_of_storing(layer):
    rows, _ = layer
    for integer_zero_point in (True, False):
        sizes = {"bits": 3, "group_size": GROUP, "integer_zero_point": integer_zero_point}
        once = affine.round_to_storage(rows, *affine.min_max(rows, bits=3, group_size=GROUP), **sizes)
        twice = affine.round_to_storage(rows, *once, **sizes)
        jax.tree.map(np.testing.assert_array_equal, twice, once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "gptq: bits must be 1 to 8, got bits=9"),
        ({"group_size": 0}, "gptq: group_size must be at least 1, got group_size=0"),
        ({"damping": -1.0}, "gptq: damping must be finite and not negative, got damping=-1.0"),
        ({"rounds": 0}, "gptq: rounds must be at least 1, got rounds=0"),
        (
            {"output_groups": 2},
            "gptq: output_groups must be 1, or more if guided, got output_groups=2, guided=False",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Gptq(**options)


def test_what_cannot_be_solved_is_refused(layer):
    rows, hessian = layer

    def solve(rows, stats, **options):
        return Gptq(**options).quantize(rows, stats, name="w", dtype=jnp.float32)

    with pytest.raises(ValueError, match="gptq: weights must be finite, got NaN"):
        solve(rows.at[0, 0].set(jnp.nan), Stats(hessian=hessian))
    with pytest.raises(ValueError, match="gptq: hessian must be finite and positive definite once damped"):
        solve(rows, Stats(hessian=hessian.at[0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match="gptq: calibration must give hessian, got none"):
        solve(rows, Stats())
    with pytest.raises(ValueError, match="gptq: output_groups must divide N, got output_groups=3, N=8"):
        solve(rows, Stats(guided_hessian=hessian[None]), guided=True, output_groups=3)
    with pytest.raises(
        ValueError, match="output_groups must divide those measured, got output_groups=2, measured=1"
    ):
        solve(rows, Stats(guided_hessian=hessian[None]), guided=True, output_groups=2)
    with pytest.raises(
        ValueError, match=r"gptq: the curvature must be of K inputs, got K=150, .*\(1, 5, 5\)"
    ):
        solve(rows, Stats(hessian=hessian[:5, :5]))
    with pytest.raises(
        ValueError, match=r"gptq: scale must be \[N, ceil\(K / group_size\)\], got .*\(8, 4\)"
    ):
        feedback(rows, hessian, rows[:, :4], rows[:, :4], bits=2, group_size=GROUP)


def test_layers_of_few_rows_share_one_program_that_rounds_share_too(layer):
    rows, hessian = layer
    method, before = Gptq(bits=5, group_size=7, rounds=3), fit_round._cache_size()  # as no other test here
    whole = method.quantize(rows, Stats(hessian=hessian), name="w", dtype=jnp.float32)
    part = method.quantize(rows[:5], Stats(hessian=hessian), name="w", dtype=jnp.float32)
    assert fit_round._cache_size() == before + 1
    np.testing.assert_array_equal(part.dequantize_rows(), whole.dequantize_rows()[:5])
