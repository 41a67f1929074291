"""What a backend's kernel is given, for pages and for a dense cache: one pool of rows, and each head's part.

A backend is a module with `default_tile`, `why_not` and `attend`.

Letters: B requests, T new tokens, H query heads, K key heads, G = H / K, n queries of a request and key head,
E head size, w numbers or words of a row, P pages, C rows a page, J heads of all contexts (or requests), S
rows of a dense cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import choice
from pallas_kernels.decode_attention import reference, work
from pallas_kernels.decode_attention.coded import Code
from pallas_kernels.decode_attention.partial_softmax import PartialSoftmax, divided


def pages(
    backend: Any,
    q,
    keys,
    values,
    page_offsets,
    page_lengths,
    page_head,
    context_of_request,
    *,
    max_readers: int,
    scale: float,
    softcap: float | None,
    code: Code | None,
    interpret: bool = False,
) -> PartialSoftmax:
    """By a backend's kernel, which sees one line of rows and where each head's are."""
    K, (P, C, w) = q.shape[1], keys.shape
    rank = reference.rank_of_requests(context_of_request)
    queries = reference.queries_by_head(q, page_offsets, context_of_request, rank, max_readers)
    J, N, E = queries.shape
    tile = backend.default_tile(N, E, q.dtype.itemsize, code, choice.target_capability())
    multiple = -(-tile.rows // C)
    found = backend.attend(
        queries,
        keys.reshape(P * C, w),
        values.reshape(P * C, w),
        work.of_pages(page_offsets, page_lengths, C),
        shares=work.Shares(min(tile.programs, -(-P // multiple)), C, multiple),
        tile=tile,
        scale=scale,
        softcap=softcap,
        code=code,
        interpret=interpret,
    )
    return reference.by_request(found, K, context_of_request, rank, max_readers)


def why_not_pages(
    backend: Any, q, keys, values, *rest, max_readers: int, code: Code | None, **rule
) -> str | None:
    """Why a backend does not take these."""
    (_, _, n, E), (P, C, _) = q.shape, keys.shape
    return backend.why_not(max_readers * n, E, q.dtype, keys.dtype, P * C, P * C, code)


def rows(
    backend: Any,
    q,
    keys,
    values,
    positions,
    key_positions,
    sinks,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    code: Code | None,
    interpret: bool = False,
) -> jax.Array:
    """By a backend's kernel."""
    (B, T, H, E), (J, S, w) = q.shape, keys.shape
    K, G = J // B, H * B // J
    queries = q.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(J, G * T, E)
    tile = backend.default_tile(G * T, E, q.dtype.itemsize, code, choice.target_capability())
    found = backend.attend(
        queries,
        keys.reshape(J * S, w),
        values.reshape(J * S, w),
        work.of_rows(positions, key_positions, K=K, window=window, unit=tile.rows),
        jnp.tile(positions, (1, G)),
        key_positions,
        shares=work.Shares(min(tile.programs, J * -(-S // tile.rows)), tile.rows, 1),
        tile=tile,
        scale=scale,
        softcap=softcap,
        window=window,
        code=code,
        interpret=interpret,
    )
    by_row = None
    if sinks is not None:
        by_row = jnp.tile(jnp.repeat(sinks.astype(jnp.float32).reshape(K, G), T, axis=1), (B, 1))
    out = divided(found, by_row)  # [J, G T, E]
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def why_not_rows(backend: Any, q, keys, *rest, code: Code | None, **rule) -> str | None:
    """Why a backend does not take these."""
    (B, T, H, E), (J, S, _) = q.shape, keys.shape
    return backend.why_not(H * B // J * T, E, q.dtype, keys.dtype, J * S, S, code)
