"""Rows that go in batches give what they give all at once, by one program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.batches import call_in_batches, map_in_batches


@pytest.mark.parametrize("at_once, size", [(0, 1), (3, 3), (4, 4), (6, 4), (100, 7)])
def test_each_row_comes_once_in_order_by_one_program_of_no_more_rows_than_asked_for(at_once, size):
    x, y = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7, dtype=np.float32)

    def f(row):
        return row[0].sum() + row[1], {"sine": jnp.sin(row[0])}

    program = jax.jit(lambda rows: map_in_batches(f, rows, at_once)).lower((x, y))
    total, others = program.compile()((x, y))
    np.testing.assert_array_equal(total, x.sum(1) + y)
    np.testing.assert_allclose(others["sine"], np.sin(x), rtol=1e-6)
    assert re.findall(r"sine .*tensor<(\d+)x2xf32>", program.as_text()) == [str(size)]


@pytest.mark.parametrize("N", [1, 3, 4, 9])
def test_a_program_of_so_many_rows_serves_any_number(N):
    x, y = np.arange(2 * N, dtype=np.float32).reshape(N, 2), np.arange(N, dtype=np.float32)
    sizes = []

    def program(given):
        sizes.append({len(a) for a in given})
        return given[0].sum(1) + given[1]

    np.testing.assert_array_equal(call_in_batches(program, (x, y), 4), x.sum(1) + y)
    assert sizes == [{4}] * -(-N // 4)
    traced = jax.jit(lambda *given: call_in_batches(program, given, 4))(x, y)  # in a program around it
    np.testing.assert_array_equal(traced, x.sum(1) + y)
