"""Mosaic GPU kernel for Hopper, of planes of bits.

That of `pallas_kernels.codebook_gemm.mosaic_gpu`, which says how. A stage is copied from the planes that are
read, by one copy whose third dimension is their number; a width that is known only when the kernel runs
chooses between loops, one a width, of both the warpgroup that copies and those that multiply.

Checked: A with race detection (jax 0.10.2, 0.12.0), B (both), C (jax 0.12.0, sm_90a). Never run on a GPU.
The interpreter of jax 0.10 takes no buffers in a branch: there, the choice stands around the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.any_precision_gemm import cells as plane_cells
from pallas_kernels.codebook_gemm.lanes import instructions
from pallas_kernels.codebook_gemm.mosaic_gpu import (
    BLOCKS,
    CHUNKS,
    WEIGHTS_PER_TURN,
    Stored,
    Tile,
    default_tile,
    product,
    why_not_sizes,
)

__all__ = ["Tile", "WEIGHTS_PER_TURN", "any_precision_gemm", "default_tile", "why_not"]

STORED = Stored(
    stage=lambda outputs, bits: (bits, outputs, BLOCKS),
    copied=lambda ref, outputs, s, bits: ref.at[pl.ds(0, bits), outputs, pl.ds(s * BLOCKS, BLOCKS)],
    part=lambda stage, bits: stage.at[pl.ds(0, bits)],
    word=lambda stage, rows, i, bits: (stage.at[i, rows], 0, CHUNKS, 1),
    cells=lambda words, bits, interpret: plane_cells.cells(words, instructions(interpret)),
    order=plane_cells.ORDER,
    name="any_precision_gemm",
)


def any_precision_gemm(
    x: jax.Array,
    planes: jax.Array,
    tables: tuple[jax.Array, ...],
    bits: jax.Array | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `pallas_kernels.any_precision_gemm`; x [*B, K] -> float32 [*B, N].

    tables: of the widths that may be read, the narrowest first; bits: an int32 scalar, one of these widths,
      or None if there is one.
    """
    run = functools.partial(product, x, planes, stored=STORED, tile=tile, interpret=interpret)
    if bits is None or not interpret or compat.INTERPRETER_KNOWS_LAYOUTS:
        return run(tables, bits)
    narrowest = tables[0].shape[1].bit_length() - 1
    return lax.switch(bits - jnp.int32(narrowest), [functools.partial(run, (t,), None) for t in tables])


def why_not(x: jax.Array, planes: jax.Array, tables: tuple[jax.Array, ...], *_: Any) -> str | None:
    """Why it does not take these, None if it does."""
    return why_not_sizes(x, tables[-1].shape[0])
