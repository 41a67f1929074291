"""Which rows of a context stay when it must get smaller: one rule for the scores of any method.

    small = evict(cache, kvzip_scores(model, cache, context), ratio=0.3)

Scores [L, B, K, T] are of the context's T tokens, for each layer without a window (L of them), request and
key head: the least are evicted. A budget is a part of the context's L K T pairs of one request, or so many
tokens' worth of them. How it is spent (KVzip, arXiv:2505.23416):

    "pair"      the greatest of all layers and heads together: heads keep as much as they need
    "uniform"   each head keeps as many
    "head"      whole heads: those whose greatest score is greatest keep all, the others nothing

The number kept is exact, and of equal scores those of earlier layers, heads and positions stay; so what a
smaller ratio keeps a larger one keeps too. `official` is the published code's strict threshold instead, which
keeps one pair less and none that equals the threshold. `safeguard` gives every head that part of an even
share first (AdaKV, arXiv:2407.11550). Rows before and after the context always stay. Lossy; at ratio 1
lossless.

Letters: L layers without a window, B requests, K key heads, T tokens of the longest context.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import paged
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import PagedCache

Budget = Literal["pair", "uniform", "head"]


def evict(
    cache: DenseCache | PagedCache,
    scores: Float[Array, "L B K T"],
    *,
    ratio: float | None = None,
    tokens: int | None = None,
    budget: Budget = "pair",
    prefix: int = 0,
    safeguard: float = 0.0,
    official: bool = False,
    rows: int = 64,
    page: int | None = None,
) -> PagedCache:
    """The cache with the least of the context's rows gone; the cache given stays as it is.

    cache: holds `prefix` tokens, the context, and perhaps more. scores: of the context; where a request's
      context is shorter than T, what stands behind its end is not looked at.
    ratio: of the context's rows that stay, above 0 to 1; or tokens: rows a head on average; at least one row.
    rows: room for tokens that come later (`grow` makes more). page: rows of a page; None takes 16 to 64, the
      more the more stays, so that little is lost to pages that are not full.

    Raises ValueError for a ratio outside, scores that are not of this cache or not numbers, or a cache that
    has been evicted before.
    """
    if not isinstance(cache, DenseCache) or cache.base is not None:
        raise ValueError(f"evict: the cache must hold every token, got a {type(cache).__name__} of some")
    layers = sum(window is None for window in cache.windows)
    held = np.asarray(cache.lengths)
    B, J = len(held), cache.keys[0].shape[0]
    T = scores.shape[-1]
    if scores.shape != (layers, B, J // B, T) or layers == 0:
        must = (layers, B, J // B, "T")
        raise ValueError(f"evict: scores must be [L, B, K, T] = {must} of this cache, got {scores.shape}")
    if not 0 <= prefix < held.min() or T < 1 or prefix + T > held.max():
        raise ValueError(
            f"evict: prefix and context must lie within the {held.tolist()} tokens held, got {prefix=}, {T=}"
        )
    lengths = np.minimum(held - prefix, T)
    if (ratio is None) == (tokens is None):
        raise ValueError("evict: exactly one of ratio and tokens must be given")
    if ratio is None:
        assert tokens is not None
        if tokens < 1:
            raise ValueError(f"evict: tokens must be at least 1, got {tokens}")
        ratios = np.minimum(float(tokens) / lengths, 1.0)
    else:
        if not 0 < ratio <= 1:
            raise ValueError(f"evict: ratio must lie above 0 and be at most 1, got {ratio}")
        ratios = np.full(B, ratio)
    real = np.arange(T)[None] < lengths[:, None]
    if not bool((jnp.isfinite(scores) | ~real[None, :, None]).all()):
        raise ValueError("evict: scores must be finite, got NaN or infinity")
    if not 0 <= safeguard <= 1:
        raise ValueError(f"evict: safeguard must be 0 to 1, got {safeguard}")
    if (safeguard and (budget != "pair" or official)) or (official and budget == "uniform"):
        rule = 'safeguard is of the budget "pair", official of "pair" and "head", and they exclude each other'
        raise ValueError(f"evict: {rule}, got {budget=}, {safeguard=}, {official=}")
    chosen = choose(scores, lengths, ratios, budget=budget, safeguard=safeguard, official=official)
    keep = np.zeros((layers, B, J // B, int(held.max())), bool)
    keep[..., :prefix] = True
    keep[..., prefix : prefix + T] = np.asarray(chosen)
    after = np.arange(held.max())[None] >= prefix + lengths[:, None]
    keep |= (after & (np.arange(held.max())[None] < held[:, None]))[None, :, None]
    if page is None:
        page = int(np.clip(2 ** np.floor(np.log2(max(keep.sum(-1).mean() / 16, 1))), 16, 64))
    return paged.pack(cache, keep, rows=rows, page=page)


def choose(
    scores: Float[Array, "L B K T"],
    lengths: Int[np.ndarray, " B"],
    ratios: Float[np.ndarray, " B"],
    *,
    budget: Budget = "pair",
    safeguard: float = 0.0,
    official: bool = False,
) -> Bool[Array, "L B K T"]:
    """What stays of each request's context of `lengths[b]` tokens; see the module."""
    L, _, K, _ = scores.shape
    count = lambda x: np.floor(x + 1e-9).astype(np.int32)  # noqa: E731 (0.3 * 10 is 3 here, and not 2.9...)
    counts = {
        "pair": count(ratios * (L * K) * lengths),
        "uniform": count(ratios * lengths),
        "head": count(ratios * (L * K)),
        "safe": count(safeguard * ratios * lengths),
    }
    return _choose(scores, lengths.astype(np.int32), ratios >= 1, counts, budget=budget, official=official)


@partial(jax.jit, static_argnames=("budget", "official"))
def _choose(scores, lengths, whole, counts, *, budget: Budget, official: bool):
    L, _, K, T = scores.shape

    def one(s, n, whole, count):
        """Of one request, [L, K, T]."""
        real = jnp.broadcast_to(jnp.arange(T) < n, s.shape)
        s = jnp.where(real, s.astype(jnp.float32), -jnp.inf)
        if budget == "head":
            s = jnp.where(real, s.max(-1, keepdims=True), -jnp.inf)
        if official:
            at = jnp.maximum(count["pair"] - 1, 0)
            kept = s > jnp.sort(s.reshape(-1), descending=True)[at]
        elif budget == "uniform":
            kept = _ranks(s) < jnp.maximum(count["uniform"], 1)
        elif budget == "head":
            best = _ranks(s[..., 0].reshape(-1)).reshape(L, K)
            kept = jnp.broadcast_to((best < jnp.maximum(count["head"], 1))[..., None], s.shape)
        else:
            safe = _ranks(s) < count["safe"]
            order = jnp.where(safe & real, jnp.inf, s)
            kept = (_ranks(order.reshape(-1)) < jnp.maximum(count["pair"], 1)).reshape(s.shape)
        return (kept | whole) & real

    return jax.vmap(one, in_axes=(1, 0, 0, 0), out_axes=1)(scores, lengths, whole, counts)


def _ranks(x: Float[Array, "*B n"]) -> Int[Array, "*B n"]:
    """How many come before each along the last axis: greater ones, and equal ones that stand before it."""
    order = jnp.argsort(-x, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)
