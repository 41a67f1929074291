"""Losses of pico: cross entropy of text and answers, and distillation from a teacher."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.decoder import Decoder


def log_likelihood(
    model: Decoder, tokens: Int[Array, "B S"]
) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """Log-probabilities of every token behind the first, and of those that came; T = S - 1."""
    logits, _ = model(tokens[:, :-1])
    logp = jax.nn.log_softmax(logits)
    return logp, jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def _answered(logp: Float[Array, "B T V"], batch: Mapping[str, Array]) -> dict[str, Array]:
    """Share of the exercises' answer tokens that greedy decoding would get right."""
    right = (jnp.argmax(logp, -1) == batch["tokens"][:, 1:]) & batch["answers"]
    share = right.sum().astype(jnp.float32) / jnp.maximum(batch["answers"].sum().astype(jnp.float32), 1.0)
    return {"answers": share}


def cross_entropy(model: Decoder, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Weighted negative log-likelihood, in nats a token."""
    logp, came = log_likelihood(model, batch["tokens"])
    return -jnp.mean(came * batch["weights"]), _answered(logp, batch)


def distil(
    models: Mapping[str, Decoder], batch: Mapping[str, Array], *, share: float = 0.7
) -> tuple[Array, dict[str, Array]]:
    """`share` of the divergence from the teacher's distribution, the rest cross entropy.

    models: {"student", "teacher"}; train with `trainable=student_only`.
    """
    logp, came = log_likelihood(models["student"], batch["tokens"])
    teacher = log_likelihood(models["teacher"], batch["tokens"])[0]
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - logp), axis=-1)
    loss = share * divergence - (1 - share) * came
    return jnp.mean(loss * batch["weights"]), _answered(logp, batch)


def student_only(path: str, leaf: Any) -> bool:
    """Whether a leaf of {"student", "teacher"} belongs to the student."""
    return path.startswith("['student']")
