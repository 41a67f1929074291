"""From logits to a token: greedy, or a draw after the usual filters.

Order as in Hugging Face: repetition penalty (Keskar et al., arXiv:1909.05858), temperature, top-k, top-p
(Holtzman et al., arXiv:1904.09751), min-p (Nguyen et al., arXiv:2407.01082). A draw is exact in distribution
for the filtered logits (Gumbel-max). Letters: B requests, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.pytree import pytree


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

    def plan(self) -> "Plan":
        """The same settings as arrays, so that another temperature needs no new compilation."""
        drawn = self.temperature > 0
        number = lambda value: None if value is None else jnp.asarray(value, jnp.float32)  # noqa: E731
        return Plan(
            temperature=number(self.temperature if drawn else None),
            top_k=None if self.top_k is None or not drawn else jnp.asarray(self.top_k, jnp.int32),
            top_p=number(self.top_p if drawn else None),
            min_p=number(self.min_p if drawn else None),
            penalty=number(None if self.repetition_penalty == 1 else self.repetition_penalty),
        )


@pytree
class Plan:
    """A sampler as a jitted function sees it: numbers are traced, which of them exist is not."""

    temperature: jax.Array | None  # None is greedy
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    penalty: jax.Array | None


def filtered(
    logits: Float[Array, "B V"], plan: Plan, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Logits after every filter of the plan; tokens that cannot be chosen are -inf.

    seen: which tokens each request already holds; needed for the repetition penalty.
    """
    if plan.penalty is not None:
        assert seen is not None
        punished = jnp.where(logits > 0, logits / plan.penalty, logits * plan.penalty)
        logits = jnp.where(seen, punished, logits)
    if plan.temperature is None:
        return logits
    logits = logits / plan.temperature
    if plan.top_k is not None:
        best = jnp.sort(logits, axis=-1, descending=True)
        last = jnp.minimum(plan.top_k, logits.shape[-1]) - 1
        logits = jnp.where(logits >= best[:, last][:, None], logits, -jnp.inf)
    if plan.top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        best = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        kept = jnp.cumsum(best, axis=-1) - best < plan.top_p  # the likeliest always stays
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)
    if plan.min_p is not None:
        likely = jax.nn.softmax(logits, axis=-1)
        enough = likely >= plan.min_p * likely.max(axis=-1, keepdims=True)
        logits = jnp.where(enough, logits, -jnp.inf)
    return logits


def choose(
    logits: Float[Array, "B V"],
    plan: Plan,
    keys,
    steps: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """The next token of each request: drawn with its own key and step, so that its batch does not matter."""
    logits = filtered(logits, plan, seen)
    if plan.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = lambda key, step, row: jax.random.categorical(jax.random.fold_in(key, step), row)  # noqa: E731
    return jax.vmap(draw)(keys, steps, logits).astype(jnp.int32)
