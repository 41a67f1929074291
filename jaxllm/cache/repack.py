"""From one layout to the other: which rows a cache holds, by head, and the pages made of some of them.

Letters: L layers without a window, B requests, K key heads, M most rows that a head has, P pages, C rows a
page.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.cache.rows import Rows

SLACK = 256  # longest chunk that a layer with a window, not yet full, can take at once after eviction


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
