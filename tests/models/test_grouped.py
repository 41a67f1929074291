"""The product over experts is that of a loop over rows, whatever the format and whoever else is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.grouped import MAX_TILE, group, grouped_matmul, ragged_product, tile_rows
from jaxllm.weights import affine
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts, members, parts, stack

X, K, N = 5, 32, 8
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((X, N, K)).astype(np.float32)


def by_rows(x, rows, chosen):
    return np.einsum("rk,rnk->rn", x, rows[chosen])


@pytest.fixture(scope="module")
def product():
    return jax.jit(lambda x, w, chosen: grouped_matmul(x, w, group(chosen, experts=X)))


# one row; more experts than rows; experts without rows; all rows of one expert
@pytest.mark.parametrize("chosen", [[3], [4, 0, 4], [1] * 9 + [3] * 30, [2] * 40])
def test_each_row_meets_the_weight_of_its_expert(product, chosen):
    chosen = np.asarray(chosen, np.int32)
    x = RNG.standard_normal((len(chosen), K)).astype(np.float32)
    want = by_rows(x, ROWS, chosen)
    np.testing.assert_allclose(product(x, Experts(Dense(jnp.asarray(ROWS))), chosen), want, atol=1e-5)


def test_stored_codes_and_the_ragged_product_of_accelerators_give_the_same(product):
    chosen = RNG.integers(0, X, 39).astype(np.int32)
    x = RNG.standard_normal((39, K)).astype(np.float32)
    coded = stack([affine.quantize(jnp.asarray(rows.T), bits=4, group_size=16) for rows in ROWS])
    assert coded.shape == (X, K, N) and members("up", coded)[3] == "up.3"
    rows = np.stack([np.asarray(one.dequantize_rows(jnp.float32)) for one in parts(coded)])
    np.testing.assert_allclose(product(x, coded, chosen), by_rows(x, rows, chosen), atol=1e-5)

    @jax.jit
    def ragged(x, chosen):
        groups = group(chosen, experts=X)
        return ragged_product(x[groups.source], jnp.asarray(ROWS), groups.sizes)[groups.place]

    np.testing.assert_allclose(ragged(x, chosen), by_rows(x, ROWS, chosen), atol=1e-5)


def test_tiles_are_as_long_as_an_expert_has_rows():
    assert [tile_rows(R, 8) for R in (1, 8, 9, 16, 17, 10**6)] == [1, 1, 2, 2, 4, MAX_TILE]


def test_experts_stored_in_several_ways_are_refused():
    one, other = (affine.quantize(jnp.asarray(ROWS[0].T), bits=bits, group_size=16) for bits in (3, 4))
    with pytest.raises(ValueError, match="must be stored alike, got .* for the first and .* for number 1"):
        stack([one, other])
