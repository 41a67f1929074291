"""Text from a model: prompts in, completions out, one compiled loop.

A run has two compiled parts. `read` reads the prompts, `_first` chooses each request's first token; `_decode`
is a `lax.while_loop` that feeds the last token and chooses the next until every request has ended or a given
step is reached. `generate` runs it to the end, `stream` a step at a time, stop strings a block at a time: the
tokens are the same because the function is. Shapes are rounded up to buckets, so nearby batches and lengths
share a compilation.

    outs = generate(model, tokenizer, ["Once upon a time"], max_new_tokens=64)

Letters: B requests (rounded up), T prompt tokens (rounded up), N new tokens (rounded up), V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import cache as kv
from jaxllm.cache import Cache, DenseCache, Gate, Hold
from jaxllm.cache.paged import Context
from jaxllm.cache.prepare import forward, read
from jaxllm.decoding.sampling import Plan, Sampler, choose
from jaxllm.pytree import pytree

Prompt = str | Sequence[int]
# How many tokens are made between two looks for a stop string.
BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str
    token_ids: list[int]  # the end token included when there is one
    logprobs: list[float] | None  # natural logs, of the unfiltered distribution
    finish_reason: Literal["stop", "length"]
    prompt_ids: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One step of a stream; `text` may be empty while a character is incomplete."""

    text: str
    token_id: int
    logprob: float | None


@pytree
class _State:
    """Everything the loop carries."""

    cache: DenseCache  # without the context, if there is one
    token: jax.Array  # [B] chosen, not yet fed
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array | None  # [B, N]
    step: jax.Array  # [] how many tokens each request has been given
    counts: jax.Array  # [B] how many of them are its own: it stops counting when it ends
    stopped: jax.Array  # [B] ended by a stop token or a stop string
    seen: jax.Array | None  # [B, V] tokens a request already holds, for the repetition penalty
    scores: jax.Array | None  # [L, B, K, buffer] what gates say of the tail's rows, where a budget is held


@pytree
class _Request:
    """What stays the same through a run."""

    budgets: jax.Array  # [B] most new tokens
    keys: jax.Array  # [B] random keys
    stop_tokens: jax.Array  # [S]
    plan: Plan
    memory: object  # what an encoder left, or None
    context: Context | None = None  # of a cache that was evicted: shared, so never given away
    gates: Gate | None = None  # where a budget is held


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    cache: Cache | None = None,
    kv_bits: int | None = None,
    hold: Hold | None = None,
    logprobs: bool = False,
) -> list[Completion]:
    """What the model writes after each prompt. Greedy by default; the same seed gives the same tokens.

    prompts: texts, or lists of token ids. Texts are encoded as the tokenizer does by itself, begin token
      included if that is its policy. For an encoder-decoder they are the source.
    max_new_tokens: for all requests or one number each. A request also ends where the model's context does.
    seed: for all (request i draws from key(seed) folded with i), or one a request, independent of i.
    stop: texts that end a request; neither they nor what follows are in `text`.
    stop_tokens: ids that end a request; None takes the model's own, or else the tokenizer's end token.
    cache: what every prompt continues: one request (shared) or one a prompt. It is read, never changed.
    kv_bits: 2, 4 or 8 keeps keys and values in codes of so many bits (lossy); a given cache has its own.
    hold: keeps the cache within a budget while the text grows, up to the model's context (lossy;
      `cache/gates.py`). A cache given with it must be an evicted one to which nothing was added.
    logprobs: also give each token's log-probability.

    Raises ValueError for an empty prompt, a token out of range, or a prompt that fills the context.
    """
    run = _Run(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        sampler,
        seed,
        stop_tokens,
        cache,
        kv_bits,
        hold,
        logprobs,
    )
    if not stop:
        run.advance(run.longest)
        return run.completions(())
    while not run.ended():
        run.advance(BLOCK)
        run.end_at(stop)
    return run.completions(stop)


def stream(
    model,
    tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    cache: Cache | None = None,
    kv_bits: int | None = None,
    hold: Hold | None = None,
    logprobs: bool = False,
) -> Iterator[Token]:
    """The tokens of `generate` for one prompt, each as soon as it is made. Arguments as there."""
    run = _Run(
        model,
        tokenizer,
        [prompt],
        max_new_tokens,
        sampler,
        seed,
        stop_tokens,
        cache,
        kv_bits,
        hold,
        logprobs,
    )
    return _tokens(run, tuple(stop))


def _tokens(run: "_Run", stop: tuple[str, ...]) -> Iterator[Token]:
    told = 0  # characters given out
    while True:
        made = run.completions(stop)[0]
        run.end_at(stop)
        last = run.ended()
        # A stop string may have begun: what could be its beginning waits.
        safe = len(made.text) if last else _safe(made.text, stop)
        text, told = made.text[told:safe], max(told, safe)
        logprob = made.logprobs[-1] if made.logprobs else None
        yield Token(text=text, token_id=made.token_ids[-1], logprob=logprob)
        if last:
            return
        run.advance(1)


def _safe(text: str, stop: tuple[str, ...]) -> int:
    """How much of `text` no later token can take back."""
    end = len(text.rstrip("\ufffd"))  # an incomplete character decodes to this
    for string in stop:
        for size in range(min(len(string) - 1, end), 0, -1):
            if text[:end].endswith(string[:size]):
                end -= size
                break
    return end


def chat(model, tokenizer, messages: Sequence[dict[str, str]], **options) -> Completion:
    """The model's answer to a conversation, laid out by the tokenizer's chat template.

    messages: dicts with "role" and "content". options: as for `generate`.
    Raises ValueError when the tokenizer has no template.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer must have a chat template, this model's has none")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes its own
    return generate(model, tokenizer, [ids], **options)[0]


def bucket(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below n."""
    power = 1
    while power < n:
        if n <= power + power // 2 and power > 1:
            return power + power // 2
        power *= 2
    return power


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

    def completions(self, stop: Sequence[str]) -> list[Completion]:
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
    if cache is not None and (not isinstance(cache, kv.PagedCache) or kv.paged.tail_size(cache)):
        got = f"{kv.paged.tail_size(cache)} rows without scores in a {type(cache).__name__}"
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


@partial(jax.jit, static_argnames=("N", "logprobs", "buffer"), donate_argnames="cache")
def _first(
    model, request, tokens, lengths, logits, cache, *, N: int, logprobs: bool, buffer: int | None = None
) -> _State:
    B, V = logits.shape
    seen = None
    if request.plan.penalty is not None:
        real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        where = jnp.where(real, tokens, V)  # V lies outside: dropped
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], where].set(True, mode="drop")
    state = _State(
        cache=cache,
        token=jnp.zeros((B,), jnp.int32),
        tokens=jnp.zeros((B, N), jnp.int32),
        logprobs=jnp.zeros((B, N), jnp.float32) if logprobs else None,
        step=jnp.zeros((), jnp.int32),
        counts=jnp.zeros((B,), jnp.int32),
        stopped=jnp.zeros((B,), bool),
        seen=seen,
        scores=None if buffer is None else _no_scores(request.gates, B, buffer),
    )
    return _choose(request, state, logits)


def _no_scores(gates: Gate, B: int, buffer: int) -> jax.Array:
    layers, _, kv_heads = gates.sizes()
    return jnp.zeros((layers, B, kv_heads, buffer), jnp.float32)


def _alive(request: _Request, state: _State) -> jax.Array:
    return ~state.stopped & (state.counts < request.budgets)


def _choose(request: _Request, state: _State, logits) -> _State:
    """The state with one more token for every request that has not ended."""
    alive = _alive(request, state)
    token = choose(logits, request.plan, request.keys, state.counts, state.seen)
    rows = jnp.arange(token.shape[0])
    at = jnp.where(alive, state.counts, state.tokens.shape[1])  # outside: dropped
    logprobs, seen = state.logprobs, state.seen
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)
        logprobs = logprobs.at[rows, at].set(chosen[:, 0], mode="drop")
    if seen is not None:
        seen = seen.at[rows, token].set(True)
    ends = (token[:, None] == request.stop_tokens[None, :]).any(axis=1)
    return dataclasses.replace(
        state,
        token=token,
        tokens=state.tokens.at[rows, at].set(token, mode="drop"),
        logprobs=logprobs,
        step=state.step + 1,
        counts=state.counts + alive.astype(jnp.int32),
        stopped=state.stopped | (alive & ends),
        seen=seen,
    )


@partial(jax.jit, donate_argnames="state")
def _decode(model, request: _Request, state: _State, until) -> _State:
    """Goes on until every request has ended or `until` tokens have been made."""

    def body(state):
        alive = _alive(request, state)
        token, lengths = state.token[:, None], alive.astype(jnp.int32)
        logits, cache, new = forward(
            model, request.gates, request.memory, request.context, token, state.cache, lengths
        )
        scores = state.scores
        if scores is not None:
            at = jnp.where(
                alive, state.cache.lengths - state.cache.base, scores.shape[-1]
            )  # outside: dropped
            rows = jnp.arange(token.shape[0])
            scores = scores.at[:, rows, :, at].set(new[..., 0].swapaxes(0, 1), mode="drop")
        return _choose(request, dataclasses.replace(state, cache=cache, scores=scores), logits)

    def goes_on(state):
        return (state.step < until) & _alive(request, state).any()

    return jax.lax.while_loop(goes_on, body, state)
