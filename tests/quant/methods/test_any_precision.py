"""Bit planes hold every width in one, and growing a width cuts each cluster where it helps most."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from checkpoints_convert.quantized.any_precision import from_cuda_planes, to_cuda_planes
from jaxllm.quant.methods import any_precision as ap
from jaxllm.quant.methods.any_precision import AnyPrecision, upscale
from jaxllm.quant.methods.curvature import damped, importance
from jaxllm.quant.methods.k_means import k_means, row_keys
from jaxllm.quant.methods.lnq import objective
from jaxllm.quant.methods.squeeze_llm import SqueezeLlm
from jaxllm.quant.statistics import Stats
from jaxllm.weights.codebook import from_codes, look_up
from jaxllm.weights.planes import bit_planes
from jaxllm.weights.planes.bit_planes import pack, read_at, unpack

N, K = 8, 536  # 17 words, the last not full
WIDTHS = range(3, 9)


def example(n=N, k=K, seed=0):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_t(4, (n, k)) * 0.02, jnp.float32)
    return rows, Stats(fisher=jnp.asarray(rng.chisquare(1, (n, k)) * 1e-7, jnp.float32))


def random_codes(bits, k, n=5):
    return jnp.asarray(np.random.default_rng(k).integers(0, 2**bits, (n, k)), jnp.uint8)


packed = jax.jit(pack, static_argnums=1)


def loss(rows, weights, codes, table):
    """J of each row, in float64."""
    rows, weights, table = (np.asarray(a, np.float64) for a in (rows, weights, table))
    return (weights * (rows - np.take_along_axis(table, np.asarray(codes), 1)) ** 2).sum(1)


@pytest.fixture(scope="module")
def stored():
    rows, stats = example()
    return AnyPrecision().quantize(rows, stats, name="up", dtype=jnp.float32)


@pytest.fixture(scope="module", params=["exact", "paper"])
def grown(request):
    """Rows, weights, parent codes, and the float32 tables of every width."""
    rows, stats = example()
    weights = importance(rows, stats.fisher)
    codes, table = k_means(rows, weights, row_keys(0, "up", N), bits=3)
    parent, tables = upscale(rows, weights, codes, table, to=8, split=request.param)
    return rows, weights, np.asarray(parent), (table, *tables)


# The format.


@pytest.mark.parametrize("bits, k", [(1, 1), (3, 31), (8, 33), (5, 992), (8, 1024), (4, 1056), (8, 2336)])
def test_planes_hold_the_codes_and_the_first_of_them_the_upper_bits(bits, k):
    codes = random_codes(bits, k)
    planes = packed(codes, bits)
    assert planes.shape == (bits, 5, -(-k // 32)) and planes.dtype == jnp.uint32
    assert (jax.jit(unpack, static_argnums=1)(planes, k) == codes).all()
    upper = (bits + 1) // 2
    assert (np.asarray(planes)[:upper] == packed(codes >> (bits - upper), upper)).all()


def test_each_width_looks_up_the_upper_bits_in_its_own_table(stored):
    parent = unpack(stored.planes, K)
    for b in WIDTHS:
        want = look_up(stored.tables[b - 3], parent >> (8 - b))
        assert (stored.at(b).dequantize_rows(jnp.float16) == want).all()
        assert stored.at(b).dequantize_rows().dtype == jnp.float32


def test_a_whole_model_is_read_at_another_width(stored):
    tree = {"a": stored, "b": (jnp.ones(3), stored)}
    read = read_at(tree, 3)
    assert read["a"].bits == read["b"][1].bits == 3 and read["a"].planes is stored.planes
    with pytest.raises(ValueError, match="must have any-precision weights, got none"):
        read_at({"a": jnp.ones(3)}, 3)


def test_a_width_reads_neither_lower_planes_nor_other_tables(stored):
    spoiled = tuple(
        t if b == 5 else jnp.full_like(t, jnp.nan) for b, t in zip(WIDTHS, stored.tables, strict=True)
    )
    other = type(stored)(stored.planes.at[5:].set(0xFFFFFFFF), spoiled, 5, 3, 8, stored.shape, stored.dtype)
    assert (other.dequantize_rows() == stored.at(5).dequantize_rows()).all()


def test_another_width_is_the_same_arrays(stored):
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(stored.at(4)), strict=True):
        assert a is b
    assert stored.bits == 8 and stored.at(4).bits == 4 and stored.at(4).at(8).bits == 8
    assert jax.tree.structure(stored) != jax.tree.structure(stored.at(4))  # static: a program for each width
    with pytest.raises(ValueError, match="bits must be 3 to 8, as stored, got bits=2"):
        stored.at(2)


def test_the_product_at_every_width_is_that_of_the_looked_up_weight(stored):
    x = jax.random.normal(jax.random.key(1), (9, K))
    product = jax.jit(lambda x, w: jnp.matmul(x, w.dequantize_rows().T, precision=jax.lax.Precision.HIGHEST))
    for b in (3, 8):
        want = np.asarray(x, np.float64) @ np.asarray(stored.at(b).dequantize_rows(), np.float64).T
        np.testing.assert_allclose(product(x, stored.at(b)), want, atol=1e-5)


def test_leaves_follow_the_logical_axes(stored):
    specs = stored.partition_specs(P("data", "model"))
    assert specs.planes == P(None, "model", "data") and set(specs.tables) == {P("model", None)}


def test_stacked_layers_scan_like_single_ones(stored):
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), stored.at(4))
    _, out = jax.lax.scan(lambda c, w: (c, w.dequantize_rows()), 0, stack)
    assert (out == stored.at(4).dequantize_rows()[None]).all()


def test_tables_of_the_wrong_shape_are_refused():
    codes = random_codes(4, 32)
    with pytest.raises(ValueError, match=r"tables must be .* got shapes=\[\(5, 8\), \(5, 32\)\]"):
        bit_planes.from_codes(codes, (jnp.zeros((5, 8)), jnp.zeros((5, 32))), bits=3)


# The CUDA order.


def cuda_place(k, K):
    """Word and bit of column k, by the formula of the authors' packer."""
    chunk = k // 1024
    T = min(32, (K - 1024 * chunk) // 32)
    r = k - 1024 * chunk
    return 32 * chunk + r % (8 * T) // 8, 31 - 8 * (r // (8 * T)) - r % 8


@pytest.mark.parametrize("k", [32, 992, 1024, 1056, 2336])
def test_the_cuda_order_is_the_published_permutation_both_ways(k):
    codes = np.asarray(random_codes(8, k, 2))
    planes = packed(jnp.asarray(codes), 8)
    theirs = to_cuda_planes(planes, k)
    assert theirs.dtype == np.int32 and theirs.shape == planes.shape
    word, bit = np.array([cuda_place(c, k) for c in range(k)]).T
    assert len(set(zip(word, bit, strict=True))) == k
    for b in range(8):
        got = theirs.view(np.uint32)[b][:, word] >> bit.astype(np.uint32) & 1
        assert (got == (codes >> (7 - b) & 1)).all()
    assert (from_cuda_planes(theirs, k) == planes).all()


def test_the_first_word_of_a_full_tile_packs_four_bytes_from_the_high_end():
    codes = np.zeros((1, 1024), np.uint8)
    codes[0, [0, 256 + 1, 512 + 2, 768 + 7]] = 1
    assert to_cuda_planes(pack(jnp.asarray(codes), 1), 1024)[0, 0, 0] == np.int32(-0x7FBFDFFF)  # 80 40 20 01


def test_the_cuda_order_needs_whole_words():
    with pytest.raises(ValueError, match="CUDA layout needs K divisible by 32, got K=40"):
        to_cuda_planes(pack(random_codes(3, 40), 3), 40)


# The method.


def test_the_seed_is_the_standalone_k_means(stored):
    rows, stats = example()
    alone = SqueezeLlm(bits=3).quantize(rows, stats, name="up", dtype=jnp.float32)
    assert (stored.tables[0] == alone.table).all()
    assert (stored.at(3).dequantize_rows() == alone.dequantize_rows()).all()


def test_codes_and_tables_ascend_with_the_weights(grown):
    rows, _, parent, tables = grown
    by_value = np.take_along_axis(parent, np.argsort(rows, axis=1), 1)
    assert (np.diff(by_value, axis=1) >= 0).all()
    for table in tables:
        assert (np.diff(table, axis=1) >= -1e-8).all()
        assert (np.diff(np.asarray(table, np.float16), axis=1) >= 0).all()


def test_a_level_lies_between_its_children_and_equals_them_where_it_is_not_cut(grown):
    _, _, parent, tables = grown
    for b, (table, finer) in enumerate(itertools.pairwise(map(np.asarray, tables)), start=3):
        low, high = finer[:, ::2], finer[:, 1::2]
        assert (low <= table + 1e-7).all() and (table <= high + 1e-7).all()
        for n in range(N):
            used = np.bincount(parent[n] >> (7 - b), minlength=2 ** (b + 1)) > 0
            whole = ~(used[::2] & used[1::2])
            assert (low[n][whole] == table[n][whole]).all() and (high[n][whole] == table[n][whole]).all()
            assert not used[1::2][whole].any()  # what is not cut stays even


def test_every_width_has_no_more_error_than_the_one_before(grown):
    rows, weights, parent, tables = grown
    found = [loss(rows, weights, parent >> (8 - b), t) for b, t in zip(WIDTHS, tables, strict=True)]
    for wide, narrow in itertools.pairwise(found):
        assert (narrow <= wide).all()


@pytest.mark.slow
def test_no_width_beats_the_exact_optimum():
    rows, stats = example(4, 64)
    weights, keys = importance(rows, stats.fisher), row_keys(0, "", 4)
    codes, table = k_means(rows, weights, keys, bits=1, exact=True)
    parent, tables = upscale(rows, weights, codes, table, to=3)
    for b, t in zip((1, 2, 3), (table, *tables), strict=True):
        best = loss(rows, weights, *k_means(rows, weights, keys, bits=b, exact=True))
        ours = loss(rows, weights, parent >> (3 - b), t)
        assert (ours >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("intervals", [True, False])
def test_the_exact_split_equals_brute_force_on_clusters_of_any_weights(intervals):
    n, k, m = 16, 40, 4
    rows, stats = example(n, k)
    weights = importance(rows, stats.fisher)
    codes = jax.random.randint(jax.random.key(0), (n, k), 0, m)
    if intervals:
        rank = jnp.argsort(jnp.argsort(rows, axis=1), axis=1)
        codes = jnp.take_along_axis(jnp.sort(codes, axis=1), rank, axis=1)
    parent, (table,) = upscale(rows, weights, codes, jnp.zeros((n, m)), to=3)
    assert (parent >> 1 == codes).all()
    got = loss(rows, weights, parent, table)
    want = np.zeros(n)
    for r, c in itertools.product(range(n), range(m)):
        x, f = (np.asarray(a[r], np.float64)[np.asarray(codes[r]) == c] for a in (rows, weights))
        order = np.argsort(x)
        x, f = x[order], f[order]
        parts = (((x[:d], f[:d]), (x[d:], f[d:])) for d in range(1, len(x)))
        want[r] += min(sum((w * (v - np.average(v, weights=w)) ** 2).sum() for v, w in cut) for cut in parts)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_the_papers_split_is_where_lloyds_algorithm_stands_still_and_never_better():
    n, k = 16, 40
    rows, stats = example(n, k)
    weights, one = importance(rows, stats.fisher), jnp.zeros((n, k), jnp.int32)
    error = {}
    for split in ("exact", "paper"):
        parent, (table,) = upscale(rows, weights, one, jnp.zeros((n, 1)), to=1, split=split)
        assert ((parent == 1) == (rows > table.mean(1, keepdims=True))).all()  # the midpoint parts the halves
        error[split] = loss(rows, weights, parent, table)
    assert (error["exact"] <= error["paper"] * (1 + 1e-6)).all() and error["exact"].sum() < error[
        "paper"
    ].sum()


@pytest.mark.parametrize("split", ["exact", "paper"])
def test_edge_rows_keep_every_width_finite_and_ordered(split):
    rng = np.random.default_rng(3)
    w, one = rng.normal(size=K) * 0.02, np.ones(K)
    huge, only = w.copy(), np.zeros(K)
    huge[7], only[5] = 1000.0, 1.0
    few = rng.choice([-1.0, -0.5, 0.0, 0.25, 2.0], K)
    pairs = [(np.full(K, 0.25), one), (np.zeros(K), one), (few, one), (huge, one)]
    pairs += [(w, np.zeros(K)), (w, only), (w, 10.0 ** rng.uniform(-12, 0, K)), (w, one * 1e-36)]
    rows, fisher = (jnp.asarray(np.stack(a), jnp.float32) for a in zip(*pairs, strict=True))
    made = AnyPrecision(split=split).quantize(rows, Stats(fisher=fisher), name="", dtype=jnp.float32)
    for b, table in zip(WIDTHS, made.tables, strict=True):
        error = np.abs(np.asarray(made.at(b).dequantize_rows() - rows))
        assert np.isfinite(error).all() and (np.diff(table, axis=1) >= 0).all()
        assert (error[:3] == 0).all()  # no more values than levels: lossless
        assert error[3, 7] == 0
    assert error[4:].max() < 2e-3  # 8 bits


def test_rows_do_not_depend_on_how_many_go_at_once(grown, monkeypatch, request):
    rows, weights, parent, tables = grown
    split = request.node.callspec.params["grown"]
    monkeypatch.setattr(ap, "AT_ONCE", 2 * K)
    again, finer = upscale(
        rows[3:], weights[3:], jnp.asarray(parent[3:] >> 5), tables[0][3:], to=8, split=split
    )
    assert (again == parent[3:]).all() and all(
        (a == b[3:]).all() for a, b in zip(finer, tables[1:], strict=True)
    )


def test_a_layer_is_reproducible_by_seed_and_name(stored):
    rows, stats = example()
    same, named, seeded = (
        AnyPrecision(seed=s).quantize(rows, stats, name=name, dtype=jnp.float32)
        for s, name in [(0, "up"), (0, "down"), (1, "up")]
    )
    assert (same.planes == stored.planes).all()
    assert (named.planes != stored.planes).any() and (seeded.planes != stored.planes).any()


# From a guided seed.


@pytest.fixture(scope="module")
def guided():
    n, k = 8, 96
    rows, _ = example(n, k)
    x = jax.random.normal(jax.random.key(2), (2, 256, k))
    x = x + 2 * x[..., :1] + jnp.roll(x, 1, axis=2)
    return rows, jnp.matmul(x.swapaxes(1, 2), x, precision=jax.lax.Precision.HIGHEST) / 256


@pytest.mark.slow
def test_a_guided_parent_errs_less_with_every_bit_by_the_whole_curvature(guided):
    rows, hessians = guided
    method = AnyPrecision(seeder="lnq", seed_bits=2, parent_bits=4, output_groups=2)
    assert method.required_stats == {"guided_hessian"}
    made = method.quantize(rows, Stats(guided_hessian=hessians), name="up", dtype=jnp.float32)
    assert (np.diff(made.tables[0], axis=1) >= 0).all()
    plain = AnyPrecision(seed_bits=2, parent_bits=4).quantize(
        rows,
        Stats(fisher=jnp.repeat(jnp.diagonal(hessians, axis1=1, axis2=2), 4, axis=0)),
        name="",
        dtype=None,
    )
    found, other = [], []
    for b, (w, into) in itertools.product((2, 3, 4), ((made, found), (plain, other))):
        codes, table = unpack(w.planes[:b], 96), w.tables[b - 2].astype(jnp.float32)
        part = [objective(rows[i : i + 4], damped(h, 1e-4), codes[i : i + 4], table[i : i + 4])
                for i, h in zip((0, 4), hessians, strict=True)]  # fmt: skip
        into.append(np.concatenate(part))
    for wide, narrow in itertools.pairwise(found):
        assert (narrow <= wide * (1 + 1e-3)).all()  # float16 tables
    assert found[0].sum() < other[0].sum()  # at the seed's width; above it a k-means seed may win


def test_choosing_halves_never_raises_the_loss_and_leaves_upper_bits_alone(guided):
    rows, hessians = guided
    h = damped(hessians[0], 1e-4)
    pull = (h / jnp.diag(h)[:, None]).at[jnp.arange(96), jnp.arange(96)].set(0.0)
    table = jnp.sort(jax.random.normal(jax.random.key(3), (8, 8)) * 0.04, axis=1)
    codes = jax.random.randint(jax.random.key(4), (8, 96), 0, 8)
    before = objective(rows, h, codes, table)
    for _ in range(2):
        chosen = ap.choose_halves(rows, pull, codes, table, cycles=1)
        after = objective(rows, h, chosen, table)
        assert (chosen >> 1 == codes >> 1).all() and (after <= before * (1 + 1e-5)).all()
        codes, before = chosen, after


def test_with_a_diagonal_curvature_each_weight_takes_the_nearer_half():
    rows, _ = example(8, 96)
    table = jnp.sort(jax.random.normal(jax.random.key(3), (8, 8)) * 0.04, axis=1)
    codes = jax.random.randint(jax.random.key(4), (8, 96), 0, 8)
    chosen = ap.choose_halves(rows, jnp.zeros((96, 96)), codes, table, cycles=1)
    low, high = look_up(table, codes & ~1), look_up(table, codes | 1)
    assert ((chosen & 1 == 1) == (jnp.abs(rows - high) < jnp.abs(rows - low))).all()


def test_sorting_levels_keeps_the_weight():
    codes, table = random_codes(3, 40, 4), jax.random.normal(jax.random.key(0), (4, 8))
    sorted_codes, levels = ap.ascending(codes, table)
    assert (np.diff(levels, axis=1) >= 0).all()
    assert (
        from_codes(sorted_codes, levels, bits=3).dequantize_rows()
        == from_codes(codes, table, bits=3).dequantize_rows()
    ).all()


# With outliers.


def heavy_rows(n=N, k=K):
    """Rows of heavy tails, in numpy."""
    return np.random.default_rng(5).standard_t(2, (n, k)).astype(np.float32) * 0.02


def test_outliers_are_float16_at_every_width_and_no_width_errs_more_than_without():
    rows = heavy_rows()
    plain, apart = (
        AnyPrecision(outliers=outliers).quantize(
            jnp.asarray(rows), Stats(fisher=jnp.ones((N, K))), name="up", dtype=jnp.float32
        )
        for outliers in (None, 0.02)
    )
    kept = np.asarray(apart.is_kept())
    assert 0.019 < kept.mean() <= 0.02
    for b in (3, 5, 8):
        without, got = (np.asarray(read_at(w, b).dequantize_rows()) for w in (plain, apart))
        np.testing.assert_array_equal(got[kept], rows.astype(np.float16)[kept])
        errors = [np.square(read - rows).sum(1) for read in (without, got)]
        assert (errors[1] < errors[0]).all() and errors[1].sum() < 0.7 * errors[0].sum()


@pytest.mark.slow
def test_outliers_of_a_guided_parent_are_none_of_its_error(guided):
    rows, hessians = heavy_rows(8, 96), guided[1]
    stats, found = Stats(guided_hessian=hessians), []
    for outliers in (None, 0.02):
        method = AnyPrecision(seeder="lnq", seed_bits=2, parent_bits=4, output_groups=2, outliers=outliers)
        w = method.quantize(jnp.asarray(rows), stats, name="up", dtype=jnp.float32)
        errors = [np.asarray(read_at(w, b).dequantize_rows() - rows).reshape(2, 4, 96) for b in (2, 3, 4)]
        found.append([np.einsum("grk,gkl,grl->", e, hessians, e) for e in errors])
    kept = np.asarray(w.is_kept())
    np.testing.assert_array_equal(np.asarray(w.dequantize_rows())[kept], rows.astype(np.float16)[kept])
    assert (np.diff(found[1]) < 0).all() and (np.array(found[1]) < 0.7 * np.array(found[0])).all()


def refuse(**options):
    """Checks options beneath the tests' type check."""
    method = AnyPrecision()
    for name, value in options.items():
        object.__setattr__(method, name, value)
    method.__post_init__()


def test_wrong_options_and_missing_statistics_are_refused():
    rows, stats = example(2, 4)
    for options, got in [
        ({"seed_bits": 9}, "seed_bits=9, bits=8, parent_bits=8"),
        ({"bits": 2}, "seed_bits=3, bits=2, parent_bits=8"),
        ({"parent_bits": 9}, "parent_bits=9"),
        ({"split": "best"}, "split=best"),
        ({"seeder": "none"}, "seeder=none"),
        ({"restarts": 0}, "restarts=0"),
        ({"turns": -1}, "turns=-1"),
        ({"output_groups": 2}, "output_groups=2, seeder=squeeze_llm"),
        ({"outliers": 0.06}, "0.06"),
    ]:
        with pytest.raises(ValueError, match=f"AnyPrecision: .* got .*{got}"):
            refuse(**options)
    with pytest.raises(ValueError, match="AnyPrecision: calibration must give guided"):
        AnyPrecision(seeder="lnq").quantize(rows, stats, name="", dtype=jnp.float32)
    with pytest.raises(ValueError, match="AnyPrecision: calibration must give fisher"):
        AnyPrecision().quantize(rows, Stats(), name="", dtype=jnp.float32)
