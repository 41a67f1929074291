"""The compiled loop: feed the last token, sample the next, until all requests have ended or a step comes.

    state = first_tokens(model, requests, tokens, lengths, logits, cache, N=64, logprobs=False)
    state = decode_until(model, requests, state, 16)

With a draft a step feeds what it proposes as well, and samples as many tokens as stand and one more.

Letters: B requests (rounded up), T prompt tokens, N new tokens (rounded up), S stop tokens, V vocabulary, L
layers without a window, K key heads.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import DenseCache, dense
from jaxllm.cache.paged import Context
from jaxllm.decoding.acceptance import (
    Verification,
    chance_of_beginning,
    joint_after,
    residual,
    stands,
)
from jaxllm.decoding.average_bits import AverageBits
from jaxllm.decoding.drafts import Draft, Proposal
from jaxllm.decoding.prefill import forward
from jaxllm.decoding.sampling import CHANCES, SamplingParams, draw, keys_of, process_logits, sample
from jaxllm.eviction.gates import Gate
from jaxllm.models.taps import WidthTap
from jaxllm.pytree import pytree, static


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
    draft: Draft | None = None  # who proposes tokens
    verification: Verification = static(default="token")  # which drafts stand (`acceptance.py`)


@pytree
class Drafted:
    """What came of proposals, a request each."""

    proposed: jax.Array  # [B] tokens that were looked at
    stood: jax.Array  # [B] of them, those that stand
    steps: jax.Array  # [B] in which the target was asked


@pytree
class Written:
    """What requests hold so far."""

    token: jax.Array  # [B] sampled, not yet fed
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array | None  # [B, N]
    counts: jax.Array  # [B] how many of them are its own: it stops counting when it ends
    stopped: jax.Array  # [B] ended by a stop token or a stop string
    nonfinite: jax.Array  # [B] ended by logits that are no numbers, of which no token was drawn
    seen: jax.Array | None  # [B, V] tokens a request already holds, for the repetition penalty


@pytree
class GenerationState:
    """Everything the loop carries."""

    cache: DenseCache  # without the context, if there is one
    written: Written
    step: jax.Array  # [] how many steps were made: of tokens, where none is drafted
    scores: jax.Array | None  # [L, B, K, buffer] what gates say of the tail's rows, where there is a budget
    bits: AverageBits | None = None  # where the weights' bits are held to an average
    draft: Any = None  # what the draft remembers
    drafted: Drafted | None = None  # what came of its proposals


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
    draft: Any = None,
) -> GenerationState:
    """The state after the prompts `tokens`, whose last logits are given: one token a request.

    N: room for new tokens. buffer: rows that gates score before a budget is enforced, None without one.
    bits: where the weights' bits are held to an average. draft: what a draft has read of the prompts.
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
    written = Written(
        token=jnp.zeros((B,), jnp.int32),
        tokens=jnp.zeros((B, N), jnp.int32),
        logprobs=jnp.zeros((B, N), jnp.float32) if logprobs else None,
        counts=jnp.zeros((B,), jnp.int32),
        stopped=jnp.zeros((B,), bool),
        nonfinite=jnp.zeros((B,), bool),
        seen=seen,
    )
    return GenerationState(
        cache=cache,
        written=sample_step(requests, written, logits),
        step=jnp.ones((), jnp.int32),
        scores=scores,
        bits=bits,
        draft=draft,
        drafted=None if draft is None else Drafted(*(jnp.zeros((B,), jnp.int32) for _ in range(3))),
    )


@partial(jax.jit, donate_argnames="state")
def decode_until(model, requests: Requests, state: GenerationState, until) -> GenerationState:
    """Goes on until every request has ended or step `until`: so many tokens at least."""

    def goes_on(state: GenerationState):
        return (state.step < until) & active(requests, state.written).any()

    def body(state: GenerationState) -> GenerationState:
        # 1. The last token of each request is fed; one that has ended feeds nothing.
        on = active(requests, state.written)
        fed, lengths, proposal, draft = state.written.token[:, None], on.astype(jnp.int32), None, state.draft
        if requests.draft is not None:
            proposal, draft = requests.draft.propose(draft, requests, state.written, state.cache.lengths, on)
            fed = jnp.concatenate([fed, proposal.tokens], axis=1)
            lengths = lengths + proposal.lengths
        aimed, bits, read = model, state.bits, None
        if bits is not None:
            aimed = bits.aim(model)
            read = WidthTap(aimed)
        logits, cache, new = forward(
            aimed,
            requests.gates,
            requests.memory,
            requests.context,
            fed,
            state.cache,
            lengths,
            read,
            logits="last" if proposal is None else "all",
        )
        if bits is not None and read is not None:
            bits = bits.after(read.mean()[:, 0], on)
        # 2. What gates say of the new row waits with the others for the budget.
        scores = state.scores
        if scores is not None:
            assert state.cache.start is not None and new is not None  # it stands behind a context
            outside = scores.shape[-1]  # dropped
            at = jnp.where(on, state.cache.lengths - state.cache.start, outside)
            rows = jnp.arange(fed.shape[0])
            scores = scores.at[:, rows, :, at].set(new[..., 0].swapaxes(0, 1), mode="drop")
        # 3. The next token, or as many as stand and one.
        step = state.step + 1
        state = dataclasses.replace(state, cache=cache, step=step, scores=scores, bits=bits, draft=draft)
        if proposal is None:
            return dataclasses.replace(state, written=sample_step(requests, state.written, logits))
        return verify(requests, state, proposal, logits, on)

    return jax.lax.while_loop(goes_on, body, state)


def active(requests: Requests, written: Written) -> Bool[Array, " B"]:
    """Which requests go on."""
    return ~written.stopped & ~written.nonfinite & (written.counts < requests.limits)


def verify(
    requests: Requests,
    state: GenerationState,
    proposal: Proposal,
    logits: Float[Array, "B T V"],
    on: Bool[Array, " B"],
) -> GenerationState:
    """The state with the proposed tokens that stand and one more for every request that goes on.

    logits: behind the last token and behind each that was proposed. on: which requests were fed.
    """
    draft, drafted, before = requests.draft, state.drafted, state.written.counts
    assert draft is not None and drafted is not None

    tokens, laws = jnp.pad(proposal.tokens, ((0, 0), (0, 1))).T, proposal.logits
    if laws is not None:
        laws = jnp.pad(laws, ((0, 1), (0, 0), (0, 0)))  # behind the last draft there is none
    positions = (jnp.arange(len(tokens)), logits.swapaxes(0, 1), tokens, laws)
    block = None
    if requests.verification == "block" and requests.sampling.temperature is not None:
        block = beginning(requests, state.written, proposal.lengths, positions)

    def one(carry, of_position):
        written, alive, stood = carry
        i, logits, token, law = of_position
        has = i < proposal.lengths
        chosen, stands = choose(requests, written, logits, token, law, has, i, block)
        new = sample_step(requests, written, logits, alive, chosen)
        alive = (new.counts > written.counts) & has & stands
        return (new, alive, stood + alive.astype(jnp.int32)), None

    (written, _, stood), _ = jax.lax.scan(one, (state.written, on, drafted.stood), positions)
    # What the target has read of tokens that do not stand is forgotten, and so by the draft.
    made = written.counts - before
    fed = proposal.lengths + on.astype(jnp.int32)
    lengths = state.cache.lengths - jnp.maximum(fed - made, 0)
    return dataclasses.replace(
        state,
        cache=dense.truncate(state.cache, lengths),
        written=written,
        draft=draft.keep(state.draft, lengths),
        drafted=Drafted(
            proposed=drafted.proposed + proposal.lengths,
            stood=stood,
            steps=drafted.steps + on.astype(jnp.int32),
        ),
    )


class Beginning(NamedTuple):
    """What stands of a block of drafts."""

    length: jax.Array  # int32 [B]
    joint: jax.Array  # float32 [B]: J behind it


def beginning(
    requests: Requests, written: Written, lengths: Int[Array, " B"], positions: tuple[Any, ...]
) -> Beginning:
    """The longest beginning of each request's drafts that stands.

    lengths: of the drafts. positions: number, logits [B, V], draft [B] and law [B, V] of each place.
    """
    rows, keys = jnp.arange(lengths.shape[0]), keys_of(CHANCES, requests.keys)

    def uniform(key, count, i):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, count), i))

    def one(carry, of_position):
        joint, found, seen = carry
        i, logits, token, law = of_position
        p, q = laws_of(requests.sampling, logits, law, seen)
        h = jnp.where(i < lengths, chance_of_beginning(joint, p, q, token), joint)
        u = jax.vmap(partial(uniform, i=i))(keys, written.counts)
        stands = (i <= lengths) & (u < h) | (i == 0)
        found = Beginning(jnp.where(stands, i, found.length), jnp.where(stands, joint, found.joint))
        if seen is not None:
            seen = seen.at[rows, token].set(True)
        return (joint_after(joint, p, q, token), found, seen), None

    joint = jnp.ones(lengths.shape, jnp.float32)
    carry = (joint, Beginning(jnp.zeros_like(lengths), joint), written.seen)
    return jax.lax.scan(one, carry, positions)[0][1]


def laws_of(
    params: SamplingParams,
    logits: Float[Array, "B V"],
    law: Float[Array, "B V"] | None,
    seen: Bool[Array, "B V"] | None,
) -> tuple[Float[Array, "B V"], Float[Array, "B V"] | None]:
    """The target's law and the draft's. law: logits of the draft's, None where it has none."""
    p = jax.nn.softmax(process_logits(logits, params, seen), axis=-1)
    return p, None if law is None else jax.nn.softmax(law, axis=-1)


def choose(
    requests: Requests,
    written: Written,
    logits: Float[Array, "B V"],
    token: Int[Array, " B"],
    law: Float[Array, "B V"] | None,
    has: Bool[Array, " B"],
    i: Int[Array, ""],
    block: Beginning | None,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The next token of each request, and whether it is the draft's and stands.

    token, law: of the draft at place i; has: where there is one. block: what stands, where blocks are asked.
    """
    params = requests.sampling
    if params.temperature is None or requests.verification == "noise":
        chosen = sample(logits, params, requests.keys, written.counts, written.seen)
        return chosen, chosen == token
    p, q = laws_of(params, logits, law, written.seen)
    if block is None:

        def uniform(key, count):
            return jax.random.uniform(jax.random.fold_in(key, count))

        u = jax.vmap(uniform)(keys_of(CHANCES, requests.keys), written.counts)
        joint, ok = None, has & stands(p, q, token, u)
    else:
        joint, ok = block.joint, i < block.length
    left = jnp.where(has[:, None], residual(p, q, token, joint), p)
    return jnp.where(ok, token, draw(jnp.log(left), params, requests.keys, written.counts)), ok


def sample_step(
    requests: Requests,
    written: Written,
    logits: Float[Array, "B V"],
    on: Bool[Array, " B"] | None = None,
    token: Int[Array, " B"] | None = None,
) -> Written:
    """The texts with one more token for every request that has not ended.

    on: those that get one, None for all. token: what has been chosen for each; None samples it.
    """
    # 1. A request whose logits are not finite ends without another token: a sum of V numbers shows it.
    finite, going = jnp.isfinite(logits.sum(axis=-1)), active(requests, written)
    on = going if on is None else on & going
    nonfinite, on = written.nonfinite | (on & ~finite), on & finite
    # 2. Sample a token each.
    if token is None:
        token = sample(logits, requests.sampling, requests.keys, written.counts, written.seen)
    # 3. Write it to the buffers.
    rows = jnp.arange(token.shape[0])
    at = jnp.where(on, written.counts, written.tokens.shape[1])  # outside: dropped
    logprobs, seen = written.logprobs, written.seen
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)
        logprobs = logprobs.at[rows, at].set(chosen[:, 0], mode="drop")
    if seen is not None:
        seen = seen.at[rows, jnp.where(on, token, seen.shape[1])].set(True, mode="drop")
    # 4. End the requests that were given a stop token.
    ends = (token[:, None] == requests.stop_tokens[None, :]).any(axis=1)
    return dataclasses.replace(
        written,
        token=jnp.where(on, token, written.token),
        tokens=written.tokens.at[rows, at].set(token, mode="drop"),
        logprobs=logprobs,
        counts=written.counts + on.astype(jnp.int32),
        stopped=written.stopped | (on & ends),
        nonfinite=nonfinite,
        seen=seen,
    )
