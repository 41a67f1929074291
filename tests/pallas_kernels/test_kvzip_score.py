"""How much attention keys receive: the streaming score is the score of stored weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.kvzip_score import attention_per_key
from pallas_kernels.kvzip_score.cases import CASES


def example(*, B=2, T=70, S=100, K=2, G=2, E=32, dtype=jnp.float32, seed=0) -> list[jax.Array]:
    """Queries, keys and what is seen: a key here and there is hidden, a query at the end sees none."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, T, K * G, E), np.float32)).astype(dtype)
    k = jnp.asarray(rng.standard_normal((B * K, S, E), np.float32)).astype(dtype)
    seen = rng.random((B, T, S)) < 0.9
    seen &= np.arange(S)[None, None] <= np.arange(T)[None, :, None] + S - T
    seen[-1, -3:] = False
    return [q, k, jnp.asarray(seen)]


def exact(q, k, seen, sinks=None, share=None, *, scale, softcap=None, reduce="max") -> np.ndarray:
    """The weights in float64, stored."""
    q, k, seen = (np.asarray(x, np.float64) for x in (q, k, seen))
    (B, _, H, E), (J, S, _) = q.shape, k.shape
    K = J // B
    keys = np.repeat(k.reshape(B, K, S, E), H // K, axis=1)
    scores = np.einsum("bthe,bhse->bhts", q, keys) * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores) * seen[:, None]
    total = weights.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[None, :, None])
    weights = weights / np.maximum(total, 1e-300)[..., None]
    weights = weights if share is None else weights * np.asarray(share)[:, None, :, None]
    out = weights.max(2) if reduce == "max" else weights.sum(2)
    return out.reshape(B, K, H // K, S)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_score_equals_that_of_stored_weights(implementation, reduce):
    arrays, rng = example(), np.random.default_rng(1)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)
    share = jnp.asarray(rng.uniform(0.5, 2, (2, 70)), jnp.float32)
    rule = {"scale": 0.3, "softcap": 4.0, "reduce": reduce}
    with kernels(implementation, interpret=True):
        got = attention_per_key(*arrays, sinks, share, **rule)
    np.testing.assert_allclose(got, exact(*arrays, sinks, share, **rule), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [{"T": 1, "S": 33, "E": 80, "dtype": jnp.bfloat16}, {"T": 65, "S": 65, "dtype": jnp.float16}],
    ids=str,
)
def test_triton_equals_the_reference(shape):
    arrays = example(B=1, **shape)
    with kernels("triton", interpret=True):
        got = attention_per_key(*arrays, scale=0.2)
    np.testing.assert_allclose(got, attention_per_key(*arrays, scale=0.2), rtol=2e-3, atol=1e-5)


MOSAIC = [  # the tolerance is that of float32: both know the same rounded queries and keys
    ({"T": 70, "S": 150, "K": 1, "E": 64, "dtype": jnp.bfloat16}, {"reduce": "max", "softcap": 4.0}),
    pytest.param(
        {"T": 150, "S": 290, "E": 128, "dtype": jnp.float16, "B": 1, "G": 1},
        {"reduce": "sum"},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"T": 130, "S": 130, "E": 64, "dtype": jnp.bfloat16, "B": 1}, {"scale": -0.2}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("shape", "rule"), MOSAIC, ids=str)
def test_mosaic_equals_stored_weights(shape, rule):
    arrays, rng = example(**shape), np.random.default_rng(1)
    B, T, H, _ = arrays[0].shape
    sinks = jnp.asarray(rng.standard_normal(H), jnp.float32)
    share = jnp.asarray(rng.uniform(0, 2, (B, T)), jnp.float32)
    rule = {"scale": 0.3, **rule}
    with kernels("mosaic_gpu", interpret=True):
        got = attention_per_key(*arrays, sinks, share, **rule)
    np.testing.assert_allclose(got, exact(*arrays, sinks, share, **rule), rtol=2e-5, atol=1e-6)


def test_mosaic_takes_what_wgmma_takes():
    q, k, seen = example(E=80, dtype=jnp.bfloat16)
    with kernels("mosaic_gpu", interpret=True):
        with pytest.raises(NotImplementedError, match="64 or 128 numbers, got E=80"):
            attention_per_key(q, k, seen, scale=1.0)
        with pytest.raises(NotImplementedError, match="16 bits"):
            attention_per_key(*example(E=64), scale=1.0)


def test_nan_reaches_the_keys_that_its_query_sees():
    q, k, seen = example(B=1, T=5, S=20)
    q = q.at[0, 1, 0, 0].set(jnp.nan)
    with kernels("triton", interpret=True):
        got = np.asarray(attention_per_key(q, k, seen, scale=0.2))
    assert np.isnan(got[0, 0, 0, np.asarray(seen[0, 1])]).all()
    assert np.isfinite(got[0, 0, 1]).all() and np.isfinite(got[0, 1]).all()


@pytest.mark.slow
def test_vmap_and_gradient_follow_the_reference():
    q, k, seen = example(B=1, T=5, S=20)
    of = functools.partial(attention_per_key, scale=0.2)
    both = jnp.stack([q, 2 * q])
    wanted = jnp.stack([of(x, k, seen) for x in both])
    slope = jax.grad(lambda q: of(q, k, seen).sum())(q)
    with kernels("triton", interpret=True):
        np.testing.assert_allclose(jax.vmap(lambda q: of(q, k, seen))(both), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda q: of(q, k, seen).sum())(q), slope, rtol=1e-4, atol=1e-6)


def test_key_heads_on_8_devices_give_what_one_gives():
    q, k, seen = example(B=1, T=5, S=20, K=8, G=1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        functools.partial(attention_per_key, scale=0.2),
        mesh=mesh,
        in_specs=(PartitionSpec(None, None, "x"), PartitionSpec("x"), PartitionSpec()),
        out_specs=PartitionSpec(None, "x"),
        check_vma=False,
    )
    wanted = attention_per_key(q, k, seen, scale=0.2)
    with kernels("triton", interpret=True):
        np.testing.assert_allclose(jax.jit(spread)(q, k, seen), wanted, rtol=1e-5, atol=1e-6)


def test_errors_and_names_are_kept():
    q, k, seen = example()
    with pytest.raises(ValueError, match="attention_per_key: J = B K blocks"):
        attention_per_key(q[:, :, :3], k, seen, scale=1.0)
    with pytest.raises(NotImplementedError, match="NVIDIA"):
        attention_per_key(q, k, seen, scale=1.0, implementation="triton")
    text = jax.jit(functools.partial(attention_per_key, scale=1.0)).lower(q, k, seen).as_text()
    assert "custom_call" not in text


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_real_shapes_lower_for_cuda(case):
    text = lowered_text(case.run, *case.arrays)
    assert "kvzip_score_sums" in text and "kvzip_score_weights" in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_real_gpu_gives_what_the_reference_gives(case):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    arrays = case.operands()
    np.testing.assert_allclose(
        jax.jit(case.run)(*arrays), jax.jit(case.reference)(*arrays), rtol=2e-2, atol=1e-4
    )
