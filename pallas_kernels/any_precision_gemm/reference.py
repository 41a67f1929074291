"""The definition of `any_precision_gemm`, and what runs where no kernel does."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, UInt8, UInt32

from pallas_kernels.codebook_gemm.reference import look_up
from pallas_kernels.dot import depend_on, dot
from pallas_kernels.words import CODES_PER_BLOCK


def any_precision_gemm(
    x: Float[Array, "*B K"],
    planes: UInt32[Array, "planes N blocks"],
    tables: tuple[Float16[Array, "N _"], ...],
    bits: Int[Array, ""] | None = None,
) -> Float[Array, "*B N"]:
    """See `pallas_kernels.any_precision_gemm`.

    tables: of the widths that may be read, the narrowest first; bits: which, None if there is one. A branch
    for each width: one runs, and reads its planes alone.
    """
    narrowest = tables[0].shape[-1].bit_length() - 1
    return by_width(x, planes, tables, bits, [at_width] * len(tables), narrowest)


def by_width(
    x: jax.Array,
    planes: jax.Array,
    tables: tuple[Any, ...],
    bits: jax.Array | None,
    at_widths: Sequence[Callable[..., jax.Array]],
    narrowest: int,
) -> jax.Array:
    """`at_widths[i](x, planes, tables[i])`, i for the width that is read, `narrowest + i`.

    tables: anything made of them; what is made here is not made again in a loop.
    """
    if bits is None:
        return at_widths[0](x, planes, tables[0])

    def of_tables(i: int, x, planes, tables):
        return at_widths[i](x, planes, tables[i])

    branches = [functools.partial(of_tables, i) for i in range(len(tables))]
    return jax.lax.switch(bits.astype(jnp.int32) - narrowest, branches, x, planes, tables)


def at_width(x: jax.Array, planes: jax.Array, table: jax.Array) -> jax.Array:
    """The product at the width of this table."""
    bits = table.shape[-1].bit_length() - 1
    planes, table = depend_on(x, (planes[:bits], table))
    return dot(x, look_up(table, unpack(planes, x.shape[-1])).astype(x.dtype))


def unpack(planes: UInt32[Array, "bits N blocks"], K: int) -> UInt8[Array, "N K"]:
    """The codes of as many bits as there are planes."""
    places = jnp.arange(CODES_PER_BLOCK, dtype=jnp.uint32)[None, None]
    codes = jnp.zeros((*planes.shape[1:], CODES_PER_BLOCK), jnp.uint32)
    for plane in planes:
        codes = (codes << 1) | ((plane[:, :, None] >> places) & 1)
    return codes.reshape(planes.shape[1], -1)[:, :K].astype(jnp.uint8)
