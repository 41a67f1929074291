"""Which rows of a context stay when it must get smaller: one rule for the scores of any method.

    small = evict(cache, kvzip_scores(model, cache, context), ratio=0.3)

Scores [L, B, K, T] are of the context's T tokens, for each layer without a window (L of them), request and
key head: the least are evicted. A budget is a part of the context's L K T pairs of one request, or so many
tokens' worth of them, or a threshold, by which a context decides itself how much stays (KVzap,
arXiv:2601.07891). How it is spent (KVzip, arXiv:2505.23416):

    "global"        the greatest of all layers and heads together: heads keep as much as they need
    "per_head"      each head keeps as many
    "whole_heads"   those heads whose greatest score is greatest keep all, the others nothing

The number kept is exact, and of equal scores those of earlier layers, heads and positions stay; so what a
smaller ratio keeps a larger one keeps too. `strict_threshold` is the published code's rule instead, which
keeps one pair less and none that equals the threshold. `safeguard` gives every head that part of an even
share first (AdaKV, arXiv:2407.11550). Rows before and after the context always stay. Lossy; at ratio 1
lossless.

A cache may be evicted again. Scores stay with their rows, so none need be given, and a smaller ratio keeps
what it would have kept at once. What is gone stays gone: a budget that wants more than is left is refused.

`evict_to_budget` evicts while a text grows: what was read or written since goes from the tail to the pages,
and so many tokens' worth of all rows stay.

Letters: L layers without a window, B requests, K key heads, T tokens of the longest context, M most rows that
a head has.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import repack
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import PagedCache
from jaxllm.cache.repack import RowTable

Rule = Literal["global", "per_head", "whole_heads"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextBudget:
    """How much of a context stays, and by which rule: the keywords of `evict`, which tells them.

    Raises ValueError where they exclude each other or lie outside.
    """

    ratio: float | None = None
    tokens: int | None = None
    threshold: float | None = None
    rule: Rule = "global"
    safeguard: float = 0.0
    strict_threshold: bool = False

    def __post_init__(self):
        if sum(x is not None for x in (self.ratio, self.tokens, self.threshold)) != 1:
            raise ValueError("evict: exactly one of ratio, tokens and threshold must be given")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"evict: tokens must be at least 1, got {self.tokens}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"evict: ratio must lie above 0 and be at most 1, got {self.ratio}")
        if self.rule not in get_args(Rule):
            raise ValueError(f"evict: budget must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"evict: safeguard must be 0 to 1, got {self.safeguard}")
        got = f"budget={self.rule!r}, safeguard={self.safeguard}, strict_threshold={self.strict_threshold}"
        if self.safeguard and (self.rule != "global" or self.strict_threshold):
            raise ValueError(f'evict: safeguard must go with the plain budget "global", got {got}')
        if self.strict_threshold and self.rule == "per_head":
            raise ValueError(
                f'evict: strict_threshold must go with the budget "global" or "whole_heads", got {got}'
            )
        if self.threshold is not None and (self.rule != "global" or self.safeguard or self.strict_threshold):
            raise ValueError(f"evict: a threshold must be all of a budget, got {got}")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise ValueError(f"evict: a threshold must be a finite number, got {self.threshold}")

    def keep(
        self, scores: Float[np.ndarray, "L B K M"], sizes: Int[np.ndarray, " B"]
    ) -> Bool[np.ndarray, "L B K M"]:
        """Which rows stay of contexts of `sizes[b]` tokens.

        scores: -inf where a head has no row, inf where the row stays whatever the budget.
        Raises ValueError where fewer rows are left than the budget wants.
        """
        if self.threshold is not None:
            return scores >= self.threshold
        if self.tokens is None:
            ratios = np.full(len(sizes), self.ratio)
        else:
            ratios = np.minimum(float(self.tokens) / sizes, 1.0)
        open_ = np.where(np.isfinite(scores), scores, -np.inf)  # of the rows that compete
        if self.strict_threshold:
            kept = keep_above(open_, sizes, ratios, whole_heads=self.rule == "whole_heads")
        elif self.rule == "per_head":
            kept = keep_per_head(open_, sizes, ratios)
        elif self.rule == "whole_heads":
            kept = keep_whole_heads(open_, sizes, ratios)
        else:
            kept = keep_global(open_, sizes, ratios, safeguard=self.safeguard)
        return kept | (scores == np.inf)


def evict(
    cache: DenseCache | PagedCache,
    scores: Float[Array, "L B K T"] | None = None,
    *,
    ratio: float | None = None,
    tokens: int | None = None,
    threshold: float | None = None,
    budget: Rule = "global",
    prefix: int = 0,
    safeguard: float = 0.0,
    strict_threshold: bool = False,
    capacity: int = 64,
    page: int | None = None,
) -> PagedCache:
    """The cache with the least of the context's rows gone; the cache given stays as it is.

    cache: holds `prefix` tokens, the context, and perhaps more. scores: of the context; where a request's
      context is shorter than T, what stands behind its end is not looked at. None takes the scores by which
      the cache was evicted before.
    ratio: of the context's rows that stay, above 0 to 1; or tokens: rows a head on average; at least one row.
      Or threshold: the rows that score at least so much.
    capacity: room for tokens that come later (`with_capacity` makes more); a cache that was evicted before
      keeps its own.
    page: rows of a page; None takes 16 to 64, the more the more stays, so that little is lost to pages that
      are not full.

    Raises ValueError for a ratio outside, scores that are not of this cache or not numbers, or a budget of
    which too much is gone already.
    """
    spent = ContextBudget(
        ratio=ratio,
        tokens=tokens,
        threshold=threshold,
        rule=budget,
        safeguard=safeguard,
        strict_threshold=strict_threshold,
    )
    check_room("evict", capacity, 16 if page is None else page)
    if isinstance(cache, PagedCache):
        table = repack.row_table(cache, tail=False)
        s, sizes = _scores_of_paged(cache, table, scores, prefix)
        prefix, tail = int(cache.context.prefix), repack.copied(cache.tail)
    else:
        table = repack.row_table(cache, tail=True)
        s, sizes = _scores_of_dense(cache, table, scores, prefix)
        tail = repack.new_tail(cache, capacity)
    keep = spent.keep(s, sizes)
    if page is None:
        page = int(np.clip(2 ** np.floor(np.log2(max(keep.sum(-1).mean() / 16, 1))), 16, 64))
    context = repack.build_context(cache, table, s, keep, lengths=sizes, prefix=prefix, page=page)
    return PagedCache(context, tail)


def check_room(who: str, capacity: int, page: int) -> None:
    if min(capacity, page) < 1:
        raise ValueError(f"{who}: capacity and page must be at least 1, got {capacity=}, {page=}")


def _scores_of_dense(
    cache: DenseCache, table: RowTable, scores: Array | None, prefix: int
) -> tuple[Float[np.ndarray, "L B K M"], Int[np.ndarray, " B"]]:
    """Scores of a dense cache's rows, infinite where they always stay, and the contexts' sizes."""
    if cache.start is not None:
        raise ValueError("evict: the cache must be whole, got the tail of one")
    L, B, K, M = table.positions.shape
    if scores is None:
        raise ValueError("evict: scores must be given for a cache that was not evicted before, got None")
    held, T = np.asarray(cache.lengths), scores.shape[-1]
    if scores.shape != (L, B, K, T) or L == 0:
        must = (L, B, K, "T")
        raise ValueError(f"evict: scores must be [L, B, K, T] = {must} of this cache, got {scores.shape}")
    if not 0 <= prefix < held.min() or T < 1 or prefix + T > M:
        raise ValueError(
            f"evict: prefix and context must lie within the {held.tolist()} tokens held, got {prefix=}, {T=}"
        )
    sizes = np.minimum(held - prefix, T)
    s = np.full((L, B, K, M), np.inf, np.float32)
    inside = np.arange(T) < sizes[:, None, None]
    s[..., prefix : prefix + T] = np.where(inside, _finite(scores, inside), np.inf)
    return np.where(table.positions >= 0, s, -np.inf), sizes


def _scores_of_paged(
    cache: PagedCache, table: RowTable, scores: Array | None, prefix: int
) -> tuple[Float[np.ndarray, "L B K M"], Int[np.ndarray, " B"]]:
    """Scores of the rows that are left of a context: those that they have, or new ones."""
    context = cache.context
    sizes = np.asarray(context.context_lengths)[np.asarray(context.context_of_request)]
    s = table.scores
    if scores is None:
        return s, sizes
    L, B, K, _ = s.shape
    T, before = int(sizes.max()), int(context.prefix)
    if scores.shape != (L, B, K, T) or prefix != before:
        raise ValueError(
            f"evict: scores must be [L, B, K, T] = {(L, B, K, T)} of the context behind prefix={before} that "
            f"was evicted before, got {scores.shape} and {prefix=}"
        )
    at, theirs = table.positions - prefix, np.isfinite(s)
    inside = np.arange(T) < sizes[:, None, None]
    given = np.take_along_axis(_finite(scores, inside), np.clip(at, 0, T - 1), axis=-1)
    return np.where(theirs, given, s), sizes


def _finite(scores: Array, inside: Bool[np.ndarray, "B 1 T"]) -> Float[np.ndarray, "L B K T"]:
    out = np.asarray(scores, np.float32)
    if not (np.isfinite(out) | ~inside).all():
        raise ValueError("evict: scores must be finite, got NaN or infinity")
    return out


# -- one function a rule: of scores [L, B, K, M], -inf where no row competes, those that stay


def keep_global(
    s: Float[np.ndarray, "L B K M"],
    sizes: Int[np.ndarray, " B"],
    ratios: Float[np.ndarray, " B"],
    *,
    safeguard: float = 0.0,
) -> Bool[np.ndarray, "L B K M"]:
    """The greatest of all heads together, once each has its safe part of an even share."""
    pairs = _pairs(s, sizes, ratios)
    safe = _greatest_of_heads(s, _floor(safeguard * ratios * sizes))
    kept = _by_layer(mark_greatest(_by_request(np.where(safe, np.inf, s)), pairs), s.shape)
    _check_left(kept, pairs)
    return kept


def keep_per_head(
    s: Float[np.ndarray, "L B K M"], sizes: Int[np.ndarray, " B"], ratios: Float[np.ndarray, " B"]
) -> Bool[np.ndarray, "L B K M"]:
    """As many of each head."""
    each = np.maximum(_floor(ratios * sizes), 1)
    kept = _greatest_of_heads(s, each)
    _check_left(kept, each * s.shape[0] * s.shape[2])
    return kept


def keep_whole_heads(
    s: Float[np.ndarray, "L B K M"], sizes: Int[np.ndarray, " B"], ratios: Float[np.ndarray, " B"]
) -> Bool[np.ndarray, "L B K M"]:
    """All of the heads whose greatest score is greatest."""
    heads = _heads(s, ratios)
    best = s.max(-1, keepdims=True, initial=-np.inf)
    kept = _by_layer(mark_greatest(_by_request(best), heads), best.shape) & np.isfinite(s)
    _check_left(kept, heads * sizes)
    return kept


def keep_above(
    s: Float[np.ndarray, "L B K M"],
    sizes: Int[np.ndarray, " B"],
    ratios: Float[np.ndarray, " B"],
    *,
    whole_heads: bool,
) -> Bool[np.ndarray, "L B K M"]:
    """The published code's rule: what is strictly above the score of the last pair that the budget has."""
    compete, pairs = np.isfinite(s), _pairs(s, sizes, ratios)
    _check_left(compete, _heads(s, ratios) * sizes if whole_heads else pairs)
    if whole_heads:  # each row counts what its head does
        s = np.where(compete, s.max(-1, keepdims=True, initial=-np.inf), -np.inf)
    order = -np.sort(-_by_request(s), axis=1)
    limit = np.take_along_axis(order, pairs[:, None] - 1, axis=1)
    limit = np.where(ratios[:, None] >= 1, -np.inf, limit)
    return _by_layer(_by_request(s) > limit, s.shape)


def _floor(x: Float[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    return np.floor(x + 1e-9).astype(np.int64)  # 0.3 * 10 is 3 here, and not 2.9...


def _pairs(s: Float[np.ndarray, "L B K M"], sizes: Int[np.ndarray, " B"], ratios: Float[np.ndarray, " B"]):
    """How many pairs of each request a ratio is."""
    return np.maximum(_floor(ratios * (s.shape[0] * s.shape[2]) * sizes), 1)


def _heads(s: Float[np.ndarray, "L B K M"], ratios: Float[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """How many heads of each request a ratio is."""
    return np.maximum(_floor(ratios * (s.shape[0] * s.shape[2])), 1)


def _by_request(x: Float[np.ndarray, "L B K n"]) -> Float[np.ndarray, "B _"]:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _by_layer(x: Bool[np.ndarray, "B _"], shape: tuple[int, ...]) -> Bool[np.ndarray, "L B K n"]:
    L, B, K, n = shape
    return x.reshape(B, L, K, n).swapaxes(0, 1)


def _greatest_of_heads(
    s: Float[np.ndarray, "L B K M"], counts: Int[np.ndarray, " B"]
) -> Bool[np.ndarray, "L B K M"]:
    """Marks the `counts[b]` greatest of each head of request b."""
    L, B, K, M = s.shape
    each = np.broadcast_to(counts[None, :, None], (L, B, K))
    return mark_greatest(s.reshape(-1, M), each.ravel()).reshape(s.shape)


def _check_left(kept: Bool[np.ndarray, "L B K M"], wanted: Int[np.ndarray, " B"]) -> None:
    left = kept.sum((0, 2, 3))
    if (left < wanted).any():
        b = int(np.argmax(left < wanted))
        raise ValueError(
            f"evict: a second budget must not want what the first has evicted, got {left[b]} rows left for "
            f"{wanted[b]} in request {b}"
        )


def mark_greatest(x: Float[np.ndarray, "N n"], counts: Int[np.ndarray, " N"]) -> Bool[np.ndarray, "N n"]:
    """Marks the `counts[i]` greatest of each row, the earlier of equal ones; never one of -inf."""
    out = np.zeros(x.shape, bool)
    for row, kept, count in zip(x, out, counts, strict=True):
        count = min(int(count), int((row > -np.inf).sum()))
        if count:
            limit = np.partition(row, len(row) - count)[len(row) - count]
            kept[:] = row > limit
            kept[np.flatnonzero(row == limit)[: count - int(kept.sum())]] = True
    return out
