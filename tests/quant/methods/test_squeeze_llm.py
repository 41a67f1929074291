"""Weighted k-means on a line: against brute force and an exact solver, on edge rows, whatever the batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quant.methods import curvature
from jaxllm.quant.methods import k_means as k_means_module
from jaxllm.quant.methods.curvature import importance
from jaxllm.quant.methods.k_means import (
    borders,
    cost,
    first_from,
    k_means,
    lloyd_step,
    row_keys,
    running_sums,
    sort,
)
from jaxllm.quant.methods.squeeze_llm import SqueezeLlm
from jaxllm.quant.statistics import Stats

N, K = 8, 96


def example(n=N, k=K, seed=0):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_t(4, (n, k)) * 0.02, jnp.float32)
    return rows, jnp.asarray(rng.chisquare(1, (n, k)) * 1e-7, jnp.float32)


def loss(rows, weights, codes, table):
    """J of each row, in float64."""
    rows, weights, table = (np.asarray(a, np.float64) for a in (rows, weights, table))
    return (weights * (rows - np.take_along_axis(table, np.asarray(codes), 1)) ** 2).sum(1)


def least(x, f, m):
    """The least J of one row of any partition of its sorted places into m intervals, in float64."""
    order = np.argsort(x)
    x, f = np.asarray(x, np.float64)[order], np.asarray(f, np.float64)[order]

    def cost(s, e):
        mean = (f[s:e] * x[s:e]).sum() / f[s:e].sum() if e > s else 0.0
        return (f[s:e] * (x[s:e] - mean) ** 2).sum()

    k = len(x)
    borders = itertools.combinations_with_replacement(range(k + 1), m - 1)
    return min(sum(cost(s, e) for s, e in zip((0, *b), (*b, k), strict=True)) for b in borders)


@pytest.fixture(scope="module")
def solved():
    rows, fisher = example()
    weights, keys = importance(rows, fisher), row_keys(0, "up", N)
    return rows, weights, keys, k_means(rows, weights, keys, bits=3)


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_solver_equals_brute_force(seed):
    rows, fisher = example(4, 9, seed)
    weights = importance(rows, fisher)
    got = loss(rows, weights, *k_means(rows, weights, row_keys(0, "", 4), bits=2, exact=True))
    want = [least(x, f, 4) for x, f in zip(rows, weights, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-14)


@pytest.mark.slow
def test_the_exact_solver_is_the_dynamic_program_over_all_intervals_on_hard_rows_too():
    rng = np.random.default_rng(1)
    rows = [
        *(rng.standard_normal(K), rng.standard_t(1.5, K), np.exp(rng.normal(0, 3, K)), np.arange(K)),
        *(rng.choice([-1, 0, 1], K) + 1e-4 * rng.standard_normal(K), rng.choice(rng.normal(size=20), K)),
        *(np.sort(rng.uniform(size=K)) ** 9, -np.exp(rng.normal(0, 3, K))),
    ]
    rows = np.stack(rows).astype(np.float32)
    weights = (10 ** rng.uniform(-4, 0, rows.shape)).astype(np.float32)
    found = k_means(jnp.asarray(rows), jnp.asarray(weights), row_keys(0, "", N), bits=3, exact=True)
    got = loss(rows, weights, *found)
    for row, weight, value in zip(rows, weights, got, strict=True):
        order = np.argsort(row)
        x, f = np.float64(row)[order], np.float64(weight)[order]
        sums = np.stack([np.append(0.0, np.cumsum(f * x**n)) for n in range(3)])
        mass, moment, square = sums[:, None] - sums[:, :, None]  # [s, e]: of places s .. e - 1
        later = np.triu(np.ones_like(mass, bool), 1)
        cost = np.where(later, square - moment**2 / np.where(later, mass, 1.0), np.inf)
        best = cost[0]
        for _ in range(7):
            best = np.minimum(best, (best[:, None] + cost).min(0))
        assert value <= best[K] * (1 + 2e-5)


def test_the_heuristic_never_beats_the_exact_solver_and_comes_near_it(solved):
    rows, weights, keys, (codes, table) = solved
    exact = loss(rows, weights, *k_means(rows, weights, keys, bits=3, exact=True))
    ratio = loss(rows, weights, codes, table) / exact
    assert (ratio > 1 - 1e-5).all() and ratio.mean() < 1.1


def test_codes_and_levels_ascend_with_the_weights_and_each_code_is_the_nearest(solved):
    rows, _, _, (codes, table) = solved
    by_value = np.take_along_axis(np.asarray(codes), np.argsort(rows, axis=1), 1)
    assert (np.diff(by_value, axis=1) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    distance = np.abs(np.asarray(rows)[..., None] - np.asarray(table)[:, None])
    own = np.take_along_axis(distance, np.asarray(codes)[..., None], 2)[..., 0]
    assert (own <= distance.min(-1) + 1e-8).all()


def test_each_level_is_the_weighted_mean_of_its_weights(solved):
    rows, weights, _, (codes, table) = solved
    for n, c in itertools.product(range(N), range(8)):
        of = np.asarray(codes[n]) == c
        if of.any():
            want = np.average(np.asarray(rows[n], np.float64)[of], weights=np.asarray(weights[n])[of])
            np.testing.assert_allclose(table[n, c], want, rtol=1e-5, atol=1e-8)


def test_lloyds_step_never_raises_the_objective():
    rows, fisher = example()
    x, f = jax.lax.sort((rows / 0.02, importance(rows, fisher)), num_keys=1)
    c = jnp.sort(jax.random.uniform(jax.random.key(0), (N, 8), minval=-2, maxval=2), axis=1)
    sums = jax.jit(jax.vmap(running_sums))(x, f)

    @jax.jit
    @jax.vmap
    def step(x, sums, c):
        c = lloyd_step(x, sums, c, borders(x, c))
        ends = borders(x, c)
        return c, cost(sums, ends[:-1], ends[1:], c).sum()

    before = np.full(N, np.inf)
    for _ in range(12):
        c, now = step(x, sums, c)
        nearest = np.abs(np.asarray(x)[..., None] - np.asarray(c)[:, None]).argmin(-1)
        np.testing.assert_allclose(now, loss(x, f, nearest, c), rtol=1e-5)
        assert (now <= before * (1 + 1e-6)).all()
        before = now


def test_a_light_cluster_behind_a_heavy_one_keeps_its_mean():
    x = jnp.concatenate([jnp.linspace(-1.0, -0.9, 48), jnp.linspace(0.9, 1.0, 48)])
    f = jnp.concatenate([jnp.full(48, 1e8), jnp.full(48, 0.1)]) * jnp.linspace(0.5, 1.0, 96)
    sums = jax.jit(running_sums)(x, f)
    f64, x64 = (np.asarray(a, np.float64) for a in (f, x))
    want = [(f64 * x64**n)[48:].sum() for n in range(3)]
    np.testing.assert_allclose((sums[96] - sums[48]).sum(0), want, rtol=1e-5)
    near = jax.jit(cost)(sums, 48, 96, jnp.float32(0.95))
    off = float(near) - (f64 * (x64 - np.float32(0.95)) ** 2)[48:].sum()
    assert abs(off) < 2.0**-45 * f64.sum()
    plain = jnp.cumsum(f)
    assert abs(float(plain[-1] - plain[47]) / want[0] - 1) > 0.1  # what the pairs are for


def test_places_are_those_of_the_sorted_row_and_equal_values_share_the_first():
    x = jnp.asarray([0.5, -0.0, 3e38, 0.0, -1e-30, -2.0, 0.5, 1e-30], jnp.float32)
    ascending, place = jax.jit(sort)(x)
    np.testing.assert_array_equal(ascending, np.sort(np.asarray(x)))
    np.testing.assert_array_equal(place, np.searchsorted(np.sort(np.asarray(x)), np.asarray(x)))


@pytest.mark.slow
def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_how_many_go_at_once(solved, monkeypatch):
    rows, weights, keys, (codes, table) = solved
    monkeypatch.setattr(k_means_module, "AT_ONCE", 2 * 16 * K)
    part, levels = k_means(rows[3:], weights[3:], keys[3:], bits=3)
    assert (part == codes[3:]).all() and (levels == table[3:]).all()


def test_layers_of_any_number_of_rows_share_one_program(solved):
    rows, weights, keys, (codes, table) = solved
    sizes = []
    for n in (N, 1, 5):  # N again: what the fixture compiled may have been dropped since (conftest)
        part, levels = k_means(rows[:n], weights[:n], keys[:n], bits=3)
        assert (part == codes[:n]).all() and (levels == table[:n]).all()
        sizes.append(k_means_module.solve_rows._cache_size())
    assert sizes == [sizes[0]] * 3 and sizes[0] > 0


def test_the_first_place_from_a_value_on_is_that_of_a_search():
    ascending = jnp.asarray([-2.0, -1.0, -1.0, 0.5, 3.0], jnp.float32)
    x = jnp.asarray([[-9.0, -2.0, -1.5], [-1.0, 3.0, 3.5]], jnp.float32)
    np.testing.assert_array_equal(jax.jit(first_from)(ascending, x), np.searchsorted(ascending, x))


def test_the_same_seed_and_name_give_the_same_weights_and_others_do_not():
    a, b, c = (jax.random.key_data(row_keys(s, name, 4)) for s, name in [(0, "a"), (0, "b"), (1, "a")])
    assert (a == jax.random.key_data(row_keys(0, "a", 9))[:4]).all()
    assert (a != b).any(1).all() and (a != c).any(1).all()


def edge_rows():
    """Rows named for what is odd about them, with their Fisher information."""
    rng = np.random.default_rng(3)
    w, one = rng.normal(size=K) * 0.02, np.ones(K)
    huge = w.copy()
    huge[7] = 1000.0
    only = np.zeros(K)
    only[5] = 1.0
    return {
        "constant": (np.full(K, 0.25), one),
        "zero": (np.zeros(K), one),
        "five values": (rng.choice([-1.0, -0.5, 0.0, 0.25, 2.0], K), one),
        "one huge": (huge, one),
        "no fisher": (w, np.zeros(K)),
        "fisher in one place": (w, only),
        "fisher of tiny scale": (w, one * 1e-36),
        "fisher of many scales": (w, 10.0 ** rng.uniform(-12, 0, K)),
    }


@pytest.mark.parametrize("exact", [False, True])
def test_edge_rows_are_finite_and_no_worse_than_rounding_to_their_range(exact):
    names, pairs = zip(*edge_rows().items(), strict=True)
    rows, fisher = (jnp.asarray(np.stack(a), jnp.float32) for a in zip(*pairs, strict=True))
    stored = SqueezeLlm(bits=3, exact=exact).quantize(rows, Stats(fisher=fisher), name="", dtype=jnp.float32)
    error = np.abs(np.asarray(stored.dequantize_rows() - rows))
    assert np.isfinite(error).all()
    worst = dict(zip(names, error.max(1), strict=True))
    for name in ("constant", "zero", "five values"):
        assert worst[name] == 0, name
    assert worst["one huge"] < 0.06  # the outlier has its own level
    assert error[names.index("fisher in one place"), 5] <= 2e-5
    for name in ("no fisher", "fisher of tiny scale", "fisher in one place"):
        assert worst[name] < 0.04, name


def test_fisher_counts_only_up_to_a_factor():
    rows, fisher = example()
    a, b = (
        SqueezeLlm(bits=3).quantize(rows, Stats(fisher=f), name="up", dtype=jnp.float32)
        for f in (fisher, fisher * 2.0**20)
    )
    assert (a.codes.words == b.codes.words).all() and (a.table == b.table).all()


def test_pruned_weights_do_not_count():
    rows = jnp.where(jnp.arange(K) % 3 == 0, 0.0, example()[0])
    weights = importance(rows, jnp.ones_like(rows))
    assert (weights[:, ::3] == curvature.MIN_IMPORTANCE).all()


@pytest.mark.slow
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_rows_shorter_than_their_table_are_stored_to_half_precision(k):
    rows, fisher = example(3, k)
    stored = SqueezeLlm(bits=3).quantize(rows, Stats(fisher=fisher), name="", dtype=jnp.float32)
    np.testing.assert_allclose(stored.dequantize_rows(), rows, rtol=1e-3, atol=1e-7)


def test_wrong_options_and_statistics_are_refused():
    rows, fisher = example(2, 4)
    with pytest.raises(ValueError, match="SqueezeLlm: bits must be 1 to 8, got bits=9"):
        SqueezeLlm(bits=9)
    with pytest.raises(ValueError, match="restarts=0"):
        SqueezeLlm(restarts=0)
    with pytest.raises(ValueError, match="SqueezeLlm: calibration must give fisher"):
        SqueezeLlm().quantize(rows, Stats(), name="", dtype=jnp.float32)
    solve = SqueezeLlm().quantize
    with pytest.raises(ValueError, match=r"as the weight, got fisher\.shape=\(2, 3\)"):
        solve(rows, Stats(fisher=fisher[:, :3]), name="", dtype=jnp.float32)
    with pytest.raises(ValueError, match="not negative"):
        solve(rows, Stats(fisher=-fisher), name="", dtype=jnp.float32)
    with pytest.raises(ValueError, match="finite"):
        solve(rows.at[0, 0].set(jnp.nan), Stats(fisher=fisher), name="", dtype=jnp.float32)


def test_outliers_are_the_largest_and_most_felt_weights_and_leave_the_tables_to_the_others():
    rows, fisher = example()  # half a block, which has half of its places
    share = 0.02
    plain, apart = (
        SqueezeLlm(bits=3, outliers=outliers).quantize(
            rows, Stats(fisher=fisher), name="up", dtype=jnp.float32
        )
        for outliers in (None, share)
    )
    places = set(np.asarray(apart.places).ravel().tolist())
    size, felt, m = np.abs(rows).reshape(-1), np.asarray(fisher).reshape(-1), int(share * 16 * K)
    first = np.argsort(-felt)[: m // 9 // 2]
    largest = [k for k in np.argsort(-size) if k not in first][: (m - m // 9) // 2]
    assert sorted(places) == sorted([*first, *largest])
    got, places = np.asarray(apart.dequantize_rows(jnp.float32)).reshape(-1), sorted(places)
    np.testing.assert_array_equal(got[places], np.asarray(rows).astype(np.float16).reshape(-1)[places])
    errors = [
        (np.asarray(fisher) * np.square(rows - w.dequantize_rows(jnp.float32))).sum() for w in (plain, apart)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("outliers", [0.0, 0.06, -1.0])
def test_shares_of_outliers_that_are_none_are_one_line(outliers):
    with pytest.raises(ValueError, match="SqueezeLlm: outliers must be above 0, at most 0.05"):
        SqueezeLlm(outliers=outliers)
