"""The definition of `codebook_gemm`, and what runs where no kernel does."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Integer, UInt32

from pallas_kernels.dot import depend_on, dot
from pallas_kernels.words import from_blocks


def codebook_gemm(
    x: Float[Array, "*B K"], codes: UInt32[Array, "N blocks bits"], table: Float16[Array, "N levels"]
) -> Float[Array, "*B N"]:
    """See `pallas_kernels.codebook_gemm`."""
    codes, table = depend_on(x, (codes, table))
    return dot(x, look_up(table, from_blocks(codes, x.shape[-1])).astype(x.dtype))


def look_up(table: Float[Array, "N m"], codes: Integer[Array, "N K"]) -> Float[Array, "N K"]:
    """Each row's levels where its codes point, in the table's type.

    A gather: a tree of selections over codes that are unpacked first takes longer on a CPU.
    """
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1)
