"""DP-LLM's estimators: what the next bit would change in a product, from its input alone (section 2.5).

    e = ||x @ (W_(b + 1) - W_b)||
    linear       slope * ||x|| + offset, by least squares; good where the step is alike in all directions
    projection   ||G x||, G = A (W_(b + 1) - W_b), A [k, N] of N(0, 1 / k): E ||G x||^2 = e^2
                 (Johnson and Lindenstrauss); of k = 64 rows, 91 % of draws lie within 15 %

G is fitted to the errors that were seen, in float32: the draw of A is the same for all tokens, so what it
gets wrong it gets wrong for all. The authors' float16 steps of 1e-3 mostly round to nothing.

What an estimate is worth is counted in bits (`bits_saved`), and what it reads as well: k rows of float16 are
16 k / N bits a weight (`bits_of_projection`).

Letters: n tokens, K inputs, N outputs, k rows of a projection.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Key

from jaxllm.weights.planes.adaptive_planes import norm


@dataclasses.dataclass(frozen=True)
class Fit:
    """An estimate `slope * found + offset` of errors, and how much of their variance it explains."""

    slope: float
    offset: float
    r2: float  # 1 where all errors are equal


@jax.jit
def errors(x: Float[Array, "n K"], step: Float[Array, "N K"]) -> Float32[Array, " n"]:
    """The length of each token's x @ step.T."""
    return norm(jnp.einsum("nk,mk->nm", x, step, precision=jax.lax.Precision.HIGHEST))


def fit_line(found: Float[Array, " n"], e: Float[Array, " n"]) -> Fit:
    """The least squares of e on what was found."""
    slope, offset, r2 = map(float, _line(found, e))
    return Fit(slope, offset, r2)


@jax.jit
def _line(found, e):
    x, y = found - found.mean(), e - e.mean()
    across, along = (x * x).sum(), (x * y).sum()
    slope = jnp.where(across > 0, along / jnp.where(across > 0, across, 1.0), 0.0)
    total = (y * y).sum()
    left = ((y - slope * x) ** 2).sum()
    return slope, e.mean() - slope * found.mean(), jnp.where(total > 0, 1 - left / total, 1.0)


def bits_saved(estimates: Float[Array, " n"], e: Float[Array, " n"], parts: Sequence[float]) -> float:
    """Bits a weight that choosing by estimates saves against choosing by chance, the mean over `parts`.

    Of n tokens a part p reads the bit more. By chance 1 - p of the squared errors remain; where the tokens of
    the greatest estimates hold a share s of them, 1 - s do, for which chance reads s - p more of a bit.
    """
    squares = np.asarray(e, np.float64) ** 2
    total = squares.sum()
    if not total > 0:
        return 0.0
    order = np.argsort(-np.nan_to_num(np.asarray(estimates), nan=-np.inf), kind="stable")
    held = np.concatenate([[0.0], np.cumsum(squares[order])]) / total
    counts = [round(part * len(order)) for part in parts]
    return float(np.mean([held[n] - n / len(order) for n in counts]))


def bits_of_projection(rows: int, N: int) -> float:
    """Bits a weight that `rows` rows in float16 read for a token."""
    return 16 * rows / N


def random_projection(key: Key[Array, ""], step: Float[Array, "N K"], rows: int) -> Float32[Array, "k K"]:
    """G = A step, A [k, N] of N(0, 1 / k)."""
    A = jax.random.normal(key, (rows, step.shape[0]), jnp.float32) * rows**-0.5
    return jnp.dot(A, step.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="steps")
def fit_projection(
    G: Float[Array, "k K"], x: Float[Array, "n K"], e: Float[Array, " n"], *, steps: int = 100
) -> Float32[Array, "k K"]:
    """G after so many steps of Adam on mean (||G x|| - e)^2, the best of all; never worse than given."""
    scale = jnp.sqrt(jnp.mean(G * G))
    rate = optax.cosine_decay_schedule(0.05, max(steps, 1))
    adam = optax.adam(rate)

    def loss(unit):
        found = jnp.dot(x, (unit * scale).T, precision=jax.lax.Precision.HIGHEST)
        # a row of zeros has a length, but no gradient of it
        return jnp.mean((optax.safe_norm(found, 1e-30, axis=-1) - e) ** 2)

    def one(_, state):
        unit, opt_state, best, lowest = state
        value, gradient = jax.value_and_grad(loss)(unit)
        better = value < lowest
        best, lowest = jnp.where(better, unit, best), jnp.where(better, value, lowest)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            moved, opt_state = adam.update(gradient, opt_state)
        return unit + moved, opt_state, best, lowest

    unit = G / jnp.where(scale > 0, scale, 1.0)
    unit, _, best, lowest = jax.lax.fori_loop(0, steps, one, (unit, adam.init(unit), unit, loss(unit)))
    return jnp.where(loss(unit) < lowest, unit, best) * scale
