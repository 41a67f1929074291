"""A text read once into a cache: plainly, with scores from the same pass, or within a budget.

    cache = prefill(model, [ids])                                   # a DenseCache of the texts

`read_in_pieces` is the loop that every run begins with, `read` its compiled step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache import Cache
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.eviction.gates import Gate
from jaxllm.eviction.running_budget import CacheBudget
from jaxllm.models.inputs import pad_batch, round_up
from jaxllm.models.taps import Tap, in_turn

CHUNK = 2048  # tokens that are read at once, so that memory does not grow with the square of a text


def prefill(
    model,
    tokens: Sequence[Sequence[int]],
    *,
    slack: int = 0,
    bits: int | None = None,
    chunk: int = CHUNK,
    extent: int | None = None,
) -> DenseCache:
    """The cache of some texts, rows of token ids; `kv.with_capacity` makes room for more.

    slack: the longest chunk that layers with a window must take later (KVzip's repetition). bits: of rows in
    codes, 2, 4 or 8. chunk: tokens that are read at once. extent: how many tokens a text may come to have
    with all that follows it, None for the model's context: a rotation with two lists of factors (Phi-3's)
    turns all of them by the list of that length.
    """
    rows, lengths = _filled_up("prefill", model, tokens)
    made = {"slack": slack, "bits": bits, "extents": _extent("prefill", model, lengths, extent)}
    cache = model.make_cache(len(rows), rows.shape[1], **made)
    return read_in_pieces(model, rows, lengths, cache, chunk)[1]


def prefill_with_scores(
    model,
    tokens: Sequence[Sequence[int]],
    gates: Gate,
    *,
    prefix: int = 0,
    slack: int = 0,
    bits: int | None = None,
    chunk: int = CHUNK,
    extent: int | None = None,
) -> tuple[DenseCache, Float[Array, "L B K T"]]:
    """As `prefill`, and the gates' scores of what stands behind `prefix`, from the same pass."""
    rows, lengths = _filled_up("prefill_with_scores", model, tokens)
    if not 0 <= prefix < lengths.min():
        raise ValueError(
            f"prefill_with_scores: rows must have more than {prefix=} tokens, got {lengths.tolist()}"
        )
    made = {"slack": slack, "bits": bits, "extents": _extent("prefill_with_scores", model, lengths, extent)}
    cache = model.make_cache(len(rows), rows.shape[1], **made)
    _, cache, pieces = read_in_pieces(model, rows, lengths, cache, chunk, gates=gates)
    real = np.arange(rows.shape[1]) < lengths[:, None]
    scores = jnp.where(real[None, :, None], jnp.concatenate(pieces, axis=-1), 0.0)
    return cache, scores[..., prefix : lengths.max()]


def prefill_within_budget(
    model,
    tokens: Sequence[Sequence[int]],
    budget: CacheBudget,
    *,
    bits: int | None = None,
    extent: int | None = None,
) -> PagedCache:
    """The cache of some texts within a budget, `budget.buffer` tokens being read at a time.

    What lies in memory does not grow with the texts; while the budget is restored it is two pools and a tail.
    extent: as in `prefill`.
    """
    rows, lengths = _filled_up("prefill_within_budget", model, tokens)
    budget.gates.layers(model)  # or it raises
    extents = _extent("prefill_within_budget", model, lengths, extent)
    cache = model.make_cache(len(rows), 1, slack=budget.buffer, bits=bits, extents=extents)
    cache = budget.enforce(cache, None)
    end = int(lengths.max())  # what only fills up is not worth a budget's while
    return read_in_pieces(model, rows, lengths, cache, budget.buffer, end=end, budget=budget)[1]


def _filled_up(who: str, model, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows, lengths = pad_batch(who, model, tokens)
    return np.pad(rows, ((0, 0), (0, round_up(rows.shape[1]) - rows.shape[1]))), lengths


def _extent(who: str, model, lengths: np.ndarray, extent: int | None) -> int:
    """How many tokens a text may come to have."""
    context, longest = model.config.context, int(lengths.max())
    if extent is not None and not longest <= extent <= context:
        raise ValueError(f"{who}: extent must lie in {longest} (the longest row) to {context}, got {extent}")
    return context if extent is None else extent


def read_in_pieces(
    model,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    cache: Cache,
    chunk: int,
    *,
    end: int | None = None,
    gates: Gate | None = None,
    memory: Any = None,
    budget: CacheBudget | None = None,
) -> tuple[Float[Array, "B V"], Any, list[Any]]:
    """Each request's last logits, the cache with the tokens in it, and the gates' scores [L, B, K, _] of each
    piece, None without gates.

    A piece is `chunk` tokens, or fewer where a window takes fewer. cache: given away. end: of the tokens that
    are read; None is T. budget: kept after each piece, by its own gates.
    """
    if chunk < 1:
        raise ValueError(f"prefill: chunk must be at least 1 token, got {chunk=}")
    if budget is not None:
        gates = budget.gates
    last, found, at = None, [], 0
    while at < (tokens.shape[1] if end is None else end):
        # 1. The next piece goes through the model.
        context, tail = kv.split_context(cache)
        piece = tokens[:, at : at + min(chunk, kv.max_chunk(tail))]
        real = np.clip(lengths - at, 0, piece.shape[1])
        logits, tail, scores = read(model, gates, memory, context, piece, tail, real)
        # 2. The logits of a request are those of the last piece that it has a token in.
        last = logits if last is None else jnp.where((real > 0)[:, None], logits, last)
        # 3. The cache gets smaller again where there is a budget.
        cache = kv.with_context(context, tail)
        if budget is not None:
            cache = budget.enforce(cache, scores)
        found.append(scores)
        at += piece.shape[1]
    assert last is not None  # there is a token
    return last, cache, found


def forward(
    model,
    gates: Gate | None,
    memory: Any,
    context: Context | None,
    tokens: Int[Array, "B T"],
    tail: DenseCache,
    lengths: Int[Array, " B"],
    also: Tap | None = None,
    logits: Literal["all", "last"] = "last",
) -> tuple[Float[Array, "B *T V"], DenseCache, Float[Array, "L B K T"] | None]:
    """Logits of the last tokens or of all, the tail with all of them in it, and the gates' scores if any.

    also: a tap that sees what there is beside what gates read.
    """
    tap, inputs = (None, []) if gates is None else gates.capture_inputs(model)
    tap = in_turn(tap, also)
    more = {} if memory is None else {"memory": memory}
    found, cache = model(
        tokens, kv.with_context(context, tail), lengths=lengths, logits=logits, tap=tap, **more
    )
    return found, kv.split_context(cache)[1], None if gates is None else gates.scores(inputs)


read = partial(jax.jit, donate_argnames="tail")(forward)
