"""Attention over keys and values that are at hand: the meaning, in jnp, for every backend.

Grouped queries (Ainslie et al., arXiv:2305.13245): query head j reads key head j // G. Scores, softmax and
the sum over values are accumulated in float32. Where all scores at once would be too many, queries and keys
are taken in tiles with a running softmax (Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682), so that memory is linear in both. Letters: B batch, T queries, S keys, H query heads, K key
heads, G = H / K, J = B K, E head size.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.partial_softmax import (
    FLOAT32,
    MASK_VALUE,
    PartialSoftmax,
    divided,
    merge,
    partial_softmax,
    soft_cap,
)

# What is added to the scores [B, H, T, S] for distances [B, T, S], negative for keys behind.
DistanceBias = Callable[[jax.Array], jax.Array]

MAX_SCORES = 2**25  # B H T S that are held at once; with more, attention goes by tiles of
TILE_SCORES, TILE_KEYS, MIN_QUERIES = 2**21, 512, 16
MIN_BLOCK = 128  # queries of a text that are taken together at least


def attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    mask: Bool[Array, "#B #T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention where `mask` says which key each query may see.

    k, v: J = B K blocks of rows, one a request and key head, as `heads_first` makes them.
    softcap: scores are bent to it by `soft_cap` (Gemma 2).
    bias: added to the scores (T5's relative positions).
    sinks: a score of each head that takes its share of the weights and has no value (GPT-OSS).
    """
    B, T, H, E = q.shape
    J, S = k.shape[:2]
    K, G = J // B, H * B // J
    q = q.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(J, G * T, E)
    scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32).reshape(B, K, G, T, S) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(-1, K, G, T, S)
    scores = soft_cap(scores, softcap)
    scores = jnp.where(mask[:, None, None], scores, MASK_VALUE)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, G, 1, 1), (B, K, G, T, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :S].astype(v.dtype).reshape(J, G * T, S)
    out = jnp.einsum("jns,jsd->jnd", weights, v, **FLOAT32).astype(v.dtype)
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def heads_first(x: Float[Array, "B T K E"]) -> Float[Array, "J T E"]:
    """Keys or values as `attention` and the caches hold them: one block of rows a request and head.

    subtle: one axis J = B K, not two. With an axis of size 1 XLA:CPU rewrites the product to drop it, fuses
      that with the write into the cache, and then copies the cache at every step.
    """
    B, T, K, E = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, T, E)


def sinks_by_block(sinks: Float[Array, " H"], J: int, K: int) -> Float[Array, "J G"]:
    """The sinks of the query heads that read each of J = B K blocks of rows, float32."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(K, -1), (J // K, 1))


class Reach(NamedTuple):
    """Which keys a query sees, by where both stand; what a tile needs to know of a mask."""

    queries: Int[Array, "#B T"]  # positions
    keys: Int[Array, "#B S"]  # positions, negative where there is no key
    causal: bool = True  # sees none behind itself
    window: int | None = None  # tokens that it sees, itself included

    def mask(self) -> Bool[Array, "#B T S"]:
        """Which key each query may see."""
        at, of = self.queries[:, :, None], self.keys[:, None]
        seen = jnp.broadcast_to(of >= 0, jnp.broadcast_shapes(at.shape, of.shape))
        if self.causal:
            seen = seen & (of <= at)
        return seen if self.window is None else seen & (of > at - self.window)


def needs_tiles(q: Float[Array, "B T H E"], S: int) -> bool:
    """Whether scores of all queries with S keys are too many to be held at once; one query's never are."""
    B, T, H, _ = q.shape
    return T > 1 and B * T * H * S > MAX_SCORES


def tiled_softmax(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    reach: Reach,
    *,
    scale: float,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
) -> PartialSoftmax:
    """The softmax [J, T, G] of `attention` by tiles, of which those where nothing is seen are left out.

    What a tile computes is computed again in the backward pass: no scores are ever stored.
    """
    (B, T, H, E), (J, S) = q.shape, k.shape[:2]
    K, G = J // B, H * B // J
    s = min(S, TILE_KEYS)
    t = min(T, max(MIN_QUERIES, TILE_SCORES // (B * H * s)))

    def tiles(x: jax.Array, size: int, fill=0) -> jax.Array:
        """Tiles of axis 1, in front; the last one is filled up."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    of_keys = tiles(k, s), tiles(v, s), tiles(reach.keys, s, -1)

    @jax.checkpoint
    def of_queries(tile: tuple[jax.Array, jax.Array]) -> PartialSoftmax:
        asked, at = tile
        asked = asked.reshape(B, t, K, G, E).swapaxes(1, 2).reshape(J, t * G, E)

        @jax.checkpoint
        def step(so_far: PartialSoftmax, keys) -> tuple[PartialSoftmax, None]:
            k, v, of = keys
            seen = reach._replace(queries=at, keys=of).mask()  # [#B, t, s]

            def with_tile() -> PartialSoftmax:
                by_row = jnp.broadcast_to(seen[:, None, :, None], (B, K, t, G, s)).reshape(J, t * G, s)
                added = None
                if bias is not None:
                    added = bias(of[:, None] - at[:, :, None])  # [#B, H, t, s]
                    added = jnp.broadcast_to(added, (B, H, t, s)).reshape(B, K, G, t, s)
                    added = added.swapaxes(2, 3).reshape(J, t * G, s)
                new = partial_softmax(asked, k, v, by_row, scale=scale, softcap=softcap, bias=added)
                return merge(so_far, new)

            return jax.lax.cond(seen.any(), with_tile, lambda: so_far), None

        none = jnp.full((J, t * G), MASK_VALUE), jnp.zeros((J, t * G)), jnp.zeros((J, t * G, E))
        return jax.lax.scan(step, PartialSoftmax(*none), of_keys)[0]

    # subtle: what fills up stands before all keys, and sees none
    found = jax.lax.map(of_queries, (tiles(q, t), tiles(reach.queries, t, -1)))

    def whole(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], J, t, G, *x.shape[3:]).swapaxes(0, 1)
        return x.reshape(J, -1, G, *x.shape[4:])[:, :T]

    return PartialSoftmax(*map(whole, found))


def tiled_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    reach: Reach,
    *,
    sinks: Float[Array, " H"] | None = None,
    **rule,
) -> Float[Array, "B T H E"]:
    """`attention` by tiles: the same numbers but for rounding, without memory for all scores."""
    (B, T, H, E), J = q.shape, len(k)
    found = tiled_softmax(q, k, v, reach, **rule)  # [J, T, G]
    by_row = None
    if sinks is not None:
        by_row = jnp.broadcast_to(sinks_by_block(sinks, J, J // B)[:, None], found.total.shape)
    out = divided(found, by_row).astype(v.dtype)  # [J, T, G, E]
    return out.reshape(B, -1, T, H * B // k.shape[0], E).swapaxes(1, 2).reshape(B, T, H, E)


def causal_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Attention of a chunk to itself: token t sees tokens max(0, t - window + 1) to t.

    Queries are taken in at most four blocks, each against the keys it can see and no others, which saves up
    to 37 % of the work (eight would save 44 %, with twice as much for XLA to compile), and each of several is
    recomputed in the backward pass, so that not all scores are stored at once. Where a block has too many
    scores, all goes by tiles.
    """
    T = q.shape[1]
    k, v = heads_first(k), heads_first(v)
    size = max(MIN_BLOCK, -(-T // 4))
    if needs_tiles(q[:, :size], T):
        at = jnp.arange(T)[None]
        reach = Reach(at, at, window=window)
        return tiled_attention(q, k, v, reach, scale=scale, softcap=softcap, bias=bias, sinks=sinks)
    by_rule = partial(attention, scale=scale, softcap=softcap)
    block = jax.checkpoint(by_rule) if T > size else by_rule
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window + 1)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        added = None if bias is None else bias(-distance[None])  # [1, H, T, S]
        seen = k[:, first:end], v[:, first:end]
        outs.append(block(q[:, start:end], *seen, mask[None], bias=added, sinks=sinks))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
