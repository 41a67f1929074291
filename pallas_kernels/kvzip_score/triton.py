"""How much attention keys receive, for Triton, sm_80 and up: two kernels over tiles of scores.

`_sums` is a program per head and tile of queries: a running softmax over tiles of keys gives each query's
greatest score and what a weight must be multiplied by (its share over the sum of weights). `_weights` is a
program per head and tile of keys: it makes the scores again, tile by tile, and keeps each key's greatest
weight, or their sum. Tiles that lie wholly behind the diagonal of the queries' own keys are left out in both.

Checked: A (jax 0.10.2, 0.12.0.1), B (both), C (0.12.0.1: h100, a100, l4, b200). Never run on a GPU.

Letters: B requests, T queries, H query heads, K key heads, G = H / K, J = B K, S keys, E head size.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import assembly, compat, tiles
from pallas_kernels.decode_attention.partial_softmax import LOG2E, MASK_VALUE, soft_cap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries, keys: of a tile of scores."""

    queries: int
    keys: int
    warps: int
    stages: int


@tiles.measured("kvzip_score triton")
def default_tile(E: int, itemsize: int) -> Tile:
    """A guess: no GPU measured it. 64 x 64 scores are 32 a thread."""
    if itemsize == 4:
        return Tile(queries=32, keys=32, warps=4, stages=2)
    return Tile(queries=64, keys=64, warps=4, stages=3 if E <= 128 else 2)


def why_not(q: Float[Array, "B T H E"], k: Float[Array, "J S E"], *rest: Any) -> str | None:
    """Why the kernels do not take these."""
    E = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or q.dtype != k.dtype:
        return f"takes queries and keys of one type of 16 or 32 bits, got {q.dtype} and {k.dtype}"
    if E * q.dtype.itemsize > 512:
        return f"takes heads of up to 512 bytes, got {E=}"
    return None


def _scores(x, y, mask, *, scale: float, softcap: float | None) -> jax.Array:
    """Scores [x, y] of queries and keys in powers of 2; what is hidden scores least.

    Of a query that sees nothing all weights are equal, and count nothing, as its share is 0.
    """
    scores = lax.dot_general(
        x,
        y,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if softcap is None:
        scores = scores * (scale * LOG2E)
    else:
        scores = soft_cap(scores * scale, softcap) * LOG2E
    return jnp.where(mask, scores, MASK_VALUE * LOG2E)


def _load_rows(ref, index: tuple, rows, limit: int) -> jax.Array:
    """Rows [rows, E], zeros where there are none. index: what stands before and behind the rows."""
    E = ref.shape[-1]
    e = lax.iota(jnp.int32, max(16, pl.next_power_of_2(E)))
    before, behind = index
    mask = (rows < limit)[:, None] & (e < E)[None]
    return plgpu.load(ref.at[(*before, rows[:, None], *behind, e[None])], mask=mask, other=0.0)


def _seen(seen_ref, b, t, s) -> jax.Array:
    """Which queries see which keys; t and s lie along different axes."""
    _, T, S = seen_ref.shape
    return plgpu.load(seen_ref.at[b, t, s], mask=(t < T) & (s < S), other=0) != 0


def _place(B: int, J: int, H: int) -> tuple[Any, Any, Any]:
    """The program's request, query head and block of keys."""
    head = pl.program_id(1)
    b, h = head // H, head % H
    return b, h, b * (J // B) + h // (H * B // J)


def _sums(
    q_ref,  # [B, T, H, E]
    k_ref,  # [J, S, E]
    seen_ref,  # [B, T, S]
    share_ref,  # [B, T]
    *refs,  # sinks [H], if there are; then greatest [B, H, T] and part [B, H, T]
    tile: Tile,
    scale: float,
    softcap: float | None,
    interpret: bool,
):
    *sinks, greatest_ref, part_ref = refs
    exp2 = functools.partial(assembly.exp2, interpret=interpret)
    (B, T, H, _), (J, S, _) = q_ref.shape, k_ref.shape
    b, h, j = _place(B, J, H)
    first = pl.program_id(0) * tile.queries
    t = first + lax.iota(jnp.int32, tile.queries)
    q = _load_rows(q_ref, ((b,), (h,)), t, T)

    def step(i, carry):
        greatest, total = carry
        s = i * tile.keys + lax.iota(jnp.int32, tile.keys)
        k = _load_rows(k_ref, ((j,), ()), s, S)
        scores = _scores(
            q, k, _seen(seen_ref, b, t[:, None], s[None]), scale=scale, softcap=softcap
        )  # [queries, keys]: a query's maximum lies in few lanes
        new = jnp.maximum(greatest, scores.max(1))
        weights = exp2(scores - new[:, None])
        return new, total * exp2(greatest - new) + weights.sum(1)

    end = jnp.minimum(S - T + first + tile.queries, S)
    zero = jnp.zeros((tile.queries,), jnp.float32)
    steps = (end + tile.keys - 1) // tile.keys
    greatest, total = lax.fori_loop(0, steps, step, (zero + MASK_VALUE * LOG2E, zero))
    share = plgpu.load(share_ref.at[b, t], mask=t < T, other=0.0)
    share = jnp.where(greatest <= MASK_VALUE, 0.0, share)  # sees none
    if sinks:
        sink = sinks[0][h] * LOG2E
        top = jnp.maximum(greatest, sink)
        total = total * exp2(greatest - top) + exp2(sink - top)
        greatest = top
    plgpu.store(greatest_ref.at[b, h, t], greatest, mask=t < T)
    plgpu.store(part_ref.at[b, h, t], share / jnp.where(total == 0, 1.0, total), mask=t < T)


def _weights(
    q_ref,  # [B, T, H, E]
    k_ref,  # [J, S, E]
    seen_ref,  # [B, T, S]
    greatest_ref,  # [B, H, T]
    part_ref,  # [B, H, T]
    out_ref,  # [B, H, S]
    *,
    tile: Tile,
    scale: float,
    softcap: float | None,
    reduce: str,
    interpret: bool,
):
    exp2 = functools.partial(assembly.exp2, interpret=interpret)
    (B, T, H, _), (J, S, _) = q_ref.shape, k_ref.shape
    b, h, j = _place(B, J, H)
    first = pl.program_id(0) * tile.keys
    s = first + lax.iota(jnp.int32, tile.keys)
    k = _load_rows(k_ref, ((j,), ()), s, S)

    def step(i, found):
        t = i * tile.queries + lax.iota(jnp.int32, tile.queries)
        q = _load_rows(q_ref, ((b,), (h,)), t, T)
        scores = _scores(
            k, q, _seen(seen_ref, b, t[None], s[:, None]), scale=scale, softcap=softcap
        )  # [keys, queries]
        greatest = plgpu.load(greatest_ref.at[b, h, t], mask=t < T, other=0.0)
        part = plgpu.load(part_ref.at[b, h, t], mask=t < T, other=0.0)
        weights = exp2(scores - greatest[None]) * part[None]
        return found + weights.sum(1) if reduce == "sum" else jnp.maximum(found, weights.max(1))

    # the first query that may see the tile's first key
    start = jnp.maximum(first - (S - T), 0) // tile.queries
    found = lax.fori_loop(start, pl.cdiv(T, tile.queries), step, jnp.zeros((tile.keys,), jnp.float32))
    plgpu.store(out_ref.at[b, h, s], found, mask=s < S)


def attention_per_key(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    seen: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    share: Float[Array, "B T"] | None,
    *,
    scale: float,
    softcap: float | None,
    reduce: Literal["max", "sum"],
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "B K G S"]:
    """The greatest weight, or the sum of weights, of each key."""
    (B, T, H, E), (J, S, _) = q.shape, k.shape
    tile = default_tile(E, q.dtype.itemsize) if tile is None else tile
    share = jnp.ones((B, T), jnp.float32) if share is None else share.astype(jnp.float32)
    rest = () if sinks is None else (sinks.astype(jnp.float32),)
    arrays: list[Any] = [q, k, seen.astype(jnp.int8)]
    options: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        "interpret": interpret,
    }
    rule: dict[str, Any] = {"tile": tile, "scale": scale, "softcap": softcap, "interpret": interpret}
    greatest, part = pl.pallas_call(
        functools.partial(_sums, **rule),
        out_shape=[compat.output((B, H, T), jnp.float32, *arrays, share)] * 2,
        grid=(pl.cdiv(T, tile.queries), B * H),
        name="kvzip_score_sums",
        **options,
    )(*arrays, share, *rest)
    out = pl.pallas_call(
        functools.partial(_weights, **rule, reduce=reduce),
        out_shape=compat.output((B, H, S), jnp.float32, *arrays, share),
        grid=(pl.cdiv(S, tile.keys), B * H),
        name="kvzip_score_weights",
        **options,
    )(*arrays, greatest, part)
    return out.reshape(B, J // B, H * B // J, S)
