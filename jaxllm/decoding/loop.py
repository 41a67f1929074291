"""The compiled loop: feed the last token, choose the next, until all requests have ended or a step comes.

Letters: B requests (rounded up), N new tokens (rounded up), S stop tokens, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.cache import DenseCache
from jaxllm.cache.paged import Context
from jaxllm.decoding.prefill import forward
from jaxllm.decoding.sampling import Plan, choose
from jaxllm.eviction.gates import Gate
from jaxllm.pytree import pytree


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
