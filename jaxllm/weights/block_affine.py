"""Affine codes by group whose offset is a number, scale and offset coded by blocks: what GGUF's types hold.

A [K, N] weight is cut along K into groups of `group_size` inputs of one output; `groups_per_block`
neighbouring groups make a block, which has a float16 scale and may have a float16 offset. Of each group there
may be codes that multiply them ("super-blocks": Q2_K to Q6_K of ggml). With g the group of k and b its block,

    w[k, n] = (codes[n, k] - middle) * (scale[b, n] * (scale_codes[n, g] - middle'))
              + offset[b, n] * offset_codes[n, g]                                              in float32

With an offset nothing is centered (middle = middle' = 0); without one, both kinds of codes stand about their
middle codes 2**(bits - 1). Codes of scales and offsets that are not there count as 1. Unlike `Affine`'s zero
point, which is in units of the scale, an offset can stand beside a scale of 0. In ggml's types all products
are exact in float32, so that only the sum rounds.

Bits a weight: those of the codes, (scale_bits + offset_bits) / group_size, and 16 or 32 a block. Q4_K has
4 + (6 + 6) / 32 + 32 / 256 = 4.5; more where G is no multiple of 32 (`packing.py` fills blocks up).
Lossless: holds what a file says, bit for bit.
Letters: K inputs, N outputs, G = K / group_size groups, S = G / groups_per_block blocks.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.ops.gather import gather, gather_codes
from jaxllm.ops.packing import Packed, unpack
from jaxllm.pytree import pytree, static


@pytree
class BlockAffine:
    """A [K, N] weight in affine codes with offsets, scales and offsets in codes of blocks.

    holds: codes.shape == (N, K); scale.shape == (S, N); offset is None or offset.shape == (S, N);
      scale_codes, offset_codes None or of shape (N, G); offset_codes is None where offset or scale_codes is;
      G * group_size == K; S * groups_per_block == G; groups_per_block == 1 where scale_codes is None
    """

    codes: Packed  # [N, K]
    scale: jax.Array  # float16 [S, N]
    scale_codes: Packed | None  # [N, G]
    offset: jax.Array | None  # float16 [S, N]
    offset_codes: Packed | None  # [N, G]
    group_size: int = static()
    groups_per_block: int = static()
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: of the numbers it stands for

    @partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        K, N = self.shape
        codes = _centered(self.codes, self.offset).reshape(N, -1, self.group_size)
        rows = codes * self._by_group(self.scale, self.scale_codes)[:, :, None]
        if self.offset is not None:
            rows = rows + self._by_group(self.offset, self.offset_codes)[:, :, None]
        return rows.reshape(N, K).astype(dtype)

    def _by_group(self, of_block: jax.Array, codes: Packed | None) -> Float[Array, "N G"]:
        """A block's number times the code of each of its groups."""
        of_group = jnp.repeat(of_block.T.astype(jnp.float32), self.groups_per_block, axis=1)
        return of_group if codes is None else of_group * _centered(codes, self.offset)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "BlockAffine":
        """The weight of some outputs."""
        found: dict[str, Any] = {
            "codes": gather_codes(self.codes, index),
            "scale": gather(self.scale, index, axis=1),
            "shape": (self.shape[0], index.size),
        }
        if self.scale_codes is not None:
            found["scale_codes"] = gather_codes(self.scale_codes, index)
        if self.offset is not None:
            found["offset"] = gather(self.offset, index, axis=1)
        if self.offset_codes is not None:
            found["offset_codes"] = gather_codes(self.offset_codes, index)
        return dataclasses.replace(self, **found)

    def partition_specs(self, spec: P) -> "BlockAffine":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        # Larger blocks than groups are few, and codes of groups are packed: whole along K on every device.
        S = K if self.groups_per_block == 1 and self.scale.shape[0] > 1 else None
        by_name = {"codes": P(N, K, None), "scale": P(S, N), "offset": P(S, N)}
        of_groups = P(N, None, None)
        return jax.tree.map_with_path(lambda path, _: by_name.get(path[0].name, of_groups), self)


def _centered(codes: Packed, offset: jax.Array | None) -> Float[Array, "*B n"]:
    """Codes as numbers, about their middle where there is no offset."""
    middle = 0.0 if offset is not None else 2.0 ** (codes.bits - 1)
    return unpack(codes).astype(jnp.float32) - middle
