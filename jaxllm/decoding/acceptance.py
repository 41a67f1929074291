"""Whether a drafted token stands, and what stands in its place: exact for the target's law.

At one position p is the target's law and q the draft's, both after the sampler's filters:

    residual        x ~ q, u ~ U(0, 1): x stands iff u q(x) < p(x), else a draw from r = max(p - q, 0) / sum
                    P(out = y) = min(p, q)(y) + (1 - beta) r(y) = p(y), beta = sum min(p, q)
                    (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). No other rule keeps
                    more drafts of one position.
    shared noise    target and draft draw by the same Gumbel noise, and x stands iff the target drew it:
                    token for token what the target gives alone, whatever is drafted and however many drafts
                    are looked at. It keeps at least (1 - TV) / (1 + TV) of them, TV = 1 - beta
                    (Daliri et al., arXiv:2408.07978).

A draft that names a token without a law (looked up in the text) is q(x) = 1. Greedy: both are "x is the
likeliest". That a position is looked at must be decided before its token is known, or the law is biased
(speculative verification says how); by shared noise it is not.

Letters: B requests, V vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LEAST = 1e-7  # mass of a residual that is rounding: p and q are equal there, and p is drawn from


def stands(
    p: Float[Array, "B V"], q: Float[Array, "B V"] | None, token: Int[Array, " B"], u: Float[Array, " B"]
) -> Bool[Array, " B"]:
    """Whether each drafted token stands.

    p, q: laws; q None where the draft is a token and no law. u: uniform in [0, 1), of nothing else.
    """
    of_target = jnp.take_along_axis(p, token[:, None], axis=1)[:, 0]
    of_draft = 1.0 if q is None else jnp.take_along_axis(q, token[:, None], axis=1)[:, 0]
    return u * of_draft < of_target


def residual(
    p: Float[Array, "B V"], q: Float[Array, "B V"] | None, token: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """The law of what stands in place of a draft that does not, sums to 1."""
    if q is None:
        left = jnp.where(jnp.arange(p.shape[1])[None] == token[:, None], jnp.zeros((), p.dtype), p)
    else:
        left = jnp.maximum(p - q, jnp.zeros((), p.dtype))
    mass = left.sum(axis=1, keepdims=True)
    return jnp.where(mass > LEAST, left / jnp.where(mass > LEAST, mass, jnp.ones((), p.dtype)), p)
