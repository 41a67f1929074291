"""The feed-forward part of a layer as a choice of experts: each token reads few of many (arXiv:1701.06538).

    shares, chosen = the greatest of router(x), softmax over them (or over all, without `renormalize`)
    mlp(x) = sum over the chosen e:  share_e * down_e(act(gate_e(x)) * up_e(x))

GPT-OSS has biases everywhere here, cuts gates off at `glu_limit` from above and ups from both sides, and adds
1 to those.

The router is float32 and stays as it is when the experts are quantized: its choices are what they were
calibrated for. Experts are stored stacked (`weights/experts.py`) and multiplied by groups
(`models/grouped.py`). Which experts a token reads depends on nothing but the token.

Letters: B batch, T tokens, D width, F inner width of an expert, X experts, S experts of a token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.grouped import Groups, group, grouped_matmul
from jaxllm.models.layers import ACTIVATIONS, broadcast_last, constant, normal, weight
from jaxllm.models.taps import Tap, probe, scoped
from jaxllm.weights.experts import Experts
from pallas_kernels.dot import dot


class Router(nnx.Module):
    """Which experts each token reads, and how much of each."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs | None, dtype):
        c = config
        self.weight = nnx.Param(normal(rngs, (c.experts, c.width), c.width**-0.5, dtype))
        self.bias = nnx.Param(constant(rngs, c.experts, 0.0, dtype)) if c.expert_bias else None
        self.per_token, self.renormalize = c.experts_per_token, c.renormalize

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T S"], Int[Array, "B T S"]]:
        """Shares and experts, the greatest share first."""
        logits = dot(x, self.weight.get_value())
        if self.bias is not None:
            logits = logits + broadcast_last(self.bias.get_value().astype(jnp.float32), logits)
        found, chosen = jax.lax.top_k(logits, self.per_token)
        if self.renormalize:  # a softmax over all, divided by its sum over the chosen, is one over the chosen
            return jax.nn.softmax(found, axis=-1), chosen
        return jnp.exp(found - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


class ExpertLinear(nnx.Module):
    """The same linear of all experts: `y = x @ w_e`, e the expert of each row of `x`."""

    def __init__(self, X: int, K: int, N: int, *, bias: bool, rngs: nnx.Rngs | None, dtype):
        self.w = nnx.Param(Experts(weight(rngs, (X, N, K), K**-0.5, dtype)))
        self.biases = nnx.Param(normal(rngs, (X, N), 0.0, dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "B T S K"], groups: Groups, assigned: jax.Array, tap: Tap | None
    ) -> Float[Array, "B T S N"]:
        """assigned: bool [B, T, S, X], the expert of each row, for taps."""
        probe(tap, "assigned", assigned)
        x = probe(tap, "in", x)
        rows, w = x.reshape(-1, x.shape[-1]), self.w.get_value()
        if self.biases is None:
            y = grouped_matmul(rows, w, groups)
        else:
            y = grouped_matmul(rows, w, groups, jnp.float32)
            y = (y + self.biases.get_value().astype(jnp.float32)[groups.chosen]).astype(x.dtype)
        return probe(tap, "out", y.reshape(*x.shape[:-1], -1))


class ExpertMlp(nnx.Module):
    """A router and X gated mlps (arXiv:2401.04088)."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs | None, dtype):
        c = config

        def linear(K: int, N: int) -> ExpertLinear:
            return ExpertLinear(c.experts, K, N, bias=c.expert_bias, rngs=rngs, dtype=dtype)

        self.router = Router(c, rngs=rngs, dtype=dtype)
        self.gate = linear(c.width, c.expert_ffn)
        self.up = linear(c.width, c.expert_ffn)
        self.down = linear(c.expert_ffn, c.width)
        self.activation, self.limit, self.experts = c.activation, c.glu_limit, c.experts

    def __call__(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T D"]:
        shares, chosen = self.router(x)
        groups = group(chosen.reshape(-1), experts=self.experts)
        assigned = jax.nn.one_hot(chosen, self.experts, dtype=bool)
        rows = jnp.broadcast_to(x[:, :, None], (*chosen.shape, x.shape[-1]))
        gate = self.gate(rows, groups, assigned, scoped(tap, "gate"))
        up = self.up(rows, groups, assigned, scoped(tap, "up"))
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit) + 1
        inner = ACTIVATIONS[self.activation](gate) * up
        y = self.down(inner, groups, assigned, scoped(tap, "down")).astype(jnp.float32)
        return jnp.sum(y * shares[..., None], axis=2).astype(x.dtype)
