"""The compiled loop: feed the last token, sample the next, until all requests have ended or a step comes.

    state = first_tokens(model, requests, tokens, lengths, logits, cache, N=64, logprobs=False)
    state = decode_until(model, requests, state, 16)

Letters: B requests (rounded up), T prompt tokens, N new tokens (rounded up), S stop tokens, V vocabulary, L
layers without a window, K key heads.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import DenseCache
from jaxllm.cache.paged import Context
from jaxllm.decoding.average_bits import AverageBits
from jaxllm.decoding.prefill import forward
from jaxllm.decoding.sampling import SamplingParams, sample
from jaxllm.eviction.gates import Gate
from jaxllm.models.taps import WidthTap
from jaxllm.pytree import pytree


@pytree
class Requests:
    """What stays the same through a run."""

    limits: jax.Array  # [B] most new tokens
    keys: jax.Array  # [B] random keys
    stop_tokens: jax.Array  # [S]
    sampling: SamplingParams
    memory: Any = None  # what an encoder left
    context: Context | None = None  # of a cache that was evicted: shared, so never given away
    gates: Gate | None = None  # where the cache has a budget


@pytree
class GenerationState:
    """Everything the loop carries."""

    cache: DenseCache  # without the context, if there is one
    token: jax.Array  # [B] sampled, not yet fed
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array | None  # [B, N]
    step: jax.Array  # [] how many tokens each request has been given
    counts: jax.Array  # [B] how many of them are its own: it stops counting when it ends
    stopped: jax.Array  # [B] ended by a stop token or a stop string
    nonfinite: jax.Array  # [B] ended by logits that are no numbers, of which no token was drawn
    seen: jax.Array | None  # [B, V] tokens a request already holds, for the repetition penalty
    scores: jax.Array | None  # [L, B, K, buffer] what gates say of the tail's rows, where there is a budget
    bits: AverageBits | None = None  # where the weights' bits are held to an average


@partial(jax.jit, static_argnames=("N", "logprobs", "buffer"), donate_argnames="cache")
def first_tokens(
    model,
    requests: Requests,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    logits: Float[Array, "B V"],
    cache: DenseCache,
    *,
    N: int,
    logprobs: bool,
    buffer: int | None = None,
    bits: AverageBits | None = None,
) -> GenerationState:
    """The state after the prompts `tokens`, whose last logits are given: one token a request.

    N: room for new tokens. buffer: rows that gates score before a budget is enforced, None without one.
    bits: where the weights' bits are held to an average.
    """
    B, V = logits.shape
    seen = scores = None
    if requests.sampling.penalty is not None:
        real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        where = jnp.where(real, tokens, V)  # V lies outside: dropped
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], where].set(True, mode="drop")
    if buffer is not None:
        assert requests.gates is not None
        L, _, K = requests.gates.sizes()
        scores = jnp.zeros((L, B, K, buffer), jnp.float32)
    state = GenerationState(
        cache=cache,
        token=jnp.zeros((B,), jnp.int32),
        tokens=jnp.zeros((B, N), jnp.int32),
        logprobs=jnp.zeros((B, N), jnp.float32) if logprobs else None,
        step=jnp.zeros((), jnp.int32),
        counts=jnp.zeros((B,), jnp.int32),
        stopped=jnp.zeros((B,), bool),
        nonfinite=jnp.zeros((B,), bool),
        seen=seen,
        scores=scores,
        bits=bits,
    )
    return sample_step(requests, state, logits)


@partial(jax.jit, donate_argnames="state")
def decode_until(model, requests: Requests, state: GenerationState, until) -> GenerationState:
    """Goes on until every request has ended or `until` tokens have been made."""

    def goes_on(state: GenerationState):
        return (state.step < until) & active(requests, state).any()

    def body(state: GenerationState) -> GenerationState:
        # 1. The last token of each request is fed; one that has ended feeds nothing.
        on = active(requests, state)
        token, lengths = state.token[:, None], on.astype(jnp.int32)
        aimed, bits, read = model, state.bits, None
        if bits is not None:
            aimed = bits.aim(model)
            read = WidthTap(aimed)
        logits, cache, new = forward(
            aimed, requests.gates, requests.memory, requests.context, token, state.cache, lengths, read
        )
        if bits is not None and read is not None:
            bits = bits.after(read.mean()[:, 0], on)
        # 2. What gates say of the new row waits with the others for the budget.
        scores = state.scores
        if scores is not None:
            assert state.cache.start is not None and new is not None  # it stands behind a context
            outside = scores.shape[-1]  # dropped
            at = jnp.where(on, state.cache.lengths - state.cache.start, outside)
            rows = jnp.arange(token.shape[0])
            scores = scores.at[:, rows, :, at].set(new[..., 0].swapaxes(0, 1), mode="drop")
        # 3. The next token.
        return sample_step(
            requests, dataclasses.replace(state, cache=cache, scores=scores, bits=bits), logits
        )

    return jax.lax.while_loop(goes_on, body, state)


def active(requests: Requests, state: GenerationState) -> Bool[Array, " B"]:
    """Which requests go on."""
    return ~state.stopped & ~state.nonfinite & (state.counts < requests.limits)


def sample_step(requests: Requests, state: GenerationState, logits: Float[Array, "B V"]) -> GenerationState:
    """The state with one more token for every request that has not ended."""
    # 1. A request whose logits are not finite ends without another token: a sum of V numbers shows it.
    finite, on = jnp.isfinite(logits.sum(axis=-1)), active(requests, state)
    nonfinite, on = state.nonfinite | (on & ~finite), on & finite
    # 2. Sample a token each.
    token = sample(logits, requests.sampling, requests.keys, state.counts, state.seen)
    # 3. Write it to the buffers.
    rows = jnp.arange(token.shape[0])
    at = jnp.where(on, state.counts, state.tokens.shape[1])  # outside: dropped
    logprobs, seen = state.logprobs, state.seen
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)
        logprobs = logprobs.at[rows, at].set(chosen[:, 0], mode="drop")
    if seen is not None:
        seen = seen.at[rows, token].set(True)
    # 4. End the requests that were given a stop token.
    ends = (token[:, None] == requests.stop_tokens[None, :]).any(axis=1)
    return dataclasses.replace(
        state,
        token=token,
        tokens=state.tokens.at[rows, at].set(token, mode="drop"),
        logprobs=logprobs,
        step=state.step + 1,
        counts=state.counts + on.astype(jnp.int32),
        stopped=state.stopped | (on & ends),
        nonfinite=nonfinite,
        seen=seen,
    )
