"""Attention of a few new tokens to a cache: pages of rows that differ by head, or the same rows for all.

    found = attend_pages(q, keys, values, page_offsets, page_lengths, page_head, context_of_request, scale=s)
    out = attend_rows(q, keys, values, positions, key_positions, scale=s)

`attend_pages` reads what eviction left of a text: a pool of pages of C rows, in which the pages of a head
follow each other, and its last one may not be full. It gives a softmax that is not yet divided, to be merged
with that of the rows that came since. `attend_rows` reads a dense cache, all or those in a window, where each
row says at which position its token stands, and divides.

Rows are plain numbers or codes of 2, 4 or 8 bits (`coded.py`); queries are in the basis of the keys. Scores,
softmax and sums are float32, weights are rounded to the type of the queries before they meet the values.
Kernels are for few queries: a cached row is read once for all of them, and time follows the rows read.

    partial_softmax     a softmax over some of the rows, and how two become one
    coded               rows in codes
    digits              codes to floats
    reference           what it means, in jnp
    work                how rows are divided among programs
    calls               what a backend's kernel is given
    columns             how rows lie in a tile
    triton              kernels for sm_80 and up
    mosaic_gpu          kernels for Hopper
    mosaic_coded        of them, the one for rows in codes
    lanes               codes to operands there
    cases               real shapes

Letters: B requests, T new tokens, H query heads, K key heads, G = H / K, n = G T queries of a request and key
head, E head size, w = E numbers or the words that hold them, P pages, C rows a page, J = heads of all
contexts (or of all requests), S rows of a dense cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import choice
from pallas_kernels.choice import Implementation, Kernel
from pallas_kernels.decode_attention import calls, mosaic_gpu, reference, triton
from pallas_kernels.decode_attention.coded import Code, words_of_row
from pallas_kernels.decode_attention.partial_softmax import PartialSoftmax, divided, merge

__all__ = ["PartialSoftmax", "attend_pages", "attend_rows", "divided", "merge"]


def attend_pages(
    q: Float[Array, "B K n E"],
    keys: Shaped[Array, "P C w"],
    values: Shaped[Array, "P C w"],
    page_offsets: Int[Array, " offsets"],
    page_lengths: Int[Array, " P"],
    page_head: Int[Array, " P"],
    context_of_request: Int[Array, " B"],
    *,
    scale: float,
    max_readers: int = 1,
    softcap: float | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    implementation: Implementation | None = None,
) -> PartialSoftmax:
    """The softmax of each request's queries over its context's rows in one layer [B, K, n], in float32.

    page_offsets: int32 [J + 1], the first page of each head j = context * K + key head of the layer, and
      where the last one's end; a head may have none. page_lengths: real rows of each page, all C but in a
      head's last page. page_head: each page's head j.
    context_of_request: which context a request reads; at most `max_readers` read the same one, together.
    softcap: scores are bent to it by cap * tanh(score / cap), once scaled.
    bits: of rows in codes, uint32 words; None for plain rows of the type of q. group_size: numbers that share
      a scale; None is the whole row.

    Raises ValueError where shapes do not go together.
    """
    (B, K, _, E), code = q.shape, _code("attend_pages", q.shape[-1], bits, group_size)
    J = page_offsets.shape[0] - 1
    _check("attend_pages", keys, values, E, code)
    if J < 1 or J % K or len(page_lengths) != len(keys) or len(page_head) != len(keys):
        raise ValueError(
            "attend_pages: page_offsets must have J + 1 numbers for J / K contexts, page_lengths and "
            f"page_head one a page, got {page_offsets.shape=}, {page_lengths.shape=}, {page_head.shape=}, "
            f"{K=}, P={len(keys)}"
        )
    if len(context_of_request) != B or max_readers < 1:
        raise ValueError(
            f"attend_pages: each of B={B} requests must have a context that 1 or more read, got "
            f"{context_of_request.shape=}, {max_readers=}"
        )
    rule: dict[str, Any] = {
        "max_readers": max_readers,
        "scale": scale,
        "softcap": softcap,
        "code": code,
    }
    walk = functools.partial(reference.pages, **rule)
    definition = functools.partial(reference.pages_definition, **rule)
    return choice.run(
        "attend_pages",
        (q, keys, values, page_offsets, page_lengths, page_head, context_of_request),
        reference=choice.differentiable(walk, definition),  # a loop of unknown length has no gradient
        backends=_backends(calls.pages, calls.why_not_pages, rule),
        implementation=implementation,
    )


def attend_rows(
    q: Float[Array, "B T H E"],
    keys: Shaped[Array, "J S w"],
    values: Shaped[Array, "J S w"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    sinks: Float[Array, " H"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H E"]:
    """What queries read from a cache of S rows for each request and key head, J = B K, in float32.

    positions: where queries stand. key_positions: where each row's token stands, negative where there is
      none. A query sees no key behind itself, and none `window` or more before; of one that sees no key at
      all the output is finite, and says nothing.
    sinks: a score of each query head that takes its share of the weights and has no value.
    softcap, bits, group_size: as for `attend_pages`.

    Raises ValueError where shapes do not go together.
    """
    (B, T, H, E), code = q.shape, _code("attend_rows", q.shape[-1], bits, group_size)
    J, S, _ = keys.shape
    _check("attend_rows", keys, values, E, code)
    if J % B or H * B % J:
        raise ValueError(f"attend_rows: J = B K blocks of rows must serve H heads, got {B=}, {J=}, {H=}")
    if positions.shape != (B, T) or key_positions.shape != (B, S):
        raise ValueError(
            f"attend_rows: positions must be [B, T] and key_positions [B, S], got {positions.shape=}, "
            f"{key_positions.shape=}, {B=}, {T=}, {S=}"
        )
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "code": code}
    return choice.run(
        "attend_rows",
        (q, keys, values, positions, key_positions, sinks),
        reference=functools.partial(reference.rows, **rule),
        backends=_backends(calls.rows, calls.why_not_rows, rule),
        implementation=implementation,
    )


def _backends(
    run: Callable[..., Any], why_not: Callable[..., Any], rule: dict[str, Any]
) -> tuple[Kernel, ...]:
    """Triton first: it takes every format; no GPU has said which is faster."""
    by = functools.partial
    return (
        Kernel("triton", by(run, triton, **rule), by(why_not, triton, **rule)),
        Kernel(
            "mosaic_gpu",
            by(run, mosaic_gpu, **rule),
            by(why_not, mosaic_gpu, **rule),
            capability=(9, 0),
            below=(10, 0),
        ),
    )


def _code(who: str, E: int, bits: int | None, group_size: int | None) -> Code | None:
    if bits is None:
        return None
    code = Code(bits, E if group_size is None else group_size)
    if bits not in (2, 4, 8) or not 1 <= code.group_size <= E:
        raise ValueError(
            f"{who}: bits must be 2, 4 or 8, group_size 1 to E, got {bits=}, {group_size=}, {E=}"
        )
    return code


def _check(who: str, keys: jax.Array, values: jax.Array, E: int, code: Code | None) -> None:
    width, coded = words_of_row(code, E), keys.dtype == values.dtype == jnp.uint32
    if keys.shape != values.shape or keys.shape[-1] != width or coded == (code is None):
        what = "numbers" if code is None else "uint32 words"
        raise ValueError(
            f"{who}: keys and values must be alike, {width} {what} a row, got {keys.shape=}, "
            f"{keys.dtype=}, {values.shape=}, {values.dtype=}"
        )
