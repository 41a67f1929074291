"""Columns at 2 and 4 bits and residuals at 16 in one matrix, every bit counted (arXiv:2311.16442)."""

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints_convert.quantized import two_bit_words
from checkpoints_convert.quantized.two_bit_words import from_interleaved, to_interleaved
from jaxllm.ops.packing import from_words, to_words
from jaxllm.quant.methods import two_bit_fit
from jaxllm.quant.methods.mixed_two_bit import MixedTwoBit, allocate
from jaxllm.quant.statistics import Stats
from jaxllm.weights import mixed_columns
from jaxllm.weights.mixed_columns import MixedColumns, stored_bits

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
N, K = 48, 192  # 12 column groups, 3 blocks of outputs
matmul = jax.jit(mixed_columns.matmul)
values = jax.jit(MixedColumns.dequantize_rows)


def example(n=N, k=K, seed=0):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_t(4, (n, k)).astype(np.float32) * 0.02)
    return rows, Stats(hessian_diag=jnp.asarray(rng.lognormal(0, 1.2, k).astype(np.float32)))


def mask_of(*groups, size=12):
    mask = np.zeros(size, bool)
    mask[list(groups)] = True
    return mask


def solve(rows, stats, mask=None, **options):
    return MixedTwoBit(**options).solve(rows, stats, name="a", dtype=rows.dtype, mask=mask)


def solve_for_words(rows, stats, mask, **options):
    limits = two_bit_words.step_limits(mask)
    method = MixedTwoBit(**options)
    return method.solve(rows, stats, name="a", dtype=rows.dtype, mask=mask, step_limits=limits)


def error(w, rows, stats):
    h = np.asarray(stats.hessian_diag)[None]
    h = h / h.mean() + 1e-4
    return float((h * np.square(np.asarray(values(w)) - np.asarray(rows))).sum())


def num_bits(w):
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(w))


@pytest.fixture(scope="module")
def layer():
    return example()


@pytest.fixture(scope="module")
def w(layer):
    return solve(*layer, mask_of(1, 4, 5), outliers=0.02)


# -- packing and layout


def test_every_word_of_the_papers_metadata_is_read_and_written_back():
    words = np.arange(2**16, dtype=np.uint16)
    zero, step = two_bit_words.unpack_words(words)
    assert (two_bit_words.pack_words(zero, step) == words).all()
    assert zero.max() == 3 and step[:, :2].max() == 7 and step[:, 2].max() == 15
    assert len(np.unique(np.concatenate([zero, step], 1), axis=0)) == 2**16


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_in_words_come_back_the_first_lowest(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 64)).astype(np.uint32)
    words = to_words(jnp.asarray(codes), bits)
    assert words.shape == (3, 5, 2 * bits) and (from_words(words, bits) == codes).all()
    assert (np.asarray(words[..., 0]) & (2**bits - 1) == codes[..., 0]).all()


@pytest.mark.parametrize(
    "n, k, groups, p",
    [(48, 192, (1, 4, 5), 0.02), (20, 100, (0, 6), 0.01), (16, 64, (), 0.0), (33, 64, (0, 1, 2, 3), 0.1)],
)
def test_the_papers_layout_is_a_lossless_round_trip(n, k, groups, p):
    rows, stats = example(n, k)
    w = solve_for_words(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p)
    layout = to_interleaved(w)
    C = -(-k // 16)
    assert layout.main.shape == (C, n) and layout.side.shape == (len(groups), n)
    assert layout.words.shape == (-(-(C - len(groups)) // 3), n)
    again = from_interleaved(layout)
    assert jax.tree.structure(again) == jax.tree.structure(w)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype and (a == b).all()


def test_the_papers_layout_reads_as_its_figure_says(layer):
    """A reference written from the figure: main and side words, 16-bit metadata, compressed rows."""
    w = solve_for_words(*layer, mask_of(1, 4, 5), outliers=0.02)
    p = to_interleaved(w)
    want = np.zeros((N, K), np.float32)
    at_two = 0
    for c in range(12):
        side = p.side_index[c]
        for n in range(N):
            if side < 0:
                codes = np.array([p.main[c, n] >> (2 * i) & 3 for i in range(16)], np.float32)
                word, zeros = int(p.words[at_two // 3, n]), int(p.zeros[at_two // 3, n // 16])
                place = at_two % 3
                zero = word >> (2 * place) & 3
                step = word >> (6, 9, 12)[place] & (7, 7, 15)[place]
                shared = zeros >> (4 * place) & (7, 7, 15)[place]
                scale = np.float32(step + shared) * np.float32(p.scales[at_two, n // 16])
            else:
                pair = int(p.main[c, n]) | int(p.side[side, n]) << 32
                codes = np.array([pair >> (4 * i) & 15 for i in range(16)], np.float32)
                group = side * 16 // p.group4
                zero, scale = p.four_zero[group, n], np.float32(p.four_scale[group, n])
            want[n, 16 * c : 16 * c + 16] = (codes - np.float32(zero)) * scale
        at_two += side < 0
    row = np.repeat(np.arange(N), np.diff(p.row_starts))
    want[row, p.columns] += p.values.astype(np.float32)
    assert (np.asarray(values(w)) == want).all()  # bit for bit


def test_metadata_that_does_not_fit_the_papers_words_is_refused(layer):
    wide = solve(*layer, mask_of())
    with pytest.raises(ValueError, match="to_interleaved: two of three steps must fit 3 bits.*got step=1"):
        to_interleaved(wide)


@pytest.mark.parametrize(
    "n, k, groups, p", [(48, 192, (1, 4, 5), 0.02), (20, 100, (0, 6), 0.01), (1, 1, (), 0.0)]
)
def test_the_count_of_bits_is_what_is_stored(n, k, groups, p):
    rows, stats = example(n, k)
    for where in ("exclusive", "none"):
        w = solve(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p, where=where, group4=32)
        assert num_bits(w) == stored_bits(k, n, len(groups), group4=32, outliers=p, where=where)


@pytest.mark.parametrize(
    "r, group4, p, want",
    [
        (0.0, 128, 0.0, 2.453),
        (0.125, 16, 0.0, 2.803),
        (0.25, 16, 0.0, 3.152),
        (0.25, 128, 0.0, 2.879),
        (0.25, 128, 0.002, 2.943),
    ],
)
def test_the_count_of_bits_is_the_papers_formula_in_a_large_matrix(r, group4, p, want):
    """2.848 and 2.912, as published, where three groups share 16 bits (`to_interleaved`) and not 18."""
    size = 4096
    four = int(r * size / 16)
    got = stored_bits(size, size, four, group4=group4, outliers=p) / size**2
    formula = 2 + 2 * r + (1 - r) * (6 / 16 + 20 / 256) + r * 20 / group4 + 32 * p
    assert abs(got - formula) < 1e-3 and abs(got - want) < 1e-3
    packed = formula - (1 - r) * (6 / 16 - 16 / 48)
    if (r, group4) == (0.25, 128):
        assert packed == pytest.approx({0: 2.848, 0.002: 2.912}[p], abs=1e-3)


# -- the product


@pytest.mark.parametrize(
    "n, k, groups, p",
    [
        (48, 192, (), 0.0),
        (48, 192, (1, 4, 5), 0.002),
        (20, 100, (0, 6), 0.02),
        (33, 64, (0, 1, 2, 3), 0.02),
        (1, 1, (0,), 0.0),
    ],
)
def test_the_product_is_that_of_the_rows_and_of_the_factored_form(n, k, groups, p):
    rows, stats = example(n, k)
    w = solve(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p)
    x = jax.random.normal(jax.random.key(0), (2, 3, k))
    want = np.asarray(x) @ np.asarray(values(w)).T
    np.testing.assert_allclose(matmul(x, w), want, rtol=1e-5, atol=1e-5)
    assert values(w).shape == (n, k)
    if w.two is not None:  # sum of q x less zero times sum of x, once a group
        moved = np.asarray(mixed_columns.permute(x, w)).reshape(2, 3, -1, 16)[:, :, : w.two.shape[1]]
        codes = np.asarray(from_words(w.two[..., None], 2), np.float32)
        scale, zero = map(np.asarray, mixed_columns.two_bit_steps(w))
        sums = np.einsum("abci,nci->abnc", moved, codes) - zero * moved.sum(-1)[:, :, None]
        dense = np.einsum("abci,nci->abn", moved, (codes - zero[..., None]) * scale[..., None])
        np.testing.assert_allclose((sums * scale).sum(-1), dense, rtol=1e-4, atol=1e-5)


def test_steps_known_before_the_codes_give_the_same_rows(layer, w):
    """What the paper overlaps with loading the codes: the order of the two does not change a bit."""
    scale, zero = jax.jit(mixed_columns.two_bit_steps)(w)  # without codes
    without = dataclasses.replace(w, two=jnp.zeros_like(w.two))
    assert all(
        (a == b).all() for a, b in zip(mixed_columns.two_bit_steps(without), (scale, zero), strict=True)
    )
    codes = from_words(w.two[..., None], 2).astype(jnp.float32)
    late = (codes - zero[..., None]) * scale[..., None]
    plain = dataclasses.replace(w, outlier=None, place=None)
    assert (jax.jit(mixed_columns.permuted_rows)(plain)[:, : late[0].size] == late.reshape(N, -1)).all()


def test_sixteen_bit_inputs_accumulate_in_float32(w):
    x = jax.random.normal(jax.random.key(0), (3, K)).astype(jnp.bfloat16)
    got = matmul(x, w)
    want = np.asarray(x, np.float32) @ np.asarray(values(w).astype(jnp.bfloat16), np.float32).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_permuted_columns_hold_the_same_numbers(w):
    assert sorted(np.asarray(w.order).tolist()) == list(range(12)) and np.asarray(w.order)[-3:].tolist() == [
        1,
        4,
        5,
    ]
    wide = np.asarray(mixed_columns.permuted_rows(w)).reshape(N, 12, 16)
    back = np.asarray(values(w)).reshape(N, 12, 16)
    assert (back[:, np.asarray(w.order)] == wide).all()
    x = jnp.arange(K, dtype=jnp.float32)
    assert (np.asarray(mixed_columns.permute(x, w)).reshape(12, 16)[:, 0] == 16 * np.asarray(w.order)).all()


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)])
def test_a_weight_cut_over_devices_gives_the_same_product(spec):
    rows, stats = example(64, 64)
    w = solve(rows, stats, mask_of(2, size=4), outliers=0.02)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    specs = w.partition_specs(spec)
    assert specs.two == P("model", None) and specs.order == P(None)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), w, specs)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(matmul(x, placed), matmul(x, w), rtol=1e-5, atol=1e-5)


def test_the_weight_survives_tree_maps_and_vmap(w):
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    x = jax.random.normal(jax.random.key(0), (2, 3, K))
    got = jax.jit(jax.vmap(mixed_columns.matmul))(x, stack)
    np.testing.assert_allclose(got, matmul(x, w), rtol=1e-5, atol=1e-5)
    assert w.shape == (K, N) and w.dtype == jnp.float32


# -- which columns


@pytest.fixture(scope="module")
def ablations():
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module("mixed_ablations")
    finally:
        sys.path.remove(BENCHMARKS)


def test_one_of_every_four_groups_is_the_best(layer, ablations):
    rows, stats = layer
    method = ablations.OneOfFour()
    gain, cost = method.gains(rows, stats)
    mask = method.allocate({"a": (gain, cost)}, {"a": (K, N)})["a"]
    assert mask.reshape(-1, 4).sum(1).tolist() == [1, 1, 1]
    assert (mask.reshape(-1, 4).argmax(1) == gain.reshape(-1, 4).argmax(1)).all()
    assert ablations.one_of_four(np.arange(6.0)).tolist() == [False] * 3 + [True, False, False]


@pytest.mark.parametrize("fit", ["search", "paper"])
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


def test_every_rule_of_selection_gives_a_number_a_group_and_gain_is_the_best(layer, ablations):
    rows, stats = layer
    options = {"outliers": 0.0, "group4": 16}
    methods = {
        "gain": MixedTwoBit(**options),
        "weight_hessian": ablations.ByRule(rule=ablations.by_weight_and_hessian, **options),
        "range": ablations.ByRule(rule=ablations.by_range, **options),
        "random": ablations.ByRule(rule=ablations.at_random, **options),
    }
    got = {}
    for rule, method in methods.items():
        gain, _ = method.gains(rows, stats, name="a")
        assert gain.shape == (12,)
        mask = mask_of(*np.argsort(-gain, kind="stable")[:3])
        got[rule] = error(solve(rows, stats, mask, outliers=0.0, group4=16), rows, stats)
    assert got["gain"] <= min(got.values()) * 1.0001
    assert got["range"] > got["gain"] * 1.05


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
    zero, g = np.asarray(steps.zero)[..., None], np.asarray(g)
    old_codes = np.clip(np.round(g / first) + zero, 0, 3)
    again = np.asarray(two_bit_fit.two_values(jnp.asarray(g), steps)[1])
    new, old = np.square(again - g), np.square((old_codes - zero) * scale - g)
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


@pytest.mark.parametrize("fit", ["search", "paper"])
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


def test_places_of_outliers_fit_sixteen_bits_at_any_width():
    assert [mixed_columns.block_rows(n) for n in (64, 4096, 8192, 11008, 65536)] == [16, 16, 8, 4, 1]
    with pytest.raises(ValueError, match="outliers need at most 65536 inputs, got W=65552"):
        mixed_columns.block_rows(65552)
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
