"""Who drafts: another model, the same one in fewer layers or bits, or the text itself.

A draft is a frozen pytree that lives in the compiled loop:

    state = draft.start(tokens, lengths, room)                      on the host: the prompts are read
    proposed, state = draft.propose(state, requests, written, lengths, on)      up to `count` tokens each
    state = draft.keep(state, lengths)                              what does not stand is forgotten

    ModelDraft     a model's own continuation, from its own cache
    LookupDraft    what followed the last occurrence of the last tokens (prompt lookup, Saxena 2023)

Letters: B requests, T prompt tokens, G drafted tokens at most, N new tokens (rounded up), V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from jaxllm import cache as kv
from jaxllm.decoding.prefill import CHUNK, read_in_pieces
from jaxllm.decoding.sampling import DRAFTS, draw, keys_of, process_logits
from jaxllm.models.decoder import Decoder
from jaxllm.pytree import pytree, static


class Proposal(NamedTuple):
    """What a draft says comes next."""

    tokens: jax.Array  # int32 [B, G]
    lengths: jax.Array  # int32 [B]: how many of them
    logits: jax.Array | None  # float32 [G, B, V] after the sampler's filters, of which they were drawn


@runtime_checkable
class Draft(Protocol):
    """What drafts."""

    @property
    def count(self) -> int:
        """Tokens proposed at most."""
        ...

    def start(self, tokens: np.ndarray, lengths: np.ndarray, room: int) -> Any:
        """The state once the prompts [B, T] are read, with room for so many more tokens."""
        ...

    def propose(
        self, state: Any, requests: Any, written: Any, lengths: jax.Array, on: jax.Array
    ) -> tuple[Proposal, Any]:
        """Tokens behind the last of each request that goes on (`on`).

        requests, written: as the loop has them. lengths: tokens [B] that the target has
          read, all but the last.
        """
        ...

    def keep(self, state: Any, lengths: jax.Array) -> Any:
        """The state of texts of so many tokens: shorter ones than were drafted."""
        ...


@pytree
class ModelDraft:
    """Another model's continuation, drawn by the target's own sampler.

    Drafting ends early where the draft doubts itself: before a token is drawn whose law has
    sqrt(entropy) > `doubt` nats (Agrawal et al., arXiv:2410.18351, bound what is accepted by it).
    """

    model: Any
    count: int = static()
    vocab: int = static()  # the target's: logits beyond are left out, missing ones are never drafted
    doubt: float | None = static(default=None)

    def start(self, tokens: np.ndarray, lengths: np.ndarray, room: int) -> kv.DenseCache:
        """A cache of the prompts but for their last tokens, which are fed when something is drafted."""
        B, T = tokens.shape
        slack = max(CHUNK if T > CHUNK else 0, self.count + 1)
        cache = self.model.make_cache(B, T + room, slack=slack)
        return read_in_pieces(self.model, tokens, lengths, cache, CHUNK)[1]

    def keep(self, state: kv.DenseCache, lengths: Int[Array, " B"]) -> kv.DenseCache:
        """The rows of what stands."""
        return kv.truncate(state, lengths)

    def propose(
        self, state, requests, written, lengths: Int[Array, " B"], on: Bool[Array, " B"]
    ) -> tuple[Proposal, kv.DenseCache]:
        """Up to `count` tokens, one after another; all requests together."""
        B, G = written.token.shape[0], self.count
        keys, first = requests.keys, written.counts
        if requests.verification != "noise":  # noise that nothing has been judged by: of this step alone
            keys, first = jax.vmap(jax.random.fold_in)(keys_of(DRAFTS, keys), first), jnp.zeros_like(first)
        greedy = requests.sampling.temperature is None
        laws = None if greedy else jnp.zeros((G, B, self.vocab), jnp.float32)

        def one(cache, fed, lengths, i, seen, tokens, count, laws, on):
            logits, cache = self.model(fed, cache, lengths=lengths, logits="last")
            on = on & jnp.isfinite(logits.sum(axis=-1))
            logits = process_logits(fit(logits, self.vocab), requests.sampling, seen)
            if self.doubt is not None:
                on = on & (jnp.sqrt(entropy(logits)) <= self.doubt)
            token = draw(logits, requests.sampling, keys, first + i)
            tokens = tokens.at[:, i].set(token)
            if laws is not None:
                laws = laws.at[i].set(logits)
            if seen is not None:
                seen = seen.at[jnp.arange(B), token].set(True)
            return cache, token, seen, tokens, count + on.astype(jnp.int32), laws, on

        # 1. What its cache lacks: the last token, and the one before where all drafts stood.
        before = jnp.take_along_axis(written.tokens, jnp.maximum(written.counts - 2, 0)[:, None], axis=1)[
            :, 0
        ]
        two = lengths > state.lengths  # the target has read one more
        last = written.token
        fed = jnp.stack([jnp.where(two, before, last), last], axis=1)  # the second is read where both are
        sizes = jnp.where(on, 1 + two.astype(jnp.int32), 0)
        tokens, count = jnp.zeros((B, G), jnp.int32), jnp.zeros((B,), jnp.int32)
        cache, token, seen, tokens, count, laws, going = one(
            state, fed, sizes, 0, written.seen, tokens, count, laws, on
        )

        # 2. A token after another.
        def goes_on(carry):
            i, *_, going = carry
            return (i < G) & going.any()

        def body(carry):
            i, cache, token, seen, tokens, count, laws, going = carry
            fed, lengths = token[:, None], going.astype(jnp.int32)
            return i + 1, *one(cache, fed, lengths, i, seen, tokens, count, laws, going)

        carry = (jnp.int32(1), cache, token, seen, tokens, count, laws, going)
        _, cache, _, _, tokens, count, laws, _ = jax.lax.while_loop(goes_on, body, carry)
        return Proposal(tokens, count, laws), cache


def fit(logits: jax.Array, vocab: int) -> jax.Array:
    """Logits of the target's vocabulary: what is beyond it is cut off, what a draft lacks never drafted."""
    more = vocab - logits.shape[-1]
    return (
        logits[..., :vocab] if more <= 0 else jnp.pad(logits, ((0, 0), (0, more)), constant_values=-jnp.inf)
    )


def entropy(logits: jax.Array) -> jax.Array:
    """Of each row's law, in nats."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0), axis=-1)


@pytree
class LookupDraft:
    """What followed the last tokens where they stood before in the request's own text.

    The longest match of up to `ngram` tokens counts, of these the latest; where not even one token stood
    before, nothing is drafted.
    """

    count: int = static(default=8)
    ngram: int = static(default=3)

    def start(self, tokens: np.ndarray, lengths: np.ndarray, room: int) -> tuple[jax.Array, jax.Array]:
        """The prompts, with room behind them, and their lengths."""
        return jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, room))), jnp.asarray(lengths, jnp.int32)

    def keep(self, state, lengths):
        """The text is the request's own: nothing to forget."""
        return state

    def propose(self, state, requests, written, lengths: Int[Array, " B"], on: Bool[Array, " B"]):
        """Up to `count` tokens of the text so far."""
        (prompts, sizes), (B, N) = state, written.tokens.shape
        rows = jnp.arange(B)[:, None]
        text = prompts.at[rows, sizes[:, None] + jnp.arange(N)[None]].set(written.tokens, mode="drop")
        tokens, found = look_up(text, sizes + written.counts, self.ngram, self.count)
        return Proposal(tokens, jnp.where(on, found, 0), None), state


def look_up(
    text: Int[Array, "B S"], ends: Int[Array, " B"], ngram: int, count: int
) -> tuple[Int[Array, "B G"], Int[Array, " B"]]:
    """What followed the last tokens of each text when they stood in it before, and how many these are."""
    S = text.shape[1]
    place = jnp.arange(S)[None]  # of the last token of an earlier occurrence
    matched, going = jnp.zeros(text.shape, jnp.int32), place < ends[:, None] - 1
    for back in range(ngram):
        own = jnp.take_along_axis(text, jnp.maximum(ends - 1 - back, 0)[:, None], axis=1)
        there = jnp.pad(text, ((0, 0), (back, 0)))[:, :S]
        going = going & (there == own) & (place >= back) & (back < ends[:, None])
        matched = matched + going.astype(jnp.int32)
    best = jnp.argmax(matched * S + place, axis=1)
    found = jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0] > 0
    at = best[:, None] + 1 + jnp.arange(count)[None]
    tokens = jnp.take_along_axis(text, jnp.minimum(at, S - 1), axis=1)
    return tokens, jnp.where(found, jnp.clip(ends - 1 - best, 0, count), 0)


def first_layers(model: Decoder, layers: int) -> Decoder:
    """The model with its first layers alone, which share its arrays: a draft that costs no memory.

    Raises ValueError for another model than a `Decoder`, and for no layers or all of them.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"first_layers: the model must be a Decoder, got {type(model).__name__}")
    if not 1 <= layers < model.config.layers:
        raise ValueError(f"first_layers: layers must lie in [1, {model.config.layers}), got {layers}")
    graph, state = nnx.split(model)
    small = nnx.merge(graph, state)
    windows = model.config.windows
    small.config = dataclasses.replace(
        model.config, layers=layers, **({"windows": windows[:layers]} if windows else {})
    )
    small.layers = nnx.List(list(small.layers)[:layers])
    return small
