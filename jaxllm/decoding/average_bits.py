"""An average of bits that decoding is held to, whatever a text asks for: lossy, as the targets are.

DP-LLM (arXiv:2508.06041) sets thresholds on calibration text, and other text reads other averages. Here what
steps read too few is summed up and paid back: each step runs at the target nearest to what is wanted then,

    wanted + GAIN * owed        owed += wanted - bits read, on average over the requests that go on

an integral controller inside the compiled loop. The average over steps is `wanted` up to owed / steps, and
may lie between targets. On the host, from outside, `precision.BitsObjective` does the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.models.linears import linear_weights
from jaxllm.pytree import pytree
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, is_adaptive

GAIN = 0.5  # the share of what is owed that one step makes good


@pytree
class AverageBits:
    """The average that is wanted, and what has been read so far."""

    wanted: jax.Array  # float32 scalar
    owed: jax.Array  # float32 scalar: what steps read too few, summed
    read: jax.Array  # float32 [B]: bits a weight of each request's tokens, summed

    def aim(self, model):
        """The model at the target nearest to what is wanted now."""
        return at_nearest_target(model, self.wanted + GAIN * self.owed)

    def after(self, bits: Float[Array, " B"], on: Bool[Array, " B"]) -> "AverageBits":
        """What is owed once a step has read so many bits for the requests that went on."""
        bits = jnp.where(on, bits, 0.0)
        mean = bits.sum() / jnp.maximum(on.sum(), 1).astype(jnp.float32)
        return dataclasses.replace(self, owed=self.owed + self.wanted - mean, read=self.read + bits)


def start(model, wanted: float, B: int) -> AverageBits:
    """Nothing read yet; ValueError where the model's targets do not have `wanted` between them."""
    targets = next((w.targets for w in linear_weights(model).values() if isinstance(w, AdaptivePlanes)), ())
    if not targets:
        raise ValueError(
            "generate: average_bits is of a model that chooses its widths (attach_precision), got another"
        )
    if not targets[0] <= wanted <= targets[-1]:
        raise ValueError(
            f"generate: average_bits must lie within the model's targets, {targets[0]:g} to {targets[-1]:g}, "
            f"got {wanted}"
        )
    zero = jnp.zeros((), jnp.float32)
    return AverageBits(jnp.float32(wanted), zero, jnp.zeros((B,), jnp.float32))


def at_nearest_target(model, bits: Float[Array, ""]):
    """The model at the target nearest to so many bits, of two the upper one."""

    def one(w):
        if not is_adaptive(w):
            return w
        falling = jnp.asarray(w.targets[::-1], jnp.float32)
        target = len(w.targets) - 1 - jnp.argmin(jnp.abs(falling - bits)).astype(jnp.int32)
        return dataclasses.replace(w, target=target)

    return jax.tree.map(one, model, is_leaf=is_adaptive)
