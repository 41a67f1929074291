"""From one layout to the other: which rows a cache holds, by head, and the pages made of some of them.

Letters: L layers without a window, B requests, K key heads, J = B K, S rows and E numbers of a head, M most
rows that a head has, P pages, C rows a page, W pages at a time.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.cache.rows import Rows

MAX_SLACK = 256  # longest chunk that a layer with a window, not yet full, can take at once after eviction
PAGES_PER_COPY = 64


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Each head's rows by position, on the host, those of the tail last; M is the most that a head has."""

    positions: np.ndarray  # int32 [L, B, K, M], -1: no row
    scores: np.ndarray  # float32 [L, B, K, M], -inf: no row; 0 in the tail
    row_index: np.ndarray  # int32 [L, B, K, M]: row of the pool, or -1 - r for row r of the dense part


def row_table(cache: DenseCache | PagedCache, *, tail: bool) -> RowTable:
    """The rows of a cache, those of a dense one or of the tail included or not."""
    written = _written(cache)
    lengths = np.asarray(written.lengths)
    start = np.zeros_like(lengths) if written.start is None else np.asarray(written.start)
    L, B = sum(window is None for window in cache.windows), len(lengths)
    shape = (L, B, written.keys[0].shape[0] // B, tail_size(cache) if tail else 0)
    row = np.arange(shape[-1], dtype=np.int32)
    real = (row < (lengths - start)[:, None])[None, :, None]
    positions = np.where(real, (start[:, None] + row)[None, :, None], -1).astype(np.int32)
    scores = np.where(real, 0, -np.inf).astype(np.float32)
    new = RowTable(*(np.broadcast_to(x, shape) for x in (positions, scores, -1 - row)))
    if not isinstance(cache, PagedCache):
        return new
    old = _context_rows(cache.context, K=shape[2])
    names = [field.name for field in dataclasses.fields(RowTable)]
    return RowTable(*(np.concatenate([getattr(old, n), getattr(new, n)], axis=-1) for n in names))


def _context_rows(context: Context, K: int) -> RowTable:
    """The rows in a context's pages."""
    offsets, C = np.asarray(context.page_offsets), context.positions.shape[1]
    ends = np.concatenate([[0], np.cumsum(np.asarray(context.page_lengths))])
    counts = np.diff(ends[offsets], axis=1)[..., None]  # [L, J, 1]
    rows = offsets[:, :-1, None] * C + np.arange(counts.max(initial=0))
    rows = np.where(np.arange(rows.shape[-1]) < counts, rows, -1).astype(np.int32)
    rows = rows.reshape(len(offsets), rows.shape[1] // K, K, -1)[:, np.asarray(context.context_of_request)]

    def of_rows(x: jax.Array, none):
        return np.where(rows >= 0, np.asarray(x).reshape(-1)[rows], none)

    return RowTable(of_rows(context.positions, -1), of_rows(context.scores, np.float32(-np.inf)), rows)


def _written(cache: DenseCache | PagedCache) -> DenseCache:
    """The part of a cache that is written in place."""
    return cache.tail if isinstance(cache, PagedCache) else cache


def tail_size(cache: DenseCache | PagedCache) -> int:
    """Tokens of the longest request that a dense cache, or a tail, holds."""
    written = _written(cache)
    return int((written.lengths - (0 if written.start is None else written.start)).max())


def copied(tail: DenseCache) -> DenseCache:
    """A copy, for a tail may be given away."""
    return jax.tree.map(jnp.array, tail)


def build_context(
    cache: DenseCache | PagedCache,
    table: RowTable,
    scores: Float[np.ndarray, "L B K M"],
    keep: Bool[np.ndarray, "L B K M"],
    *,
    lengths: Int[np.ndarray, " B"],
    prefix: int,
    page: int,
    most: int | None = None,
) -> Context:
    """Pages of the rows that are marked and none but them; the cache given stays as it is.

    lengths, prefix: of the texts that scores were given for, and where they begin. page: rows of a page.
    most: rows that the pool has room for; None: as many as are marked, rounded up to a sixteenth more.
    """
    L, B, K, _ = keep.shape
    J = B * K
    layer, b, k, _ = np.nonzero(keep)
    owner = layer * J + b * K + k  # of each row that stays
    counts = np.bincount(owner, minlength=L * J)
    pages = -(-counts // page)
    offsets = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    P = (_rounded(len(owner)) if most is None else most) // page + L * J  # no head wastes a whole page
    place = offsets[owner] * page + _rank_in_group(counts)

    def in_pages(values: np.ndarray, none, dtype) -> jax.Array:
        out = np.full(P * page, none, dtype)
        out[place] = values[keep]
        return jnp.asarray(out.reshape(P, page))

    page_head, filled = np.zeros(P, np.int32), np.zeros(P, np.int32)
    page_head[: offsets[-1]] = np.repeat(np.tile(np.arange(J), L), pages)
    filled[: offsets[-1]] = np.minimum(page, np.repeat(counts, pages) - page * _rank_in_group(pages))
    offsets = np.stack([offsets[i * J : (i + 1) * J + 1] for i in range(L)])
    pages_of = (in_pages(table.row_index, 0, np.int32), jnp.asarray(page_head), offsets)
    return Context(
        keys=_copy_rows(cache, "keys", *pages_of),
        values=_copy_rows(cache, "values", *pages_of),
        positions=in_pages(table.positions, -1, np.int32),
        scores=in_pages(scores, -np.inf, np.float32),
        page_head=jnp.asarray(page_head),
        page_lengths=jnp.asarray(filled),
        page_offsets=jnp.asarray(offsets),
        context_lengths=jnp.asarray(lengths, jnp.int32),
        prefix=jnp.int32(prefix),
        context_of_request=jnp.arange(B, dtype=jnp.int32),
        max_readers=1,
    )


def _rank_in_group(sizes: Int[np.ndarray, " N"]) -> Int[np.ndarray, " n"]:
    """0, 1, ... for the members of each of N groups that follow each other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _copy_rows(
    cache: DenseCache | PagedCache,
    name: Literal["keys", "values"],
    row_index: Int[Array, "P C"],
    head: Int[Array, " P"],
    offsets: Int[np.ndarray, "L _"],
) -> Rows:
    """A pool of pages with the rows of a cache that `row_index` names."""
    old = getattr(cache.context, name) if isinstance(cache, PagedCache) else None
    of_layers = getattr(_written(cache), name)
    of_layers = [x for x, window in zip(of_layers, cache.windows, strict=True) if window is None]
    shape = row_index.shape
    pool = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[2:]), x.dtype), of_layers[0])
    for rows, (start, *_, end) in zip(of_layers, offsets, strict=True):
        pool = _copy_layer(pool, old, rows, row_index, head, start, end)
    return pool


@functools.partial(jax.jit, donate_argnames="pool")
def _copy_layer(
    pool: Rows,
    old: Rows | None,
    rows: Rows,
    row_index: Int[Array, "P C"],
    head: Int[Array, " P"],
    start: Int[Array, ""],
    end: Int[Array, ""],
) -> Rows:
    """The pool with pages `start` to `end` taken from one layer: of another pool, or of rows [J, S, E]."""
    W = min(len(row_index), PAGES_PER_COPY)

    def body(carry):
        page, pool = carry
        first = jnp.minimum(page, len(row_index) - W)

        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, first, W)

        pages, index = first + jnp.arange(W), cut(row_index)  # [W], [W, C]
        mine = ((pages >= page) & (pages < end))[:, None, None]

        def copy(x, rows, old=None):
            new = rows[cut(head)[:, None], jnp.maximum(-1 - index, 0)]
            if old is not None:
                before = old.reshape(-1, old.shape[-1])[jnp.maximum(index, 0)]
                new = jnp.where((index >= 0)[..., None], before, new)
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine, new, cut(x)), first, 0)

        parts = (pool, rows) if old is None else (pool, rows, old)
        return page + W, jax.tree.map(copy, *parts)

    return jax.lax.while_loop(lambda carry: carry[0] < end, body, (start, pool))[1]


def new_tail(cache: DenseCache | PagedCache, capacity: int) -> DenseCache:
    """An empty cache behind all that is held; layers with a window as they are, as rings that can go on."""
    return _new_tail(_written(cache), capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _new_tail(old: DenseCache, capacity: int) -> DenseCache:
    """A program of its own, none of whose results is an array that was given."""

    def new_rows(array: Rows, window: int | None) -> Rows:
        if window is None:
            return jax.tree.map(lambda x: jnp.zeros((x.shape[0], capacity, *x.shape[2:]), x.dtype), array)
        whole = old.start is None and array.shape[1] == old.capacity
        more = max(0, window + min(capacity, MAX_SLACK) - array.shape[1]) if whole else 0
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0))), array)

    keys, values = (tuple(map(new_rows, some, old.windows)) for some in (old.keys, old.values))
    lengths, start = jnp.array(old.lengths), jnp.array(old.lengths)  # copies: a tail may be given away
    of_each: dict[str, Any] = {"lengths": lengths, "start": start, "extents": jnp.array(old.extents)}
    tail = dataclasses.replace(old, keys=keys, values=values, **of_each)
    return dataclasses.replace(tail, capacity=capacity, is_first_chunk=False)


def _rounded(n: int) -> int:
    """The least number of five binary digits, then zeros, that is not below n: at most a sixteenth more."""
    step = 2 ** max(0, n.bit_length() - 5)
    return -(-n // step) * step


def positions_by_head(cache: PagedCache) -> list[list[list[np.ndarray]]]:
    """The positions of each head's rows of the context: [layer without a window][request][key head]."""
    positions = row_table(cache, tail=False).positions
    return [[[head[head >= 0] for head in request] for request in layer] for layer in positions]
