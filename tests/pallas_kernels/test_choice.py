"""Which implementation runs, and that a named one is never changed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choice, kernels
from pallas_kernels.choice import Kernel, rows_together, run


def doubled(x):
    return 2 * x


def tripled(x, *, interpret):
    """A kernel that is wrong, so that it can be told from the reference."""
    return 3 * x


def too_long(x):
    return "takes no more than 4 numbers" if x.size > 4 else None


TRITON = Kernel("triton", tripled, too_long)
HOPPER = Kernel("mosaic_gpu", tripled, too_long, capability=(9, 0))


def double(x, implementation=None):
    return run("double", (x,), reference=doubled, backends=(HOPPER, TRITON), implementation=implementation)


def test_outside_of_any_context_a_cpu_takes_the_reference():
    assert double(jnp.float32(2)) == 4


@pytest.mark.parametrize("name", ["pallas", "triton", "mosaic_gpu"])
def test_a_named_kernel_does_not_fall_back_on_a_cpu(name):
    with kernels(name), pytest.raises(NotImplementedError, match="double: no .* kernel: .* NVIDIA GPUs only"):
        double(jnp.float32(2))
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        double(jnp.float32(2), name)


def test_a_named_kernel_does_not_fall_back_for_a_shape():
    with kernels("triton", interpret=True):
        assert double(jnp.ones(4))[0] == 3
        with pytest.raises(NotImplementedError, match="triton takes no more than 4 numbers"):
            double(jnp.ones(5))


def test_a_name_in_the_call_goes_before_the_context():
    with kernels("pallas", interpret=True):
        assert double(jnp.float32(2), "xla") == 4


def test_a_compiled_function_is_traced_again_within_another_context():
    f = jax.jit(double)
    assert f(jnp.float32(2)) == 4
    with kernels("pallas", interpret=True):
        assert f(jnp.float32(2)) == 6
    assert f(jnp.float32(2)) == 4


def test_auto_takes_a_mosaic_kernel_only_once_it_has_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "target_capability", lambda: (9, 0))
    monkeypatch.setattr(choice, "_is_whole", lambda: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))

    def of(*backends):
        return run("double", (jnp.float32(2),), reference=doubled, backends=backends)

    with kernels("auto", interpret=True):
        assert of(HOPPER) == 4
        assert of(HOPPER, TRITON) == 6
        assert of(dataclasses.replace(HOPPER, proven=True)) == 6
    with kernels("pallas", interpret=True):
        assert of(HOPPER) == 6


def test_arrays_are_whole_on_one_device_or_within_shard_map(monkeypatch):
    seen = []

    def look(x):
        seen.append(choice._is_whole())
        return x

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert not choice._is_whole()  # eight devices
    for axes in ({"a", "b"}, {"a"}):
        spec = jax.sharding.PartitionSpec(tuple(sorted(axes)))
        by_parts = jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        jax.jit(by_parts).lower(jnp.ones(8))
    assert seen == [True, False]  # cut along all axes; along one, the other is the partitioner's
    monkeypatch.setattr(jax, "local_devices", lambda: [None])
    assert choice._is_whole()


def test_a_gpu_that_a_kernel_was_not_made_for_is_told(monkeypatch):
    monkeypatch.setattr(choice, "target_capability", lambda: (10, 0))
    blackwell = dataclasses.replace(HOPPER, below=(10, 0))
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu .* from 9\.0 to below 10\.0, got 10\.0"):
        run("double", (jnp.ones(2),), reference=doubled, backends=[blackwell], implementation="mosaic_gpu")


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="must be one of auto, xla, pallas, triton, mosaic_gpu, got .*'cuda'"
    ):
        kernels("cuda")


def test_gradients_are_the_references():
    with kernels("triton", interpret=True):
        value, gradient = jax.value_and_grad(double)(jnp.float32(2))
    assert (value, gradient) == (6, 2)


def test_vmap_over_rows_makes_more_rows():
    shapes = []

    def product(x, w):
        shapes.append((x.shape, w.shape))
        return x @ w

    x, w = jnp.ones((5, 3, 4)), jnp.ones((4, 2))
    np.testing.assert_array_equal(jax.vmap(rows_together(product), (0, None))(x, w), x @ w)
    assert shapes[-1] == ((5, 3, 4), (4, 2))


@pytest.mark.parametrize("stacked", [None, jnp.matmul])
def test_vmap_over_operands_takes_a_stack_of_them(stacked):
    def product(x, w):
        return x @ w

    x, w = jnp.ones((3, 4)), jnp.arange(40.0).reshape(5, 4, 2)
    got = jax.vmap(rows_together(product, stacked=stacked), (None, 0))(x, w)
    np.testing.assert_array_equal(got, x @ w)
