import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.qwix import from_qwix, to_qwix
from jaxllm.weights import affine
from jaxllm.weights.matmul import dequantize

qwix = pytest.importorskip("qwix", reason="qwix is in the test extra")


def weight(K=64, N=24):
    return jax.random.normal(jax.random.key(0), (K, N))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_means_the_same_to_qwix(bits, symmetric):
    w = affine.quantize(weight(), bits=bits, group_size=32, symmetric=symmetric)
    array = to_qwix(w)
    assert isinstance(array, qwix.QArray) and array.shape == (64, 24)
    np.testing.assert_array_equal(qwix.dequantize(array), dequantize(w))
    if bits != 3:  # qwix has no 3 bits: the codes lie in int8
        back = from_qwix(array)
        jax.tree.map(np.testing.assert_array_equal, back, w)


@pytest.mark.parametrize("qtype", ["int4", "int8"])
@pytest.mark.parametrize(
    "how", [{"tiled_axes": {0: 16}, "channelwise_axes": [1]}, {"channelwise_axes": [1]}, {}]
)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_an_array_of_qwix_means_the_same_here(qtype, how, method):
    array = qwix.quantize(weight(), qtype, calibration_method=method, **how)
    w = from_qwix(array)
    np.testing.assert_allclose(dequantize(w), qwix.dequantize(array), rtol=2.0**-10, atol=1e-6)
    again = to_qwix(w)
    np.testing.assert_array_equal(again.qvalue.astype(jnp.int32), array.qvalue.astype(jnp.int32))


def test_what_the_other_cannot_say_is_refused():
    with pytest.raises(ValueError, match="to_qwix: zeros must be whole codes"):
        to_qwix(affine.quantize(weight(), bits=4, group_size=32, integer_zero_point=False))
    with pytest.raises(ValueError, match="to_qwix: group_size must divide K, got group_size=48, K=64"):
        to_qwix(affine.quantize(weight(), bits=4, group_size=48))
    with pytest.raises(ValueError, match="from_qwix: qtype must be one of int2, int4, int8, got nf4"):
        from_qwix(qwix.quantize(weight(), "nf4", channelwise_axes=[1]))
    with pytest.raises(ValueError, match="from_qwix: the array must be"):
        from_qwix(qwix.quantize(jnp.ones((2, 4, 8)), "int8"))
