"""One batch of requests, the host's side: checked, rounded up, prefilled, then advanced; its texts.

Letters: B requests (rounded up), T prompt tokens (rounded up), N new tokens (rounded up), V vocabulary.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import cache as kv
from jaxllm.cache import Cache, DenseCache, repack
from jaxllm.decoding.loop import _alive, _decode, _first, _Request
from jaxllm.decoding.prefill import read
from jaxllm.eviction.running_budget import Hold
from jaxllm.models.inputs import bucket

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds that the batch of a completion took, compilation included where there was any."""

    prefill_s: float  # from the call until the first token of every request is there
    decode_s: float  # from then until the last token of every request is there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str
    token_ids: list[int]  # the end token included when there is one
    logprobs: list[float] | None  # natural logs, of the unfiltered distribution
    finish_reason: Literal["stop", "length"]
    prompt_ids: list[int]
    timings: Timings | None = dataclasses.field(default=None, compare=False)  # where asked for


class _Run:
    """One batch of requests on its way: checked, rounded up, prefilled, then advanced."""

    def __init__(
        self, model, tokenizer, prompts, max_new, sampler, seed, stop_tokens, cache, kv_bits, hold, logprobs
    ):
        self.model, self.tokenizer, self.hold = model, tokenizer, hold
        if isinstance(prompts, str):
            raise ValueError(f"generate: prompts must be a list of prompts, got the text {prompts!r}")
        self.prompts = [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
        if not self.prompts:
            raise ValueError("generate: at least one prompt is needed, got none")
        _check_range(self.prompts, model.config.vocab)
        self.stop_tokens = _stop_tokens(model, tokenizer, stop_tokens)
        n = len(self.prompts)
        B = bucket(n)
        for name, given in (("max_new_tokens", max_new), ("seed", seed)):
            if not isinstance(given, int) and len(given) != n:
                raise ValueError(
                    f"generate: {name} must be one number or one a prompt, got {len(given)} for {n}"
                )
        wanted = [max_new] * n if isinstance(max_new, int) else list(max_new)
        if min(wanted) < 1:
            raise ValueError(f"generate: max_new_tokens must be at least 1, got {min(wanted)}")
        if cache is not None and kv_bits is not None:
            raise ValueError(f"generate: kv_bits must be None where a cache is given, got {kv_bits=}")
        if hold is not None:
            _check_hold(model, hold, cache)
        before = _held(cache, n)
        fed = self.prompts
        memory = None
        if hasattr(model, "encode"):  # the prompt is the source; the target begins with one token
            source, lengths = _pad(self.prompts, B)
            memory = _encode_source(model, source, lengths)
            fed = [[model.config.decoder_start]] * n
        budgets = [
            _budget(model, len(ids), held, most, i)
            for i, (ids, held, most) in enumerate(zip(fed, before, wanted, strict=True))
        ]
        self.longest = max(budgets)
        tokens, lengths = _pad(fed, B)
        there = max(before) - (int(cache.tail.base.min()) if isinstance(cache, kv.PagedCache) else 0)
        rows = bucket(there) * (there > 0) + tokens.shape[1] + bucket(self.longest)
        own = _given(model, cache, n, B, rows, kv_bits, hold)
        self.request = _Request(
            budgets=jnp.asarray(budgets + [0] * (B - n), jnp.int32),
            keys=_keys(seed, B),
            stop_tokens=jnp.asarray(self.stop_tokens, jnp.int32),
            plan=sampler.plan(),
            memory=memory,
            context=kv.split(own)[0],
            gates=None if hold is None else hold.gates,
        )
        self._start(tokens, lengths, kv.split(own)[1], N=bucket(self.longest), logprobs=logprobs)

    def _start(self, tokens, lengths, tail: DenseCache, *, N: int, logprobs: bool) -> None:
        """Reads the prompts, in pieces if a layer with a window, or a budget, could not take them at once."""
        last, begin = None, 0
        while begin < tokens.shape[1]:
            room = kv.room(tail) if self.hold is None else min(self.hold.buffer, kv.room(tail))
            piece = tokens[:, begin : begin + room]
            real = jnp.clip(lengths - begin, 0, piece.shape[1])
            request = self.request
            logits, tail, scores = read(
                self.model, request.gates, request.memory, request.context, piece, tail, real
            )
            last = logits if last is None else jnp.where((real > 0)[:, None], logits, last)
            if self.hold is not None:
                tail = self._settled(tail, scores)
            begin += room
        buffer = None if self.hold is None else self.hold.buffer
        self.state = _first(
            self.model, self.request, tokens, lengths, last, tail, N=N, logprobs=logprobs, buffer=buffer
        )

    def _settled(self, tail: DenseCache, scores) -> DenseCache:
        """An empty tail behind a context that holds the budget."""
        assert self.hold is not None
        self.room = self.hold.buffer
        context, tail = kv.split(self.hold.settled(kv.join(self.request.context, tail), scores))
        self.request = dataclasses.replace(self.request, context=context)
        return tail

    def advance(self, steps: int) -> None:
        """Makes up to `steps` more tokens for every request that has not ended."""
        if self.hold is None:
            self.state = _decode(self.model, self.request, self.state, self.state.step + steps)
            return
        while steps > 0 and not self.ended():
            if self.room == 0:
                tail = self._settled(self.state.cache, self.state.scores)
                self.state = dataclasses.replace(self.state, cache=tail)
            some = min(steps, self.room)
            self.state = _decode(self.model, self.request, self.state, self.state.step + some)
            steps, self.room = steps - some, self.room - some

    def wait(self) -> float:
        """Waits for the tokens made so far; the time on `perf_counter` then."""
        jax.block_until_ready(self.state.token)
        return time.perf_counter()

    def ended(self) -> bool:
        """Whether no request can go on."""
        return not bool(_alive(self.request, self.state).any())

    def end_at(self, stop: Sequence[str]) -> None:
        """Ends the requests whose text holds a stop string, after the token that completed it."""
        if not stop:
            return
        counts, stopped = np.array(self.state.counts), np.array(self.state.stopped)
        rows = np.asarray(self.state.tokens)
        for i in range(len(self.prompts)):
            ids = rows[i, : counts[i]].tolist()
            if not _holds(self._text(i, ids), stop):
                continue
            least, most = 1, len(ids)  # the fewest tokens whose text holds one
            while least < most:
                middle = (least + most) // 2
                if _holds(self._text(i, ids[:middle]), stop):
                    most = middle
                else:
                    least = middle + 1
            counts[i], stopped[i] = least, True
        self.state = dataclasses.replace(self.state, counts=jnp.asarray(counts), stopped=jnp.asarray(stopped))

    def completions(self, stop: Sequence[str], timings: Timings | None = None) -> list[Completion]:
        """What has been made so far."""
        state = self.state
        counts, stopped, tokens, logprobs = jax.device_get(
            (state.counts, state.stopped, state.tokens, state.logprobs)
        )
        outs = []
        for i, prompt in enumerate(self.prompts):
            count = int(counts[i])
            ids = tokens[i, :count].tolist()
            text = self._text(i, ids)
            cuts = [text.find(string) for string in stop if string in text]
            outs.append(
                Completion(
                    text=text[: min(cuts)] if cuts else text,
                    token_ids=ids,
                    logprobs=None if logprobs is None else logprobs[i, :count].tolist(),
                    finish_reason="stop" if stopped[i] else "length",
                    prompt_ids=list(prompt),
                    timings=timings,
                )
            )
        return outs

    def _text(self, i: int, ids: list[int]) -> str:
        """The new tokens as text: what they add to the prompt's text, for a first space may depend on it."""
        if self.tokenizer is None:
            return ""
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        if hasattr(self.model, "encode"):
            return decode(ids)
        before, whole = decode(list(self.prompts[i])), decode(list(self.prompts[i]) + ids)
        return whole[len(before) :] if whole.startswith(before) else decode(ids)


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(string in text for string in stop)


def _encode(tokenizer, prompt: Prompt, index: int) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"generate: a prompt must not be empty, got '' as number {index}")
        if tokenizer is None:
            raise ValueError("generate: text needs a tokenizer, this model has none: give token ids")
        prompt = tokenizer.encode(prompt)
    ids = [int(token) for token in prompt]
    if not ids:
        raise ValueError(f"generate: a prompt must not be empty, got no tokens as number {index}")
    return ids


def _check_range(prompts: list[list[int]], vocab: int) -> None:
    for i, ids in enumerate(prompts):
        if min(ids) < 0 or max(ids) >= vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise ValueError(f"generate: token ids must lie in 0 to {vocab - 1}, got {wrong} in prompt {i}")


def _stop_tokens(model, tokenizer, given) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    own = getattr(model.config, "stop_tokens", ())
    if own:
        return tuple(own)
    end = None if tokenizer is None else tokenizer.eos_token_id
    return () if end is None else (end,)


def _budget(model, length: int, held: int, most: int, index: int) -> int:
    room = model.config.context - held - length
    if room < 1:
        raise ValueError(
            f"generate: a prompt must leave room in the context of {model.config.context} tokens, "
            f"got {held + length} as number {index}"
        )
    return min(most, room)


def _pad(prompts: list[list[int]], B: int):
    """Prompts as [B, T] padded on the right, and their lengths; rows past the last prompt hold one token."""
    T = max(8, bucket(max(map(len, prompts))))
    tokens, lengths = np.zeros((B, T), np.int32), np.ones((B,), np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _keys(seed: int | Sequence[int], B: int):
    if isinstance(seed, int):
        return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    seeds = np.zeros((B,), np.uint32)
    seeds[: len(seed)] = np.asarray(seed, np.uint64).astype(np.uint32)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def _held(cache: Cache | None, n: int) -> list[int]:
    """How many tokens each request continues."""
    if cache is None:
        return [0] * n
    lengths = np.asarray(cache.lengths).tolist()
    if len(lengths) not in (1, n):
        raise ValueError(
            f"generate: a cache must hold one request or one a prompt, got {len(lengths)} for {n}"
        )
    return lengths * n if len(lengths) == 1 else lengths


def _check_hold(model, hold: Hold, cache: Cache | None) -> None:
    if hasattr(model, "encode"):
        raise ValueError("generate: hold needs a decoder alone, got a model that reads a source")
    hold.gates.layers(model)  # or it raises
    if cache is not None and (not isinstance(cache, kv.PagedCache) or repack.tail_size(cache)):
        got = f"{repack.tail_size(cache)} rows without scores in a {type(cache).__name__}"
        raise ValueError(f"generate: with hold, a cache must be an evicted one and nothing more, got {got}")


def _given(
    model, cache: Cache | None, n: int, B: int, rows: int, kv_bits: int | None, hold: Hold | None
) -> Cache:
    """An own cache with room for `rows` tokens a request: empty, or a copy of the one given."""
    if cache is not None:
        order = [0] * B if cache.lengths.shape[0] == 1 else [min(i, n - 1) for i in range(B)]
        cache = kv.select(cache, jnp.asarray(order))
    if hold is not None:
        cache = model.make_cache(B, 1, slack=hold.buffer, bits=kv_bits) if cache is None else cache
        return hold.settled(cache, None)
    return model.make_cache(B, rows, bits=kv_bits) if cache is None else kv.grow(cache, rows)


@jax.jit
def _encode_source(model, tokens, lengths):
    return model.encode(tokens, lengths)
