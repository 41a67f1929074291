"""Log-probabilities of token sequences, and the perplexity of a text.

The negative log-likelihood (NLL) of a token is float32 on the device; sums are float64 on the
host. One compiled function serves both: `score` pads ragged sequences to a few lengths,
`perplexity` cuts a text into windows of one shape (the shorter last one is padded, so nothing is
dropped).

    perplexity(model, tokens, context=512)              # windows side by side, as in papers
    perplexity(model, tokens, context=512, stride=128)  # overlapping, as in Hugging Face's guide

Any model with `model(tokens, lengths=, logits="none") -> (x [B, T, D], cache)` and `unembed(x)`, the
float32 logits of any rows of x, will do; with bits in `cache` it also needs `make_cache`.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Integer
from tqdm import tqdm

from jaxllm.decoding.options import CacheOptions
from jaxllm.models.inputs import check_token_ids, require_decoder_only
from jaxllm.models.nonfinite import first_nonfinite, nonfinite_message
from jaxllm.weights.planes.adaptive_planes import every_token_chooses

# What one call may take: tokens (the host waits for it, the progress bar moves after it), and
# numbers of logits; a window that has more is cut into slices of rows.
CALL_TOKENS = 2**14
CALL_LOGITS = 2**26
SHORTEST = 16  # sequences are padded at least to this; lengths double from here


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text: exp(nll_per_token), in nats, over `tokens` predictions."""

    perplexity: float
    nll_per_token: float
    bits_per_byte: float | None  # None where the number of bytes was not given
    tokens: int


class Scores(NamedTuple):
    """One array a sequence, one value a token after its first."""

    logprobs: list[Float32[np.ndarray, " _"]]  # log p(token | all tokens before it)
    greedy: list[Bool[np.ndarray, " _"]]  # whether the token is the arg max


@partial(jax.jit, static_argnames="bits")
def _predict(
    model: Any,
    tokens: Integer[Array, "B T"],
    lengths: Integer[Array, " B"],
    targets: Integer[Array, "B T"],
    bits: int | None = None,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """log p(target) after each token, as it would be decoded, and whether the target is the arg max."""
    model = every_token_chooses(model)
    more = {} if bits is None else {"cache": model.make_cache(*tokens.shape, bits=bits, extents=lengths)}
    x, _ = model(tokens, lengths=lengths, logits="none", **more)
    rows = max(1, CALL_LOGITS // model.config.vocab)
    if targets.size <= rows:
        return _of_logits(model.unembed(x), targets)
    # Slices of rows: logits of all of them would take context x vocabulary.
    x, flat = (jnp.reshape(v, (targets.size, *v.shape[2:])) for v in (x, targets))
    x, flat = (jnp.pad(v, ((0, -len(v) % rows), *[(0, 0)] * (v.ndim - 1))) for v in (x, flat))
    slices = x.reshape(-1, rows, x.shape[1]), flat.reshape(-1, rows)
    found = jax.lax.map(lambda some: _of_logits(model.unembed(some[0]), some[1]), slices)
    logprobs, greedy = (v.reshape(-1)[: targets.size].reshape(targets.shape) for v in found)
    return logprobs, greedy


def _of_logits(
    logits: Float32[Array, "*B V"], targets: Integer[Array, "*B"]
) -> tuple[Float32[Array, "*B"], Bool[Array, "*B"]]:
    """The targets' log-probabilities, and whether they are the arg max."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logprobs, jnp.argmax(logits, axis=-1) == targets


def _call(
    who: str, model: Any, rows: list[np.ndarray], batch: int, length: int, bits: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`_predict` for up to `batch` sequences of up to length + 1 tokens, padded to one shape.

    Raises FloatingPointError where a log-probability is not finite.
    """
    tokens, targets = np.zeros((2, batch, length), np.int32)
    lengths = np.ones((batch,), np.int32)
    for i, row in enumerate(rows):
        n = len(row) - 1
        tokens[i, :n], targets[i, :n], lengths[i] = row[:-1], row[1:], n
    logprobs, greedy = map(np.asarray, _predict(model, tokens, lengths, targets, bits))
    for row, values in zip(rows, logprobs, strict=False):
        if not np.isfinite(values[: len(row) - 1]).all():
            where = first_nonfinite(model, row[:-1])
            raise FloatingPointError(nonfinite_message(who, model, where, f"a text of {len(row)} tokens"))
    return logprobs, greedy


def _rows_per_call(model: Any, length: int, batch: int | None) -> int:
    """How many sequences of `length` tokens go through the model at once."""
    if batch is None:
        return max(1, min(CALL_TOKENS // length, CALL_LOGITS // (length * model.config.vocab)))
    if batch < 1:
        raise ValueError(f"measure: batch must be positive, got {batch=}")
    return batch


def score(
    model: Any,
    sequences: Sequence[Integer[np.ndarray, " _"] | Sequence[int]],
    *,
    batch: int | None = None,
    progress: bool = False,
) -> Scores:
    """Log-probabilities of every token after the first of each sequence, in the order given.

    Sequences are grouped by length (padded to 16, 32, 64, ...), so that few shapes are compiled. A
    sequence has at least 2 and at most context + 1 tokens (the last one is only predicted).
    batch: sequences a call; None chooses by their length.

    Raises FloatingPointError where logits are not finite, with the layer that was first.
    """
    require_decoder_only("score", model)
    context = model.config.context
    rows = [check_token_ids("score", row, model.config.vocab) for row in sequences]
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if not 2 <= len(row) <= context + 1:
            raise ValueError(
                "score: a sequence must have 2 to context + 1 tokens, "
                f"got {len(row)} in sequence {i}, {context=}"
            )
        length = min(context, max(SHORTEST, 1 << (len(row) - 2).bit_length()))
        groups.setdefault(length, []).append(i)
    logprobs: list[Any] = [None] * len(rows)
    greedy: list[Any] = [None] * len(rows)
    with tqdm(total=len(rows), unit="seq", desc="score", file=sys.stderr, disable=not progress) as bar:
        for length, members in sorted(groups.items()):
            size = min(_rows_per_call(model, length, batch), 1 << (len(members) - 1).bit_length())
            for start in range(0, len(members), size):
                some = members[start : start + size]
                values, hits = _call("score", model, [rows[i] for i in some], size, length)
                for j, i in enumerate(some):
                    n = len(rows[i]) - 1
                    logprobs[i], greedy[i] = values[j, :n].copy(), hits[j, :n].copy()
                bar.update(len(some))
    return Scores(logprobs, greedy)


def perplexity(
    model: Any,
    tokens: Integer[np.ndarray, " N"] | Integer[Array, " N"] | Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    bos: int | None = None,
    num_bytes: int | None = None,
    cache: CacheOptions | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a text, read through windows of `context` tokens, `stride` tokens apart.

    Each token is predicted once, by the first window that holds it, with at least context - stride
    tokens before it in that window (fewer only where the text has fewer). The last window may be
    short; it is scored too.

    Which tokens are predicted:
      without bos, a window is `context` tokens of the text, and its first token has nothing before
        it. So windows side by side (stride None) leave out the first token of each, as papers on
        quantization do, and overlapping ones only the first token of the text. Nothing is put in
        front: a text encoded with its begin token has it in the first window alone.
      with bos, every window is that token, which is never predicted, and context - 1 tokens of the
        text, all of which are. If the text itself begins with bos, that one is taken off first.

    context: None is the model's own; not longer than that.
    stride: None is windows side by side; else from 1 to the tokens of text in a window.
    batch: windows a call; None chooses by their length and the vocabulary.
    num_bytes: bytes of the text, asks for bits per byte: nll_per_token / ln 2 x tokens of the text
      / num_bytes, so tokens that were not predicted count as average ones.
    cache: its bits, 2, 4 or 8: keys and values are read as a cache in codes of so many gives them back.
    progress: draws a bar on stderr.

    Raises FloatingPointError where logits are not finite, with the layer that was first.
    """
    require_decoder_only("perplexity", model)
    if cache is not None and (cache.start is not None or cache.budget is not None):
        raise ValueError("perplexity: cache may have bits only, got a start or a budget")
    bits = None if cache is None else cache.bits
    context = model.config.context if context is None else context
    if not 2 <= context <= model.config.context:
        raise ValueError(f"perplexity: context must lie in [2, {model.config.context}], got {context=}")
    front = np.zeros((0,), np.int32)
    text = check_token_ids("perplexity", tokens, model.config.vocab)
    if bos is not None:
        front = check_token_ids("perplexity", [bos], model.config.vocab)
        text = text[1:] if text.size and text[0] == bos else text
    room = context - len(front)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ValueError(f"perplexity: stride must lie in [1, {room}] (text in a window), got {stride=}")
    if len(text) + len(front) < 2:
        raise ValueError(f"perplexity: needs a token to predict, got {len(text)} tokens, {bos=}")
    if num_bytes is not None and num_bytes < 1:
        raise ValueError(f"perplexity: num_bytes must be positive, got {num_bytes=}")

    starts = range(0, max(1, len(text) - room + stride), stride)  # the first to reach the end is the last
    length = min(context, len(front) + len(text))
    size = min(_rows_per_call(model, length, batch), len(starts))
    total, count = 0.0, 0
    with tqdm(total=len(text), unit="tok", desc="perplexity", file=sys.stderr, disable=not progress) as bar:
        for first in range(0, len(starts), size):
            some = starts[first : first + size]
            rows = [np.concatenate([front, text[s : s + room]]) for s in some]
            # subtle: without bos the last window can be one token, which nothing predicts
            rows = [row for row in rows if len(row) > 1]
            values, _ = _call("perplexity", model, rows, size, length, bits)
            seen = 0
            for row, value, start in zip(rows, values, some, strict=False):
                known = 0 if start == 0 else room - stride  # tokens of text that an earlier window predicted
                skip = max(0, known + len(front) - 1)  # value[j] is that of row[j + 1]
                new = value[skip : len(row) - 1].astype(np.float64)
                total, count = total - float(new.sum()), count + len(new)
                seen += len(row) - len(front) - known
            bar.update(seen)
    if count == 0:
        raise ValueError(f"perplexity: needs a token to predict, got {len(text)} tokens, {bos=}")
    nll = total / count
    return Perplexity(
        perplexity=math.exp(nll) if nll < 700.0 else math.inf,
        nll_per_token=nll,
        bits_per_byte=None if num_bytes is None else nll / math.log(2) * len(text) / num_bytes,
        tokens=count,
    )
