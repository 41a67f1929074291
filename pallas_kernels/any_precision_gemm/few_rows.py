"""A few rows on a CPU: a tree of selections over the planes, where they stand (`pallas_kernels.fold`)."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Float16, Int, UInt32

from pallas_kernels.any_precision_gemm import reference
from pallas_kernels.codebook_gemm.few_rows import MOST_BITS, Levels, by_levels, levels_of
from pallas_kernels.fold import FEW_ROWS


def takes(x: Float[Array, "*B K"], tables: tuple[Float16[Array, "N _"], ...]) -> bool:
    """Whether it is the faster way here: a CPU, few rows, and a width with a small table."""
    few = 0 < x.size <= FEW_ROWS * x.shape[-1]
    return jax.default_backend() == "cpu" and few and tables[0].shape[1] <= 2**MOST_BITS


@jax.jit  # a model has few shapes: each is traced once
def any_precision_gemm(
    x: Float[Array, "*B K"],
    planes: UInt32[Array, "planes N blocks"],
    tables: tuple[Float16[Array, "N _"], ...],
    bits: Int[Array, ""] | None = None,
) -> Float[Array, "*B N"]:
    """The product, levels times float32 inputs; arguments as the reference's."""
    narrowest = tables[0].shape[1].bit_length() - 1
    widths = range(narrowest, narrowest + len(tables))
    ready = tuple(levels_of(t) if b <= MOST_BITS else (t, None) for b, t in zip(widths, tables, strict=True))
    each = [functools.partial(at_width, b) for b in widths]
    return reference.by_width(x, planes, ready, bits, each, narrowest)


def at_width(bits: int, x: jax.Array, planes: jax.Array, ready: Levels) -> jax.Array:
    """The product at this width."""
    if bits > MOST_BITS:
        return reference.at_width(x, planes, ready[0])

    def lowest_first(planes):
        return tuple(planes[i] for i in reversed(range(bits)))

    def masks(words, r):
        return [(word & np.uint32(1 << r)) != 0 for word in words]

    y = by_levels(x.reshape(-1, x.shape[-1]), planes, ready, lowest_first, masks)
    return y.reshape(*x.shape[:-1], planes.shape[1])
