"""A cache after eviction: each head keeps rows of its own of the context, and the others' bytes are gone.

A `PagedCache` is a frozen context and a tail. The tail is a `DenseCache` of what came since, whose rows are
written in place; layers with a window, from which nothing is evicted, lie in it whole. The context is one
pool for all layers and heads, of pages of C rows. Heads of a layer are sorted by how much they keep and put
in groups of g; page i of all heads of a group lie side by side, a stripe:

    stripes start[layer] to start[layer + 1]; group[stripe]: whose; first[stripe]: how many rows lie before
    keys[stripe * g + place]    [C, D]: a page of the head at that place of the group

Attention walks over a layer's stripes with a running softmax, so a stripe is read once and no head is
filled up beyond the longest of its group. How many stripes there are is known at run time only, and the
pool's size is rounded up, so that most contexts of one size and budget share a compilation. Rows are stored
rotated, as they were, so new tokens go on at their own positions. Lossless as to the rows that are kept.

Requests may share a context: `slot[b]` is the context of request b (`select`, many questions to one text).

Letters: B requests, S contexts, K key heads, G queries a key head, L layers without a window, N groups.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention import FLOAT32, HIDDEN
from jaxllm.cache import dense, quantized
from jaxllm.cache.dense import DenseCache, Rows
from jaxllm.cache.quantized import CodedRows
from jaxllm.pytree import pytree, static

STEP = 16  # stripes that a pool has room for at least
SLACK = 256  # longest chunk that a layer with a window, not yet full, can take at once after eviction


@pytree
class Context:
    """The rows that were kept."""

    keys: Rows  # [stripes g, C, D]
    values: Rows  # [stripes g, C, D]
    positions: jax.Array  # int32 [stripes g, C], -1 where a page is not full
    group: jax.Array  # int32 [stripes]
    first: jax.Array  # int32 [stripes]
    start: jax.Array  # int32 [L + 1]: the stripes of layer l are start[l] to start[l + 1]
    lengths: jax.Array  # int32 [L, N, g]: rows of each head
    heads: jax.Array  # int32 [L, N g]: which head, context * K + key head, stands at each place
    slot: jax.Array  # int32 [B]
    readers: int = static()  # requests that read one context, at most


@pytree
class PagedCache:
    """What eviction left, and what came since."""

    context: Context
    tail: DenseCache

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
    if isinstance(keys, CodedRows):
        q = quantized.turn(q, keys)
    q = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap}
    sums = _of_context(q, cache.context, sum(w is None for w in tail.windows[:layer]), rule)
    _, seen = dense.visible(tail, layer, positions, lengths, mask)  # [B, T, R]
    seen = jnp.broadcast_to(seen[:, None, None], (B, K, G, T, seen.shape[-1])).reshape(J, G * T, -1)
    sums = jax.tree.map(lambda x: x.reshape(J, *x.shape[2:]), sums)
    _, total, out = _more(sums, q.reshape(J, G * T, D), numbers(keys), numbers(values), seen, **rule)
    out = (out / total[..., None]).astype(numbers(values).dtype)
    return out.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def numbers(rows: Rows) -> jax.Array:
    """Rows as plain numbers, in the basis in which they are stored."""
    return quantized.numbers(rows) if isinstance(rows, CodedRows) else rows


def _of_context(q: Float[Array, "B K n D"], context: Context, layer: int, rule):
    """Greatest score [B, K, n], sum of weights and weighted values [B, K, n, D] over one layer's context."""
    B, K, n, D = q.shape
    N, g = context.lengths.shape[1:]
    S, M, C = N * g // K, context.readers, context.keys.shape[1]
    slot = context.slot
    before = (slot[:, None] == slot[None]) & (jnp.arange(B)[:, None] > jnp.arange(B)[None])
    rank = before.sum(1)  # among the requests of one context
    own = jnp.full((S, M), B, jnp.int32).at[slot, rank].set(jnp.arange(B, dtype=jnp.int32), mode="drop")
    asked = jnp.concatenate([q, jnp.zeros((1, K, n, D), q.dtype)])[own]  # [S, M, K, n, D]
    asked = asked.transpose(0, 2, 1, 3, 4).reshape(S * K, M * n, D)
    heads = context.heads[layer]
    asked = asked[heads].reshape(N, g, M * n, D)

    def body(carry):
        i, sums = carry
        one = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
        at = one(context.group, i)
        stripe = lambda x: jax.lax.dynamic_slice_in_dim(x, i * g, g)  # noqa: E731
        k, v = (jax.tree.map(stripe, rows) for rows in (context.keys, context.values))
        kept = one(context.lengths[layer], at) - one(context.first, i)  # [g]
        seen = jnp.arange(C)[None, None] < kept[:, None, None]
        old = jax.tree.map(lambda x: one(x, at), sums)
        new = _more(old, one(asked, at), numbers(k), numbers(v), seen, **rule)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, at, 0)  # noqa: E731
        return i + 1, jax.tree.map(put, sums, new)

    end = context.start[layer + 1]
    none = (
        jnp.full((N, g, M * n), HIDDEN),
        jnp.zeros((N, g, M * n)),
        jnp.zeros((N, g, M * n, D)),
    )
    _, sums = jax.lax.while_loop(lambda carry: carry[0] < end, body, (context.start[layer], none))
    place = jnp.argsort(heads)

    def by_request(x):
        x = x.reshape(N * g, M, n, *x.shape[3:])[place].reshape(S, K, M, n, *x.shape[3:])
        return x[slot, :, jnp.minimum(rank, M - 1)]

    return jax.tree.map(by_request, sums)


def _more(sums, q, k, v, seen, *, scale: float, softcap: float | None):
    """Running softmax: greatest score, sum of weights, weighted values, with some more rows taken in.

    q [J, n, D], k, v [J, S, D], seen [J, n or 1, S].
    """
    greatest, total, out = sums
    scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, HIDDEN)
    new = jnp.maximum(greatest, scores.max(-1))
    shrink = jnp.exp(greatest - new)
    weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
    more = jnp.einsum("jns,jsd->jnd", weights.astype(v.dtype), v, **FLOAT32)
    return new, total * shrink + weights.sum(-1), out * shrink[..., None] + more


# -- from one layout to the other


def pack(cache: DenseCache, keep: Bool[np.ndarray, "L B K T"], *, rows: int, page: int) -> PagedCache:
    """The cache with the rows that are marked, of the first T tokens of each request, and none but them.

    rows: room for tokens that come later. The cache given stays as it is.
    """
    L, B, K, _ = keep.shape
    layers = [i for i, window in enumerate(cache.windows) if window is None]
    g = _group(B * K)
    N = B * K // g
    counts = keep.sum(-1).reshape(L, B * K)
    heads = np.argsort(counts, axis=1, kind="stable")
    lengths = np.take_along_axis(counts, heads, 1).reshape(L, N, g)
    stripes = -(-lengths.max(-1) // page)  # [L, N]
    start = np.concatenate([[0], np.cumsum(stripes.sum(1))]).astype(np.int32)
    room = _rounded(int(start[-1]))
    group, first = np.zeros(room, np.int32), np.zeros(room, np.int32)
    group[: start[-1]] = np.concatenate([np.repeat(np.arange(N), row) for row in stripes])
    first[: start[-1]] = page * np.concatenate([np.arange(n) for row in stripes for n in row])
    positions = np.full((room * g, page), -1, np.int32)
    for layer in range(L):
        places = np.split(np.arange(start[layer], start[layer + 1]), np.cumsum(stripes[layer])[:-1])
        for at in range(N * g):
            own, h = places[at // g], at % g
            kept = np.flatnonzero(keep[layer].reshape(B * K, -1)[heads[layer, at]])
            filled = np.full(len(own) * page, -1, np.int32)
            filled[: len(kept)] = kept
            positions[own * g + h] = filled.reshape(len(own), page)
    owner = np.zeros((room * g,), np.int32)
    for layer in range(L):
        block = np.arange(start[layer], start[layer + 1])
        owner.reshape(room, g)[block] = heads[layer].reshape(N, g)[group[block]]
    pools = []
    for all_rows in (cache.keys, cache.values):
        like = all_rows[layers[0]]
        pool = jax.tree.map(lambda x: jnp.zeros((room * g, page, *x.shape[2:]), x.dtype), like)
        for layer, index in enumerate(layers):
            pool = _fill(pool, all_rows[index], positions, owner, start[layer], start[layer + 1], g=g)
        pools.append(pool)
    context = Context(
        keys=pools[0],
        values=pools[1],
        positions=jnp.asarray(positions),
        group=jnp.asarray(group),
        first=jnp.asarray(first),
        start=jnp.asarray(start),
        lengths=jnp.asarray(lengths.astype(np.int32)),
        heads=jnp.asarray(heads.astype(np.int32)),
        slot=jnp.arange(B, dtype=jnp.int32),
        readers=1,
    )
    return PagedCache(context, _tail(cache, rows))


@functools.partial(jax.jit, static_argnames="g", donate_argnames="pool")
def _fill(pool: Rows, rows: Rows, positions, owner, start, end, *, g: int) -> Rows:
    """The pool with stripes `start` to `end` taken from one layer's rows [J, R, D]."""

    def body(carry):
        i, pool = carry
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * g, g)  # noqa: E731
        at, head = jnp.maximum(take(positions), 0), take(owner)
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y[head[:, None], at], i * g, 0)  # noqa: E731
        return i + 1, jax.tree.map(put, pool, rows)

    return jax.lax.while_loop(lambda carry: carry[0] < end, body, (start, pool))[1]


def _tail(cache: DenseCache, rows: int) -> DenseCache:
    """An empty cache behind the context; layers with a window as they are, as rings that can go on."""

    def one(array: Rows, window: int | None) -> Rows:
        if window is None:
            return jax.tree.map(lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype), array)
        more = max(0, window + min(rows, SLACK) - array.shape[1]) if array.shape[1] == cache.rows else 0
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0))), array)

    keys, values = (tuple(map(one, some, cache.windows)) for some in (cache.keys, cache.values))
    lengths, base = jnp.array(cache.lengths), jnp.array(cache.lengths)  # copies: a tail may be given away
    tail = dataclasses.replace(cache, keys=keys, values=values, lengths=lengths, base=base)
    return dataclasses.replace(tail, rows=rows, empty=False)


def _group(J: int) -> int:
    """Heads a group: a divisor of J that makes about sixteen groups."""
    return max(d for d in range(1, max(1, J // 16) + 1) if J % d == 0)


def _rounded(stripes: int) -> int:
    """The least of 16, 18, 20, ..., 32, 36, 40, ... that is not below; above 16 less than an eighth more."""
    step = max(STEP // 8, 2 ** (math.ceil(math.log2(max(stripes, 1))) - 4))
    return max(STEP, -(-stripes // step) * step)


def kept_positions(cache: PagedCache) -> list[list[list[np.ndarray]]]:
    """The positions that each head of each layer without a window kept: [layer][context][key head]."""
    context = jax.device_get(cache.context)
    L, N, g = context.lengths.shape
    S = int(context.heads.max()) + 1
    K = cache.tail.keys[0].shape[0] // len(context.slot)
    found: list[list[list[np.ndarray]]] = [[[np.empty(0)] * K for _ in range(S // K)] for _ in range(L)]
    for layer in range(L):
        stripes = np.arange(context.start[layer], context.start[layer + 1])
        for place, head in enumerate(context.heads[layer]):
            own = stripes[context.group[stripes] == place // g]
            rows = context.positions[own * g + place % g].ravel()
            found[layer][head // K][head % K] = rows[rows >= 0]
    return found
