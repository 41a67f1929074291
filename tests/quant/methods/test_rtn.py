"""Round to nearest, and what its range search may and may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quant.methods.rtn import FINE, RANGES, Rtn, clip_error
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine

N, K, GROUP = 8, 150, 32


@pytest.fixture(scope="module")
def rows():
    return jax.random.t(jax.random.key(0), 3.0, (N, K))


def error(rows, stored, weight):
    """The weighed squared error of each row's groups [N, G], in float64."""
    e = np.asarray(rows - stored.dequantize_rows(), np.float64) ** 2 * np.asarray(weight, np.float64)
    return np.pad(e, ((0, 0), (0, -K % GROUP))).reshape(N, -1, GROUP).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_clipping_it_is_the_grid_from_least_to_greatest(rows, symmetric):
    got = Rtn(bits=3, group_size=GROUP, symmetric=symmetric).quantize(
        rows, Stats(), name="w", dtype=jnp.float32
    )
    want = affine.quantize(rows.T, bits=3, group_size=GROUP, symmetric=symmetric)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert Rtn().required_stats == frozenset() and Rtn(clip=True).required_stats == {"hessian_diag"}


@pytest.mark.parametrize("integer_zero_point", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_clipping_never_raises_a_groups_error_and_lowers_most(rows, integer_zero_point, weighted):
    weight = jnp.exp(jnp.linspace(-2, 2, K)) if weighted else jnp.ones(K)
    stats = Stats(hessian_diag=weight) if weighted else Stats()
    plain, clipped = (
        Rtn(bits=2, group_size=GROUP, clip=clip, integer_zero_point=integer_zero_point).quantize(
            rows, stats, name="w", dtype=jnp.float32
        )
        for clip in (False, True)
    )
    before, after = error(rows, plain, weight), error(rows, clipped, weight)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_the_best_of_all_it_tries(rows, symmetric):
    method = Rtn(bits=2, group_size=GROUP, clip=True, symmetric=symmetric)
    weight = jnp.exp(jnp.linspace(-2, 2, K))
    stored = method.quantize(rows, Stats(hessian_diag=weight), name="w", dtype=jnp.float32)
    kept = {"bits": 2, "group_size": GROUP}

    def tried(stretch, move):
        scale, zero_point = affine.min_max(rows, **kept, symmetric=symmetric, clip_ratio=stretch)
        zero_point = None if symmetric else jnp.clip(zero_point + move, 0, 3)
        return error(
            rows, affine.encode(rows, scale, zero_point, **kept, integer_zero_point=not symmetric), weight
        )

    first = list(RANGES)
    coarse = np.stack([tried(stretch, 0) for stretch in first])
    centre = np.asarray(first, np.float32)[coarse.argmin(0)]
    fine = [tried(centre + np.float32(step), move) for step, move in FINE if not (symmetric and move)]
    least = np.minimum(coarse.min(0), np.min(fine, 0))
    np.testing.assert_allclose(error(rows, stored, weight), least, rtol=1e-3)
    assert symmetric or least.sum() < 0.99 * coarse.min(0).sum()  # the second round pays


def test_the_error_searched_is_that_of_what_is_stored(rows):
    method = Rtn(bits=3, group_size=GROUP, clip=True)
    stored = method.quantize(rows, Stats(), name="w", dtype=jnp.float32)
    scale, zero_point = method.grid(rows)
    got = clip_error(rows, scale, zero_point, jnp.ones(K), bits=3, group_size=GROUP)
    np.testing.assert_allclose(got, error(rows, stored, np.ones(K)), rtol=1e-4)


def test_the_scale_of_the_statistics_does_not_matter_and_dead_inputs_work(rows):
    method = Rtn(bits=2, group_size=GROUP, clip=True)
    hessian_diag = jnp.exp(jnp.linspace(-2, 2, K)).at[:64].set(0.0)
    one, two, none = (
        method.quantize(rows, Stats(hessian_diag=d), name="w", dtype=jnp.float32)
        for d in (hessian_diag, hessian_diag * 2.0**-70, hessian_diag * 0)
    )
    jax.tree.map(np.testing.assert_array_equal, two, one)
    same = method.quantize(rows, Stats(), name="w", dtype=jnp.float32)
    np.testing.assert_array_equal(
        one.dequantize_rows()[:, :64], same.dequantize_rows()[:, :64]
    )  # two groups of dead inputs only
    np.testing.assert_array_equal(none.dequantize_rows(), same.dequantize_rows())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_any_shape_and_groups_wider_than_it_work(shape):
    rows = jax.random.normal(jax.random.key(1), shape)
    stored = Rtn(bits=8, group_size=32, clip=True).quantize(rows, Stats(), name="w", dtype=jnp.bfloat16)
    assert stored.shape == shape[::-1] and stored.dtype == jnp.bfloat16
    np.testing.assert_allclose(stored.dequantize_rows(), rows, atol=0.02)


def test_what_makes_no_sense_is_refused(rows):
    with pytest.raises(ValueError, match="rtn: bits must be 1 to 8, got bits=0"):
        Rtn(bits=0)
    with pytest.raises(ValueError, match="rtn: group_size must be at least 1, got group_size=0"):
        Rtn(group_size=0)
    with pytest.raises(ValueError, match="weights must be finite, got NaN"):
        Rtn().quantize(rows.at[0, 0].set(jnp.nan), Stats(), name="w", dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"rtn: statistics must be of K inputs, got K=150, .*\(5,\)"):
        Rtn(clip=True).quantize(rows, Stats(hessian_diag=jnp.ones(5)), name="w", dtype=jnp.float32)
