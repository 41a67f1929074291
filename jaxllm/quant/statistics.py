"""What calibration knows of one linear layer, and what a method may ask for.

A method says in `wants` which of these it needs; `calibrate` measures just those, and `quantize` hands the
method one layer's at a time. All are sums over calibration tokens t of the layer's inputs x_t [K], in
float32 at highest matmul precision:

    "hessian_diag"    sum_t x_t^2                                     [K]
    "mean"            sum_t |x_t| / tokens                            [K]
    "hessian"         sum_t x_t x_t^T                                 [K, K]
    "held_out"        the same over every fourth sequence, which then is not in "hessian"
    "guided_hessian"  sum_t s_t x_t x_t^T, a group of consecutive outputs each   [g, K, K]
                      s_t = mean over the group's outputs j of (d loss / d y_tj)^2 (arXiv:2505.07004, eq. 7)
    "fisher"          sum_sequences (d loss / d w_nk)^2               [N, K]  (arXiv:2306.07629)
    "thresholds"      max_t of the (r+1)-th largest |x_t|, r = 0 .. K-1      [K]    (DecDEC dossier 2.2)
    "sample"          some of the inputs themselves                   [n, K]

Letters: K inputs, N outputs, g groups of outputs.
"""

from typing import Protocol, runtime_checkable

import jax

from jaxllm.pytree import pytree, static

WANTS = ("hessian_diag", "mean", "hessian", "held_out", "guided_hessian", "fisher", "thresholds", "sample")


@pytree
class Stats:
    """What was measured of one linear; None where it was not asked for."""

    hessian_diag: jax.Array | None = None  # [K]
    mean: jax.Array | None = None  # [K]
    hessian: jax.Array | None = None  # [K, K]
    held_out: jax.Array | None = None  # [K, K]
    guided_hessian: jax.Array | None = None  # [g, K, K]
    fisher: jax.Array | None = None  # [N, K]
    thresholds: jax.Array | None = None  # [K]
    sample: jax.Array | None = None  # [n, K]
    tokens: int = static(default=0)  # how many tokens were seen


@runtime_checkable  # type checks in tests look at instances
class Method(Protocol):
    """A way to quantize: a frozen dataclass of options."""

    @property
    def wants(self) -> frozenset[str]:
        """Names in WANTS."""
        ...

    def solve(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> object:
        """A weight in some format, for the rows [N, K] (float32) of the linear called `name`.

        dtype: the type that the weight had. What is random depends on the method's seed and `name` only.
        """
        ...


def need(stats: Stats, who: str, *names: str) -> None:
    """Raises ValueError unless the statistics named were measured."""
    missing = [name for name in names if getattr(stats, name) is None]
    if missing:
        raise ValueError(f"{who}: calibration must give {', '.join(missing)}, got none")
