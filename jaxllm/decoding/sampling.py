"""From logits to a token: greedy, or a draw after the usual filters.

Order as in Hugging Face: repetition penalty (Keskar et al., arXiv:1909.05858), temperature, top-k, top-p
(Holtzman et al., arXiv:1904.09751), min-p (Nguyen et al., arXiv:2407.01082). A draw is exact in distribution
for the filtered logits (Gumbel-max). Letters: B requests, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.pytree import pytree

DRAFTS, CHANCES = 2**32 - 1, 2**32 - 2  # noise beside that of a request's steps, which never get there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen. The default takes the likeliest token.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens. top_p: keep the likeliest tokens that together reach probability p.
    min_p: keep tokens with at least min_p of the likeliest one's probability.
    repetition_penalty: logits of tokens already in the request are divided (if positive) or multiplied by it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampler: temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampler: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampler: top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampler: min_p must lie in [0, 1], got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"Sampler: repetition_penalty must be positive, got {self.repetition_penalty}")

    def params(self) -> "SamplingParams":
        """The same settings as arrays, so that another temperature needs no new compilation."""
        drawn = self.temperature > 0

        def number(value: float | None) -> jax.Array | None:
            return None if value is None else jnp.asarray(value, jnp.float32)

        return SamplingParams(
            temperature=number(self.temperature if drawn else None),
            top_k=None if self.top_k is None or not drawn else jnp.asarray(self.top_k, jnp.int32),
            top_p=number(self.top_p if drawn else None),
            min_p=number(self.min_p if drawn else None),
            penalty=number(None if self.repetition_penalty == 1 else self.repetition_penalty),
        )


@pytree
class SamplingParams:
    """A sampler as a jitted function sees it: numbers are traced, which of them exist is not."""

    temperature: jax.Array | None  # None is greedy
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    penalty: jax.Array | None


def process_logits(
    logits: Float[Array, "B V"], params: SamplingParams, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Logits after every filter; tokens that cannot be chosen are -inf.

    seen: which tokens each request already holds; needed for the repetition penalty.
    """
    if params.penalty is not None:
        assert seen is not None
        punished = jnp.where(logits > 0, logits / params.penalty, logits * params.penalty)
        logits = jnp.where(seen, punished, logits)
    if params.temperature is None:
        return logits
    logits = logits / params.temperature
    if params.top_k is not None:
        best = jnp.sort(logits, axis=-1, descending=True)
        last = jnp.minimum(params.top_k, logits.shape[-1]) - 1
        logits = jnp.where(logits >= best[:, last][:, None], logits, -jnp.inf)
    if params.top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        best = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        kept = jnp.cumsum(best, axis=-1) - best < params.top_p  # the likeliest always stays
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)
    if params.min_p is not None:
        likely = jax.nn.softmax(logits, axis=-1)
        enough = likely >= params.min_p * likely.max(axis=-1, keepdims=True)
        logits = jnp.where(enough, logits, -jnp.inf)
    return logits


def sample(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    keys,
    steps: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """The next token of each request: drawn with its own key and step, so that its batch does not matter."""
    return draw(process_logits(logits, params, seen), params, keys, steps)


def draw(
    logits: Float[Array, "B V"], params: SamplingParams, keys, steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each request of logits that the filters have left: `sample` behind its filters."""
    if params.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def one(key, step, row):
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(one)(keys, steps, logits).astype(jnp.int32)


def keys_of(purpose: int, keys: Key[Array, " B"]) -> Key[Array, " B"]:
    """Each request's key for noise that its steps do not have: `DRAFTS` or `CHANCES`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def request_keys(seed: int | Sequence[int], B: int) -> Key[Array, " B"]:
    """A random key a request: of one seed folded with its number, or of its own seed whatever its number.

    Seeds may be fewer than B: the requests behind them, which only fill a batch up, get that of 0.
    """
    if isinstance(seed, int):
        return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    seeds = np.zeros((B,), np.uint32)
    seeds[: len(seed)] = np.asarray(seed, np.uint64).astype(np.uint32)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))
