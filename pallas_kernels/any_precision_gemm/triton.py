"""Triton kernels for products with planes of bits; compute capability 8.0 and up.

Those of `pallas_kernels.codebook_gemm.triton`, which say how; here words of the planes that are read become
cells. A width that is known only when the kernel runs chooses between loops, one a width, within one kernel:
each reads its own planes and table, so that what is fetched falls with the width.

Checked: A and B on jax 0.10.2 and 0.12.0, C on 0.12.0 for h100, a100, l4, b200. Never run on a GPU. The
interpreter permutes bytes by shifts and selects bits by masks, where a GPU has one instruction for each.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from pallas_kernels import choice
from pallas_kernels.any_precision_gemm import cells as plane_cells
from pallas_kernels.codebook_gemm import lookup
from pallas_kernels.codebook_gemm.cells import Cells
from pallas_kernels.codebook_gemm.triton import Stored, Tile, default_tile, load_once, product, why_not

__all__ = ["Tile", "any_precision_gemm", "default_tile", "why_not"]


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
    widths = tuple(table.shape[-1].bit_length() - 1 for table in tables)
    stored = Stored(
        load=_load, cells=_cells, order=plane_cells.ORDER, widths=widths, name="any_precision_gemm_triton"
    )
    run = functools.partial(_any_precision_gemm, stored=stored, tile=tile, interpret=interpret)
    arrays = (x, planes, tables) if bits is None else (x, planes, tables, bits)
    return choice.rows_together(run, stacked=jax.vmap(run))(*arrays)


def _any_precision_gemm(x, planes, tables, bits=None, *, stored: Stored, **options: Any) -> jax.Array:
    return product(x, planes, tables, bits, stored=stored, blocks=planes.shape[2], **options)


def _load(
    ref, rows: jax.Array, blocks: jax.Array, mask: jax.Array | None, bits: int
) -> tuple[jax.Array, ...]:
    """Words of the first `bits` planes of [planes, N, blocks]."""
    shape = rows.size, blocks.size
    at = lax.broadcast_in_dim(rows, shape, (0,)), lax.broadcast_in_dim(blocks, shape, (1,))
    return tuple(load_once(ref.at[(plane, *at)], mask) for plane in range(bits))


def _cells(words: Sequence[jax.Array], bits: int, interpret: bool) -> Cells:
    return plane_cells.cells(words, lookup.instructions(interpret))
