"""The product over experts is that of a loop over rows, whatever the format and whoever else is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.grouped import MAX_TILE, group, grouped_matmul, ragged_product, tile_rows
from jaxllm.weights import affine
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts, members, parts, stack
from jaxllm.weights.matmul import matmul
from jaxllm.weights.nested_float import encode, with_mode

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


def test_no_more_than_one_expert_is_ever_dequantized(usual_compiler):
    many, size = 16, 256
    one = affine.quantize(jnp.full((size, size), 0.01), bits=4, group_size=32)
    w = jax.eval_shape(lambda one: Experts(jax.tree.map(lambda x: jnp.stack([x] * many), one)), one)
    x, chosen = jax.ShapeDtypeStruct((64, size), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    program = jax.jit(lambda x, w, chosen: grouped_matmul(x, w, group(chosen, experts=many)))
    compiled = program.lower(x, w, chosen).compile(compiler_options=usual_compiler)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * size * size < many * 4 * size * size / 2


@pytest.mark.parametrize("fp8", [False, True])
def test_a_switch_chosen_while_it_runs_reaches_every_expert(fp8):
    chosen = np.arange(39, dtype=np.int32) % X
    x = RNG.standard_normal((39, K)).astype(np.float32)
    nested = [encode(jnp.asarray(rows / 10)) for rows in ROWS]

    @jax.jit
    def run(w, x, fp8):
        return grouped_matmul(x, with_mode(w, fp8), group(jnp.asarray(chosen), experts=X))

    @jax.jit
    def alone(w, x):
        return matmul(x, w)

    mode = "fp8" if fp8 else "fp16"
    want = [alone(with_mode(nested[e], mode), x[None, i])[0] for i, e in enumerate(chosen)]
    np.testing.assert_allclose(run(stack(nested), x, jnp.int32(fp8)), want, atol=2e-3)


def test_tiles_are_as_long_as_an_expert_has_rows():
    assert [tile_rows(R, 8) for R in (1, 8, 9, 16, 17, 10**6)] == [1, 1, 2, 2, 4, MAX_TILE]


def test_experts_stored_in_several_ways_are_refused():
    one, other = (affine.quantize(jnp.asarray(ROWS[0].T), bits=bits, group_size=16) for bits in (3, 4))
    with pytest.raises(ValueError, match="must be stored alike, got .* for the first and .* for number 1"):
        stack([one, other])
