"""Weights that no table has to serve: they are kept apart in float16 (dense and sparse, arXiv:2306.07629).

Of each block of outputs (`weights/sparse.py`) a share: a ninth of them those that the loss feels most (the
paper's 0.05 of 0.45 %), the others the largest. The paper's thresholds are of a whole model, and so are those
of Any-Precision's code.

    inner, weights, kept = set_apart(rows, fisher, 0.0045, who="SqueezeLlm")
    w = put_back(base, rows, kept, 0.0045)              # the base found for `inner`, and the kept weights

Solvers that weigh errors against each other take `free`: 1 where a weight has a level, 0 where it is kept
apart and has no error, None where all have levels.

Letters: K inputs, N outputs, m places a block, g groups of n outputs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.quant.methods.curvature import importance
from jaxllm.weights.sparse import block_rows, encode, highest

MAX_SHARE = 0.05  # of which places alone take more than half a bit a weight


def check_share(who: str, outliers: float | None) -> None:
    """Raises ValueError for a share that is none; None keeps nothing apart."""
    if outliers is not None and not 0 < outliers <= MAX_SHARE:
        raise ValueError(f"{who}: outliers must be above 0, at most {MAX_SHARE}, got {outliers}")


def set_apart(
    rows: Float[Array, "N K"], felt: Float[Array, "_ _"], share: float | None, *, who: str
) -> tuple[Float[Array, "N K"], Float[Array, "N K"], Bool[Array, "N K"] | None]:
    """The rows with 0 for what is kept apart, how much each place of them counts, and what is kept.

    felt: how much the loss feels each weight. Without a share: the rows, and None kept.
    """
    weights = importance(rows, felt, who=who)  # checks both, the kept weights with them
    if share is None:
        return rows, weights, None
    kept = _most_felt_and_largest(rows, felt, _places(rows.shape[1], share))
    inner = jnp.where(kept, 0.0, rows)
    return inner, importance(inner, felt, who=who), kept


def put_back(base: Any, rows: Float[Array, "N K"], kept: Bool[Array, "N K"] | None, share: float | None):
    """The base, around it what was kept apart."""
    if kept is None or share is None:
        return base
    return encode(base, rows, kept, _places(rows.shape[1], share))


def free_of(kept: Bool[Array, "N K"] | None, g: int) -> Sequence[Float[Array, "n K"] | None]:
    """`free` of each of g groups of consecutive outputs."""
    return [None] * g if kept is None else jnp.split((~kept).astype(jnp.float32), g)


def where_free(error: Float[Array, "*n"], free: Float[Array, "*n"] | None) -> Float[Array, "*n"]:
    """The errors, of kept weights 0."""
    return error if free is None else error * free


def _places(K: int, share: float) -> int:
    return max(1, int(share * block_rows(K) * K))


@functools.partial(jax.jit, static_argnames="m")
def _most_felt_and_largest(
    rows: Float[Array, "N K"], felt: Float[Array, "N K"], m: int
) -> Bool[Array, "N K"]:
    first = highest(felt, m // 9)
    return first | highest(jnp.where(first, 0.0, jnp.abs(rows)), m - m // 9)
