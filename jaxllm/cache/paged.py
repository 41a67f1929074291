"""A cache after eviction: each head keeps rows of its own of the context, and the others' bytes are gone.

A `PagedCache` is a frozen context and a tail. The tail is a `DenseCache` of what came since, whose rows are
written in place; layers with a window, from which nothing is evicted, lie in it whole. The context is one
pool of pages of C rows for all layers, requests and heads. The pages of a head follow each other, so that a
block table is where they begin:

    pages first[l, j] to first[l, j + 1]    of head j = context * K + key head, in layer l
    keys[page]     [C, D]                   its rows by position; the last page of a head may not be full

Attention walks over a layer's pages, some at a time, with a running softmax for each head; a page is read
once, and no head is filled up beyond its own last page. How many pages a head has is known at run time only;
how many there are at most follows from the number of rows that stay, so contexts of one size and budget share
a compilation. Rows are stored rotated, as they were, so new tokens go on at their own positions. Lossless as
to the rows that are kept. A row's score stays with it, for a second eviction.

Requests may share a context: `slot[b]` is the context of request b (`select`, many questions to one text).
`_of_context` is what a kernel over pages replaces.

Letters: B requests, S contexts, K key heads, J = S K, G queries a key head, L layers without a window,
P pages, C rows a page, W pages at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import dense
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.rows import Rows, dequantize, rotate_queries
from jaxllm.ops.attention import FLOAT32, MASK_VALUE
from jaxllm.pytree import pytree, static


@pytree
class Context:
    """The rows that were kept."""

    keys: Rows  # [P, C, D]
    values: Rows  # [P, C, D]
    positions: jax.Array  # int32 [P, C], -1 where a page is not full
    scores: jax.Array  # float32 [P, C]: what `evict` was given; infinite for rows that always stay
    head: jax.Array  # int32 [P]: whose page
    filled: jax.Array  # int32 [P]: how many of its rows are real
    first: jax.Array  # int32 [L, J + 1]
    sizes: jax.Array  # int32 [S]: tokens of each context that scores were given for, evicted ones too
    prefix: jax.Array  # int32 []: where those begin
    slot: jax.Array  # int32 [B]
    readers: int = static()  # requests that read one context, at most


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
    def empty(self) -> bool:
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


def select(cache: PagedCache, rows: Int[Array, " N"]) -> PagedCache:
    """As `dense.select`; contexts are shared, not copied, and stay even if no request reads them."""
    slot = cache.context.slot[rows]
    traced = isinstance(slot, jax.core.Tracer)
    readers = slot.shape[0] if traced else int(np.bincount(np.asarray(slot), minlength=1).max(initial=1))
    context = dataclasses.replace(cache.context, slot=slot, readers=readers)
    return PagedCache(context, dense.select(cache.tail, rows))


def grow(cache: PagedCache, rows: int) -> PagedCache:
    """As `dense.grow`: room for `rows` tokens behind the context."""
    return dataclasses.replace(cache, tail=dense.grow(cache.tail, rows))


def attend(
    q: Float[Array, "B T H D"],
    cache: PagedCache,
    layer: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Bool[Array, "B T R"] | None = None,
    bias=None,
) -> Float[Array, "B T H D"]:
    """As `dense.attend`. mask: of the rows of the tail; the context is seen whole. bias must be None."""
    if bias is not None:
        raise ValueError("cache.attend: a bias by distance needs all rows: such a cache cannot be evicted")
    tail = cache.tail
    if tail.windows[layer] is not None:
        return dense.attend(
            q, tail, layer, positions, lengths, scale=scale, softcap=softcap, mask=mask, bias=None
        )
    B, T, H, D = q.shape
    keys, values = tail.keys[layer], tail.values[layer]
    J = keys.shape[0]
    K, G = J // B, H * B // J
    q = rotate_queries(q, keys)
    q = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap}
    sums = _of_context(q, cache.context, sum(w is None for w in tail.windows[:layer]), rule)
    _, seen = dense.visible(tail, layer, positions, lengths, mask)  # [B, T, R]
    seen = jnp.broadcast_to(seen[:, None, None], (B, K, G, T, seen.shape[-1])).reshape(J, G * T, -1)
    sums = jax.tree.map(lambda x: x.reshape(J, *x.shape[2:]), sums)
    since = _weighed(q.reshape(J, G * T, D), dequantize(keys), dequantize(values), seen, **rule)
    _, total, out = _both(sums, since)
    out = (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(dequantize(values).dtype)
    return out.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _of_context(q: Float[Array, "B K n D"], context: Context, layer: int, rule):
    """Greatest score [B, K, n], sum of weights and weighted values [B, K, n, D] over one layer's context."""
    (B, K, n, D), (P, C, _) = q.shape, context.keys.shape
    J, M = context.first.shape[1] - 1, context.readers
    slot = context.slot
    before = (slot[:, None] == slot[None]) & (jnp.arange(B)[:, None] > jnp.arange(B)[None])
    rank = before.sum(1)  # among the requests of one context
    own = jnp.full((J // K, M), B, jnp.int32)
    own = own.at[slot, rank].set(jnp.arange(B, dtype=jnp.int32), mode="drop")
    asked = jnp.concatenate([q, jnp.zeros((1, K, n, D), q.dtype)])[own]  # [S, M, K, n, D]
    asked = asked.transpose(0, 2, 1, 3, 4).reshape(J, M * n, D)
    # As many pages at a time as there are heads: their rows fill a product that is worth two cores, and what
    # is added up for heads (W W M n D) stays small beside the product itself (W M n C D).
    W = min(P, max(8, min(J, 64, 1024 // (M * n))))
    room = lambda x: jnp.pad(x, [(0, W)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
    asked = room(asked)
    start, end = context.first[layer, 0], context.first[layer, J]

    def body(carry):
        i, sums = carry
        at = jnp.minimum(i, P - W)
        pages = at + jnp.arange(W)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, W)  # noqa: E731
        least = context.head[i]  # pages at hand belong to this head and those behind it
        local = cut(context.head) - least
        # subtle: where heads without pages lie between, W pages reach farther than W heads
        new = (pages >= i) & (pages < end) & (local < W)
        local = jnp.where(new, local, W)
        heads = lambda x: jax.lax.dynamic_slice_in_dim(x, least, W)  # noqa: E731
        k, v = (dequantize(jax.tree.map(cut, rows)) for rows in (context.keys, context.values))
        seen = jnp.arange(C)[None] < jnp.where(new, cut(context.filled), 0)[:, None]
        part = _weighed(heads(asked)[jnp.minimum(local, W - 1)], k, v, seen[:, None], **rule)
        sums = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, least, 0),
            sums,
            _by_head(jax.tree.map(heads, sums), part, local),
        )
        return i + new.sum(), sums

    none = (
        jnp.full((J + W, M * n), MASK_VALUE),
        jnp.zeros((J + W, M * n)),
        jnp.zeros((J + W, M * n, D)),
    )
    _, sums = jax.lax.while_loop(lambda carry: carry[0] < end, body, (start, none))

    def by_request(x):
        return x[:J].reshape(J // K, K, M, n, *x.shape[2:])[slot, :, jnp.minimum(rank, M - 1)]

    return jax.tree.map(by_request, sums)


def _weighed(q, k, v, seen, *, scale: float, softcap: float | None):
    """Greatest score [J, n], sum of weights relative to it and weighted values [J, n, D] of some rows.

    q [J, n, D], k, v [J, S, D], seen [J, n or 1, S].
    """
    scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, MASK_VALUE)
    greatest = scores.max(-1)
    weights = jnp.where(seen, jnp.exp(scores - greatest[..., None]), 0.0)
    out = jnp.einsum("jns,jsd->jnd", weights.astype(v.dtype), v, **FLOAT32)
    return greatest, weights.sum(-1), out


def _both(one, other):
    """The sums of `_weighed` over the rows of both."""
    greatest = jnp.maximum(one[0], other[0])
    a, b = jnp.exp(one[0] - greatest), jnp.exp(other[0] - greatest)
    return greatest, a * one[1] + b * other[1], a[..., None] * one[2] + b[..., None] * other[2]


def _by_head(sums, part, head: Int[Array, " W"]):
    """The sums of W heads with those of W pages taken in; head[page] is W for a page of none of them."""
    W = len(head)
    owner = head[None] == jnp.arange(W)[:, None]  # [head, page]
    greatest = jnp.maximum(sums[0], jnp.where(owner[:, :, None], part[0][None], MASK_VALUE).max(1))
    mine = owner.astype(jnp.float32)
    shrink = jnp.exp(sums[0] - greatest)
    factor = jnp.where(head[:, None] < W, jnp.exp(part[0] - greatest[jnp.minimum(head, W - 1)]), 0.0)
    add = lambda x: jnp.einsum("hp,pm->hm", mine, x.reshape(x.shape[0], -1), **FLOAT32)  # noqa: E731
    total = sums[1] * shrink + add(part[1] * factor)
    out = sums[2] * shrink[..., None] + add(part[2] * factor[..., None]).reshape(sums[2].shape)
    return greatest, total, out
