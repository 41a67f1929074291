"""One batch of requests, the host's side: checked, rounded up, prefilled, then advanced; its texts.

Letters: B requests (rounded up), T prompt tokens (rounded up), N new tokens (rounded up), V vocabulary.
"""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxllm import cache as kv
from jaxllm.cache import Cache, repack
from jaxllm.decoding import average_bits
from jaxllm.decoding.loop import Requests, active, decode_until, first_tokens
from jaxllm.decoding.options import CacheOptions, GenerationOptions
from jaxllm.decoding.prefill import CHUNK, read_in_pieces
from jaxllm.decoding.sampling import request_keys
from jaxllm.decoding.speculation import Speculated, make_draft, of_request
from jaxllm.decoding.text import NewText
from jaxllm.eviction.running_budget import CacheBudget
from jaxllm.models.inputs import bucket
from jaxllm.models.nonfinite import first_nonfinite, nonfinite_message
from jaxllm.models.rope import ropes
from jaxllm.weights.planes.adaptive_planes import every_token_chooses

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds that the batch of a completion took by the clock, compilation included."""

    prefill_s: float  # from the call until the first token of every request is there
    decode_s: float  # from then until the last token of every request is there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str
    token_ids: list[int]  # the end token included when there is one
    logprobs: list[float] | None  # natural logs, of the unfiltered distribution
    finish_reason: Literal["stop", "length", "nonfinite"]  # the last: its logits ceased to be numbers
    prompt_ids: list[int]
    error: str | None = None  # of "nonfinite": which layer was first, and what helps
    timings: Timings | None = dataclasses.field(default=None, compare=False)  # where asked for
    bits: float | None = None  # a weight, read on average by the tokens fed back, where an average is held
    speculation: Speculated | None = None  # where tokens were drafted


class GenerationRun:
    """One batch of requests on its way.

    run = GenerationRun(model, tokenizer, prompts, options)    # every request has its first token
    run.advance(16)                                            # up to so many more
    run.completions()                                          # what has been made so far
    """

    def __init__(self, model, tokenizer, prompts: Sequence[Prompt], options: GenerationOptions):
        """Reads the prompts and samples the first tokens. Raises ValueError as `generate` says."""
        self.model, self.tokenizer, self.stop = model, tokenizer, tuple(options.stop)
        given = options.cache_options()
        self.start, self.bits = given.start, given.bits
        # 1. Prompts become token ids; what is said of all requests is said of each.
        self.prompts = _encode_all(tokenizer, prompts, model.config.vocab)
        n = len(self.prompts)
        B = bucket(n)
        _check_one_each("seed", options.seed, n)
        wanted = _max_new_tokens(options.max_new_tokens, n)
        # 2. The decoder is fed the prompts, or one token each behind an encoder that has read them.
        memory, fed = _read_source(model, self.prompts, B)
        # 3. A request ends where the model's context does at the latest.
        self.budget = given.budget
        if self.budget is not None:
            _check_budget(model, self.budget, given.start)
        bits = None
        if options.average_bits is not None:
            bits = average_bits.start(model, options.average_bits, B)
        before = _lengths_before(given.start, n)
        limits = [
            _limit(model, before[i] + len(ids), most, i)
            for i, (ids, most) in enumerate(zip(fed, wanted, strict=True))
        ]
        self.longest = max(limits)
        draft = None
        if options.speculation is not None:
            if bits is not None:
                raise ValueError("generate: speculation and average_bits exclude each other, got both")
            draft = make_draft(options.speculation, model, tokenizer, given)
            self.model = every_token_chooses(model)  # what is drafted is read as what is decoded
        self.fed = [*fed, *[[0]] * (B - n)]
        ends = [b + len(ids) + most - 1 for b, ids, most in zip(before, fed, limits, strict=True)]
        self.switch = _switch(model, given, ends)
        if draft is not None and self.switch is not None and max(ends) > self.switch:
            raise ValueError(
                f"generate: speculation needs texts of at most {self.switch} tokens, behind which this "
                f"model's rotation changes, got up to {max(ends)}"
            )
        # 4. The prompts are read into a cache of their own with room for all that comes.
        tokens, lengths = _pad(fed, B)
        extents = lengths if given.budget is None else lengths + self.longest
        drafted = 0 if draft is None else draft.count
        room = bucket(self.longest) + drafted
        cache = _own_cache(model, given, before, tokens.shape[1], room, extents, drafted)
        chunk = CHUNK if self.budget is None else self.budget.buffer
        logits, cache, _ = read_in_pieces(
            model, tokens, lengths, cache, chunk, memory=memory, budget=self.budget
        )
        context, tail = kv.split_context(cache)
        # 5. What stays the same through the run, and each request's first token, of its last logits.
        self.requests = Requests(
            limits=jnp.asarray(limits + [0] * (B - n), jnp.int32),
            keys=request_keys(options.seed, B),
            stop_tokens=jnp.asarray(_stop_tokens(model, tokenizer, options.stop_tokens), jnp.int32),
            sampling=options.sampler.params(),
            memory=memory,
            context=context,
            gates=None if self.budget is None else self.budget.gates,
            draft=draft,
            verification="token" if options.speculation is None else options.speculation.verification,
        )
        buffer = None if self.budget is None else self.budget.buffer
        self.until_enforced = buffer or 0  # tokens until the budget is kept again
        self.state = first_tokens(
            model,
            self.requests,
            tokens,
            lengths,
            logits,
            tail,
            N=bucket(self.longest),
            logprobs=options.logprobs,
            buffer=buffer,
            bits=bits,
            draft=None if draft is None else draft.start(tokens, lengths, room),
        )

    def _until_enforced(self) -> int:
        """How many tokens can be made before the budget is kept again; keeps it where that is due."""
        assert self.budget is not None
        if self.until_enforced == 0:
            self.until_enforced = self.budget.buffer
            whole = kv.with_context(self.requests.context, self.state.cache)
            context, tail = kv.split_context(self.budget.enforce(whole, self.state.scores))
            self.requests = dataclasses.replace(self.requests, context=context)
            self.state = dataclasses.replace(self.state, cache=tail)
        return self.until_enforced

    def _until_switch(self) -> int:
        """Tokens that can be made before a text passes where its rotation changes; reads it again there."""
        assert self.switch is not None
        state = self.state
        on, counts, extents = jax.device_get(
            (active(self.requests, state.written), state.written.counts, state.cache.extents)
        )
        ends = np.asarray([len(ids) for ids in self.fed]) + counts  # with the token that is fed next
        short = on & (extents <= self.switch)
        if short.any() and ends[short].max() > self.switch:
            made = np.asarray(state.written.tokens)
            texts = [ids + made[i, : max(counts[i] - 1, 0)].tolist() for i, ids in enumerate(self.fed)]
            tokens, lengths = _pad(texts, len(texts))
            T, more = tokens.shape[1], bucket(self.longest)
            for old in jax.tree.leaves(state.cache):  # never two caches at once
                old.delete()
            made_as = {"slack": _slack(T), "bits": self.bits, "extents": ends}
            cache = self.model.make_cache(len(texts), T + more, **made_as)
            _, cache, _ = read_in_pieces(self.model, tokens, lengths, cache, CHUNK)
            self.state = dataclasses.replace(state, cache=cache)
            short = short & (ends <= self.switch)
        return self.switch + 1 - int(ends[short].max()) if short.any() else self.longest

    def advance(self, steps: int) -> None:
        """Makes `steps` more tokens for every request that has not ended; more where drafts stand."""
        while steps > 0 and (self.budget is None or not self.ended()):
            some = steps
            if self.budget is not None:
                some = min(steps, self._until_enforced())
            elif self.switch is not None:
                some = min(steps, self._until_switch())
            self.state = decode_until(self.model, self.requests, self.state, self.state.step + some)
            steps, self.until_enforced = steps - some, self.until_enforced - some

    def wait(self) -> float:
        """Waits for the tokens made so far; the time on `perf_counter` then."""
        jax.block_until_ready(self.state.written.token)
        return time.perf_counter()

    def ended(self) -> bool:
        """Whether no request can go on."""
        return not bool(active(self.requests, self.state.written).any())

    def end_at_stop_strings(self) -> None:
        """Ends the requests whose text has a stop string in it, after the token that completed it."""
        if not self.stop:
            return
        written = self.state.written
        counts, stopped, tokens = map(np.array, (written.counts, written.stopped, written.tokens))
        for i in range(len(self.prompts)):
            ids = tokens[i, : counts[i]].tolist()
            if self.text(i, ids).first_stop(self.stop) is None:
                continue
            least, most = 1, len(ids)  # the fewest tokens whose text has one
            while least < most:
                middle = (least + most) // 2
                if self.text(i, ids[:middle]).first_stop(self.stop) is not None:
                    most = middle
                else:
                    least = middle + 1
            counts[i], stopped[i] = least, True
        written = dataclasses.replace(written, counts=jnp.asarray(counts), stopped=jnp.asarray(stopped))
        self.state = dataclasses.replace(self.state, written=written)

    def completions(self, timings: Timings | None = None) -> list[Completion]:
        """What has been made so far."""
        state, made = self.state, self.state.written
        counts, stopped, nonfinite, tokens, logprobs = jax.device_get(
            (made.counts, made.stopped, made.nonfinite, made.tokens, made.logprobs)
        )
        read, drafted = jax.device_get((None if state.bits is None else state.bits.read, state.drafted))
        outs = []
        for i, prompt in enumerate(self.prompts):
            count = int(counts[i])
            ids = tokens[i, :count].tolist()
            text = self.text(i, ids)
            outs.append(
                Completion(
                    text=text.shown(text.first_stop(self.stop)),
                    token_ids=ids,
                    logprobs=None if logprobs is None else logprobs[i, :count].tolist(),
                    finish_reason="nonfinite" if nonfinite[i] else "stop" if stopped[i] else "length",
                    prompt_ids=list(prompt),
                    error=self._why_nonfinite(i, ids) if nonfinite[i] else None,
                    timings=timings,
                    bits=None if read is None or count < 2 else float(read[i]) / (count - 1),
                    speculation=None if drafted is None else of_request(drafted, i),
                )
            )
        return outs

    def _why_nonfinite(self, i: int, ids: list[int]) -> str:
        """What a second pass over request i says, warned of as well."""
        prompt, start = self.prompts[i], self.start
        source = None
        if hasattr(self.model, "encode"):
            source, prompt = prompt, [self.model.config.decoder_start]
        if start is not None:
            start = kv.select(start, jnp.asarray([i if start.lengths.shape[0] > 1 else 0]))
        where = first_nonfinite(self.model, [*prompt, *ids], source=source, cache=start)
        message = nonfinite_message("generate", self.model, where, f"request {i} after {len(ids)} tokens")
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return message

    def text(self, i: int, ids: list[int]) -> NewText:
        """What new tokens of request i say."""
        return NewText(self.tokenizer, () if hasattr(self.model, "encode") else self.prompts[i], ids)


def _encode_all(tokenizer, prompts: Sequence[Prompt], vocab: int) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError(f"generate: prompts must be a list of prompts, got the text {prompts!r}")
    out = [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    if not out:
        raise ValueError("generate: at least one prompt is needed, got none")
    for i, ids in enumerate(out):
        if min(ids) < 0 or max(ids) >= vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise ValueError(f"generate: token ids must lie in 0 to {vocab - 1}, got {wrong} in prompt {i}")
    return out


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


def _check_one_each(name: str, given: int | Sequence[int], n: int) -> None:
    if not isinstance(given, int) and len(given) != n:
        raise ValueError(f"generate: {name} must be one number or one a prompt, got {len(given)} for {n}")


def _max_new_tokens(given: int | Sequence[int], n: int) -> list[int]:
    _check_one_each("max_new_tokens", given, n)
    each = [given] * n if isinstance(given, int) else list(given)
    if min(each) < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {min(each)}")
    return each


def _read_source(model, prompts: list[list[int]], B: int) -> tuple[Any, list[list[int]]]:
    """What an encoder has read of the prompts, if there is one, and what the decoder is fed."""
    if not hasattr(model, "encode"):
        return None, prompts
    source, lengths = _pad(prompts, B)
    return _encode_source(model, source, lengths), [[model.config.decoder_start]] * len(prompts)


@jax.jit
def _encode_source(model, tokens, lengths):
    return model.encode(tokens, lengths)


def _stop_tokens(model, tokenizer, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    own = getattr(model.config, "stop_tokens", ())
    if own:
        return tuple(own)
    end = None if tokenizer is None else tokenizer.eos_token_id
    return () if end is None else (end,)


def _limit(model, length: int, most: int, index: int) -> int:
    """How many tokens a request of `length` tokens so far may be given."""
    room = model.config.context - length
    if room < 1:
        raise ValueError(
            f"generate: a prompt must leave room in the context of {model.config.context} tokens, "
            f"got {length} as number {index}"
        )
    return min(most, room)


def _pad(prompts: list[list[int]], B: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts padded on the right, and their lengths; rows past the last prompt hold one token."""
    T = max(8, bucket(max(map(len, prompts))))
    tokens, lengths = np.zeros((B, T), np.int32), np.ones((B,), np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return tokens, lengths


def _lengths_before(cache: Cache | None, n: int) -> list[int]:
    """How many tokens each request continues."""
    if cache is None:
        return [0] * n
    lengths = np.asarray(cache.lengths).tolist()
    if len(lengths) not in (1, n):
        raise ValueError(
            f"generate: a cache must hold one request or one a prompt, got {len(lengths)} for {n}"
        )
    return lengths * n if len(lengths) == 1 else lengths


def _check_budget(model, budget: CacheBudget, cache: Cache | None) -> None:
    if hasattr(model, "encode"):
        raise ValueError("generate: a budget needs a decoder alone, got a model that reads a source")
    budget.gates.layers(model)  # or it raises
    if cache is not None and (not isinstance(cache, kv.PagedCache) or repack.tail_size(cache)):
        got = f"{repack.tail_size(cache)} rows without scores in a {type(cache).__name__}"
        raise ValueError(
            f"generate: with a budget, a cache must be an evicted one and nothing more, got {got}"
        )


def _switch(model, given: CacheOptions, ends: list[int]) -> int | None:
    """The length at which a text is read again, as its rotation has other factors from there on; None: never.

    Raises ValueError where a given cache was turned by the factors of shorter texts. ends: tokens that
    requests may have.
    """
    switch = min((rope.switch for rope in ropes(model.config) if rope.switch is not None), default=None)
    if switch is None or given.budget is not None and given.start is None:
        return None
    if given.start is None:
        return switch
    extents = kv.split_context(given.start)[1].extents
    least = int(extents.min())
    if max(ends) > switch >= least:
        raise ValueError(
            f"generate: a cache must be prepared for the {max(ends)} tokens that requests may come to have "
            f"(the rotation changes past {switch}), got one for {least}: see prefill's extent"
        )
    return None


def _slack(T: int) -> int:
    """What layers with a window need to be able to take another piece of T tokens."""
    return CHUNK - 1 if T > CHUNK else 0


def _own_cache(
    model,
    given: CacheOptions,
    before: list[int],
    T: int,
    new: int,
    extents: Int[np.ndarray, " B"],
    slack: int,
) -> Cache:
    """A cache with room for T tokens of prompts and `new` ones: empty, or a copy of the one given.

    slack: tokens that may be forgotten at once.
    """
    B, new = len(extents), T + new
    cache = given.start
    if cache is not None:
        order = [0] * B if cache.lengths.shape[0] == 1 else [min(i, len(before) - 1) for i in range(B)]
        cache = kv.select(cache, jnp.asarray(order))
    if given.budget is not None:
        if cache is None:
            made = {"slack": given.budget.buffer, "bits": given.bits, "extents": extents}
            cache = model.make_cache(B, 1, **made)
        return given.budget.enforce(cache, None)
    if cache is None:
        return model.make_cache(B, new, slack=max(_slack(T), slack), bits=given.bits, extents=extents)
    longest = max(before)
    if isinstance(cache, kv.PagedCache):
        assert cache.tail.start is not None  # it stands behind a context
        longest -= int(cache.tail.start.min())
    return kv.with_capacity(cache, bucket(longest) * (longest > 0) + new)
