"""`better` keeps, place by place, the candidate of less error."""

import jax.numpy as jnp
import numpy as np

from jaxllm.ops.search import better


def test_less_error_wins_and_the_old_one_stays_where_equal_or_where_the_new_error_is_no_number():
    new = jnp.asarray([1.0, 3.0, 2.0, jnp.nan]), jnp.full(4, 10), jnp.full((4, 2), 10.0)
    old = jnp.asarray([2.0, 2.0, 2.0, 2.0]), jnp.zeros(4, int), jnp.zeros((4, 2))
    error, what, rows = better(new, old)
    np.testing.assert_array_equal(error, [1, 2, 2, 2])
    np.testing.assert_array_equal(what, [10, 0, 0, 0])
    np.testing.assert_array_equal(rows, [[10, 10], [0, 0], [0, 0], [0, 0]])
