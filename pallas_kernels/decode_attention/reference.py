"""What attention of a few new queries to a cache means, in jnp; also what runs where no kernel does.

`pages` walks over the pages of a layer, some at a time, with a running softmax for each head, so that a page
is read once and time follows the rows that there are. `pages_definition` is the same thing said shortly: one
softmax over each head's own rows, where every head looks at every page. `rows` is attention to a dense cache.

Letters: B requests, T tokens, H query heads, K key heads, G = H / K, E head size, S rows of a dense cache, J
heads of all contexts (or requests), P pages, C rows a page, W pages of a tile, n queries of a request and key
head, M most requests of a context, N = M n, w = E numbers, or the words that hold them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.decode_attention.coded import Code, dequantize
from pallas_kernels.decode_attention.partial_softmax import (
    FLOAT32,
    MASK_VALUE,
    PartialSoftmax,
    partial_softmax,
    soft_cap,
)

MIN_PAGES, MAX_PAGES = 8, 64  # of a tile
MAX_QUERIES = 1024  # W N: of all pages of a tile together


def rows(
    q: Float[Array, "B T H E"],
    keys: Shaped[Array, "J S w"],
    values: Shaped[Array, "J S w"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    sinks: Float[Array, " H"] | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    code: Code | None,
) -> Float[Array, "B T H E"]:
    """Attention to all rows, of which those with a position that a query sees count."""
    B, T, H, E = q.shape
    k, v = (dequantize(x, code, E, q.dtype) for x in (keys, values))
    J, S = k.shape[:2]
    K, G = J // B, H * B // J
    q = q.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(J, G * T, E)
    scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32).reshape(B, K, G, T, S) * scale
    seen = is_seen(positions, key_positions, window)
    scores = jnp.where(seen[:, None, None], soft_cap(scores, softcap), MASK_VALUE)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, G, 1, 1), (B, K, G, T, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :S].astype(v.dtype).reshape(J, G * T, S)
    out = jnp.einsum("jns,jsd->jnd", weights, v, **FLOAT32)
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def is_seen(
    positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Which key each query sees: those at positions from 0 on, none behind itself, the window's only."""
    at, of = positions[:, :, None], key_positions[:, None]
    seen = (of >= 0) & (of <= at)
    return seen if window is None else seen & (of > at - window)


def pages_definition(
    q: Float[Array, "B K n E"],
    keys: Shaped[Array, "P C w"],
    values: Shaped[Array, "P C w"],
    page_offsets: Int[Array, " offsets"],
    page_lengths: Int[Array, " P"],
    page_head: Int[Array, " P"],
    context_of_request: Int[Array, " B"],
    *,
    max_readers: int,
    scale: float,
    softcap: float | None,
    code: Code | None,
) -> PartialSoftmax:
    """One softmax over each head's own rows; slow, as every head looks at every page."""
    (_, K, _, E), (P, C, _) = q.shape, keys.shape
    k, v = (dequantize(x, code, E, q.dtype).reshape(P * C, E) for x in (keys, values))
    head = context_of_request[:, None] * K + jnp.arange(K)[None]
    first, end = (page_offsets[head + i][..., None] for i in (0, 1))  # [B, K, 1]
    page = jnp.arange(P)[None, None]
    real = jnp.arange(C)[None] < page_lengths[:, None]  # [P, C]
    own = ((first <= page) & (page < end))[..., None] & real[None, None]  # [B, K, P, C]
    own = own.reshape(*head.shape, 1, P * C)
    scores = soft_cap(jnp.einsum("bkne,se->bkns", q, k, **FLOAT32) * scale, softcap)
    scores = jnp.where(own, scores, MASK_VALUE)
    greatest = scores.max(-1)
    weights = jnp.where(own, jnp.exp(scores - greatest[..., None]), 0.0)
    v = jnp.where(real.reshape(-1, 1), v, jnp.zeros((), v.dtype))
    out = jnp.einsum("bkns,se->bkne", weights.astype(v.dtype), v, **FLOAT32)
    return PartialSoftmax(greatest, weights.sum(-1), out)


def pages(
    q: Float[Array, "B K n E"],
    keys: Shaped[Array, "P C w"],
    values: Shaped[Array, "P C w"],
    page_offsets: Int[Array, " offsets"],
    page_lengths: Int[Array, " P"],
    page_head: Int[Array, " P"],
    context_of_request: Int[Array, " B"],
    *,
    max_readers: int,
    scale: float,
    softcap: float | None,
    code: Code | None,
) -> PartialSoftmax:
    """The softmax over one layer's context, by a walk over its pages, a tile of W at a time."""
    rank = rank_of_requests(context_of_request)
    queries = queries_by_head(q, page_offsets, context_of_request, rank, max_readers)
    (J, N, E), P = queries.shape, keys.shape[0]
    W = _pages_of_tile(P, J, N)
    queries = jnp.pad(queries, ((0, W), (0, 0), (0, 0)))  # a tile may have heads behind the last one
    pool = _Pool(keys, values, page_lengths, page_head)
    start, end = page_offsets[0], page_offsets[J]

    def body(carry):
        page, heads = carry
        tile = _read_tile(pool, page, end, W)

        def of_tile(x):
            return jax.lax.dynamic_slice_in_dim(x, tile.head, W)

        asked = of_tile(queries)[jnp.minimum(tile.local, W - 1)]
        k, v = (dequantize(x, code, E, q.dtype) for x in (tile.keys, tile.values))
        found = partial_softmax(asked, k, v, tile.seen[:, None], scale=scale, softcap=softcap)
        heads = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, tile.head, 0),
            heads,
            _merge_pages(jax.tree.map(of_tile, heads), found, tile.local),
        )
        return page + tile.num_pages, heads

    none = PartialSoftmax(jnp.full((J + W, N), MASK_VALUE), jnp.zeros((J + W, N)), jnp.zeros((J + W, N, E)))
    _, heads = jax.lax.while_loop(lambda carry: carry[0] < end, body, (start, none))
    heads = jax.tree.map(lambda x: x[:J], heads)
    return by_request(heads, q.shape[1], context_of_request, rank, max_readers)


def rank_of_requests(context_of_request: Int[Array, " B"]) -> Int[Array, " B"]:
    """Each request's number among those that read the same context."""
    order = jnp.arange(len(context_of_request))
    before = (context_of_request[:, None] == context_of_request[None]) & (order[:, None] > order[None])
    return before.sum(1)


def queries_by_head(
    q: Float[Array, "B K n E"],
    page_offsets: Int[Array, " offsets"],
    context_of_request: Int[Array, " B"],
    rank: Int[Array, " B"],
    max_readers: int,
) -> Float[Array, "J N E"]:
    """The N = M n queries of each context's head; zeros where fewer than M requests read it."""
    (B, K, n, E), J, M = q.shape, page_offsets.shape[0] - 1, max_readers
    request = jnp.full((J // K, M), B, jnp.int32)
    order = jnp.arange(B, dtype=jnp.int32)
    request = request.at[context_of_request, rank].set(order, mode="drop")
    queries = jnp.concatenate([q, jnp.zeros((1, K, n, E), q.dtype)])[request]  # [J / K, M, K, n, E]
    return queries.transpose(0, 2, 1, 3, 4).reshape(J, M * n, E)


def by_request(
    heads: PartialSoftmax,
    K: int,
    context_of_request: Int[Array, " B"],
    rank: Int[Array, " B"],
    max_readers: int,
) -> PartialSoftmax:
    """What each request's n queries found, of heads [J, N]."""
    M = max_readers

    def one(x):
        J, N = x.shape[:2]
        x = x.reshape(J // K, K, M, N // M, *x.shape[2:])
        return x[context_of_request, :, jnp.minimum(rank, M - 1)]

    return jax.tree.map(one, heads)


def _pages_of_tile(P: int, J: int, N: int) -> int:
    """Pages read at a time (W).

    As many as there are heads: their rows fill a product that is worth two cores, and what is added up for
    heads (W W N E) stays small beside the product itself (W N C E).
    """
    return min(P, max(MIN_PAGES, min(J, MAX_PAGES, MAX_QUERIES // N)))


class _Pool(NamedTuple):
    """Pages of all heads."""

    keys: Shaped[Array, "P C w"]
    values: Shaped[Array, "P C w"]
    lengths: Int[Array, " P"]
    head: Int[Array, " P"]


class _Tile(NamedTuple):
    """Pages of one layer, read at once."""

    keys: Shaped[Array, "W C w"]
    values: Shaped[Array, "W C w"]
    seen: Bool[Array, "W C"]  # rows that are real, and not read before
    head: Int[Array, ""]  # the first page's
    local: Int[Array, " W"]  # each page's head, counted from that one; W: the page is not the tile's
    num_pages: Int[Array, ""]  # pages that are the tile's


def _read_tile(pool: _Pool, page: Int[Array, ""], end: Int[Array, ""], W: int) -> _Tile:
    """The pages from `page` on, before `end`, as far as they are of W heads."""
    P, C, _ = pool.keys.shape
    start = jnp.minimum(page, P - W)
    numbers = start + jnp.arange(W)

    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, start, W)

    head = pool.head[page]
    local = cut(pool.head) - head
    # subtle: where heads without pages lie between, W pages reach farther than W heads
    new = (numbers >= page) & (numbers < end) & (local < W)
    seen = jnp.arange(C)[None] < jnp.where(new, cut(pool.lengths), 0)[:, None]
    return _Tile(cut(pool.keys), cut(pool.values), seen, head, jnp.where(new, local, W), new.sum())


def _merge_pages(heads: PartialSoftmax, found: PartialSoftmax, head: Int[Array, " W"]) -> PartialSoftmax:
    """The softmax of W heads with the rows of W pages; head[page] is W for a page of none of them."""
    W = len(head)
    owner = head[None] == jnp.arange(W)[:, None]  # [head, page]
    of_pages = jnp.where(owner[:, :, None], found.greatest[None], MASK_VALUE).max(1)
    greatest = jnp.maximum(heads.greatest, of_pages)
    mine = owner.astype(jnp.float32)
    shrink = jnp.exp(heads.greatest - greatest)
    factor = jnp.exp(found.greatest - greatest[jnp.minimum(head, W - 1)])
    factor = jnp.where(head[:, None] < W, factor, 0.0)

    def add(x):
        return jnp.einsum("hp,pm->hm", mine, x.reshape(W, -1), **FLOAT32)

    total = heads.total * shrink + add(found.total * factor)
    out = heads.out * shrink[..., None] + add(found.out * factor[..., None]).reshape(heads.out.shape)
    return PartialSoftmax(greatest, total, out)
