"""Weights in a rotated basis, so that activations, too, can be rounded to 8 or 4 bits. Lossy.

Papers: S. Ashkboos et al., "QuaRot" (arXiv:2404.00456); Z. Liu et al., "SpinQuant" (arXiv:2405.16406);
under GuidedQuant's solvers: arXiv:2505.07004, section 5.3 (W4A4KV4). With Q orthogonal (`hadamard.py`),

    x @ W = (x Q) @ (Q^T W) ~ step * (codes @ base),     step = clip max |x Q| / P,  codes = round(x Q / step)

a step a token, codes -P .. P, P = 2**(activation_bits - 1) - 1. A few great inputs, which would leave 4 bits
for nothing else, are spread over all. `base` is any other method's weight of Q^T W. Ours differs:

- every linear turns its own input as it comes; nothing is folded into norms or neighbours, so any model, any
  choice of linears and any base will do, and q, k and v, which turn the same input alike, do it once;
- any K: the papers need a Hadamard matrix of its size, or store a learned Q;
- the base's solver sees statistics of turned inputs, Q^T H Q, guided ones as well: a turn of the inputs
  leaves a token's weight s_t as it was, so any number of groups of outputs is exact (where outputs are
  turned, too, only one is: GuidedQuant dossier 2.4);
- activations are symmetric, weights whatever the base is.

Where the base is affine with one scale an output (`group_size` at least K: "per channel") the product is one
of int8 numbers in int32. Else it is the float product of the same whole numbers, in x's type: equal to
rounding. On a mesh that cuts K, x is gathered before it is turned; the product is cut as the base's.

    Rotate(base=Gptq(bits=4), activation_bits=4).quantize(rows, stats, name="up", dtype=jnp.float32)

Memory: the base's, and one more copy of the rows and of each H. With 16 bits x Q is not rounded.
Letters: K inputs, N outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import hadamard
from jaxllm.quant.methods.gptq import Gptq
from jaxllm.quant.statistics import Method, Stats, need, output_groups_of
from jaxllm.weights.rotated import Rotated

PER_INPUT = frozenset({"mean", "thresholds", "fisher"})  # of one input each: they do not turn with the inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate:
    """Another method on rotated weights, and activations of 4, 8 or (16) all bits.

    clip: of the range of activations. seed: of the signs, best the same in all linears. The base must not
    want what cannot be rotated (AWQ's means, Fisher information by weight, DecDEC's thresholds).
    """

    base: Method = Gptq(bits=4, group_size=32, guided=True)
    activation_bits: int = 4
    clip: float = 0.9
    seed: int = 0

    def __post_init__(self):
        if self.activation_bits not in (4, 8, 16):
            raise ValueError(f"rotate: activation_bits must be 4, 8 or 16, got {self.activation_bits}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"rotate: clip must lie in (0, 1], got clip={self.clip}")
        fixed = self.base.required_stats & PER_INPUT
        if fixed:
            raise ValueError(f"rotate: the base must not want what cannot be rotated, got {sorted(fixed)}")

    @property
    def required_stats(self) -> frozenset[str]:
        diagonal, of_base = frozenset({"hessian_diag"}), self.base.required_stats
        return of_base - diagonal | {"hessian"} if of_base & diagonal else of_base

    @property
    def output_groups(self) -> int:
        """Of outputs, for guided curvature: the base's."""
        return output_groups_of(self.base)

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Rotated:
        """The base's solution for the rotated rows."""
        if "hessian_diag" in self.base.required_stats:
            need(stats, "rotate", "hessian")
        turned = jax.jit(hadamard.rotate, static_argnums=1)(rows, self.seed)
        base = self.base.quantize(turned, rotated(stats, self.seed), name=name, dtype=dtype)
        return Rotated(base, self.activation_bits, self.clip, self.seed)


def rotated(stats: Stats, seed: int) -> Stats:
    """What calibration would have measured of rotated inputs; None for what cannot be known."""
    found = {name: getattr(stats, name) for name in ("hessian", "held_out", "guided_hessian", "sample")}
    new = jax.jit(_rotated, static_argnums=1)(found, seed)
    if new["hessian"] is not None:
        held = new["held_out"]  # tokens that are not in "hessian", but are in its diagonal
        new["hessian_diag"] = jnp.diag(new["hessian"]) + (0.0 if held is None else jnp.diag(held))
    return Stats(**new, tokens=stats.tokens)


def _rotated(found: dict[str, Any], seed: int) -> dict[str, Any]:
    def curvature(h):
        if h is None:
            return None
        half = jnp.swapaxes(hadamard.rotate(h, seed), -1, -2)  # Q^T H
        whole = hadamard.rotate(half, seed)
        return (whole + jnp.swapaxes(whole, -1, -2)) / 2

    sample = found["sample"]
    new = {name: curvature(found[name]) for name in ("hessian", "held_out", "guided_hessian")}
    return new | {"sample": None if sample is None else hadamard.rotate(sample, seed)}
