"""A text read once into a cache: plainly, with scores from the same pass, or within a budget.

    cache = prefill(model, [ids])                                   # a DenseCache of the texts

`read` is the model step that every run begins with.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm import cache as kv
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.eviction.gates import Gate
from jaxllm.eviction.running_budget import CacheBudget
from jaxllm.models.inputs import STEP, pad_batch


def prefill(
    model, tokens: Sequence[Sequence[int]], *, slack: int = 0, bits: int | None = None, chunk: int = 2048
) -> DenseCache:
    """The cache of some texts, rows of token ids; `kv.grow` makes room for more.

    slack: the longest chunk that layers with a window must take later (KVzip's repetition). bits: of rows in
    codes, 2, 4 or 8. chunk: tokens that are read at once.
    """
    rows, lengths = _filled_up("prefill", model, tokens)
    cache = model.make_cache(len(rows), rows.shape[1], slack=slack, bits=bits)
    return _read(model, cache, rows, lengths, chunk)[0]


def prefill_with_scores(
    model,
    tokens: Sequence[Sequence[int]],
    gates: Gate,
    *,
    prefix: int = 0,
    slack: int = 0,
    bits: int | None = None,
    chunk: int = 2048,
) -> tuple[DenseCache, Float[Array, "L B K T"]]:
    """As `prefill`, and the gates' scores of what stands behind `prefix`, from the same pass."""
    rows, lengths = _filled_up("prefill_with_scores", model, tokens)
    if not 0 <= prefix < lengths.min():
        raise ValueError(
            f"prefill_with_scores: rows must have more than {prefix=} tokens, got {lengths.tolist()}"
        )
    cache = model.make_cache(len(rows), rows.shape[1], slack=slack, bits=bits)
    cache, scores = _read(model, cache, rows, lengths, chunk, gates)
    real = np.arange(rows.shape[1]) < lengths[:, None]
    scores = jnp.where(real[None, :, None], jnp.concatenate(scores, axis=-1), 0.0)
    return cache, scores[..., prefix : lengths.max()]


def prefill_within_budget(
    model, tokens: Sequence[Sequence[int]], hold: CacheBudget, *, bits: int | None = None
) -> PagedCache:
    """The cache of some texts within a budget, `hold.buffer` tokens being read at a time.

    What lies in memory does not grow with the texts; while the budget is restored it is two pools and a tail.
    """
    rows, lengths = _filled_up("prefill_within_budget", model, tokens)
    hold.gates.layers(model)  # or it raises
    cache = hold.enforce(model.make_cache(len(rows), 1, slack=hold.buffer, bits=bits), None)
    at = 0
    while at < lengths.max():
        context, tail = kv.split(cache)
        part = rows[:, at : at + min(hold.buffer, kv.room(tail))]
        sizes = np.clip(lengths - at, 0, part.shape[1])
        _, tail, scores = read(model, hold.gates, None, context, part, tail, sizes)
        cache = hold.enforce(kv.join(context, tail), scores)
        at += part.shape[1]
    return cache


def _filled_up(who: str, model, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows, lengths = pad_batch(who, model, tokens)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % STEP))), lengths


def _read(
    model, cache: DenseCache, rows: np.ndarray, lengths: np.ndarray, chunk: int, gates: Gate | None = None
):
    """The cache with the rows read, some tokens at a time, and the scores [L, B, K, _] of each time."""
    if chunk < 1:
        raise ValueError(f"prefill: chunk must be at least 1 token, got {chunk=}")
    at, found = 0, []
    while at < rows.shape[1]:
        part = rows[:, at : at + min(chunk, kv.room(cache))]
        sizes = np.clip(lengths - at, 0, part.shape[1])
        _, cache, scores = read(model, gates, None, None, part, cache, sizes)
        found.append(scores)
        at += part.shape[1]
    return cache, found


def forward(model, gates: Gate | None, memory, context: Context | None, tokens, tail: DenseCache, lengths):
    """Logits of the last tokens, the tail with all of them in it, and the gates' scores of them if any."""
    tap, inputs = (None, []) if gates is None else gates.capture_inputs(model)
    more = {} if memory is None else {"memory": memory}
    logits, cache = model(tokens, kv.join(context, tail), lengths=lengths, logits="last", tap=tap, **more)
    return logits, kv.split(cache)[1], None if gates is None else gates.scores(inputs)


read = partial(jax.jit, donate_argnames="tail")(forward)
