"""Searches that try one candidate after another: which one is kept."""

from typing import Any

import jax
import jax.numpy as jnp

Candidate = tuple[Any, ...]  # the error [...] of what was tried, then what that was [...] or [..., *axes]


def better(new: Candidate, old: Candidate, *, is_first: jax.Array | bool = False) -> Candidate:
    """Of two candidates (error, *what) the one of less error, place by place; of equals the old one.

    is_first: the new one is the first of a loop, and taken whatever its error.
    """
    less = (new[0] < old[0]) | is_first

    def choose(a, b):
        return jnp.where(less.reshape(less.shape + (1,) * (jnp.ndim(b) - less.ndim)), a, b)

    return tuple(choose(a, b) for a, b in zip(new, old, strict=True))
