"""What Hessians and Fisher information give a solver: damped curvature, importance of single weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.quant.statistics import Stats, need

MIN_IMPORTANCE = 2.0**-30  # of a place, in units of its row's mean
MAX_FLOAT16 = 65504.0  # tables hold no more


def curvature(
    stats: Stats, who: str, *, guided: bool, output_groups: int, shape: tuple[int, ...]
) -> Float[Array, "g K K"]:
    """The curvature of each group of outputs of rows [N, K]: of the inputs alone, or of the end loss."""
    N, K = shape
    need(stats, who, "guided_hessian" if guided else "hessian")
    hessians = stats.guided_hessian if guided else stats.hessian[None]  # type: ignore[index]
    assert hessians is not None
    if hessians.shape[1:] != (K, K):
        raise ValueError(f"{who}: the curvature must be of K inputs, got {K=}, {hessians.shape=}")
    if N % output_groups:
        raise ValueError(f"{who}: output_groups must divide N, got {output_groups=}, {N=}")
    return averaged(hessians, output_groups)


def averaged(hessians: Float[Array, "many K K"], output_groups: int) -> Float[Array, "g K K"]:
    """Neighbouring groups merged: the mean of their curvatures is the curvature of the larger group."""
    many, K, _ = hessians.shape
    if many % output_groups:
        raise ValueError(
            f"guided: output_groups must divide those measured, got {output_groups=}, measured={many}"
        )
    if many == output_groups:
        return hessians
    return hessians.reshape(output_groups, many // output_groups, K, K).mean(1)


@functools.partial(jax.jit, static_argnames="damping")
def damped(hessian: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """H plus `damping` times the mean of its diagonal; of an H that is 0 throughout, the identity.

    With damping = 0, an input that is always 0 still gets the mean on its diagonal: it touches no other.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diag(hessian)
    mean = diagonal.mean()
    unit = jnp.where(mean > 0, mean, 1.0)
    extra = jnp.where((diagonal > 0) | (damping > 0) & (mean > 0), damping * mean, unit)
    return hessian + jnp.diag(extra)


def check_curvature(who: str, damping: float, guided: bool, output_groups: int) -> None:
    """Raises ValueError for options that no curvature has."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"{who}: damping must be finite and not negative, got {damping=}")
    if output_groups < 1 or (output_groups > 1 and not guided):
        raise ValueError(
            f"{who}: output_groups must be 1, or more if guided, got {output_groups=}, {guided=}"
        )


def importance(
    rows: Float[Array, "N K"], fisher: Float[Array, "_ _"], *, who: str = "importance"
) -> Float[Array, "N K"]:
    """Weights of the places, of mean 1 a row: the Fisher information of those that are not zero.

    A row without any counts all its places alike.
    """
    if fisher.shape != rows.shape:
        raise ValueError(f"{who}: fisher must be as the weight, got {fisher.shape=}, {rows.shape=}")
    # both are looked at on the host, where nothing is compiled for it; NaN is neither above nor below
    if not isinstance(rows, jax.core.Tracer) and not (np.abs(np.asarray(rows)) <= MAX_FLOAT16).all():
        raise ValueError(f"{who}: weights must be finite and at most {MAX_FLOAT16:.0f} in size")
    if (
        not isinstance(fisher, jax.core.Tracer)
        and not ((np.asarray(fisher) >= 0) & (np.asarray(fisher) < np.inf)).all()
    ):
        raise ValueError(f"{who}: fisher must be finite and not negative")
    return _importance(rows, fisher)


@jax.jit
def _importance(rows: Float[Array, "N K"], fisher: Float[Array, "N K"]) -> Float[Array, "N K"]:
    f = jnp.where(rows != 0, fisher.astype(jnp.float32), 0.0)
    greatest = f.max(1, keepdims=True)
    f = jnp.where(greatest > 0, f / jnp.where(greatest > 0, greatest, 1.0), 1.0)  # else a mean may overflow
    return jnp.maximum(f / f.mean(1, keepdims=True), MIN_IMPORTANCE)
