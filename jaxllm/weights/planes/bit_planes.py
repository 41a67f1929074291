"""A format: planes of bits, the highest first, of which the first few may be read (arXiv:2402.10517).

    w[k, n] at b bits = tables[b - seed_bits][n, codes[n, k] >> (parent_bits - b)]           float16 levels

Code k lies in word k // 32 at bit k % 32 of its plane: reading b bits reads the first b planes and the table
of that width, nothing else.

Letters: K inputs, N outputs, B planes, W = ceil(K / 32) words.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer, UInt32

from jaxllm.ops.gather import gather
from jaxllm.pytree import pytree, static
from pallas_kernels.any_precision_gemm import any_precision_gemm
from pallas_kernels.any_precision_gemm.reference import unpack
from pallas_kernels.codebook_gemm.reference import look_up

CODES_PER_WORD = 32  # of a plane


@pytree
class BitPlanes:
    """A [K, N] weight of several widths, of which `bits` is the one it is read at.

    holds: planes.shape == (parent_bits, N, ceil(K / 32)); tables[i].shape == (N, 2**(seed_bits + i)),
      len(tables) == parent_bits - seed_bits + 1; 1 <= seed_bits <= bits <= parent_bits <= 8
    """

    planes: jax.Array  # uint32 [parent_bits, N, W], the highest bit first
    tables: tuple[jax.Array, ...]  # float16 [N, 2**b] for b = seed_bits .. parent_bits
    bits: int = static()
    seed_bits: int = static()
    parent_bits: int = static()
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    def at(self, bits: int) -> "BitPlanes":
        """The same arrays, read at another width."""
        if not self.seed_bits <= bits <= self.parent_bits:
            widths = f"{self.seed_bits} to {self.parent_bits}"
            raise ValueError(f"any_precision: bits must be {widths}, as stored, got {bits=}")
        return dataclasses.replace(self, bits=bits)

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        codes = unpack(self.planes[: self.bits], self.shape[0])
        return look_up(self.tables[self.bits - self.seed_bits], codes).astype(dtype)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "BitPlanes":
        """The weight of some outputs."""
        planes = gather(self.planes, index, axis=1)
        tables = tuple(gather(table, index) for table in self.tables)
        return dataclasses.replace(self, planes=planes, tables=tables, shape=(self.shape[0], index.size))

    def partition_specs(self, spec: P) -> "BitPlanes":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        place = {"planes": P(None, N, K), "tables": P(N, None)}
        return jax.tree.map_with_path(lambda path, _: place[path[0].name], self)


def matmul(x: Float[Array, "*B K"], w: BitPlanes) -> Float[Array, "*B N"]:
    """`x @ w` in float32, at the width of `w`."""
    return any_precision_gemm(x, w.planes, w.tables, w.bits)


def read_at(model, bits: int):
    """The model, or any tree, with its any-precision weights read at another width: the same arrays."""

    def planes(w):
        return isinstance(w, BitPlanes)

    if not any(map(planes, jax.tree.leaves(model, is_leaf=planes))):
        raise ValueError("any_precision: the model must have any-precision weights, got none")
    return jax.tree.map(lambda w: w.at(bits) if planes(w) else w, model, is_leaf=planes)


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack(codes: Integer[Array, "N K"], bits: int) -> UInt32[Array, "B N W"]:
    """The codes as `bits` planes; the last word is filled up with zeros."""
    N, K = codes.shape
    wide = jnp.pad(codes.astype(jnp.uint32), ((0, 0), (0, -K % CODES_PER_WORD))).reshape(
        N, -1, CODES_PER_WORD
    )
    places = jnp.arange(CODES_PER_WORD, dtype=jnp.uint32)[None, None]
    highest_first = jnp.arange(bits, dtype=jnp.uint32)[::-1, None, None, None]
    return (((wide[None] >> highest_first) & 1) << places[None]).sum(-1, dtype=jnp.uint32)


def from_codes(
    codes: Integer[Array, "N K"], tables: tuple[Float[Array, "N _"], ...], *, bits: int, dtype=jnp.float32
) -> BitPlanes:
    """The format of given parent codes and one table a width, narrowest first; read at `bits`."""
    N, K = codes.shape
    widths = [table.shape[1].bit_length() - 1 for table in tables]
    if (
        not tables
        or any(t.shape != (N, 2 ** (widths[0] + i)) for i, t in enumerate(tables))
        or widths[-1] > 8
    ):
        shapes = [table.shape for table in tables]
        raise ValueError(
            f"any_precision: tables must be [N, 2**b], b rising by 1 to 8 at most, got {shapes=}"
        )
    planes, stored = _stored(codes, tables, widths[-1])
    return BitPlanes(planes, stored, widths[-1], widths[0], widths[-1], (K, N), jnp.dtype(dtype)).at(bits)


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def _stored(codes, tables, bits: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return pack(codes, bits), tuple(table.astype(jnp.float16) for table in tables)
