"""What else has been taken for the worth of a cached pair: the rivals of KVzip, for comparison and choice.

Each gives scores [L, B, K, T] for `evict`, of the tokens behind the first `prefix`; `tokens` are all that the
cache holds, one row a request, and 0 stands behind the end of a shorter one.

    h2o_scores        the attention a key receives from all later queries (arXiv:2306.14048)
    snapkv_scores     from the last `window` queries, smoothed; these stay (arXiv:2404.14469)
    tova_scores       from the last query, all heads together (arXiv:2401.06104)
    expected_scores   that later queries may be expected to give (Expected Attention, arXiv:2510.00636)
    streaming_scores  the first `sinks` tokens and the most recent ones (arXiv:2309.17453)
    random_scores     drawn by seed

The first four take one pass over the tokens and know the queries of the text only, not those of a later
question. Letters: L layers without a window, B requests, K key heads, G queries a key head, T tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.cache.dense import DenseCache, global_layers
from jaxllm.models.attention import score_rule
from jaxllm.models.inputs import pad_batch, require_global_layer
from jaxllm.models.rope import rotate
from jaxllm.models.taps import layer_tap
from jaxllm.ops.attention import heads_first
from pallas_kernels.decode_attention.partial_softmax import FLOAT32, MASK_VALUE
from pallas_kernels.kvzip_score import attention_per_key

Rows = Sequence[Sequence[int]]


def h2o_scores(
    model, tokens: Rows, *, prefix: int = 0, reduce: Literal["sum", "max"] = "sum", recent: int = 0
) -> Float[Array, "L B K T"]:
    """Attention received from all queries: the sum of the paper, or the greatest (KVzip's comparison).

    recent: the last tokens that stay whatever their score (the paper spends half of the budget so).
    """
    rows, lengths = _checked("h2o", model, tokens, prefix)
    got = _attention(model, rows, lengths, rows.shape[1], reduce=reduce).mean(3)
    return _behind_prefix(_keep_last(got, lengths, recent), lengths, prefix)


def snapkv_scores(
    model, tokens: Rows, *, prefix: int = 0, window: int = 32, kernel: int = 5
) -> Float[Array, "L B K T"]:
    """Attention received from the last `window` queries, averaged over `kernel` neighbouring keys."""
    if window < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"snapkv: window must be positive, kernel odd, got {window=}, {kernel=}")
    rows, lengths = _checked("snapkv", model, tokens, prefix)
    got = _attention(model, rows, lengths, window, reduce="sum").mean(3) / window
    sums = jax.lax.reduce_window(
        got, 0.0, jax.lax.add, (1, 1, 1, kernel), (1, 1, 1, 1), [(0, 0)] * 3 + [(kernel // 2, kernel // 2)]
    )
    return _behind_prefix(_keep_last(sums / kernel, lengths, window), lengths, prefix)


def tova_scores(model, tokens: Rows, *, prefix: int = 0) -> Float[Array, "L B K T"]:
    """Attention received from the last query, averaged over all heads of a layer; it stays itself."""
    rows, lengths = _checked("tova", model, tokens, prefix)
    got = _attention(model, rows, lengths, 1, reduce="sum")
    got = jnp.broadcast_to(got.mean((2, 3))[:, :, None], (*got.shape[:3], got.shape[-1]))
    return _behind_prefix(_keep_last(got, lengths, 1), lengths, prefix)


def expected_scores(
    model, tokens: Rows, *, prefix: int = 0, future: int = 512, sinks: int = 4, epsilon: float = 0.0
) -> Float[Array, "L B K T"]:
    """Logarithm of the attention that queries like the text's give at the next `future` positions, times |v|.

    Queries before rotation are taken as normal, with the mean m and covariance C of all but the `sinks` first
    tokens, and turned by the mean rotation of those positions; a key k then weighs e^(m.k/s + k'C k/(2 s^2)),
    normalized over keys, s^2 the head size. epsilon: added before |v| is multiplied. The sinks stay.
    (Without the logarithm a fifth of them were 0 in float32, and which of those stay was left to chance.)
    """
    rows, lengths = _checked("expected", model, tokens, prefix)
    if future < 1 or not 0 <= sinks < lengths.min():
        got = f"{future=}, {sinks=}, {lengths.tolist()}"
        raise ValueError(f"expected: future must be positive and sinks fewer than a row's tokens, got {got}")
    got = _expected(model, rows, lengths, future=future, sinks=sinks, epsilon=epsilon)
    first = np.arange(rows.shape[1]) < sinks
    return _behind_prefix(jnp.where(first[None, None, None], got.max() + 1.0, got), lengths, prefix)


def streaming_scores(model, tokens: Rows, *, prefix: int = 0, sinks: int = 4) -> Float[Array, "L B K T"]:
    """The first tokens, then the later the better."""
    rows, lengths = _checked("streaming", model, tokens, prefix)
    T = rows.shape[1]
    at = np.arange(T, dtype=np.float32)
    score = np.where(at < sinks, 2 * T - at, at)
    return _behind_prefix(_broadcast(model, score, len(lengths)), lengths, prefix)


def random_scores(model, tokens: Rows, *, prefix: int = 0, seed: int = 0) -> Float[Array, "L B K T"]:
    """Uniform numbers."""
    rows, lengths = _checked("random", model, tokens, prefix)
    shape = _broadcast(model, np.zeros(rows.shape[1], np.float32), len(lengths)).shape
    return _behind_prefix(jax.random.uniform(jax.random.key(seed), shape), lengths, prefix)


def _checked(who: str, model, tokens: Rows, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    rows, lengths = pad_batch(who, model, tokens)
    require_global_layer(who, model)
    if not 0 <= prefix < lengths.min():
        raise ValueError(f"{who}: each row must have more than the {prefix=} tokens, got {lengths.tolist()}")
    return rows, lengths


def _broadcast(model, score: np.ndarray, B: int) -> jax.Array:
    """The same scores for each layer without a window, request and key head."""
    windows = model.windows
    shape = (len(global_layers(windows)), B, model.config.kv_heads, len(score))
    return jnp.broadcast_to(jnp.asarray(score)[None, None, None], shape)


@partial(jax.jit, static_argnames=("last", "reduce"))
def _attention(
    model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    last: int,
    *,
    reduce: Literal["sum", "max"],
) -> Float[Array, "L B K G T"]:
    """What keys receive from the last queries of each request."""
    B, T = tokens.shape
    step = jnp.arange(T)
    asks = (step[None] < lengths[:, None]) & (step[None] >= lengths[:, None] - last)
    seen = (step[None, :, None] >= step[None, None]) & asks[:, :, None]
    found: list[jax.Array] = []

    def of_layer(layer: int, q, k) -> None:
        attention = model.layers[layer].attention
        rule = score_rule(attention)
        found.append(attention_per_key(q, heads_first(k), seen, reduce=reduce, **rule))

    tap = layer_tap(of_layer, ("attention.queries", "attention.keys"), global_layers(model.windows))
    model(tokens, _empty_cache(model, tokens), lengths=lengths, logits="last", tap=tap)
    return jnp.stack(found)


@partial(jax.jit, static_argnames=("future", "sinks", "epsilon"))
def _expected(
    model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    future: int,
    sinks: int,
    epsilon: float,
) -> Float[Array, "L B K T"]:
    B, T = tokens.shape
    step = jnp.arange(T)
    real = (step[None] < lengths[:, None]) & (step[None] >= sinks)  # [B, T]
    mine = real.astype(jnp.float32)
    later = lengths[:, None] + jnp.arange(future)[None]
    cache = _empty_cache(model, tokens)
    found: list[jax.Array] = []

    def of_layer(
        layer: int, q: Float[Array, "B T N"], k: Float[Array, "B T K E"], v: Float[Array, "B T K E"]
    ) -> None:
        attention = model.layers[layer].attention
        (_, _, K, E), square = k.shape, attention.scale**2
        mean, cov = _later_queries(attention, q.reshape(B, T, -1, E), mine, later, cache.extents)
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        mean, cov = mean.reshape(B, K, -1, E), cov.reshape(B, K, -1, E, E)
        logits = jnp.einsum("bkgd,btkd->bkgt", mean, k, **FLOAT32) * attention.scale
        logits += jnp.einsum("btkd,bkgde,btke->bkgt", k, cov, k, **FLOAT32) * (square / 2)
        logits = jnp.where(real[:, None, None], logits, MASK_VALUE)
        learned = score_rule(attention)["sinks"]
        if learned is not None:
            sink = learned.astype(jnp.float32).reshape(1, K, -1, 1)
            logits = jnp.concatenate([logits, jnp.broadcast_to(sink, (*logits.shape[:3], 1))], axis=-1)
        weights = jax.nn.log_softmax(logits, axis=-1)[..., :T]
        weights = jax.nn.logsumexp(weights, axis=2) - np.log(weights.shape[2])
        if epsilon:
            weights = jnp.logaddexp(weights, np.float32(np.log(epsilon)))
        found.append(weights + jnp.log(jnp.maximum(jnp.linalg.norm(v, axis=-1), 1e-30)).swapaxes(1, 2))

    tap = layer_tap(
        of_layer, ("attention.q.out", "attention.keys", "attention.values"), global_layers(model.windows)
    )
    model(tokens, cache, lengths=lengths, logits="last", tap=tap)
    return jnp.stack(found)


def _empty_cache(model, tokens: Int[Array, "B T"]) -> DenseCache:
    """What makes a pass turn keys as `prefill` did, of whose cache the scores are; it does nothing else."""
    return model.make_cache(*tokens.shape, extents=model.config.context)


def _later_queries(
    attention,
    q: Float[Array, "B T H E"],
    mine: Float[Array, "B T"],
    later: Int[Array, "B F"],
    extents: Int[Array, " B"],
) -> tuple[Float[Array, "B 1 H E"], Float[Array, "B H E E"]]:
    """Mean m and covariance C of queries at later positions: R m and R C R^T, R the mean rotation there.

    q: before rotation. mine: 1 for the queries that count.
    """
    (B, _, _, E), q_norm = q.shape, getattr(attention, "q_norm", None)
    q = (q if q_norm is None else q_norm(q)).astype(jnp.float32)
    share = (mine / mine.sum(1, keepdims=True))[:, :, None, None]
    mean = (q * share).sum(1, keepdims=True)
    cov = jnp.einsum("bthd,bthe->bhde", (q - mean) * share, q - mean, **FLOAT32)
    rope = getattr(attention, "rope", None)
    if rope is None:
        return mean, cov
    # a rotation is linear in cos and sin, so that of mean angles' is the mean rotation
    cos, sin = (x.mean(1, keepdims=True) for x in rope.angles(E, later, extents))

    def transposed_product(c: Float[Array, "B H E E"]) -> Float[Array, "B H E E"]:
        """(C R^T)^T, of rows that are rotated."""
        return rotate(c.reshape(B, 1, -1, E), cos, sin).reshape(c.shape).swapaxes(-1, -2)

    return rotate(mean, cos, sin), transposed_product(transposed_product(cov))


def _keep_last(scores: Float[Array, "L B K T"], lengths: np.ndarray, last: int) -> Float[Array, "L B K T"]:
    """Scores with the last tokens of each request above all others."""
    at = np.arange(scores.shape[-1])[None]
    stays = (at >= lengths[:, None] - last) & (at < lengths[:, None])
    return jnp.where(stays[None, :, None], scores.max() + 1.0, scores)


def _behind_prefix(
    scores: Float[Array, "L B K T"], lengths: np.ndarray, prefix: int
) -> Float[Array, "L B K _"]:
    """Scores behind the prefix, 0 behind the end of a request."""
    real = np.arange(scores.shape[-1])[None] < lengths[:, None]
    return jnp.where(real[None, :, None], scores, 0.0)[..., prefix:]
