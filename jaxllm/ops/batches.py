"""Rows some at a time: as many as memory should hold, or always as many, so that one program serves all."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEAST_ROWS = 256  # that solvers go input by input with: a program of so many serves all layers of fewer


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


def rows_at_once(most: int, on_cpu: int) -> int:
    """How many rows a solver's program takes: on a CPU few, which go as fast, so that one serves all."""
    return max(1, min(most, on_cpu) if jax.default_backend() == "cpu" else most)


def call_in_batches(program: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """What a compiled program gives of `size` rows of a pytree's leading axis, for however many there are.

    A program compiled for `size` rows serves any number of them, where `map_in_batches` inside a program is
    compiled anew for each. The last batch is filled up by the first rows again. Rows are cut and put together
    on the host (traced ones in a loop of the program around), and lie on the device where they lay, if it was
    one; if there are just so many, they are handed over as they are.
    """
    first = jax.tree.leaves(rows)[0]
    N = first.shape[0]
    if N == size:
        return program(rows)
    if isinstance(first, jax.core.Tracer):
        filled = jax.tree.map(lambda x: jnp.take(x, jnp.arange(-(-N // size) * size), 0, mode="wrap"), rows)
        batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), filled)
        traced = jax.lax.map(program, batches)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:N], traced)
    place = first.sharding if isinstance(first, jax.Array) and len(first.devices()) == 1 else None
    held = jax.tree.map(np.asarray, rows)

    def batch(at: int) -> Any:
        return jax.tree.map(lambda x: np.take(x, range(at, at + size), axis=0, mode="wrap"), held)

    found = [program(jax.device_put(batch(at), place)) for at in range(0, N, size)]
    return jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts)[:N], place), *found)
