import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.packing import unpack
from jaxllm.weights import codebook
from jaxllm.weights.matmul import bits_per_weight, dequantize


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_is_its_rows_level_and_codes_are_the_nearest(bits):
    rows = jax.random.normal(jax.random.key(0), (6, 50))
    table = jax.random.normal(jax.random.key(1), (6, 2**bits))
    q = codebook.encode(rows, table, bits=bits)
    levels = np.asarray(table.astype(jnp.float16), np.float32)
    want = np.abs(levels[:, None, :] - np.asarray(rows)[:, :, None]).argmin(-1)  # ties: the lowest
    np.testing.assert_array_equal(unpack(q.codes), want)
    np.testing.assert_array_equal(q.dequantize_rows(jnp.float32), np.take_along_axis(levels, want, 1))
    assert q.shape == (50, 6) and dequantize(q).shape == (50, 6)


def test_the_table_counts():
    q = codebook.encode(jnp.zeros((8, 64)), jnp.zeros((8, 8)), bits=3)
    assert bits_per_weight(q) == 3 + 16 * 8 / 64


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"codebook: table must be \[N, 2\*\*bits\]"):
        codebook.from_codes(jnp.zeros((3, 4), jnp.int32), jnp.zeros((3, 4)), bits=3)
