"""Farthest point sampling is brute force, bit for bit, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from targets import lowered_text

from pallas_kernels import choice, compat, kernels
from pallas_kernels.farthest_point_sampling import (
    blocks,
    farthest_point_sampling,
    mosaic_gpu,
    reference,
    triton,
)
from pallas_kernels.farthest_point_sampling.cases import CASES

CLOUDS = ("uniform", "lattice", "duplicates", "line", "plane of scales")


def cloud(kind: str, N: int, D: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        p = rng.random((N, D))
    elif kind == "lattice":  # most distances tie
        p = rng.permutation(np.stack(np.unravel_index(np.arange(N), (int(np.ceil(N ** (1 / D))),) * D), 1))
    elif kind == "duplicates":
        p = rng.integers(0, 4, (N, D))
    elif kind == "line":
        p = np.linspace(0, 1, N)[:, None] * np.ones(D)
    else:  # far from uniform, as a lidar's
        p = np.exp(rng.uniform(-3, 3, (N, 1))) * rng.standard_normal((N, D)) * ([1] * (D - 1) + [1e-3])
    return p.astype(np.float32)


def brute_force(points, m, start=None, allowed=None, initial=None):
    """NumPy's float32, one operation at a time; a point once."""
    N, D = points.shape
    far = np.full(N, np.inf, np.float32) if initial is None else initial.copy()
    allowed = np.ones(N, bool) if allowed is None else allowed
    far[~allowed] = -1
    taken = ~allowed
    indices, distances = np.full(m, -1), np.zeros(m, np.float32)
    for k in range(min(m, allowed.sum())):
        i = start if k == 0 and start is not None else int(np.argmax(np.where(taken, -2, far)))
        indices[k], distances[k], taken[i] = i, far[i], True
        to = np.zeros(N, np.float32)
        for d in range(D):
            to = to + (points[:, d] - points[i, d]) ** 2
        far = np.where(allowed, np.minimum(far, to), far)
    return indices, distances, far


def assert_is_brute_force(got, *arguments, **options):
    for mine, theirs in zip(got, brute_force(*arguments, **options), strict=False):
        np.testing.assert_array_equal(np.asarray(mine), theirs)


@functools.cache
def by_blocks(N: int, D: int, m: int, tile: blocks.Tile):
    run = functools.partial(blocks.sample, m=m, tile=tile)
    shapes = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.float32)
    return jax.jit(run).lower(*shapes).compile()


def untouched(points) -> jax.Array:
    return jnp.full(points.shape[:-1], jnp.inf, jnp.float32)


@pytest.mark.parametrize("kind", CLOUDS)
def test_picks_are_those_of_brute_force(kind):
    p = cloud(kind, 60)
    assert_is_brute_force(farthest_point_sampling(jnp.asarray(p), 40, start=7, return_minimum=True), p, 40, 7)


@pytest.mark.parametrize("run", [reference.sample, pytest.param(blocks.sample, marks=pytest.mark.slow)])
def test_bits_are_those_of_numpy_whatever_the_compiler_contracts(run, usual_compiler):
    p = cloud("uniform", 3000)
    f = jax.jit(functools.partial(run, m=100)).lower(jnp.asarray(p), untouched(p))
    assert_is_brute_force(f.compile(compiler_options=usual_compiler)(jnp.asarray(p), untouched(p)), p, 100)


@pytest.mark.parametrize("kind", CLOUDS)
def test_many_picks_a_round_are_those_of_brute_force(kind):
    p = cloud(kind, 1000)
    run = by_blocks(1000, 3, 200, blocks.Tile(blocks=64, candidates=32))
    index, distance, after = run(jnp.asarray(p), untouched(p))
    live = brute_force(p, 200)[1] > 0  # what follows is made up elsewhere
    assert_is_brute_force((index[live], distance[live]), p, live.sum())
    np.testing.assert_array_equal(after, brute_force(p, max(live.sum(), 1))[2])


@pytest.mark.parametrize("seed", range(20))
def test_many_picks_a_round_go_on_from_any_minima_and_leave_out_points(seed):
    kind, left = CLOUDS[seed % len(CLOUDS)], [1, 30, 300, 999][seed // len(CLOUDS)]
    rng = np.random.default_rng(seed)
    p = cloud(kind, 1000, seed=seed)
    initial = rng.choice(np.asarray([0.1, 0.2, 0.5, 3.0, np.inf], np.float32), 1000)
    initial[rng.permutation(1000)[left:]] = -1
    run = by_blocks(1000, 3, 200, blocks.Tile(blocks=64, candidates=32))
    index, distance, _ = run(jnp.asarray(p), jnp.asarray(initial))
    want, curve, _ = brute_force(p, 200, allowed=initial >= 0, initial=initial)
    live = curve > 0
    np.testing.assert_array_equal(index[live], want[live])
    np.testing.assert_array_equal(distance[live], curve[live])


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLOUDS)
@pytest.mark.parametrize("N", [6001, 20000])
@pytest.mark.parametrize("D", [2, 3, 5])
def test_large_clouds_are_sampled_by_blocks_exactly(kind, N, D):
    p = cloud(kind, N, D)
    got = farthest_point_sampling(jnp.asarray(p), N // 4, start=N // 2, return_minimum=True)
    assert_is_brute_force(got, p, N // 4, N // 2)


def test_the_room_for_picks_may_run_out():
    """Picks that come early are dropped when their place is needed, and found again."""
    rng = np.random.default_rng(0)
    p = np.concatenate(
        [1000 * cloud("uniform", 64), cloud("uniform", 2000) + rng.choice([0, 1e4], (2000, 1))]
    )
    p = p.astype(np.float32)
    run = by_blocks(len(p), 3, 65, blocks.Tile(blocks=512, candidates=64))
    index, distance, _ = run(jnp.asarray(p), untouched(p))
    assert_is_brute_force((index, distance), p, 65)


def test_a_sample_continues_where_it_was_left():
    p = jnp.asarray(cloud("uniform", 100))
    whole, curve = farthest_point_sampling(p, 30)
    index, distance, minimum = farthest_point_sampling(p, 12, return_minimum=True)
    rest, rest_distance = farthest_point_sampling(p, 18, initial=minimum)
    np.testing.assert_array_equal(np.concatenate([index, rest]), whole)
    np.testing.assert_array_equal(np.concatenate([distance, rest_distance]), curve)


def test_masked_and_infinite_points_are_left_out_and_what_is_missing_is_minus_one():
    p = cloud("uniform", 50)
    p[3, 1], p[8, 0] = np.nan, np.inf
    mask = np.arange(50) % 6 == 2
    got = farthest_point_sampling(jnp.asarray(p), 12, mask=jnp.asarray(mask), start=20)
    mask[8] = False
    assert_is_brute_force(got, np.nan_to_num(p, posinf=0), 12, 20, mask)
    assert got[0][7] == -1 and got[1][7] == 0
    nobody = farthest_point_sampling(jnp.asarray(p), 3, mask=jnp.zeros(50, bool), start=1)
    np.testing.assert_array_equal(nobody[0], [-1] * 3)
    np.testing.assert_array_equal(nobody[1], [0] * 3)


def test_a_start_that_is_masked_gives_way_to_the_farthest():
    p = jnp.asarray(cloud("uniform", 20))
    assert farthest_point_sampling(p, 2, start=0, mask=jnp.arange(20) > 4)[0][0] == 5


def test_the_curve_falls_covers_the_cloud_and_bounds_the_spacing():
    p = cloud("plane of scales", 400)
    index, curve, minimum = farthest_point_sampling(jnp.asarray(p), 80, return_minimum=True)
    assert (np.diff(curve) <= 0).all() and np.isinf(curve[0])
    assert (minimum <= curve[-1]).all()
    chosen = p[np.asarray(index)].astype(np.float64)
    apart = ((chosen[:, None] - chosen[None]) ** 2).sum(-1) + np.diag([np.inf] * 80)
    np.testing.assert_allclose(apart.min(), curve[-1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "lattice"])
@pytest.mark.parametrize(
    ("N", "D", "tile"),
    [
        (300, 3, triton.Tile(part=128, warps=4, in_registers=True)),
        (300, 2, triton.Tile(part=256, warps=4, in_registers=False)),
    ],
)
def test_triton_kernel_equals_brute_force(N, D, tile, kind):
    p = cloud(kind, N, D)
    got = triton.sample(jnp.asarray(p)[None], untouched(p)[None], 20, tile=tile, interpret=True)
    assert_is_brute_force([a[0] for a in got], p, 20)


BLOCKS = [
    pytest.param(300, 3, mosaic_gpu.Tile(blocks=1, warpgroups=1, in_registers=True), id="one warpgroup"),
    pytest.param(1100, 2, mosaic_gpu.Tile(blocks=1, warpgroups=2, in_registers=False), id="two warpgroups"),
    pytest.param(
        700,
        3,
        mosaic_gpu.Tile(blocks=2, warpgroups=2, in_registers=True),
        id="two blocks",
        marks=pytest.mark.skipif(
            not compat.INTERPRETER_KNOWS_LAYOUTS, reason="jax 0.10 interprets no barrier of a cluster"
        ),
    ),
]


@pytest.mark.parametrize("kind", ["lattice", pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("N", "D", "tile"), BLOCKS)
def test_mosaic_kernel_equals_brute_force_without_races(N, D, tile, kind):
    """The interpreter raises at a race."""
    p = cloud(kind, N, D)
    got = mosaic_gpu.sample(jnp.asarray(p)[None], untouched(p)[None], 7, tile=tile, interpret=True)
    assert_is_brute_force([a[0] for a in got], p, 7)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_triton_kernel_lowers(gpu):
    p, far = jnp.zeros((2, 5000, 3)), jnp.zeros((2, 5000))
    assert "farthest_point_sampling" in lowered_text(functools.partial(triton.sample, m=9), p, far, gpu=gpu)


@pytest.mark.parametrize("N", [1000, 30000, 131072])
def test_mosaic_kernel_lowers(N):
    p, far = jnp.zeros((1, N, 3)), jnp.zeros((1, N))
    assert mosaic_gpu.why_not(p, far) is None
    assert "farthest_point_sampling" in lowered_text(functools.partial(mosaic_gpu.sample, m=9), p, far)


def test_clouds_are_sampled_together_by_leading_axes_and_by_vmap():
    p = np.stack([cloud("uniform", 40, seed=i) for i in range(6)]).reshape(2, 3, 40, 3)
    starts = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    index, distance = farthest_point_sampling(jnp.asarray(p), 9, start=starts)
    mapped = jax.vmap(lambda p, s: farthest_point_sampling(p, 9, start=s))(jnp.asarray(p), starts)
    for i in range(6):
        a, b = divmod(i, 3)
        assert_is_brute_force((index[a, b], distance[a, b]), p[a, b], 9, i)
    np.testing.assert_array_equal(mapped[0], index)
    with kernels("triton", interpret=True):
        mapped = jax.vmap(lambda p: farthest_point_sampling(p, 3))(jnp.asarray(p[0]))
    np.testing.assert_array_equal(mapped[0], farthest_point_sampling(jnp.asarray(p[0]), 3)[0])


def test_shard_map_samples_each_device_s_clouds():
    p = jnp.asarray(np.stack([cloud("uniform", 40, seed=i) for i in range(8)]))
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("clouds",))
    spec = PartitionSpec("clouds")
    for interpret, name in ((False, "xla"), (True, "triton")):
        with kernels(name, interpret=interpret):
            run = jax.shard_map(
                lambda p: farthest_point_sampling(p, 5)[0],
                mesh=mesh,
                in_specs=spec,
                out_specs=spec,
                check_vma=not interpret,
            )
            np.testing.assert_array_equal(jax.jit(run)(p), farthest_point_sampling(p, 5)[0])


def test_a_gradient_goes_through_the_picked_points_and_not_through_the_picking():
    p = jnp.asarray(cloud("uniform", 30))

    def loss(p):
        index, distance = farthest_point_sampling(p, 5)
        return p[index].sum() + distance[1:].sum()

    gradient = jax.grad(loss)(p)
    np.testing.assert_array_equal(gradient.sum(0), [5] * 3)


@pytest.fixture
def unchecked():
    """Without the check of annotations, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m=0"),
        ({"m": 3, "start": 30}, "start=30, N=30"),
        ({"m": 3, "mask": jnp.ones(29, bool)}, r"mask must have shape \(30,\), got \(29,\)"),
        ({"m": 3, "initial": jnp.ones((1, 30))}, r"initial must have shape \(30,\)"),
    ],
)
def test_wrong_arguments_are_named(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        farthest_point_sampling(jnp.zeros((30, 3)), **options)


def test_a_named_implementation_never_falls_back():
    p = jnp.zeros((40000, 3))
    for name in ("triton", "mosaic_gpu", "pallas"):
        with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
            farthest_point_sampling(p[:100], 3, implementation=name)
    with kernels("triton", interpret=True), pytest.raises(NotImplementedError, match="at most 32768 points"):
        farthest_point_sampling(p, 3)


def test_a_cpu_takes_the_definition():
    text = jax.jit(lambda p: farthest_point_sampling(p, 3)).lower(jnp.zeros((64, 3))).as_text()
    assert "farthest_point_sampling_kernel" not in text and "custom_call" not in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_definition_on_a_gpu(case):
    if "mosaic_gpu" in case.name and choice.target_capability()[0] != 9:
        pytest.skip("Mosaic kernels are for Hopper")
    arrays = case.operands()
    for mine, theirs in zip(case.run(*arrays), jax.jit(case.reference)(*arrays), strict=True):
        np.testing.assert_array_equal(mine, theirs)
