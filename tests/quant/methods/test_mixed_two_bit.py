"""Which columns get 4 bits, how steps are fitted, which weights stay at 16 bits (arXiv:2311.16442)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixed_columns_example import K, N, error, example, mask_of, num_bits, solve, solve_for_words, values
from parts import mixed_ablations

from jaxllm.quant.methods import two_bit_fit
from jaxllm.quant.methods.mixed_two_bit import MixedTwoBit, allocate
from jaxllm.quant.statistics import Stats
from jaxllm.weights import sparse
from jaxllm.weights.mixed_columns import stored_bits


@pytest.fixture(scope="module")
def layer():
    return example()


# -- which columns


def test_one_of_every_four_groups_is_the_best(layer):
    rows, stats = layer
    method = mixed_ablations.OneOfFour()
    gain, cost = method.gains(rows, stats)
    mask = method.allocate({"a": (gain, cost)}, {"a": (K, N)})["a"]
    assert mask.reshape(-1, 4).sum(1).tolist() == [1, 1, 1]
    assert (mask.reshape(-1, 4).argmax(1) == gain.reshape(-1, 4).argmax(1)).all()
    assert mixed_ablations.one_of_four(np.arange(6.0)).tolist() == [False] * 3 + [True, False, False]


@pytest.mark.parametrize("fit", ["search", pytest.param("paper", marks=pytest.mark.slow)])
def test_more_groups_at_four_bits_never_raise_the_error_and_the_gain_picks_the_best_set(fit):
    rows, stats = example(16, 128)
    options = {"fit": fit, "group4": 16, "outliers": 0.0}
    gain, _ = MixedTwoBit(**options).gains(rows, stats)
    ranked = np.argsort(-gain, kind="stable")
    errors = {}
    for size in (0, 1, 3, 8):
        errors[size] = error(solve(rows, stats, mask_of(*ranked[:size], size=8), **options), rows, stats)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    # the error is a sum over groups, so any set's follows from the gains; all 56 sets of three
    total = errors[0] - np.array([gain[list(s)].sum() for s in itertools.combinations(range(8), 3)]) * energy(
        rows, stats
    )
    np.testing.assert_allclose(total.min(), errors[3], rtol=1e-3)
    for other in (mask_of(0, 1, 2, size=8), mask_of(*ranked[-3:], size=8)):
        assert errors[3] <= error(solve(rows, stats, other, **options), rows, stats) * 1.0001


def energy(rows, stats):
    h = np.asarray(stats.hessian_diag)[None]
    h = h / h.mean() + 1e-4
    return float((h * np.square(np.asarray(rows))).sum())


@pytest.mark.slow
def test_every_rule_of_selection_gives_a_number_a_group_and_gain_is_the_best(layer):
    rows, stats = layer
    options = {"outliers": 0.0, "group4": 16}
    methods = {
        "gain": MixedTwoBit(**options),
        "weight_hessian": mixed_ablations.ByRule(rule=mixed_ablations.by_weight_and_hessian, **options),
        "range": mixed_ablations.ByRule(rule=mixed_ablations.by_range, **options),
        "random": mixed_ablations.ByRule(rule=mixed_ablations.at_random, **options),
    }
    got = {}
    for rule, method in methods.items():
        gain, _ = method.gains(rows, stats, name="a")
        assert gain.shape == (12,)
        mask = mask_of(*np.argsort(-gain, kind="stable")[:3])
        got[rule] = error(solve(rows, stats, mask, outliers=0.0, group4=16), rows, stats)
    assert got["gain"] <= min(got.values()) * 1.0001
    assert got["range"] > got["gain"] * 1.05


@pytest.mark.slow
def test_gains_do_not_depend_on_how_many_tokens_were_seen(layer):
    rows, stats = layer
    more = Stats(hessian_diag=stats.hessian_diag * 1024)
    assert (MixedTwoBit().gains(rows, stats)[0] == MixedTwoBit().gains(rows, more)[0]).all()
    a, b = solve(rows, stats, mask_of(1)), solve(rows, more, mask_of(1))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_allocation_meets_the_target_over_all_layers_and_takes_the_best_first():
    rng = np.random.default_rng(0)
    sizes = {"a": (256, 64), "b": (256, 64), "c": (1024, 32)}
    cost = {n: (stored_bits(k, m, k // 16) - stored_bits(k, m, 0)) / (k // 16) for n, (k, m) in sizes.items()}
    gains = {n: (rng.random(k // 16) * (3 if n == "b" else 1), cost[n]) for n, (k, _) in sizes.items()}
    for target in (2.6, 2.91, 3.5, 9.0):
        masks = allocate(gains, sizes, target_bits=target)
        spent = sum(stored_bits(*sizes[n], int(mask.sum())) for n, mask in masks.items())
        budget = target * sum(k * m for k, m in sizes.values())
        assert spent <= budget
        worst = min((gains[n][0][m].min() / cost[n] for n, m in masks.items() if m.any()), default=0)
        left = [(n, c) for n, m in masks.items() for c in np.flatnonzero(~m)]
        for n, c in left:  # what gains more than the last one taken no longer fits
            more = stored_bits(*sizes[n], int(masks[n].sum()) + 1) - stored_bits(
                *sizes[n], int(masks[n].sum())
            )
            assert gains[n][0][c] / cost[n] <= worst or spent + more > budget
        if left:
            assert spent > budget - 2 * max(cost.values())
    assert all(mask.all() for mask in masks.values())
    share = allocate(gains, sizes, target_bits=2.91)
    assert share["b"].mean() > share["a"].mean()
    with pytest.raises(ValueError, match="MixedTwoBit: target_bits must be at least 2.4"):
        allocate(gains, sizes, target_bits=2.0)


def test_a_layer_alone_meets_the_target():
    rows, stats = example(64, 512)
    w = solve(rows, stats)
    assert 2.91 - 0.06 < num_bits(w) / rows.size <= 2.91


# -- fitting


def test_requantized_codes_are_at_most_as_wrong_as_the_first_ones(layer):
    """With the second-order scale known, rounding again cannot lose (2.3); nor can the search."""
    rows, stats = layer
    g, h, live = two_bit_fit.column_groups(rows, stats.hessian_diag)
    top = jnp.full(12, 15.0)
    steps = two_bit_fit.fit_two(g, h, live, top, fit="paper")
    scale = np.asarray(two_bit_fit.group_scale(steps))[..., None]
    low, high = (np.asarray(v) for v in two_bit_fit.limits(g, live))
    first = np.maximum((high - low) / 3, 1e-9)[..., None]
    zero_point, g = np.asarray(steps.zero_point)[..., None], np.asarray(g)
    old_codes = np.clip(np.round(g / first) + zero_point, 0, 3)
    again = np.asarray(two_bit_fit.two_values(jnp.asarray(g), steps)[1])
    new, old = np.square(again - g), np.square((old_codes - zero_point) * scale - g)
    assert (new <= old * 1.0001 + 1e-12).all()
    best = two_bit_fit.fit_two(jnp.asarray(g), h, live, top, fit="search")
    assert float(best.error.sum()) < 0.8 * float(steps.error.sum())


@pytest.mark.parametrize("kind, four, narrow", [("gaussian", 1.01, 1.03), ("t4", 1.02, 1.03)])
def test_four_bit_steps_cost_about_one_percent_of_error(kind, four, narrow):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(128, 256)) if kind == "gaussian" else rng.standard_t(4, (128, 256))
    g, h, live = two_bit_fit.column_groups(jnp.asarray(w.astype(np.float32)), jnp.ones(256))
    low, high = two_bit_fit.limits(g, live)
    scale = (high - low) / 3
    exact = float(
        two_bit_fit.squared_error(g, h[None], live, scale, jnp.clip(jnp.round(-low / scale), 0, 3), 3).sum()
    )
    for tops, bound in ((np.full(16, 15.0), four), (np.where(np.arange(16) % 3 < 2, 7.0, 15.0), narrow)):
        steps = two_bit_fit.fit_two(g, h, live, jnp.asarray(tops, jnp.float32), fit="paper")
        assert float(steps.error.sum()) <= bound * exact


@pytest.mark.parametrize("solve", [solve, solve_for_words])
@pytest.mark.parametrize("fit", ["search", "paper"])
def test_odd_groups_have_no_nan_and_errors_within_reach(fit, solve):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(32, 64)).astype(np.float32) * 0.02
    rows[:, :16] = 0.5  # constant
    rows[3] = 0  # all zero
    rows[5, 16:32] = np.abs(rows[5, 16:32])  # all positive
    rows[7, 40] = 30.0  # one huge
    rows[16:] = 0
    rows[20, 3] = 1e-6
    for diagonal in (np.zeros(64), np.ones(64), np.where(np.arange(64) < 20, 0, 5)):
        stats = Stats(hessian_diag=jnp.asarray(diagonal.astype(np.float32)))
        w = solve(jnp.asarray(rows), stats, mask_of(3, size=4), fit=fit, outliers=0.0)
        got = np.asarray(values(w))
        assert np.isfinite(got).all() and (got[3, 16:] == 0).all() and (got[21:] == 0).all()
        reach = rows[:16].reshape(16, 4, 16)
        reach = np.maximum(reach.max(-1), 0) - np.minimum(reach.min(-1), 0)
        if fit == "paper":  # half a step of the range, and half a step's rounding
            step = np.maximum(reach / 3, reach.max(0) / 15)[..., None]
            off = np.abs(got - rows)[:16].reshape(16, 4, 16)
            assert (off <= 1.01 * step + 1e-6)[:, :3].all()


# -- outliers


def test_outliers_lie_in_groups_at_two_bits_and_are_no_more_than_asked_for(layer):
    rows, stats = layer
    for p in (0.001, 0.02, 0.1):
        w = solve(rows, stats, mask_of(1, 4, 5), outliers=p)
        if w.outlier is None:
            assert int(p * 16 * K) == 0 or p * 16 * K < 1
            continue
        used = np.asarray(w.outlier) != 0
        at = np.asarray(w.place)[used] % K
        assert (at < 9 * 16).all()  # of the permuted inputs the first 9 groups are at 2 bits
        assert used.sum() <= int(p * N * K)
        assert (np.asarray(w.place)[~used] == 0).all()
        per_row = [
            len(set(line[v != 0].tolist())) == (v != 0).sum()
            for line, v in zip(np.asarray(w.place), np.asarray(w.outlier), strict=True)
        ]
        assert all(per_row)
    rows, stats = example(20, 100)  # a block short of rows has its share only
    w = solve(rows, stats, mask_of(size=7), outliers=0.05)
    assert (np.asarray(w.outlier) != 0).sum() <= int(0.05 * 20 * 100)
    assert (np.asarray(w.outlier)[-1] != 0).sum() <= int(0.05 * 4 * 100)


@pytest.mark.parametrize("fit", [pytest.param("search", marks=pytest.mark.slow), "paper"])
def test_more_outliers_never_raise_the_error_and_all_of_them_give_the_weights(layer, fit):
    rows, stats = layer
    mask = mask_of(1, 4, 5)
    lost = [
        error(solve(rows, stats, mask, outliers=p, fit=fit), rows, stats) for p in (0.0, 0.002, 0.01, 0.05)
    ]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.7 * lost[0]
    every = solve(rows, stats, mask, outliers=1.0, fit=fit)
    at_two = np.repeat(~mask, 16)
    got, want = np.asarray(values(every))[:, at_two], np.asarray(rows)[:, at_two]
    np.testing.assert_allclose(got, want, rtol=2.0**-10, atol=1e-6)


def test_outliers_may_lie_anywhere_or_nowhere(layer):
    rows, stats = layer
    mask = mask_of(1, 4, 5)
    assert solve(rows, stats, mask, outliers=0.05, where="none").outlier is None
    spread = solve(rows, stats, mask, outliers=0.3, where="anywhere")
    places = np.asarray(spread.place)[np.asarray(spread.outlier) != 0] % K
    assert (places >= 9 * 16).any()
    assert error(spread, rows, stats) < error(solve(rows, stats, mask, outliers=0.0), rows, stats)


@pytest.mark.slow
def test_places_of_outliers_fit_sixteen_bits_at_any_width():
    assert [sparse.block_rows(n) for n in (64, 4096, 8192, 11008, 65536)] == [16, 16, 8, 4, 1]
    with pytest.raises(ValueError, match="outliers need at most 65536 inputs, got W=65552"):
        sparse.block_rows(65552)
    rows, stats = example(5, 8208)  # blocks of 4 rows
    w = solve(rows, stats, mask_of(size=513), outliers=0.002, fit="paper")
    assert w.outlier.shape == (2, int(0.002 * 4 * 8208))
    none = dataclasses.replace(w, outlier=None, place=None)
    assert error(w, rows, stats) < error(none, rows, stats)


# -- wrong input


def test_nonsense_is_refused_in_one_line(layer):
    rows, stats = layer
    for option, message in (
        ({"outliers": 1.5}, "outliers must be 0 to 1"),
        ({"group4": 24}, "group4 must be a multiple of 16"),
        ({"where": "here"}, "where must be one of"),
        ({"fit": "fast"}, "fit must be one of"),
    ):
        wrong = object.__new__(MixedTwoBit)  # beneath the tests' type check
        for field in dataclasses.fields(MixedTwoBit):
            object.__setattr__(wrong, field.name, option.get(field.name, field.default))
        with pytest.raises(ValueError, match=f"MixedTwoBit: {message}"):
            wrong.__post_init__()
    with pytest.raises(ValueError, match="MixedTwoBit: calibration must give hessian_diag"):
        solve(rows, Stats())
    with pytest.raises(ValueError, match=r"MixedTwoBit: hessian_diag must be \[K\], got .*\(7,\)"):
        solve(rows, Stats(hessian_diag=jnp.ones(7)))
    with pytest.raises(ValueError, match="MixedTwoBit: weights must be finite"):
        solve(rows.at[3, 4].set(jnp.nan), stats)
    with pytest.raises(ValueError, match=r"MixedTwoBit: mask must be \[12\] for K=192, got .*\(5,\)"):
        solve(rows, stats, mask_of(size=5))
    with pytest.raises(ValueError, match="target_bits must be at least"):
        solve(rows, stats, target_bits=2.1)
    assert MixedTwoBit().required_stats == {"hessian_diag"}
