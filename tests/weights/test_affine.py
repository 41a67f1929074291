import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm as jl
from jaxllm.ops.packing import unpack
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine
from jaxllm.weights.matmul import bits_per_weight, dequantize, num_bytes


def weight(K=96, N=40, seed=0):
    return jax.random.normal(jax.random.key(seed), (K, N))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("integer_zero_point", [True, False])
def test_error_is_at_most_half_a_step_and_a_bit(bits, integer_zero_point):
    w = weight()
    q = affine.quantize(w, bits=bits, group_size=32, integer_zero_point=integer_zero_point)
    error = jnp.abs(dequantize(q) - w).reshape(3, 32, 40).max(1)
    step = q.scale.astype(jnp.float32)
    # a scale's float16 moves the far end of the grid by up to 2**(bits - 11) steps, a whole zero by 1/2
    assert bool((error <= step * (0.5 + 2.0 ** (bits - 10) + 0.5 * integer_zero_point)).all())


def test_codes_are_the_nearest_under_the_stored_scale_and_zero():
    rows = weight().T
    scale, zero_point = affine.min_max(rows, bits=2, group_size=32)
    q = affine.encode(rows, scale * 0.7, zero_point + 0.3, bits=2, group_size=32)
    grid = jnp.arange(4.0)[:, None, None] - q.zero_point.astype(jnp.float32).T[None]
    levels = grid * q.scale.astype(jnp.float32).T[None]  # [4, N, G]
    distance = jnp.abs(levels[..., None] - rows.reshape(1, 40, 3, 32))
    got = unpack(q.codes).reshape(40, 3, 32)
    chosen = jnp.take_along_axis(distance, got[None].astype(jnp.int32), axis=0)[0]
    np.testing.assert_allclose(chosen, distance.min(0), atol=1e-6)


@pytest.mark.parametrize("K", [1, 5, 32, 33, 100, 172])
def test_any_number_of_inputs_works_and_the_last_group_may_be_short(K):
    w = weight(K, 7)
    q = affine.quantize(w, bits=4, group_size=min(32, K))
    assert q.shape == (K, 7) and q.scale.shape == (-(-K // 32), 7)
    assert float(jnp.abs(dequantize(q) - w).max()) < 0.6


def test_symmetric_codes_need_no_zero_and_hold_zero_exactly():
    w = weight().at[:4].set(0.0)
    q = affine.quantize(w, bits=4, group_size=96, symmetric=True)
    assert q.zero_point is None
    assert not dequantize(q)[:4].any()


def test_weights_on_a_grid_come_back_bit_for_bit():
    codes = np.random.default_rng(0).integers(0, 8, (32, 6))
    codes[:2] = [[0], [7]]
    w = jnp.asarray((codes - 3) * 0.25, jnp.float32)
    np.testing.assert_array_equal(dequantize(affine.quantize(w, bits=3, group_size=32)), w)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.5, -3.0, 400.0])
def test_a_constant_group_is_kept_as_its_mean(value):
    rows = jnp.full((2, 64), value)
    q = affine.encode(rows, jnp.full((2, 2), 1e-9), jnp.full((2, 2), 1e9), bits=2, group_size=32)
    np.testing.assert_allclose(q.dequantize_rows(jnp.float32), rows, rtol=1e-3, atol=1e-6)


def test_bits_are_counted_from_what_is_stored():
    w = weight(64, 64)
    assert bits_per_weight(affine.quantize(w, bits=2, group_size=32, integer_zero_point=False)) == 3.0
    q = affine.quantize(w, bits=2, group_size=32)
    assert bits_per_weight(q) == 2 + (16 + 2) / 32
    assert num_bytes(q) == sum(x.nbytes for x in jax.tree.leaves(q))
    assert bits_per_weight(affine.quantize(w, bits=3, group_size=64, symmetric=True)) == 3.25


@pytest.mark.parametrize("K", [100, 512])
def test_scales_in_codes_cost_fewer_bits_and_codes_are_nearest_under_them(K):
    rows = weight(K, 96).T * jnp.linspace(0.5, 2.0, K)[None]
    sizes = ("bits", "group_size", "integer_zero_point", "scale_bits")
    encode = jax.jit(affine.encode, static_argnames=sizes)
    plain = encode(
        rows, *affine.min_max(rows, bits=3, group_size=32), bits=3, group_size=32, integer_zero_point=True
    )
    q = encode(
        rows,
        *affine.min_max(rows, bits=3, group_size=32),
        bits=3,
        group_size=32,
        integer_zero_point=True,
        scale_bits=6,
    )
    exact, coded = (np.asarray(affine.scales(w)) for w in (plain, q))
    block = affine.OUTPUTS_PER_SCALE
    greatest = [exact[:, i : i + block].max(1) for i in range(0, 96, block)]
    greatest = np.repeat(np.stack(greatest, 1), block, axis=1)[:, :96]
    # off by half a step of the scale of scales at most, and by float16's rounding of it
    assert (np.abs(coded - exact) <= greatest / 63 * 0.5 + greatest * 2.0**-10).all() and (coded > 0).all()
    s, z = (np.repeat(np.asarray(v).T, 32, axis=1)[:, :K] for v in (coded, affine.zero_points(q)))
    levels = (np.arange(8)[:, None, None] - z) * s
    rows = np.asarray(rows)
    np.testing.assert_allclose(np.abs(q.dequantize_rows() - rows), np.abs(levels - rows).min(0), atol=1e-6)
    if K == 512:
        assert bits_per_weight(q) < bits_per_weight(plain) - 0.2  # of 19 / 32 for scales and zeros
        lost = [float(jnp.mean((w.dequantize_rows() - rows) ** 2)) for w in (plain, q)]
        assert lost[1] < 1.02 * lost[0]


def test_scales_in_codes_need_a_zero_that_does_not_move():
    for make in (jl.Rtn, jl.DashQ):
        with pytest.raises(ValueError, match="scale_bits needs integer_zero_point=True or a symmetric grid"):
            make(bits=2, integer_zero_point=False, scale_bits=6)
    with pytest.raises(ValueError, match="rtn: scale_bits must be 2 to 8, got scale_bits=9"):
        jl.Rtn(scale_bits=9)
    with pytest.raises(ValueError, match="scale_bits needs feedback=False"):
        jl.DashQ(integer_zero_point=True, feedback=True, scale_bits=6)
    stats = Stats(hessian_diag=jnp.ones(256), tokens=9)
    for method in (
        jl.Rtn(bits=2, symmetric=True, scale_bits=6),
        jl.DashQ(group_size=32, integer_zero_point=True, scale_bits=6),
    ):
        w = method.quantize(weight(256, 32).T, stats, name="up", dtype=jnp.float32)
        assert isinstance(w.scale, affine.Affine) and bits_per_weight(w) < 2.4


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="affine: bits must be 1 to 8, got bits=0"):
        affine.quantize(weight(), bits=0, group_size=32)
    with pytest.raises(ValueError, match="affine: group_size must be 1 to K, got group_size=128, K=96"):
        affine.quantize(weight(), bits=4, group_size=128)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="affine: weights must be finite"):
            affine.quantize(weight().at[3, 3].set(bad), bits=4, group_size=32)
        rows, one = weight().T.at[3, 3].set(bad), jnp.ones((40, 3))
        with pytest.raises(ValueError, match="affine: weights must be finite"):
            affine.encode(rows, one, one, bits=4, group_size=32)
