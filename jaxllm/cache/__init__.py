"""Keys and values kept between steps. A cache knows its own layout; models only append and attend.

cache = append(cache, layer, k, v, lengths)    rows of one layer, written in place when donated
out = attend(q, cache, layer, positions, ...)  queries against all that the layer holds
cache = advance(cache, lengths)                once a chunk, after its last layer
cache = truncate(cache, lengths)               forget the newest rows, per request
cache = select(cache, requests)                other requests in another order (fork, beams, tree paths)
cache = with_capacity(cache, capacity)         a copy with room for so many tokens (behind a context)
k, v = round_trip(cache, layer, k, v)          a chunk as it will be read back: for one that sees itself only
context, tail = split_context(cache)           what never changes, what is written; `with_context` undoes it
max_chunk(cache), num_bytes(cache)             the longest chunk that fits; bytes really held

`DenseCache` holds every token of a request, `PagedCache` what `eviction.evict` has left of a context and all
that came since. Either may hold `QuantizedRows`.

    dense     rows for every token: append, attend, truncate, select
    rows      rows, plain or in codes: the one place that knows of both kinds
    coded     rows in codes of 2, 4 or 8 bits, in place of an array
    paged     what is left after eviction, by head, and what came since
    repack    from one layout to the other: which rows a cache holds, and the pages made of some of them
    files     a cache in a directory that another process opens
"""

from typing import Any, TypeVar

import jax
from jaxtyping import Array, Float

from jaxllm.cache import dense, paged, rows
from jaxllm.cache.coded import QuantizedRows
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.files import load, save
from jaxllm.cache.paged import Context, PagedCache

Cache = DenseCache | PagedCache
C = TypeVar("C", bound=Cache)


def _layout(cache: Cache) -> Any:
    return paged if isinstance(cache, PagedCache) else dense


def append(cache: C, layer: int, k, v, lengths) -> C:
    """See `dense.append`."""
    return _layout(cache).append(cache, layer, k, v, lengths)


def attend(q, cache: Cache, layer: int, positions, lengths, **rule):
    """See `dense.attend`."""
    return _layout(cache).attend(q, cache, layer, positions, lengths, **rule)


def advance(cache: C, lengths) -> C:
    """See `dense.advance`."""
    return _layout(cache).advance(cache, lengths)


def truncate(cache: C, lengths) -> C:
    """See `dense.truncate`."""
    return _layout(cache).truncate(cache, lengths)


def select(cache: C, requests) -> C:
    """See `dense.select`."""
    return _layout(cache).select(cache, requests)


def with_capacity(cache: C, capacity: int) -> C:
    """See `dense.with_capacity`."""
    return _layout(cache).with_capacity(cache, capacity)


def round_trip(
    cache: Cache, layer: int, k: Float[Array, "B T K E"], v: Float[Array, "B T K E"]
) -> tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """A chunk's keys and values as a layer that holds codes will give them back; else as they are."""
    tail = split_context(cache)[1]
    return rows.round_trip(k, tail.keys[layer]), rows.round_trip(v, tail.values[layer])


def max_chunk(cache: Cache) -> int:
    """See `dense.max_chunk`."""
    return dense.max_chunk(split_context(cache)[1])


def split_context(cache: Cache) -> tuple[Context | None, DenseCache]:
    """What never changes, and what is written: a program may be given the second for good, not the first."""
    return (cache.context, cache.tail) if isinstance(cache, PagedCache) else (None, cache)


def with_context(context: Context | None, tail: DenseCache) -> Cache:
    """The cache that was split."""
    return tail if context is None else PagedCache(context, tail)


def num_bytes(cache: Cache) -> int:
    """Bytes of all arrays held."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


__all__ = [
    "Cache",
    "DenseCache",
    "PagedCache",
    "QuantizedRows",
    "advance",
    "append",
    "attend",
    "with_capacity",
    "with_context",
    "load",
    "num_bytes",
    "max_chunk",
    "round_trip",
    "save",
    "select",
    "split_context",
    "truncate",
]
