"""Other rules for the columns at 4 bits of 2/4/16-bit weights: what is the choice by gain worth?

A rule gives a number for each column group of 16 inputs; groups get 4 bits in its order, to the same total of
bits as by gain. Letters: K inputs, N outputs, C column groups.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm as jl
from jaxllm.quant.methods.two_bit_fit import column_groups, limits
from jaxllm.quant.statistics import layer_key

Rule = Callable[..., jax.Array]  # (rows [N, K], hessian_diag [K], key) -> [C]


def by_range(rows, hessian_diag, key) -> jax.Array:
    """The sum of the outputs' ranges."""
    g, _, live = column_groups(rows, hessian_diag)
    low, high = limits(g[: rows.shape[0]], live[: rows.shape[0]])
    return (high - low).sum(axis=0)


def by_weight_and_hessian(rows, hessian_diag, key) -> jax.Array:
    """The share of the squared weights, weighted by the inputs' second moments."""
    g, h, _ = column_groups(rows, hessian_diag)
    energy = jnp.sum(h[None] * jnp.square(g[: rows.shape[0]]), axis=(0, 2))
    return energy / jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)


def at_random(rows, hessian_diag, key) -> jax.Array:
    """Uniform numbers."""
    return jax.random.uniform(key, (-(-rows.shape[1] // 16),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByRule(jl.MixedTwoBit):
    """The method with another rule in place of the gain."""

    rule: Rule

    def gains(self, rows, stats, *, name: str = "") -> tuple[np.ndarray, float]:
        """The rule's numbers [C], and the bits that 4 bits cost there."""
        _, cost = super().gains(rows, stats, name=name)
        return np.asarray(self.rule(rows, stats.hessian_diag, layer_key(self.seed, name))), cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneOfFour(jl.MixedTwoBit):
    """The best one of every four consecutive column groups, whatever the target (the paper's figure)."""

    def allocate(
        self, gains: Mapping[str, tuple[np.ndarray, float]], sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """For each weight which column groups get 4 bits."""
        return {name: one_of_four(np.asarray(values)) for name, (values, _) in gains.items()}


def one_of_four(gain: np.ndarray) -> np.ndarray:
    """The best of every four consecutive column groups; none of fewer than four at the end."""
    mask = np.zeros(gain.size, bool)
    best = gain[: gain.size // 4 * 4].reshape(-1, 4).argmax(axis=1)
    mask[np.arange(best.size) * 4 + best] = True
    return mask
