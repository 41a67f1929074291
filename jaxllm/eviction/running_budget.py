"""A budget that holds while a text grows.

What was read or written since goes from the tail to the pages, and so many tokens' worth of all rows stay.

Letters: L layers without a window, B requests, K key heads, S tokens of the tail.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.cache import repack
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import PagedCache
from jaxllm.eviction.budget import check_room, mark_greatest
from jaxllm.eviction.gates import Gate


def evict_to_budget(
    cache: DenseCache | PagedCache,
    scores: Float[Array, "L B K S"],
    *,
    tokens: int,
    recent: int = 0,
    sinks: int = 0,
    capacity: int = 64,
    page: int = 16,
) -> PagedCache:
    """The cache with the tail's rows in its pages, and of all rows of a request the best `tokens` L K left.

    scores: of the tail's rows, or of all that a `DenseCache` holds; what stands behind a request's end is not
      looked at. Earlier rows have the scores that they were given then.
    recent: the last tokens, and sinks: the first ones, that stay whatever they score; they count as well.
    capacity: room for tokens that come later. How many pages there are follows from `tokens` alone.

    Raises ValueError where the scores are not of this cache, tokens are not more than sinks and recent, or
    more rows than the budget has always stay (`evict`'s prefix).
    """
    if sinks < 0 or recent < 0 or tokens <= sinks + recent:
        got = f"{tokens=}, {sinks=}, {recent=}"
        raise ValueError(f"evict_to_budget: tokens must be more than sinks and recent together, got {got}")
    check_room("evict_to_budget", capacity, page)
    table = repack.row_table(cache, tail=True)
    L, B, K, M = table.positions.shape
    if not L:
        raise ValueError("evict_to_budget: a layer must see all of the text, got windows only")
    new = repack.tail_size(cache)
    if scores.ndim != 4 or scores.shape[:3] != (L, B, K) or scores.shape[3] < new:
        raise ValueError(
            f"evict_to_budget: scores must be [L, B, K, S] of {(L, B, K, new)} rows, got {scores.shape}"
        )
    s = table.scores.copy()
    real = table.positions >= 0
    s[..., M - new :] = np.where(real[..., M - new :], np.asarray(scores)[..., :new], -np.inf)
    if not np.isfinite(s[..., M - new :][real[..., M - new :]]).all():
        raise ValueError("evict_to_budget: scores must be finite, got NaN or infinity")
    s = np.where(real & (table.positions < sinks), np.inf, s)
    lengths = np.asarray(cache.lengths)
    stays = (s == np.inf) | (real & (table.positions >= lengths[None, :, None, None] - recent))
    open_ = np.where(stays, -np.inf, s).swapaxes(0, 1).reshape(B, -1)
    count = tokens * L * K - stays.sum((0, 2, 3))
    if (count < 0).any():
        most = int(-(-stays.sum((0, 2, 3)).max() // (L * K)))
        raise ValueError(
            f"evict_to_budget: tokens must be at least the {most} a head that always stay, got {tokens=}"
        )
    keep = stays | mark_greatest(open_, count).reshape(B, L, K, M).swapaxes(0, 1)
    tail = repack.new_tail(cache, capacity)
    most = tokens * L * K * B
    sizes = np.maximum(lengths - sinks, 0)
    context = repack.build_context(cache, table, s, keep, lengths=sizes, prefix=sinks, page=page, most=most)
    return PagedCache(context, tail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """A budget that holds while a text grows, whether it is read or written.

    Rows wait in a buffer; when it is full, they compete with all others, and so many stay.

    tokens: rows a head on average that stay, with those that always do: the first `sinks`, the last `recent`.
    buffer: rows that wait at most; they are held on top of `tokens`.
    """

    gates: Gate
    tokens: int
    buffer: int = 128
    recent: int = 32
    sinks: int = 4

    def __post_init__(self):
        if self.buffer < 1 or min(self.recent, self.sinks) < 0 or self.tokens <= self.recent + self.sinks:
            names = ("tokens", "buffer", "recent", "sinks")
            got = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(
                f"CacheBudget: tokens must be more than recent and sinks, buffer at least 1, got {got}"
            )

    def enforce(self, cache: DenseCache | PagedCache, scores: Float[Array, "L B K S"] | None) -> PagedCache:
        """The cache with its tail among the pages, and the budget kept. None: the tail must be empty."""
        if scores is None:
            L, _, K = self.gates.sizes()
            scores = jnp.zeros((L, cache.lengths.shape[0], K, 0), jnp.float32)
        kept = {"tokens": self.tokens, "recent": self.recent, "sinks": self.sinks}
        return evict_to_budget(cache, scores, capacity=self.buffer, **kept)
