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
import functools
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

SLACK = 256  # longest chunk that a layer with a window, not yet full, can take at once after eviction


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
    since = _weighed(q.reshape(J, G * T, D), numbers(keys), numbers(values), seen, **rule)
    _, total, out = _both(sums, since)
    out = (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(numbers(values).dtype)
    return out.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def numbers(rows: Rows) -> jax.Array:
    """Rows as plain numbers, in the basis in which they are stored."""
    return quantized.numbers(rows) if isinstance(rows, CodedRows) else rows


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
        k, v = (numbers(jax.tree.map(cut, rows)) for rows in (context.keys, context.values))
        seen = jnp.arange(C)[None] < jnp.where(new, cut(context.filled), 0)[:, None]
        part = _weighed(heads(asked)[jnp.minimum(local, W - 1)], k, v, seen[:, None], **rule)
        sums = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, least, 0),
            sums,
            _by_head(jax.tree.map(heads, sums), part, local),
        )
        return i + new.sum(), sums

    none = (
        jnp.full((J + W, M * n), HIDDEN),
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
    scores = jnp.where(seen, scores, HIDDEN)
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
    greatest = jnp.maximum(sums[0], jnp.where(owner[:, :, None], part[0][None], HIDDEN).max(1))
    mine = owner.astype(jnp.float32)
    shrink = jnp.exp(sums[0] - greatest)
    factor = jnp.where(head[:, None] < W, jnp.exp(part[0] - greatest[jnp.minimum(head, W - 1)]), 0.0)
    add = lambda x: jnp.einsum("hp,pm->hm", mine, x.reshape(x.shape[0], -1), **FLOAT32)  # noqa: E731
    total = sums[1] * shrink + add(part[1] * factor)
    out = sums[2] * shrink[..., None] + add(part[2] * factor[..., None]).reshape(sums[2].shape)
    return greatest, total, out


# -- from one layout to the other


@dataclasses.dataclass(frozen=True)
class Held:
    """Each head's rows by position, on the host, those of the tail last; M is the most that a head has."""

    positions: np.ndarray  # int32 [L, B, K, M], -1: no row
    scores: np.ndarray  # float32 [L, B, K, M], -inf: no row; 0 in the tail
    source: np.ndarray  # int32 [L, B, K, M]: row of the pool, or -1 - r for row r of the dense part


def held(cache: DenseCache | PagedCache, *, tail: bool) -> Held:
    """The rows of a cache, those of a dense one or of the tail included or not."""
    written = cache.tail if isinstance(cache, PagedCache) else cache
    lengths = np.asarray(written.lengths)
    base = np.zeros_like(lengths) if written.base is None else np.asarray(written.base)
    L, B = sum(window is None for window in cache.windows), len(lengths)
    shape = (L, B, written.keys[0].shape[0] // B, tail_size(cache) if tail else 0)
    at = np.arange(shape[-1], dtype=np.int32)
    real = (at < (lengths - base)[:, None])[None, :, None]
    positions = np.where(real, (base[:, None] + at)[None, :, None], -1).astype(np.int32)
    found = Held(
        np.broadcast_to(positions, shape),
        np.broadcast_to(np.where(real, 0, -np.inf).astype(np.float32), shape),
        np.broadcast_to(-1 - at, shape),
    )
    if not isinstance(cache, PagedCache):
        return found
    context = cache.context
    first, filled, slot = (np.asarray(x) for x in (context.first, context.filled, context.slot))
    C, J, K = context.positions.shape[1], first.shape[1] - 1, shape[2]
    ends = np.concatenate([[0], np.cumsum(filled)])
    counts = np.diff(ends[first], axis=1)[..., None]  # [L, J, 1]
    rows = first[:, :-1, None] * C + np.arange(counts.max(initial=0))
    rows = np.where(np.arange(rows.shape[-1]) < counts, rows, -1).astype(np.int32)
    rows = rows.reshape(L, J // K, K, -1)[:, slot]
    of_row = lambda x, none: np.where(rows >= 0, np.asarray(x).reshape(-1)[rows], none)  # noqa: E731
    parts = (of_row(context.positions, -1), of_row(context.scores, np.float32(-np.inf)), rows)
    both = lambda name, x: np.concatenate([x, getattr(found, name)], axis=-1)  # noqa: E731
    return Held(**{f.name: both(f.name, x) for f, x in zip(dataclasses.fields(Held), parts, strict=True)})


def tail_size(cache: DenseCache | PagedCache) -> int:
    """Tokens of the longest request that a dense cache, or a tail, holds."""
    written = cache.tail if isinstance(cache, PagedCache) else cache
    return int((written.lengths - (0 if written.base is None else written.base)).max())


def copied(tail: DenseCache) -> DenseCache:
    """A copy, for a tail may be given away."""
    return jax.tree.map(jnp.array, tail)


def pack(
    cache: DenseCache | PagedCache,
    rows: Held,
    scores: Float[np.ndarray, "L B K M"],
    keep: Bool[np.ndarray, "L B K M"],
    *,
    sizes: Int[np.ndarray, " B"],
    prefix: int,
    tail: DenseCache,
    page: int,
    most: int | None = None,
) -> PagedCache:
    """The rows that are marked and none but them, before a tail; the cache given stays as it is.

    most: rows that the pool has room for; None: as many as are marked, rounded up to a sixteenth more.
    """
    L, B, K, _ = keep.shape
    J = B * K
    layer, b, k, _ = np.nonzero(keep)
    owner = layer * J + b * K + k
    counts = np.bincount(owner, minlength=L * J)
    pages = -(-counts // page)
    first = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    P = (_rounded(len(owner)) if most is None else most) // page + L * J  # no head wastes a whole page
    rank = lambda sizes: np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # noqa: E731
    place = first[owner] * page + rank(counts)

    def spread(values, empty, dtype):
        out = np.full(P * page, empty, dtype)
        out[place] = values[keep]
        return out.reshape(P, page)

    head, filled = np.zeros(P, np.int32), np.zeros(P, np.int32)
    head[: first[-1]] = np.repeat(np.tile(np.arange(J), L), pages)
    filled[: first[-1]] = np.minimum(page, np.repeat(counts, pages) - page * rank(pages))
    first = np.stack([first[i * J : (i + 1) * J + 1] for i in range(L)])
    source = jnp.asarray(spread(rows.source, 0, np.int32))
    whose = jnp.asarray(head)
    old = cache.context if isinstance(cache, PagedCache) else None
    written = cache.tail if isinstance(cache, PagedCache) else cache
    pools = []
    for name in ("keys", "values"):
        of_layers = [x for x, w in zip(getattr(written, name), cache.windows, strict=True) if w is None]
        pool = jax.tree.map(lambda x: jnp.zeros((P, page, *x.shape[2:]), x.dtype), of_layers[0])
        for i, of_layer in enumerate(of_layers):
            before = None if old is None else getattr(old, name)
            pool = _fill(pool, before, of_layer, source, whose, first[i, 0], first[i, J])
        pools.append(pool)
    context = Context(
        keys=pools[0],
        values=pools[1],
        positions=jnp.asarray(spread(rows.positions, -1, np.int32)),
        scores=jnp.asarray(spread(scores, -np.inf, np.float32)),
        head=whose,
        filled=jnp.asarray(filled),
        first=jnp.asarray(first),
        sizes=jnp.asarray(sizes, jnp.int32),
        prefix=jnp.int32(prefix),
        slot=jnp.arange(B, dtype=jnp.int32),
        readers=1,
    )
    return PagedCache(context, tail)


@functools.partial(jax.jit, donate_argnames="pool")
def _fill(pool: Rows, old: Rows | None, written: Rows, source, head, start, end) -> Rows:
    """The pool with pages `start` to `end` taken from one layer: of another pool, or of rows [J, R, D]."""
    P = source.shape[0]
    W = min(P, 64)  # pages at a time

    def body(carry):
        i, pool = carry
        first = jnp.minimum(i, P - W)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, W)  # noqa: E731
        pages, at = first + jnp.arange(W), cut(source)  # [W], [W, C]
        mine = ((pages >= i) & (pages < end))[:, None, None]

        def one(x, was, y):
            new = y[cut(head)[:, None], jnp.maximum(-1 - at, 0)]
            if was is not None:
                kept = was.reshape(-1, was.shape[-1])[jnp.maximum(at, 0)]
                new = jnp.where((at >= 0)[..., None], kept, new)
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine, new, cut(x)), first, 0)

        if old is None:
            return i + W, jax.tree.map(lambda x, y: one(x, None, y), pool, written)
        return i + W, jax.tree.map(one, pool, old, written)

    return jax.lax.while_loop(lambda carry: carry[0] < end, body, (start, pool))[1]


def new_tail(cache: DenseCache | PagedCache, rows: int) -> DenseCache:
    """An empty cache behind all that is held; layers with a window as they are, as rings that can go on."""
    old = cache.tail if isinstance(cache, PagedCache) else cache
    dense_still = old.base is None

    def one(array: Rows, window: int | None) -> Rows:
        if window is None:
            return jax.tree.map(lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype), array)
        whole = dense_still and array.shape[1] == old.rows
        more = max(0, window + min(rows, SLACK) - array.shape[1]) if whole else 0
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0))), array)

    keys, values = (tuple(map(one, some, old.windows)) for some in (old.keys, old.values))
    lengths, base = jnp.array(old.lengths), jnp.array(old.lengths)  # copies: a tail may be given away
    tail = dataclasses.replace(old, keys=keys, values=values, lengths=lengths, base=base)
    return dataclasses.replace(tail, rows=rows, empty=False)


def _rounded(n: int) -> int:
    """The least number of five binary digits, then zeros, that is not below n: at most a sixteenth more."""
    step = 2 ** max(0, n.bit_length() - 5)
    return -(-n // step) * step


def kept_positions(cache: PagedCache) -> list[list[list[np.ndarray]]]:
    """The positions that each head of each layer without a window kept: [layer][request][key head]."""
    at = held(cache, tail=False).positions
    return [[[head[head >= 0] for head in request] for request in layer] for layer in at]
