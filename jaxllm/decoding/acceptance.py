"""Whether a drafted token stands, and what stands in its place: exact for the target's law.

At one position p is the target's law and q the draft's, both after the sampler's filters:

    token           x ~ q, u ~ U(0, 1): x stands iff u q(x) < p(x), else a draw from r = max(p - q, 0) / sum
                    P(out = y) = min(p, q)(y) + (1 - beta) r(y) = p(y), beta = sum min(p, q)
                    (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). No other rule keeps
                    more drafts of one position.
    block           drafts x_1 .. x_G are looked at together: with the joint chance
                        J_0 = 1,  J_i = min(1, J_(i - 1) p(x_i) / q(x_i))
                    the longest of the beginnings i stands for which u_i < h_i,
                        h_G = J_G,  h_i = m_i / (m_i + 1 - J_i),  m_i = sum max(J_i p - q, 0) behind x_i,
                    and a draw from max(J_i p - q, 0) / m_i follows, or from p behind x_G: a token that is
                    likelier than drafted pays for the next, and on average never fewer stand (Sun et al.,
                    arXiv:2403.10444). All drafts are looked at, so no noise of a block may come again
    noise           target and draft draw by the same Gumbel noise, and x stands iff the target drew it:
                    token for token what the target gives alone, whatever is drafted and however many drafts
                    are looked at. It keeps at least (1 - TV) / (1 + TV) of them, TV = 1 - beta
                    (Daliri et al., arXiv:2408.07978).

A draft that names a token without a law (looked up in the text) is q(x) = 1. Greedy: both are "x is the
likeliest". That a position is looked at must be decided before its token is known, or the law is biased
(speculative verification says how); by shared noise it is not.

Letters: B requests, V vocabulary.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Verification = Literal["token", "block", "noise"]
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
    p: Float[Array, "B V"],
    q: Float[Array, "B V"] | None,
    token: Int[Array, " B"],
    joint: Float[Array, " B"] | None = None,
) -> Float[Array, "B V"]:
    """The law of what stands in place of a draft that does not, sums to 1.

    joint: J of the block's beginning; None: 1, each draft by itself.
    """
    left = surplus(p, q, token, joint)
    mass = left.sum(axis=1, keepdims=True)
    return jnp.where(mass > LEAST, left / jnp.where(mass > LEAST, mass, jnp.ones((), p.dtype)), p)


def surplus(
    p: Float[Array, "B V"],
    q: Float[Array, "B V"] | None,
    token: Int[Array, " B"],
    joint: Float[Array, " B"] | None = None,
) -> Float[Array, "B V"]:
    """max(J p - q, 0): what the target's law has beyond the draft's."""
    p = p if joint is None else joint[:, None] * p
    if q is None:
        q = (jnp.arange(p.shape[1])[None] == token[:, None]).astype(p.dtype)
    return jnp.maximum(p - q, jnp.zeros((), p.dtype))


def joint_after(
    joint: Float[Array, " B"], p: Float[Array, "B V"], q: Float[Array, "B V"] | None, token: Int[Array, " B"]
) -> Float[Array, " B"]:
    """J behind one more draft."""
    of_target = jnp.take_along_axis(p, token[:, None], axis=1)[:, 0]
    of_draft = jnp.ones_like(joint) if q is None else jnp.take_along_axis(q, token[:, None], axis=1)[:, 0]
    tiny = jnp.finfo(p.dtype).tiny  # what a draft drew has a chance there
    return jnp.minimum(joint * of_target / jnp.maximum(of_draft, tiny), jnp.ones((), p.dtype))


def chance_of_beginning(
    joint: Float[Array, " B"], p: Float[Array, "B V"], q: Float[Array, "B V"] | None, token: Int[Array, " B"]
) -> Float[Array, " B"]:
    """h: how likely a beginning of a block stands at least, behind which p, q and the draft `token` come."""
    more = surplus(p, q, token, joint).sum(axis=1)
    rest = jnp.ones((), p.dtype) - joint
    both = more + rest
    return jnp.where(both > LEAST, more / jnp.where(both > LEAST, both, jnp.ones((), p.dtype)), joint)
