"""Ball query and k nearest are brute force, bit for bit, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.neighbours import ball_query, knn, triton
from pallas_kernels.neighbours.cases import CASES

BY = [("xla", False), ("triton", True)]


def cloud(kind: str, N: int, D: int) -> np.ndarray:
    rng = np.random.default_rng(N)
    if kind == "uniform":
        return rng.random((N, D)).astype(np.float32)
    return rng.integers(0, 5, (N, D)).astype(np.float32) / 4  # a lattice with duplicates: most distances tie


def squared_distances(points, queries):
    total = np.zeros((len(queries), len(points)), np.float32)
    for d in range(points.shape[1]):
        total = total + (points[None, :, d] - queries[:, None, d]) ** 2
    return total


def brute_ball(points, queries, radius, k, allowed=True):
    near = (squared_distances(points, queries) < np.float32(radius) * np.float32(radius)) & allowed
    index = np.full((len(queries), k), -1)
    for row, is_near in zip(index, near, strict=True):
        found = np.flatnonzero(is_near)
        row[:] = found[0] if len(found) else -1
        row[: min(k, len(found))] = found[:k]
    return index, near.sum(1)


def brute_nearest(points, queries, k, allowed=True):
    distance = np.where(allowed, squared_distances(points, queries), np.inf)
    distance = np.pad(distance, ((0, 0), (0, k)), constant_values=np.inf)
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    distance = np.take_along_axis(distance, index, 1)
    return np.where(np.isinf(distance), -1, index), distance


def assert_equal(got, want):
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), theirs)


@pytest.mark.parametrize(("name", "interpret"), BY)
@pytest.mark.parametrize("kind", ["uniform", "lattice"])
@pytest.mark.parametrize(("N", "M", "D", "k"), [(70, 21, 3, 5), (33, 5, 2, 40)])
def test_neighbours_are_those_of_brute_force(name, interpret, kind, N, M, D, k):
    p, q = cloud(kind, N, D), cloud(kind, M, D)
    allowed = np.arange(N) % 4 != 1
    with kernels(name, interpret=interpret):
        for mask, ok in ((None, True), (jnp.asarray(allowed), allowed)):
            got = ball_query(jnp.asarray(p), jnp.asarray(q), 0.3, k, mask=mask)
            assert_equal(got, brute_ball(p, q, 0.3, k, ok))
            got = knn(jnp.asarray(p), jnp.asarray(q), k, mask=mask)
            assert_equal(got, brute_nearest(p, q, k, ok))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "lattice"])
def test_tiles_of_queries_join_to_brute_force(kind, usual_compiler):
    p, q = cloud(kind, 6000, 3), cloud(kind, 1111, 3)
    assert_equal(ball_query(jnp.asarray(p), jnp.asarray(q), 0.1, 20), brute_ball(p, q, 0.1, 20))
    assert_equal(knn(jnp.asarray(p), jnp.asarray(q), 7), brute_nearest(p, q, 7))


def test_bits_are_those_of_numpy_whatever_the_compiler_contracts(usual_compiler):
    p, q = cloud("uniform", 500, 3), cloud("uniform", 60, 3)
    f = jax.jit(functools.partial(knn, k=9)).lower(jnp.asarray(p), jnp.asarray(q))
    got = f.compile(compiler_options=usual_compiler)(jnp.asarray(p), jnp.asarray(q))
    assert_equal(got, brute_nearest(p, q, 9))


@pytest.mark.parametrize(("name", "interpret"), BY)
def test_an_empty_ball_is_minus_one_and_a_full_one_says_how_many_it_left_out(name, interpret):
    p = jnp.zeros((40, 3))
    q = jnp.asarray([[0.0, 0, 0], [0.5, 0, 0], [jnp.nan, 0, 0]])
    with kernels(name, interpret=interpret):
        index, count = ball_query(p, q, 0.5, 4)  # a point at the radius is not in the ball
        np.testing.assert_array_equal(index, [[0, 1, 2, 3], [-1] * 4, [-1] * 4])
        np.testing.assert_array_equal(count, [40, 0, 0])
        index, distance = knn(p, q, 2)
        np.testing.assert_array_equal(index, [[0, 1], [0, 1], [-1, -1]])
        np.testing.assert_array_equal(distance, [[0, 0], [0.25, 0.25], [jnp.inf] * 2])


@pytest.mark.parametrize(("name", "interpret"), BY)
def test_points_that_are_not_finite_are_nobody_s_neighbours(name, interpret):
    p = cloud("uniform", 20, 3)
    p[[2, 5]] = [[np.nan, 0, 0], [0, np.inf, 0]]
    allowed = ~np.isin(np.arange(20), (2, 5))
    p0 = np.where(allowed[:, None], p, 0)
    with kernels(name, interpret=interpret):
        got = knn(jnp.asarray(p), jnp.asarray(p0), 19)
        assert_equal(got, brute_nearest(p0, p0, 19, allowed))


def test_clouds_by_leading_axes_by_vmap_and_with_a_radius_each():
    p = np.stack([cloud("uniform", 30 + i, 3)[:30] for i in range(4)]).reshape(2, 2, 30, 3)
    x = jnp.asarray(p)
    index, count = ball_query(x, x[..., :6, :], 0.4, 5)
    nearest = knn(x, x[..., :6, :], 3)
    for i in range(4):
        a, b = divmod(i, 2)
        assert_equal((index[a, b], count[a, b]), brute_ball(p[a, b], p[a, b, :6], 0.4, 5))
        assert_equal([n[a, b] for n in nearest], brute_nearest(p[a, b], p[a, b, :6], 3))
    mapped = jax.vmap(lambda p: knn(p, x[0, 0, :6], 3))(x[0])
    assert_equal([m[1] for m in mapped], brute_nearest(p[0, 1], p[0, 0, :6], 3))
    radii = jnp.asarray([0.2, 0.5])
    mapped = jax.vmap(lambda p, r: ball_query(p, p[:6], r, 5))(x[0], radii)
    assert_equal([m[1] for m in mapped], brute_ball(p[0, 1], p[0, 1, :6], 0.5, 5))


def test_shard_map_searches_each_device_s_queries():
    p, q = jnp.asarray(cloud("uniform", 50, 3)), jnp.asarray(cloud("uniform", 32, 3))
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("queries",))
    spec = PartitionSpec("queries")
    for name, interpret in BY:
        with kernels(name, interpret=interpret):
            run = jax.shard_map(
                lambda p, q: (*ball_query(p, q, 0.3, 4), *knn(p, q, 4)),
                mesh=mesh,
                in_specs=(PartitionSpec(), spec),
                out_specs=spec,
                check_vma=not interpret,
            )
            assert_equal(jax.jit(run)(p, q), (*ball_query(p, q, 0.3, 4), *knn(p, q, 4)))


def test_a_gradient_goes_through_the_points_that_are_found():
    p = jnp.asarray(cloud("uniform", 30, 3))

    def loss(p):
        index, distance = knn(p, p, 3)
        return p[index].sum() + distance.sum()

    np.testing.assert_array_equal(jax.grad(loss)(p).sum(0), [90] * 3)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_kernels_lower(gpu):
    p, q, radius = jnp.zeros((2, 1000, 3)), jnp.zeros((2, 100, 3)), jnp.float32(0.1)
    assert "ball_query" in lowered_text(functools.partial(triton.ball_query, k=32), p, q, radius, gpu=gpu)
    assert "knn" in lowered_text(functools.partial(triton.knn, k=3), p, q, gpu=gpu)


def test_wrong_arguments_are_named():
    jaxtyping.config.update("jaxtyping_disable", True)  # users have no check of annotations
    p = jnp.zeros((10, 3))
    with pytest.raises(ValueError, match="k=0"):
        knn(p, p, 0)
    with pytest.raises(ValueError, match=r"mask must have shape \(10,\), got \(9,\)"):
        ball_query(p, p, 1.0, 3, mask=jnp.ones(9, bool))
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_named_implementation_never_falls_back():
    p = jnp.zeros((10, 3))
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        knn(p, p, 2, implementation="triton")
    with pytest.raises(NotImplementedError, match="no mosaic_gpu kernel: none was written"):
        ball_query(p, p, 1.0, 2, implementation="mosaic_gpu")
    with (
        kernels("triton", interpret=True),
        pytest.raises(NotImplementedError, match="at most 128 neighbours"),
    ):
        knn(p, p, 200)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_definition_on_a_gpu(case):
    arrays = case.operands()
    index, other = case.run(*arrays)
    want, theirs = jax.jit(case.reference)(*arrays)
    np.testing.assert_array_equal(other, theirs)
    live = np.arange(index.shape[2]) < (np.asarray(other)[..., None] if other.ndim == 2 else np.inf)
    np.testing.assert_array_equal(np.where(live, index, -1), np.where(live, want, -1))
