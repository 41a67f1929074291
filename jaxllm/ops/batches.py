"""A function of one row, for so many rows at once as memory should hold."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_in_batches(f: Callable[[Any], Any], rows: Any, at_once: int) -> Any:
    """f of each row of a pytree's leading axis, at most `at_once` (and at least one) side by side.

    Batches are of one size, so that f is compiled once; `jax.lax.map` compiles it again for what is left
    over. The last batch is filled up by the first rows again, of which nothing is kept.
    """
    N = jax.tree.leaves(rows)[0].shape[0]
    count = math.ceil(N / max(1, at_once))
    size = math.ceil(N / max(1, count))
    if count <= 1:
        return jax.vmap(f)(rows)

    def batches(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, x[: count * size - N]]).reshape(count, size, *x.shape[1:])

    found = jax.lax.map(jax.vmap(f), jax.tree.map(batches, rows))
    return jax.tree.map(lambda y: y.reshape(count * size, *y.shape[2:])[:N], found)
