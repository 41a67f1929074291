"""The plain cache: rows for every token of a request. Lossless, unless its rows are codes.

One array [B K, S, E] a layer for keys and one for values; S rows a request and head. The token at position p
lies in row p mod S. A layer that attends to everything has S >= the longest request, so its row is the
position; a layer with a sliding window has S = window + slack and overwrites its oldest rows. The slack is
what a chunk may write, or a rollback forget, without losing a row that a query still sees. Keys are stored
after rotation. In place of an array there may be `QuantizedRows` of the same shape (`coded.py`): a cache in
2, 4 or 8 bits. Then a chunk that attends to itself, too, sees its keys and values as they will be read back,
so that how a text is cut into chunks changes no more than the rounding of sums does.

Letters: B requests, K key heads, S cached tokens (rows that there are), E head size, T tokens of a chunk, H
query heads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.rows import (
    Rows,
    code_of,
    dequantize,
    quantize,
    rotate_queries,
    stored,
    type_name,
    zeros,
)
from jaxllm.ops.attention import DistanceBias, Reach, attention, heads_first, needs_tiles, tiled_attention
from jaxllm.pytree import pytree, static
from pallas_kernels.decode_attention import attend_rows

FEW_QUERIES = 8  # new tokens of a request: with more, attention is a product of matrices like any other


@pytree
class DenseCache:
    """Keys and values of every layer, and how many tokens each request holds."""

    keys: tuple[Rows, ...]  # a layer: [B K, S, E]
    values: tuple[Rows, ...]  # a layer: [B K, S, E]
    lengths: jax.Array  # [B] int32
    # [B] int32: the position in row 0 of layers without a window, what came before lies elsewhere; None: 0
    start: jax.Array | None
    # [B] int32: how many tokens a request may come to have, by which a rotation with two lists of factors
    # chooses one, for all rows alike; 0: as many as its first chunk
    extents: jax.Array
    windows: tuple[int | None, ...] = static()  # a layer: how far back it sees
    capacity: int = static()  # how many tokens a request may have
    # True until the first chunk, which then attends to itself only: cheaper, and known before tracing.
    is_first_chunk: bool = static()

    def __repr__(self) -> str:
        """Tokens of each request, capacity, what a row is, bytes; never the numbers in it."""
        of = f"{len(self.windows)} layers of {type_name(self.keys[0])}"
        return f"DenseCache({_tokens(self.lengths)} of {self.capacity}, {of}, {size_text(self)})"


def _tokens(lengths: jax.Array) -> str:
    """How many tokens each request has seen, where that is known."""
    if isinstance(lengths, jax.core.Tracer) or not isinstance(lengths, jax.Array):
        return f"{lengths.shape[0]} requests"
    return f"tokens {np.asarray(lengths).tolist()}"


def size_text(tree) -> str:
    """The bytes of all arrays in a tree, as people write them."""
    return f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)):,} bytes"


def make(
    batch: int,
    *,
    windows: tuple[int | None, ...],
    kv_heads: int,
    head_dim: int,
    capacity: int,
    slack: int,
    dtype,
    bits: int | None = None,
    group_size: int | None = None,
) -> DenseCache:
    """A cache of zeros for `capacity` tokens a request; a layer with a window holds window + slack if less.

    bits: 2, 4 or 8 for rows in codes. group_size: numbers of a row that share a scale, None for all of them.
    """
    if capacity < 1 or slack < 0:
        got = f"{capacity=}, {slack=}"
        raise ValueError(f"cache.make: capacity must be positive and slack not negative, got {got}")
    sizes = [capacity if window is None else min(capacity, window + slack) for window in windows]
    shapes = [(batch * kv_heads, size, head_dim) for size in sizes]

    coding = {"bits": bits, "group_size": group_size}
    return DenseCache(
        keys=tuple(zeros(shape, dtype, rotated=True, **coding) for shape in shapes),
        values=tuple(zeros(shape, dtype, rotated=False, **coding) for shape in shapes),
        lengths=jnp.zeros((batch,), jnp.int32),
        start=None,
        extents=jnp.zeros((batch,), jnp.int32),
        windows=windows,
        capacity=capacity,
        is_first_chunk=True,
    )


def global_layers(windows: tuple[int | None, ...]) -> list[int]:
    """The layers that see all of the text, those without a window: what is evicted is theirs."""
    return [layer for layer, window in enumerate(windows) if window is None]


def append(
    cache: DenseCache,
    layer: int,
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    lengths: Int[Array, " B"],
) -> DenseCache:
    """The cache with the first `lengths[b]` tokens of the chunk written behind request b's rows of one layer.

    `cache.lengths` stays: `advance` moves it once all layers are written. Raises ValueError when the chunk
    cannot fit; that a request outgrows its rows over many chunks is the caller's to prevent (lengths are
    traced).
    """
    (B, T, K, _), S = k.shape, cache.keys[layer].shape[1]
    if T > max_chunk(cache):
        raise ValueError(f"cache.append: a chunk must fit, got {T=} tokens, max_chunk={max_chunk(cache)}")
    if cache.is_first_chunk and T <= S:

        def write(rows, new):  # rows past a request's length are never seen and soon overwritten
            return rows.at[:, :T].set(new)

    else:
        step = jnp.arange(T)[None, :]
        stays = (step < lengths[:, None]) & (step >= lengths[:, None] - S)
        end = cache.lengths - first_position(cache, layer)
        row = jnp.where(stays, (end[:, None] + step) % S, S)  # S lies outside: dropped
        row, block = jnp.repeat(row, K, axis=0), jnp.arange(B * K)[:, None]

        def write(rows, new):
            return rows.at[block, row].set(new, mode="drop")

    keys, values = list(cache.keys), list(cache.values)
    keys[layer] = jax.tree.map(write, keys[layer], quantize(heads_first(k), keys[layer]))
    values[layer] = jax.tree.map(write, values[layer], quantize(heads_first(v), values[layer]))
    return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))


def advance(cache: DenseCache, lengths: Int[Array, " B"]) -> DenseCache:
    """The cache that counts the chunk just written by all layers."""
    ends = cache.lengths + lengths
    extents = jnp.where(cache.extents > 0, cache.extents, ends)
    return dataclasses.replace(cache, lengths=ends, extents=extents, is_first_chunk=False)


def first_position(cache: DenseCache, layer: int) -> jax.Array | int:
    """Where the rows of a layer begin [B]."""
    return 0 if cache.start is None or cache.windows[layer] is not None else cache.start


def row_positions(ends: Int[Array, " B"], S: int) -> Int[Array, "B S"]:
    """The position of each row's token when request b ends before `ends[b]`; negative where there is none."""
    last, row = ends[:, None] - 1, jnp.arange(S)[None, :]
    return last - (last - row) % S


def attend(
    q: Float[Array, "B T H E"],
    cache: DenseCache,
    layer: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    bias: DistanceBias | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H E"]:
    """What queries at `positions` read from a layer to which their own chunk (`lengths` tokens) was appended.

    mask: hides further rows (tree decoding). bias: added to the scores by distance (T5). sinks: scores of
    heads that have no value (GPT-OSS).
    """
    keys, values = cache.keys[layer], cache.values[layer]
    seen = reach(cache, layer, positions, lengths)
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    q = rotate_queries(q, keys)
    if mask is None and bias is None and q.shape[1] <= FEW_QUERIES and not needs_tiles(q, keys.shape[1]):
        out = attend_rows(
            q,
            stored(keys),
            stored(values),
            positions,
            seen.keys,
            window=seen.window,
            **rule,
            **code_of(keys),
        )
        return out.astype(values.dtype)
    k, v = dequantize(keys), dequantize(values)
    if mask is None and needs_tiles(q, k.shape[1]):
        return tiled_attention(q, k, v, seen, bias=bias, **rule)
    added = None if bias is None else bias(seen.keys[:, None] - positions[:, :, None])  # [B, H, T, S]
    return attention(q, k, v, seen.mask() if mask is None else seen.mask() & mask, bias=added, **rule)


def reach(cache: DenseCache, layer: int, positions: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Reach:
    """Which rows of a layer queries see, those of their own chunk (`lengths` tokens) among them."""
    start = first_position(cache, layer)
    at = row_positions(cache.lengths + lengths - start, cache.keys[layer].shape[1])
    if not isinstance(start, int):
        at = jnp.where(at >= 0, at + start[:, None], -1)
    return Reach(positions, at, window=cache.windows[layer])


def truncate(cache: DenseCache, lengths: Int[Array, " B"]) -> DenseCache:
    """The cache with request b cut back to its first `lengths[b]` tokens; a longer length changes nothing.

    Exact as long as no more than the slack is forgotten by a layer with a window.
    """
    least = lengths if cache.start is None else jnp.maximum(lengths, cache.start)
    return dataclasses.replace(cache, lengths=jnp.minimum(cache.lengths, least))


def select(cache: DenseCache, requests: Int[Array, " N"]) -> DenseCache:
    """The cache of some requests, in that order, with repeats where asked."""
    B = cache.lengths.shape[0]

    def of_requests(x):
        return x.reshape(B, -1, *x.shape[1:])[requests].reshape(-1, *x.shape[1:])

    keys, values = jax.tree.map(of_requests, (cache.keys, cache.values))
    start = None if cache.start is None else cache.start[requests]
    of_each: dict[str, Any] = {"lengths": cache.lengths[requests], "extents": cache.extents[requests]}
    return dataclasses.replace(cache, keys=keys, values=values, start=start, **of_each)


def max_chunk(cache: DenseCache) -> int:
    """The longest chunk that every layer can take next."""
    if cache.is_first_chunk:
        return cache.capacity
    rings = [
        keys.shape[1] - window + 1
        for keys, window in zip(cache.keys, cache.windows, strict=True)
        if window is not None and (cache.start is not None or keys.shape[1] < cache.capacity)
    ]
    return min([cache.capacity, *rings])


def with_capacity(cache: DenseCache, capacity: int) -> DenseCache:
    """A copy with room for `capacity` tokens a request; never smaller than the cache given."""
    more = max(0, capacity - cache.capacity)

    def wider(rows: Rows, window: int | None):
        # a layer that overwrites its oldest rows stays
        full = window is None or (cache.start is None and rows.shape[1] == cache.capacity)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more if full else 0), (0, 0))), rows)

    keys, values = (tuple(map(wider, some, cache.windows)) for some in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values, capacity=cache.capacity + more)
