"""Which rows of a context stay when it must get smaller: one rule for the scores of any method.

    small = evict(cache, kvzip_scores(model, cache, context), ratio=0.3)

Scores [L, B, K, T] are of the context's T tokens, for each layer without a window (L of them), request and
key head: the least are evicted. A budget is a part of the context's L K T pairs of one request, or so many
tokens' worth of them, or a threshold, by which a context decides itself how much stays (KVzap,
arXiv:2601.07891). How it is spent (KVzip, arXiv:2505.23416):

    "pair"      the greatest of all layers and heads together: heads keep as much as they need
    "uniform"   each head keeps as many
    "head"      whole heads: those whose greatest score is greatest keep all, the others nothing

The number kept is exact, and of equal scores those of earlier layers, heads and positions stay; so what a
smaller ratio keeps a larger one keeps too. `official` is the published code's strict threshold instead, which
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

from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import repack
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import PagedCache
from jaxllm.cache.repack import Held

Budget = Literal["pair", "uniform", "head"]


def evict(
    cache: DenseCache | PagedCache,
    scores: Float[Array, "L B K T"] | None = None,
    *,
    ratio: float | None = None,
    tokens: int | None = None,
    threshold: float | None = None,
    budget: Budget = "pair",
    prefix: int = 0,
    safeguard: float = 0.0,
    official: bool = False,
    rows: int = 64,
    page: int | None = None,
) -> PagedCache:
    """The cache with the least of the context's rows gone; the cache given stays as it is.

    cache: holds `prefix` tokens, the context, and perhaps more. scores: of the context; where a request's
      context is shorter than T, what stands behind its end is not looked at. None takes the scores by which
      the cache was evicted before.
    ratio: of the context's rows that stay, above 0 to 1; or tokens: rows a head on average; at least one row.
      Or threshold: the rows that score at least so much.
    rows: room for tokens that come later (`grow` makes more); a cache that was evicted before keeps its own.
    page: rows of a page; None takes 16 to 64, the more the more stays, so that little is lost to pages that
      are not full.

    Raises ValueError for a ratio outside, scores that are not of this cache or not numbers, or a budget of
    which too much is gone already.
    """
    if sum(x is not None for x in (ratio, tokens, threshold)) != 1:
        raise ValueError("evict: exactly one of ratio, tokens and threshold must be given")
    if tokens is not None and tokens < 1:
        raise ValueError(f"evict: tokens must be at least 1, got {tokens}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"evict: ratio must lie above 0 and be at most 1, got {ratio}")
    if not 0 <= safeguard <= 1:
        raise ValueError(f"evict: safeguard must be 0 to 1, got {safeguard}")
    if (safeguard and (budget != "pair" or official)) or (official and budget == "uniform"):
        rule = 'safeguard is of the budget "pair", official of "pair" and "head", and they exclude each other'
        raise ValueError(f"evict: {rule}, got {budget=}, {safeguard=}, {official=}")
    if threshold is not None and (budget != "pair" or safeguard or official):
        raise ValueError(f"evict: a threshold is all of a budget, got {budget=}, {safeguard=}, {official=}")
    if threshold is not None and not np.isfinite(threshold):
        raise ValueError(f"evict: a threshold must be a finite number, got {threshold}")
    _check_room("evict", rows, 16 if page is None else page)
    if isinstance(cache, PagedCache):
        there = repack.held(cache, tail=False)
        s, sizes = _scores_again(cache, there, scores, prefix)
        prefix, tail = int(cache.context.prefix), repack.copied(cache.tail)
    else:
        there = repack.held(cache, tail=True)
        s, sizes = _scores_of_all(cache, there, scores, prefix)
        tail = repack.new_tail(cache, rows)
    if threshold is not None:
        keep = s >= threshold
    else:
        part = np.full(len(sizes), ratio) if tokens is None else np.minimum(float(tokens) / sizes, 1.0)
        keep = choose(s, sizes, part, budget=budget, safeguard=safeguard, official=official)
    if page is None:
        page = int(np.clip(2 ** np.floor(np.log2(max(keep.sum(-1).mean() / 16, 1))), 16, 64))
    return repack.pack(cache, there, s, keep, sizes=sizes, prefix=prefix, tail=tail, page=page)


def _check_room(who: str, rows: int, page: int) -> None:
    if min(rows, page) < 1:
        raise ValueError(f"{who}: rows and page must be at least 1, got {rows=}, {page=}")


def _scores_of_all(
    cache: DenseCache, there: Held, scores: Array | None, prefix: int
) -> tuple[Float[np.ndarray, "L B K M"], Int[np.ndarray, " B"]]:
    """Scores of a dense cache's rows, infinite where they always stay, and the contexts' sizes."""
    if cache.base is not None:
        raise ValueError("evict: the cache must be whole, got the tail of one")
    L, B, K, M = there.positions.shape
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
    s[..., prefix : prefix + T] = np.where(inside, _numbers(scores, inside), np.inf)
    return np.where(there.positions >= 0, s, -np.inf), sizes


def _scores_again(
    cache: PagedCache, there: Held, scores: Array | None, prefix: int
) -> tuple[Float[np.ndarray, "L B K M"], Int[np.ndarray, " B"]]:
    """Scores of the rows that are left of a context: those that they have, or new ones."""
    context = cache.context
    sizes = np.asarray(context.sizes)[np.asarray(context.slot)]
    s = there.scores
    if scores is None:
        return s, sizes
    L, B, K, _ = s.shape
    T, before = int(sizes.max()), int(context.prefix)
    if scores.shape != (L, B, K, T) or prefix != before:
        raise ValueError(
            f"evict: scores must be [L, B, K, T] = {(L, B, K, T)} of the context behind prefix={before} that "
            f"was evicted before, got {scores.shape} and {prefix=}"
        )
    at, theirs = there.positions - prefix, np.isfinite(s)
    inside = np.arange(T) < sizes[:, None, None]
    given = np.take_along_axis(_numbers(scores, inside), np.clip(at, 0, T - 1), axis=-1)
    return np.where(theirs, given, s), sizes


def _numbers(scores: Array, inside: Bool[np.ndarray, "B 1 T"]) -> Float[np.ndarray, "L B K T"]:
    out = np.asarray(scores, np.float32)
    if not (np.isfinite(out) | ~inside).all():
        raise ValueError("evict: scores must be finite, got NaN or infinity")
    return out


def choose(
    scores: Float[np.ndarray, "L B K M"],
    sizes: Int[np.ndarray, " B"],
    ratios: Float[np.ndarray, " B"],
    *,
    budget: Budget = "pair",
    safeguard: float = 0.0,
    official: bool = False,
) -> Bool[np.ndarray, "L B K M"]:
    """Which rows stay of contexts of `sizes[b]` tokens; see the module.

    scores: -inf where a head has no row, inf where the row stays whatever the budget.
    Raises ValueError where fewer rows are left than the budget wants.
    """
    L, B, K, M = scores.shape
    always, there = scores == np.inf, np.isfinite(scores)
    s = np.where(there, scores, -np.inf)
    count = lambda x: np.floor(x + 1e-9).astype(np.int64)  # noqa: E731 (0.3 * 10 is 3 here, and not 2.9...)
    flat = lambda x: x.swapaxes(0, 1).reshape(B, -1)  # noqa: E731
    back = lambda x: x.reshape(B, L, K, -1).swapaxes(0, 1)  # noqa: E731
    pairs = np.maximum(count(ratios * (L * K) * sizes), 1)
    if budget == "head":
        best = s.max(-1, initial=-np.inf)  # [L, B, K]
        s = np.where(there, best[..., None], -np.inf)
        pairs = np.maximum(count(ratios * (L * K)), 1) * sizes
    if official:
        _check_left(there.sum((0, 2, 3)), pairs)
        at = np.maximum(count(ratios * (L * K) * sizes) - 1, 0)
        order = -np.sort(-flat(s), axis=1)
        limit = np.take_along_axis(order, at[:, None], axis=1)
        limit = np.where(ratios[:, None] >= 1, -np.inf, limit)
        return back(flat(s) > limit) | always
    if budget == "uniform":
        each = np.maximum(count(ratios * sizes), 1)
        kept = _greatest(s.reshape(-1, M), np.broadcast_to(each[None, :, None], (L, B, K)).ravel())
        kept, pairs = kept.reshape(s.shape), each * L * K
    elif budget == "head":
        kept = back(_greatest(flat(best), pairs // sizes))[..., :1] & there
    else:
        least = np.broadcast_to(count(safeguard * ratios * sizes)[None, :, None], (L, B, K)).ravel()
        safe = _greatest(s.reshape(-1, M), least).reshape(s.shape)
        kept = back(_greatest(flat(np.where(safe, np.inf, s)), pairs))
    _check_left(kept.sum((0, 2, 3)), pairs)
    return kept | always


def _check_left(left: Int[np.ndarray, " B"], wanted: Int[np.ndarray, " B"]) -> None:
    if (left < wanted).any():
        b = int(np.argmax(left < wanted))
        raise ValueError(
            f"evict: a second budget must not want what the first has evicted, got {left[b]} rows left for "
            f"{wanted[b]} in request {b}"
        )


def _greatest(x: Float[np.ndarray, "N n"], counts: Int[np.ndarray, " N"]) -> Bool[np.ndarray, "N n"]:
    """Marks the `counts[i]` greatest of each row, the earlier of equal ones; never one of -inf."""
    out = np.zeros(x.shape, bool)
    for row, kept, count in zip(x, out, counts, strict=True):
        count = min(int(count), int((row > -np.inf).sum()))
        if count:
            limit = np.partition(row, len(row) - count)[len(row) - count]
            kept[:] = row > limit
            kept[np.flatnonzero(row == limit)[: count - int(kept.sum())]] = True
    return out
