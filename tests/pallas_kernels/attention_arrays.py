"""Caches of a few rows, and what attention to them is in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.coded import Code, dequantize, words_of_row
from pallas_kernels.decode_attention.partial_softmax import MASK_VALUE
from pallas_kernels.words import to_words

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
COUNTS = (40, 0, 17, 100)  # rows of 2 contexts' 2 heads: one has none, and two a page that is not full


def stored_rows(rng, shape, dtype, code: Code | None):
    """Rows of a cache: plain, or random codes."""
    if code is None:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
    *lead, E = shape
    groups, width = -(-E // code.group_size), words_of_row(code, E)
    codes = rng.integers(0, 2**code.bits, (*lead, (width - groups) * 32 // code.bits))
    codes[..., E:] = 0
    scale = rng.uniform(0.5, 1, (*lead, groups)) * 3 / 2**code.bits
    low = rng.uniform(-1.6, -1.4, (*lead, groups))
    low, scale = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (low, scale))
    return jnp.concatenate([jnp.asarray(low | scale << 16), to_words(jnp.asarray(codes), code.bits)], -1)


def paged(
    *, E=64, C=16, K=2, n=4, counts=COUNTS, contexts_of=(0, 1), dtype=jnp.float32, code=None, seed=0
) -> list[jax.Array]:
    """Arrays of `attend_pages`; pages of other layers lie before and behind, with great numbers in them."""
    rng, before = np.random.default_rng(seed), 3
    pages = [-(-count // C) for count in counts]
    offsets = before + np.concatenate([[0], np.cumsum(pages)])
    P = offsets[-1] + 2
    lengths, head = np.zeros(P), np.zeros(P)
    for j, (count, first) in enumerate(zip(counts, offsets[:-1], strict=True)):
        for i in range(pages[j]):
            lengths[first + i], head[first + i] = min(C, count - i * C), j
    q = jnp.asarray(rng.standard_normal((len(contexts_of), K, n, E), np.float32)).astype(dtype)
    k, v = (stored_rows(rng, (P, C, E), dtype, code) for _ in range(2))
    if code is None:
        other = jnp.ones(P, bool).at[offsets[0] : offsets[-1]].set(False)[:, None, None]
        k, v = (jnp.where(other, 1e4, x).astype(dtype) for x in (k, v))
    return [q, k, v, *(jnp.asarray(x, jnp.int32) for x in (offsets, lengths, head, contexts_of))]


def nan_where_no_head_has_rows(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same caches, but for rows behind the last one of a page, and for pages of other layers."""
    q, *caches, offsets, lengths, head, of = arrays
    real = (jnp.arange(caches[0].shape[1])[None] < lengths[:, None])[..., None]
    nan = jnp.uint32(2**32 - 1) if caches[0].dtype == jnp.uint32 else jnp.asarray(jnp.nan, caches[0].dtype)
    return [q, *(jnp.where(real, x, nan) for x in caches), offsets, lengths, head, of]


def exact_pages(q, k, v, offsets, lengths, head, contexts, *, scale, softcap=None, code=None):
    """The softmax in float64, by another road: each head's rows are gathered."""
    B, K, n, E = q.shape
    k, v = (np.asarray(dequantize(x, code, E, jnp.float32), np.float64) for x in (k, v))
    q = np.asarray(q, np.float64)
    greatest, total, out = np.full((B, K, n), MASK_VALUE), np.zeros((B, K, n)), np.zeros((B, K, n, E))
    for b in range(B):
        for h in range(K):
            j = int(contexts[b]) * K + h
            of = [(p, i) for p in range(int(offsets[j]), int(offsets[j + 1])) for i in range(int(lengths[p]))]
            if not of:
                continue
            rows, values = (np.stack([x[p, i] for p, i in of]) for x in (k, v))
            scores = q[b, h] @ rows.T * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            greatest[b, h] = scores.max(1)
            weights = np.exp(scores - greatest[b, h][:, None])
            total[b, h], out[b, h] = weights.sum(1), weights @ values
    return greatest, total, out


def assert_same_softmax(got, wanted, dtype=jnp.float32):
    """Equal greatest scores, and equal sums once divided: total and out scale with e^greatest."""
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    greatest, total, out = (np.asarray(x, np.float64) for x in wanted)
    np.testing.assert_allclose(np.asarray(got[0]), greatest, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(got[1]), total, rtol=2 * tolerance, atol=1e-6)
    share = np.where(total > 0, total, 1.0)[..., None]
    np.testing.assert_allclose(np.asarray(got[2]) / share, out / share, rtol=tolerance, atol=tolerance)


def dense(*, B=2, K=2, G=2, T=2, S=40, E=32, lengths=(40, 9), dtype=jnp.float32, code=None, seed=0):
    """Arrays of `attend_rows`: T new tokens at the end of each request."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, T, K * G, E), np.float32)).astype(dtype)
    k, v = (stored_rows(rng, (B * K, S, E), dtype, code) for _ in range(2))
    end = np.asarray(lengths)[:, None]
    positions = end - T + np.arange(T)[None]
    last, row = end - 1, np.arange(S)[None]
    key_positions = last - (last - row) % S
    return [q, k, v, jnp.asarray(positions, jnp.int32), jnp.asarray(key_positions, jnp.int32)]


def exact_rows(q, k, v, positions, key_positions, sinks=None, *, scale, softcap=None, window=None, code=None):
    """Attention in float64, one query after the other."""
    B, T, H, E = q.shape
    k, v = (np.asarray(dequantize(x, code, E, jnp.float32), np.float64) for x in (k, v))
    q, K = np.asarray(q, np.float64), len(k) // B
    out = np.zeros((B, T, H, E))
    for b, t, h in np.ndindex(B, T, H):
        at, of = int(positions[b, t]), np.asarray(key_positions[b])
        rows = [s for s in range(len(of)) if 0 <= of[s] <= at and (window is None or of[s] > at - window)]
        scores = k[b * K + h // (H // K), rows] @ q[b, t, h] * scale
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        extra = 0.0 if sinks is None else np.exp(float(sinks[h]) - scores.max())
        out[b, t, h] = weights @ v[b * K + h // (H // K), rows] / (weights.sum() + extra)
    return out
