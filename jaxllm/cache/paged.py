"""A cache after eviction: each head keeps rows of its own of the context, and the others' bytes are gone.

A `PagedCache` is a frozen context and a tail. The tail is a `DenseCache` of what came since, whose rows are
written in place; layers with a window, from which nothing is evicted, lie in it whole. The context is one
pool of pages of C rows for all layers, requests and heads. The pages of a head follow each other, so that a
block table is where they begin:

    pages page_offsets[l, j] to page_offsets[l, j + 1]    of head j = context * K + key head, in layer l
    keys[page]     [C, E]           its rows by position; the last page of a head may not be full

Attention walks over a layer's pages, some at a time, with a running softmax for each head; a page is read
once, and no head is filled up beyond its own last page. How many pages a head has is known at run time only;
how many there are at most follows from the number of rows that stay, so contexts of one size and budget share
a compilation. Rows are stored rotated, as they were, so new tokens go on at their own positions. Lossless as
to the rows that are kept. A row's score stays with it, for a second eviction.

Requests may share a context (`select`, many questions to one text). `attend_reference` is what
`attend` means, and what a kernel over pages must equal.

Letters: B requests, T tokens of a chunk, H query heads, K key heads, G = H / K, E head size, S rows of the
tail, L layers without a window, J heads of all contexts (or of all requests), P pages, C rows a page, W pages
of a tile, n = G T queries of a request and key head, M most requests of a context, N = M n.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import dense
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.rows import Rows, code_of, dequantize, rotate_queries, stored
from jaxllm.ops.attention import attention, needs_tiles, sinks_by_block, tiled_softmax
from jaxllm.pytree import pytree, static
from pallas_kernels.decode_attention import PartialSoftmax, attend_pages, divided, merge
from pallas_kernels.decode_attention.partial_softmax import partial_softmax


@pytree
class Context:
    """What eviction left of one text or several, in pages; never written."""

    keys: Rows  # [P, C, E]
    values: Rows  # [P, C, E]
    positions: jax.Array  # int32 [P, C], -1 where a page is not full
    scores: jax.Array  # float32 [P, C]: what `evict` was given; infinite for rows that always stay
    page_head: jax.Array  # int32 [P]: whose page
    page_lengths: jax.Array  # int32 [P]: how many of its rows are real
    page_offsets: jax.Array  # int32 [L, J + 1]: the first page of each head, and where the last one's end
    context_lengths: jax.Array  # int32 [J / K]: tokens that scores were given for, evicted ones too
    prefix: jax.Array  # int32 []: where those begin
    context_of_request: jax.Array  # int32 [B]
    max_readers: int = static()  # requests that read one context, at most


@pytree
class PagedCache:
    """What eviction left, and what came since."""

    context: Context
    tail: DenseCache

    def __repr__(self) -> str:
        """The pages that hold what was kept, and the tail; never the numbers in them."""
        pages, rows = self.context.positions.shape
        return f"PagedCache({pages} pages of {rows} rows, {dense.size_text(self.context)}, tail={self.tail})"

    @property
    def lengths(self) -> jax.Array:
        """How many tokens each request has seen, those evicted too: where the next one stands [B]."""
        return self.tail.lengths

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.tail.windows

    @property
    def is_first_chunk(self) -> bool:
        return False


def append(cache: PagedCache, layer: int, k, v, lengths) -> PagedCache:
    """As `dense.append`, behind the context."""
    return dataclasses.replace(cache, tail=dense.append(cache.tail, layer, k, v, lengths))


def advance(cache: PagedCache, lengths: Int[Array, " B"]) -> PagedCache:
    """As `dense.advance`."""
    return dataclasses.replace(cache, tail=dense.advance(cache.tail, lengths))


def truncate(cache: PagedCache, lengths: Int[Array, " B"]) -> PagedCache:
    """As `dense.truncate`; the context stays."""
    return dataclasses.replace(cache, tail=dense.truncate(cache.tail, lengths))


def select(cache: PagedCache, requests: Int[Array, " N"]) -> PagedCache:
    """As `dense.select`; contexts are shared, not copied, and stay even if no request reads them."""
    of = cache.context.context_of_request[requests]
    traced = isinstance(of, jax.core.Tracer)
    readers = of.shape[0] if traced else int(np.bincount(np.asarray(of), minlength=1).max(initial=1))
    context = dataclasses.replace(cache.context, context_of_request=of, max_readers=readers)
    return PagedCache(context, dense.select(cache.tail, requests))


def with_capacity(cache: PagedCache, capacity: int) -> PagedCache:
    """As `dense.with_capacity`: room for `capacity` tokens behind the context."""
    return dataclasses.replace(cache, tail=dense.with_capacity(cache.tail, capacity))


def attend(
    q: Float[Array, "B T H E"],
    cache: PagedCache,
    layer: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    bias=None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H E"]:
    """As `dense.attend`. mask: of the rows of the tail; the context is seen whole. bias must be None."""
    if bias is not None:
        raise ValueError("cache.attend: a bias by distance needs all rows: such a cache cannot be evicted")
    tail = cache.tail
    if tail.windows[layer] is not None:
        rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return dense.attend(q, tail, layer, positions, lengths, mask=mask, **rule)
    B, T, H, E = q.shape
    keys, values = tail.keys[layer], tail.values[layer]
    J = keys.shape[0]
    K, G = J // B, H * B // J
    asked = rotate_queries(q, keys)
    q = asked.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, E)
    rule = {"scale": scale, "softcap": softcap}
    of_context = _attend_context(q, cache.context, _context_layer(tail, layer), **rule)
    of_context = jax.tree.map(lambda x: x.reshape(J, *x.shape[2:]), of_context)
    seen = dense.reach(tail, layer, positions, lengths)
    if mask is None and needs_tiles(asked, keys.shape[1]):
        of_tail = tiled_softmax(asked, dequantize(keys), dequantize(values), seen, **rule)  # [J, T, G]
        of_tail = jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(J, G * T, *x.shape[3:]), of_tail)
    else:
        of_row = seen.mask() if mask is None else seen.mask() & mask  # [B, T, S]
        of_row = jnp.broadcast_to(of_row[:, None, None], (B, K, G, T, of_row.shape[-1])).reshape(J, G * T, -1)
        q = q.reshape(J, G * T, E)
        of_tail = partial_softmax(q, dequantize(keys), dequantize(values), of_row, **rule)
    by_row = None
    if sinks is not None:
        by_row = jnp.repeat(sinks_by_block(sinks, J, K), T, axis=1)  # [J, G T]
    out = divided(merge(of_context, of_tail), by_row).astype(values.dtype)
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def attend_reference(
    q: Float[Array, "B T H E"],
    cache: PagedCache,
    layer: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H E"]:
    """What `attend` means, and a kernel over pages must equal: one softmax over each head's own rows.

    For a layer without a window; slow, as every head looks at every page.
    """
    (B, T, H, E), tail, context = q.shape, cache.tail, cache.context
    K = tail.keys[layer].shape[0] // B
    q = rotate_queries(q, tail.keys[layer]).reshape(B, T, K, H // K, E)
    own = _own_rows(context, _context_layer(tail, layer), K)[:, :, None]  # [B, K, 1, P C]
    seen = dense.reach(tail, layer, positions, lengths).mask()
    seen = (seen if mask is None else seen & mask)[:, None]  # [B, 1, T, S]
    sees = [jnp.broadcast_to(mask, (B, K, T, mask.shape[-1])) for mask in (own, seen)]

    def rows(pool: Rows, tail: Rows) -> Float[Array, "B K n E"]:
        """Every row of the context, then those of the tail."""
        of_context = jnp.broadcast_to(dequantize(pool).reshape(-1, E), (B, K, own.shape[-1], E))
        return jnp.concatenate([of_context, dequantize(tail).reshape(B, K, -1, E)], axis=2)

    keys, values = rows(context.keys, tail.keys[layer]), rows(context.values, tail.values[layer])

    def of_head(q, k, v, sees, sinks):
        return attention(q, k, v, sees, scale=scale, softcap=softcap, sinks=sinks)

    of_heads = jax.vmap(of_head, in_axes=(2, 1, 1, 1, None if sinks is None else 0), out_axes=2)
    by_head = None if sinks is None else sinks.reshape(K, -1)
    return of_heads(q, keys, values, jnp.concatenate(sees, axis=-1), by_head).reshape(B, T, H, E)


def _own_rows(context: Context, layer: int, K: int) -> Bool[Array, "B K n"]:
    """Which rows of the context, all pages one after the other, each request's key heads have."""
    P, C = context.positions.shape
    head = context.context_of_request[:, None] * K + jnp.arange(K)[None]
    first, end = (context.page_offsets[layer][head + i][..., None] for i in (0, 1))  # [B, K, 1]
    page = jnp.arange(P)[None, None]
    own = (first <= page) & (page < end)  # [B, K, P]
    real = jnp.arange(C)[None] < context.page_lengths[:, None]  # [P, C]
    return (own[..., None] & real[None, None]).reshape(*own.shape[:2], P * C)


def _context_layer(tail: DenseCache, layer: int) -> int:
    """Which of the context's layers, those without a window, a layer is."""
    return sum(window is None for window in tail.windows[:layer])


def _attend_context(
    q: Float[Array, "B K n E"], context: Context, layer: int, *, scale: float, softcap: float | None
) -> PartialSoftmax:
    """The softmax over one layer's context [B, K, n]."""
    return attend_pages(
        q,
        stored(context.keys),
        stored(context.values),
        context.page_offsets[layer],
        context.page_lengths,
        context.page_head,
        context.context_of_request,
        max_readers=context.max_readers,
        scale=scale,
        softcap=softcap,
        **code_of(context.keys),
    )
