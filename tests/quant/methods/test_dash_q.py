"""DASH-Q finds the scale and zero of each group that hessian_diag asks for, next to the exact optimum."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.packing import unpack
from jaxllm.quant.methods import dash_q, gptq
from jaxllm.quant.methods.dash_q import DashQ
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine
from jaxllm.weights.matmul import bits_per_weight, matmul, num_bytes


def problem(N=32, K=64, seed=0):
    rng = np.random.default_rng(seed)
    rows, h = rng.standard_normal((N, K)), np.exp(rng.standard_normal(K))
    return jnp.asarray(rows, jnp.float32), jnp.asarray(h, jnp.float32)


def solved(rows, h, **options):
    return DashQ(**options).quantize(rows, Stats(hessian_diag=h), name="up", dtype=jnp.float32)


def cut(x, group_size):
    """Groups [N, G, g] of rows whose K the group size divides."""
    return np.asarray(x, np.float64).reshape(x.shape[0], -1, group_size)


def errors(w, rows, h, group_size):
    """F of every group [N, G]."""
    return (
        cut(h[None], group_size) * (cut(w.dequantize_rows(), group_size) - cut(rows, group_size)) ** 2
    ).sum(-1)


def nearest_range(rows, group_size, bits, integer_zero_point=False):
    """Round to nearest from each group's least to its greatest weight."""
    if integer_zero_point:
        scale, zero_point = affine.min_max(rows, bits=bits, group_size=group_size)
    else:
        g = cut(rows, group_size)
        scale = (g.max(-1) - g.min(-1)) / (2**bits - 1)
        scale, zero_point = (jnp.asarray(x, jnp.float32) for x in (scale, -g.min(-1) / scale))
    return affine.encode(
        rows, scale, zero_point, bits=bits, group_size=group_size, integer_zero_point=integer_zero_point
    )


def regressed(w, q, h):
    """F, s and low of the best line through the points (q, w) with weights h, along the last axis; s > 0."""
    H = h.sum(-1)
    mw, mq = (h * w).sum(-1) / H, (h * q).sum(-1) / H
    cov = (h * w * q).sum(-1) / H - mw * mq
    var = (h * q * q).sum(-1) / H - mq * mq
    s = np.where((var > 1e-12) & (cov > 0), cov / np.maximum(var, 1e-12), 0)
    return H * ((h * w * w).sum(-1) / H - mw**2 - s * cov), s, mw - s * mq


def optimum(w, h):
    """The least F at 2 bits of groups [B, g]: codes rise with the weights, so all cuts in four are tried."""
    g = w.shape[1]
    order = np.argsort(w, axis=1)
    w, h = np.take_along_axis(w, order, 1), np.take_along_axis(np.broadcast_to(h, w.shape), order, 1)
    cuts = np.array(list(itertools.combinations_with_replacement(range(g + 1), 3)))
    q = (np.arange(g)[None, :, None] >= cuts[:, None, :]).sum(-1)  # [cuts, g]
    return np.array([regressed(w[i], q, h[i])[0].min() for i in range(len(w))])


@pytest.fixture(scope="module")
def steps():
    """(s, low) [G, n] after so many steps of the paper's loop, for any damping and ridge."""
    rows, h = problem()
    w, weights = dash_q._cut(rows, 8), dash_q._weights(h, 8, 1.0)
    run = jax.jit(partial(dash_q.descend, w, weights, *dash_q._range(w, 3), qmax=3))

    def places(x):
        G, n = w.shape[1], w.shape[3]
        return np.broadcast_to(x, w.shape).transpose(1, 3, 0, 2).reshape(G, n, -1).astype(np.float64)

    return lambda *of: [np.asarray(x, np.float64) for x in run(**of[0])], places(w), places(weights)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("damping", [0.25, 0.5, 1.0])
def test_no_half_step_raises_the_regularized_objective(steps, damping, ridge):
    run, w, h = steps  # [G, n, g]
    options = {"damping": jnp.float32(damping), "ridge": jnp.float32(ridge)}

    def value(q, s, low):
        return (h * (w - low[..., None] - s[..., None] * q) ** 2).sum(-1) + ridge * s * s

    def rounded(s, low):
        return np.clip(np.rint((w - low[..., None]) / s[..., None]), 0, 3)

    at = run({**options, "steps": 0})
    q = rounded(*at)
    trace = [value(q, *at)]
    for t in range(1, 9):
        at = run({**options, "steps": t})
        trace.append(value(q, *at))  # the line moved, with ridge = 0 this is F itself
        q = rounded(*at)
        trace.append(value(q, *at))  # the codes moved
    trace = np.stack(trace)
    assert (np.diff(trace, axis=0) <= 2e-6 * trace[:-1]).all()
    assert trace[-1].mean() < 0.8 * trace[0].mean()


def test_the_closed_form_is_weighted_least_squares():
    rows, h = problem(N=16, K=8)
    w, weights = dash_q._cut(rows, 8), dash_q._weights(h, 8, 1.0)
    mean = dash_q._mean(w, weights)
    s, low = dash_q._range(w, 3)
    q = np.clip(np.rint((np.asarray(rows).T - low) / s), 0, 3)  # [g, n]
    F, new_s, new_low = dash_q.refit(w - mean[None, :, None], weights, s, low - mean, qmax=3)
    h = np.asarray(weights, np.float64).ravel()
    for n, row in enumerate(np.asarray(rows, np.float64)):
        design = np.sqrt(h)[:, None] * np.stack([q[:, n], np.ones(8)], 1)
        want, rest, *_ = np.linalg.lstsq(design, np.sqrt(h) * row)
        np.testing.assert_allclose([new_s[0, n], (new_low + mean)[0, n]], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(F[0, n] + h @ (row - h @ row) ** 2, rest[0], rtol=1e-3)


def test_equal_energies_are_plain_least_squares_and_dead_inputs_do_not_count():
    rows, h = problem()
    ones = jnp.ones_like(h)
    for got, want in (
        (solved(rows, h, group_size=8, h_power=0.0), solved(rows, ones, group_size=8)),
        (solved(rows, 0 * h, group_size=8), solved(rows, ones, group_size=8)),  # nothing was ever active
    ):
        assert (got.dequantize_rows() == want.dequantize_rows()).all()
    w, weights = dash_q._cut(rows, 8), dash_q._weights(h.at[3].set(0.0), 8, 1.0)
    start = dash_q._range(w, 3)
    for step in (
        lambda w: dash_q.descend(w, weights, *start, qmax=3, steps=3, damping=1.0, ridge=0.0),
        lambda w: dash_q.refit_code(w, weights, dash_q._mean(w, weights), start[0], -start[0], qmax=3),
    ):
        other = jnp.asarray(w).at[0, 0, 3].set(-0.7)
        for a, b in zip(step(w), step(other), strict=True):
            assert (a == b).all()


def test_rounding_is_the_best_of_all_codes():
    rows, h = problem(N=16, K=6)
    scale, zero_point = jnp.full((16, 1), 0.5), jnp.full((16, 1), 1.375)
    w = affine.encode(rows, scale, zero_point, bits=2, group_size=6)
    every = (np.array(list(itertools.product(range(4), repeat=6))) - 1.375) * 0.5
    best = (np.asarray(h) * (np.asarray(rows)[:, None] - every) ** 2).sum(-1).min(-1)
    np.testing.assert_allclose(errors(w, rows, h, 6)[:, 0], best, rtol=1e-5)


def test_the_exact_optimum_of_the_tests_is_that_of_all_codes():
    rng = np.random.default_rng(0)
    w, h = rng.standard_normal((8, 6)), np.exp(rng.standard_normal(6))
    every = np.array(list(itertools.product(range(4), repeat=6)))
    for got, row in zip(optimum(w, h), w, strict=True):
        np.testing.assert_allclose(got, regressed(row, every, h)[0].min(), rtol=1e-9)


@pytest.mark.parametrize("heavy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_search_is_within_ten_percent_of_the_exact_optimum_and_the_paper_behind(heavy):
    rows, h = problem(N=40, K=64)
    rows = jnp.asarray(np.random.default_rng(1).standard_t(3, (40, 64)), jnp.float32) if heavy else rows
    best = np.stack([optimum(cut(rows, 32)[:, i], cut(h[None], 32)[0, i]) for i in range(2)], 1)
    search, paper = (errors(solved(rows, h, mode=mode), rows, h, 32) for mode in ("search", "paper"))
    assert (search >= best * (1 - 1e-4)).all() and (paper >= best * (1 - 1e-4)).all()
    assert search.sum() <= 1.1 * best.sum() < paper.sum()


def test_a_whole_zero_is_fitted_next_to_its_optimum():
    rows, h = problem(N=32, K=64)
    g, hessian_diag = cut(rows, 32)[:, :, None], cut(h[None], 32)[0][:, None]
    scales = np.linspace(0.05, 2.5, 1000)[:, None]
    best = np.full((32, 2), np.inf)
    for zero_point in range(4):
        q = np.clip(np.rint(g / scales + zero_point), 0, 3) - zero_point
        cross, square = (hessian_diag * g * q).sum(-1), (hessian_diag * q * q).sum(-1)
        gain = np.where(square > 0, cross**2 / np.maximum(square, 1e-9), 0)
        best = np.minimum(best, ((hessian_diag * g * g).sum(-1) - gain).min(-1))
    found = errors(solved(rows, h, integer_zero_point=True), rows, h, 32)
    assert found.sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("integer_zero_point", [False, True])
@pytest.mark.parametrize("bits", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_no_group_ends_above_round_to_nearest(bits, integer_zero_point):
    rows, h = problem()
    rows = rows.at[0].multiply(1e-3).at[1].add(20.0).at[2, 5].set(50.0)
    found = errors(
        solved(rows, h, bits=bits, group_size=8, integer_zero_point=integer_zero_point), rows, h, 8
    )
    start = errors(nearest_range(rows, 8, bits, integer_zero_point), rows, h, 8)
    assert (found <= start * (1 + 1e-5) + 1e-9).all() and found.sum() < start.sum()


@pytest.mark.parametrize("mode", ["search", "paper"])
def test_units_of_energies_and_weights_and_the_order_of_inputs_do_not_matter(mode):
    rows, h = problem()
    fit = partial(dash_q.fit, DashQ(bits=2, group_size=8, mode=mode))

    def codes(rows, h):
        return unpack(solved(rows, h, group_size=8, mode=mode).codes)

    scale, zero_point = fit(rows, h)
    for unit in (2.0**-90, 2.0**70):
        for got, want in zip(fit(rows, h * unit), (scale, zero_point), strict=True):
            assert (got == want).all()
    np.testing.assert_allclose(fit(rows, h * 1000)[0], scale, rtol=2e-3)
    moved = fit(4 * rows, h)
    assert (moved[0] == 4 * scale).all() and (moved[1] == zero_point).all()
    assert (codes(4 * rows, h) == codes(rows, h)).all()
    shifted = fit(rows + 1, h)
    np.testing.assert_allclose(shifted[0], scale, rtol=2e-3)
    np.testing.assert_allclose(shifted[1], zero_point - 1 / scale, rtol=2e-3, atol=2e-3)
    order = jnp.asarray(np.arange(64).reshape(8, 8)[:, ::-1].ravel())
    assert (codes(rows[:, order], h[order]) == codes(rows, h)[:, order]).all()


def test_weights_on_a_grid_come_back_exactly():
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.permuted(np.arange(8)[None] % 4, axis=1) for _ in range(8)], 1)
    rows, h = jnp.asarray((codes - 1.5) * 0.125, jnp.float32), problem()[1]
    w = solved(rows, h, group_size=8)
    assert (w.dequantize_rows() == rows).all() and (np.asarray(unpack(w.codes)) == codes).all()
    paper = solved(rows, h, group_size=8, mode="paper", iterations=40)
    assert (np.asarray(unpack(paper.codes)) == codes).all()
    h = cut(h[None], 8)[0]
    mean = (h * cut(codes, 8)[0]).sum(-1) / h.sum(-1)
    spread = (h * (cut(codes, 8)[0] - mean[:, None]) ** 2).sum(-1) / h.sum(-1)
    np.testing.assert_allclose(paper.scale[:, 0], 0.125 * spread / (spread + 0.01), rtol=2e-3)


@pytest.mark.parametrize("mode", ["search", "paper"])
def test_constant_groups_are_stored_exactly(mode):
    rows, h = problem(N=4)
    for value in (0.0, 0.25, -3.0):
        flat = rows.at[1, 8:24].set(value)
        w = solved(flat, h, group_size=8, mode=mode)
        assert (w.dequantize_rows()[1, 8:24] == value).all()
        assert np.isfinite(w.scale).all() and np.isfinite(w.zero_point).all()


@pytest.mark.slow
def test_what_is_stored_is_counted_to_the_bit():
    rows, h = problem()
    w = solved(rows, h, group_size=8)
    assert bits_per_weight(w) == 2 + 32 / 8 and num_bytes(w) == 32 * 64 * 2 // 8 + 4 * 32 * 8
    assert bits_per_weight(solved(rows, h, group_size=8, integer_zero_point=True)) == 2 + 16 / 8 + 2 / 8
    assert [DashQ(bits=b).quantize(*_wide(b), name="x", dtype=jnp.bfloat16).group_size for b in (2, 4)] == [
        32,
        64,
    ]


def _wide(bits):
    rows, h = problem(N=4)
    return rows, Stats(hessian_diag=h)


def test_the_product_is_that_of_the_numbers_and_of_group_sums():
    rows, h = problem(K=60)
    w = solved(rows, h, group_size=8)  # a short last group
    x = jax.random.normal(jax.random.key(0), (5, 60))
    want = np.asarray(x) @ np.asarray(w.dequantize_rows()).T
    np.testing.assert_allclose(matmul(x, w), want, atol=1e-4)
    of = np.arange(60) // 8
    scale, zero_point = (np.asarray(v, np.float32) for v in (w.scale, w.zero_point))  # [G, N]
    codes = np.asarray(unpack(w.codes), np.float32)
    sums = np.stack([np.asarray(x)[:, of == g].sum(1) for g in range(8)], 1)  # [B, G]
    parts = [np.asarray(x)[:, of == g] @ codes[:, of == g].T for g in range(8)]
    factored = sum(part * scale[g] for g, part in enumerate(parts)) - sums @ (scale * zero_point)
    np.testing.assert_allclose(factored, want, atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1), marks=pytest.mark.slow),
        pytest.param((3, 1), marks=pytest.mark.slow),
        (1, 7),
        (17, 9),
    ],
)
def test_any_shape_works_and_rows_do_not_depend_on_one_another(shape):
    rows, h = problem(*shape)
    w = solved(rows, h, group_size=4)
    assert w.shape == shape[::-1] and np.isfinite(w.dequantize_rows()).all()
    more = solved(jnp.concatenate([rows, 100 * rows]), h, group_size=4)
    assert (more.dequantize_rows()[: len(rows)] == w.dequantize_rows()).all()


@pytest.mark.slow
def test_groups_longer_than_a_loop_and_more_rows_than_a_block_are_cut_up(monkeypatch):
    rows, h = problem(N=40, K=30)
    want = solved(rows, h, group_size=10).dequantize_rows()
    monkeypatch.setattr(dash_q, "UNROLL", 4)
    monkeypatch.setattr(dash_q, "ROWS", 16)
    jax.clear_caches()
    np.testing.assert_allclose(solved(rows, h, group_size=10).dequantize_rows(), want, atol=1e-2)
    jax.clear_caches()


def gaussian(K=64, tokens=4096, seed=0):
    """Correlated inputs, few directions strong: H of some, H of others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((K, K)) * np.exp(-np.arange(K) / 12)[:, None] + 0.1 * np.eye(K)
    H = [(x.T @ x).astype(np.float32) for x in (rng.standard_normal((tokens, K)) @ mix for _ in range(2))]
    return Stats(
        hessian_diag=jnp.diag(jnp.asarray(H[0])), hessian=jnp.asarray(H[0]), held_out=jnp.asarray(H[1])
    )


def loss(w, rows, hessian):
    off = np.asarray(w.dequantize_rows() - rows, np.float64)
    return float((off @ np.asarray(hessian, np.float64) * off).sum())


def test_feedback_is_gptq_on_the_fitted_grids_and_pays_with_many_tokens():
    rows, stats = problem()[0], gaussian()

    def run(**of):
        return DashQ(group_size=8, **of).quantize(rows, stats, name="up", dtype=jnp.float32)

    plain, fed = run(), run(feedback=True)
    assert (fed.scale == plain.scale).all() and (fed.zero_point == plain.zero_point).all()
    grid = fed.scale.astype(jnp.float32).T, fed.zero_point.astype(jnp.float32).T
    codes = gptq.feedback(rows, stats.hessian, *grid, bits=2, group_size=8)
    assert (unpack(fed.codes) == codes).all()
    assert loss(fed, rows, stats.held_out) < 0.9 * loss(plain, rows, stats.held_out)
    diagonal = run(feedback=True, shrinkage=0.0)
    assert (unpack(diagonal.codes) == unpack(plain.codes)).all()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [pytest.param(24, marks=pytest.mark.slow), 4096])
def test_the_shrinkage_chosen_has_the_least_held_out_error(tokens):
    rows, true = problem()[0], gaussian()
    few = gaussian(tokens=tokens)
    stats = Stats(hessian_diag=few.hessian_diag, hessian=few.hessian, held_out=true.held_out)

    def run(rho):
        method = DashQ(group_size=8, feedback=True, shrinkage=rho)
        return method.quantize(rows, stats, name="up", dtype=jnp.float32)

    each = [loss(run(rho), rows, stats.held_out) for rho in dash_q.RHOS]
    assert np.isclose(loss(run("auto"), rows, stats.held_out), min(each), rtol=1e-5)
    assert (np.argmin(each) < len(each) - 1) or tokens == 4096  # with few tokens, not all of H


def test_what_a_method_wants_is_said_and_missing_or_foreign_statistics_are_refused():
    assert DashQ().required_stats == {"hessian_diag"} and DashQ(feedback=True).required_stats == {
        "hessian_diag",
        "hessian",
    }
    assert DashQ(feedback=True, shrinkage="auto").required_stats == {"hessian_diag", "hessian", "held_out"}
    rows, h = problem()
    with pytest.raises(ValueError, match="dash_q: calibration must give hessian_diag, got none"):
        DashQ().quantize(rows, Stats(), name="up", dtype=jnp.float32)
    with pytest.raises(
        ValueError, match=r"dash_q: hessian_diag must be \[K\], got hessian_diag\.shape=\(32,\), K=64"
    ):
        solved(rows, h[:32])
    with pytest.raises(ValueError, match="dash_q: up: weights must be finite, got NaN or infinity"):
        solved(rows.at[0, 0].set(jnp.nan), h)
    for bad in (-1.0, jnp.inf, jnp.nan):
        with pytest.raises(ValueError, match="dash_q: hessian_diag must be finite and not negative"):
            solved(rows, h.at[0].set(bad))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 9}, "bits must be 1 to 8, got self.bits=9"),
        ({"group_size": 0}, "group_size must be at least 1, got self.group_size=0"),
        ({"iterations": -1}, "iterations must not be negative"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"ridge": -1.0}, "ridge must be finite"),
        ({"h_power": float("nan")}, "h_power must be finite"),
        ({"mode": "paper", "integer_zero_point": True}, "integer_zero_point needs mode='search'"),
        ({"shrinkage": 0.5}, "shrinkage needs feedback=True"),
        ({"feedback": True, "shrinkage": 1.5}, "shrinkage must be None, 'auto' or 0 to 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"dash_q: {message}"):
        DashQ(**options)
