"""What calibration knows of one linear layer, and what a method of quantization is.

A method says in `required_stats` which of these it needs; `calibrate` measures just those, and `quantize`
hands the method one layer's at a time. All are sums over calibration tokens t of the layer's inputs x_t [K],
in float32 at highest matmul precision:

    "hessian_diag"    sum_t x_t^2                                     [K]
    "mean"            sum_t |x_t| / tokens                            [K]
    "hessian"         sum_t x_t x_t^T                                 [K, K]
    "held_out"        the same over every fourth sequence, which then is not in "hessian"
    "guided_hessian"  sum_t s_t x_t x_t^T, a group of consecutive outputs each   [g, K, K]
                      s_t = mean over the group's outputs j of (d loss / d y_tj)^2 (arXiv:2505.07004, eq. 7)
    "fisher"          sum_sequences (d loss / d w_nk)^2               [N, K]  (arXiv:2306.07629)
    "gradient"        sum_sequences d loss / d w_nk                   [N, K]
    "thresholds"      max_t of the (r+1)-th largest |x_t|, r = 0 .. K-1, at most a 64th higher  [K]
                      (arXiv:2412.20185; what `sums.thresholds` counts)
    "sample"          some of the inputs themselves                   [n, K]

Letters: K inputs, N outputs, g groups of outputs.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Key

from jaxllm.pytree import pytree, static

STATISTICS = (
    "hessian_diag", "mean", "hessian", "held_out", "guided_hessian", "fisher", "gradient",
    "thresholds", "sample",
)  # fmt: skip


@pytree
class Stats:
    """What was measured of one linear; None where it was not asked for."""

    hessian_diag: jax.Array | None = None  # [K]
    mean: jax.Array | None = None  # [K]
    hessian: jax.Array | None = None  # [K, K]
    held_out: jax.Array | None = None  # [K, K]
    guided_hessian: jax.Array | None = None  # [g, K, K]
    fisher: jax.Array | None = None  # [N, K]
    gradient: jax.Array | None = None  # [N, K]
    thresholds: jax.Array | None = None  # [K]
    sample: jax.Array | None = None  # [n, K]
    tokens: int = static(default=0)  # how many tokens were seen


@runtime_checkable
class Method(Protocol):
    """A way to quantize: a frozen dataclass of options. What it may say besides: the three classes below."""

    @property
    def required_stats(self) -> frozenset[str]:
        """Names in STATISTICS; none for a method that needs no text."""
        ...

    def quantize(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> object:
        """A weight in some format, for the rows [N, K] (float32) of the linear called `name`.

        dtype: the type that the weight had. What is random depends on the method's seed and `name` only.
        """
        ...


@runtime_checkable
class Guided(Method, Protocol):
    """A method whose "guided_hessian" is one for each of `output_groups` groups of consecutive outputs."""

    @property
    def output_groups(self) -> int:
        """How many; they must divide the outputs of every linear."""
        ...


@runtime_checkable
class Grouped(Method, Protocol):
    """A method whose grid is one for each `group_size` consecutive inputs."""

    @property
    def group_size(self) -> int | None:
        """At most the inputs of any linear; None where the method finds one that fits."""
        ...


@runtime_checkable
class Allocator(Method, Protocol):
    """A method that divides its bits among all its linears before it solves each.

    `quantize` takes what `allocate` gave the linear as `mask`, and allocates to it alone without.
    """

    def gains(self, rows: jax.Array, stats: Stats, *, name: str) -> Any:
        """What more bits would gain in one linear, and what they cost there."""
        ...

    def allocate(self, gains: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """For each linear its mask, from the gains of all. sizes: (K, N)."""
        ...


def output_groups_of(*methods: Method) -> int:
    """Groups of outputs that have a guided Hessian of their own: the most that a method asks for."""
    return max((method.output_groups for method in methods if isinstance(method, Guided)), default=1)


def layer_key(seed: int, name: str) -> Key[Array, ""]:
    """What a method that draws numbers draws them by in the layer called `name`."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def need(stats: Stats, who: str, *names: str) -> None:
    """Raises ValueError unless the statistics named were measured."""
    missing = [name for name in names if getattr(stats, name) is None]
    if missing:
        raise ValueError(f"{who}: calibration must give {', '.join(missing)}, got none")
