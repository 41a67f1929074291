"""A table of levels for each output, and codes into it, at 1 to 8 bits. Lossy.

    w[k, n] = table[n, codes[n, k]]                                                     float16 levels

Bits a weight: bits + 16 * 2**bits / K, so a table pays only where K is large (1,024 or more). The order of
the levels carries no meaning here; formats that need it sorted say so.

    w = encode(rows, table, bits=3)         # the nearest level of each row's table

Letters: K inputs, N outputs, m = 2**bits levels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer

from jaxllm.ops.gather import gather, gather_codes
from jaxllm.ops.packing import Packed, pack, unpack
from jaxllm.ops.search import better
from jaxllm.pytree import pytree, static
from pallas_kernels.codebook_gemm import codebook_gemm
from pallas_kernels.codebook_gemm.reference import look_up


@pytree
class Codebook:
    """A [K, N] weight as codes into one table an output.

    holds: codes.shape == (N, K); table.shape == (N, 2**codes.bits); 1 <= codes.bits <= 8
    """

    codes: Packed  # [N, K]
    table: jax.Array  # float16 [N, 2**bits]
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        return look_up(self.table, unpack(self.codes)).astype(dtype)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "Codebook":
        """The weight of some outputs."""
        codes, table = gather_codes(self.codes, index), gather(self.table, index)
        return dataclasses.replace(self, codes=codes, table=table, shape=(self.shape[0], index.size))

    def partition_specs(self, spec: P) -> "Codebook":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        place = {"codes": P(N, K, None), "table": P(N, None)}
        return jax.tree.map_with_path(lambda path, _: place[path[0].name], self)


def matmul(x: Float[Array, "*B K"], w: Codebook) -> Float[Array, "*B N"]:
    """`x @ w` in float32."""
    return codebook_gemm(x, w.codes.words, w.table)


def nearest(rows: Float[Array, "N K"], table: Float[Array, "N m"]) -> Integer[Array, "N K"]:
    """The code of each weight's nearest level; the lowest code of those equally near."""

    def closer(i, best):
        distance = jnp.abs(rows - jax.lax.dynamic_slice_in_dim(table, i, 1, axis=1))
        return better((distance, i.astype(jnp.int32)), best)

    start = jnp.full(rows.shape, jnp.inf, rows.dtype), jnp.zeros(rows.shape, jnp.int32)
    return jax.lax.fori_loop(0, table.shape[1], closer, start)[1]


@functools.partial(jax.jit, static_argnames=("bits", "dtype"), inline=True)
def encode(
    rows: Float[Array, "N K"], table: Float[Array, "N m"], *, bits: int, dtype=jnp.float32
) -> Codebook:
    """Rounds the table to float16 and every weight to the nearest level of it."""
    table = table.astype(jnp.float16)
    codes = nearest(rows.astype(jnp.float32), table.astype(jnp.float32))
    return from_codes(codes, table, bits=bits, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("bits", "dtype"), inline=True)
def from_codes(
    codes: Integer[Array, "N K"], table: Float[Array, "N m"], *, bits: int, dtype=jnp.float32
) -> Codebook:
    """The format of given codes and levels."""
    if not 1 <= bits <= 8 or table.shape != (codes.shape[0], 2**bits):
        raise ValueError(f"codebook: table must be [N, 2**bits], got {table.shape=}, {codes.shape=}, {bits=}")
    shape = (codes.shape[1], codes.shape[0])
    return Codebook(pack(codes, bits), table.astype(jnp.float16), shape, jnp.dtype(dtype))
