"""What rounding lost, kept in host memory, and fetched for the few inputs that matter to this very token.

Paper: Y. Park et al., "DecDEC: A Systems Approach to Advancing Low-Bit LLM Quantization" (OSDI 2025,
arXiv:2412.20185), sections 4.2 (residual) and 4.3 (selection). With R = W - base and M the k
inputs of greatest |x|, as a calibrated table of thresholds tells them:

    y = x @ base + ((x * M) @ Q) * S        Q: whole codes of R, one row an *input*;  S: one scale an output

Ours differs: any format is the base; any number of tokens, each with its own inputs; selection is
deterministic (the lowest index first where a bucket overflows); the sum is in float32; NaN counts as 0; an
output without residual gets scale 0 (the official search divides by zero); scales are float32 in natural
order and stay on the device, so that fused layers are concatenated layers.

Layout: codes q + 2**(bits - 1) packed along N (4 bits: code j of a word at bit 4 j, as in the paper), so that
what an input needs is one contiguous run; 16 bits are plain float16. They lie in pinned host memory: the
method puts them there, and `jl.load` and `jl.shard` do again (`to_host`). On a CPU that is ordinary memory:
what can be known there is the bytes fetched, not their speed.

Lossy; with k_chunk = 0 the base, bit for bit; with k_chunk = 1024 the base plus the whole coded residual.

    w = DecDec(base=Rtn(bits=3), k_chunk=8).quantize(rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
    y = matmul(x, w.base) + compensation(x, w)                  # what weights.matmul does

Letters: K inputs, N outputs, k inputs fetched a token, R tokens, *B any leading axes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.quant.statistics import Method, Stats, layer_key, need, output_groups_of
from jaxllm.weights.host_residual import (
    INPUTS_PER_CHUNK,
    RESIDUAL_BITS,
    HostResidual,
    Selector,
    edges,
    encode,
    to_host,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecDec:
    """Another method's weight, and its residual by input in host memory.

    k_chunk: inputs fetched of each 1024; fewer than 1024 / K of them is none. selector: "bucket" is the
    paper's; "exact", "static" (by the diagonal) and "random" are what it is compared with.
    """

    base: Method
    residual_bits: int = 4
    k_chunk: int = 8
    selector: Selector = "bucket"
    seed: int = 0

    def __post_init__(self):
        if self.residual_bits not in RESIDUAL_BITS:
            raise ValueError(f"DecDec: residual_bits must be 2, 4, 8 or 16, got {self.residual_bits=}")
        if not 0 <= self.k_chunk <= INPUTS_PER_CHUNK:
            raise ValueError(f"DecDec: k_chunk must be 0 to {INPUTS_PER_CHUNK}, got {self.k_chunk=}")
        if self.selector not in ("bucket", "exact", "static", "random"):
            raise ValueError(
                f"DecDec: selector must be bucket, exact, static or random, got {self.selector=}"
            )

    @property
    def required_stats(self) -> frozenset[str]:
        own = {"bucket": {"thresholds"}, "static": {"hessian_diag"}}.get(self.selector, set())
        return self.base.required_stats | own

    @property
    def output_groups(self) -> int:
        """Of outputs, in the guided Hessians that the base wants."""
        return output_groups_of(self.base)

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> HostResidual:
        """The base's weight, and 4-bit codes of what it lacks. Holds three arrays of [N, K]."""
        N, K = rows.shape
        base: Any = self.base.quantize(rows, stats, name=name, dtype=dtype)
        codes, scale = jax.jit(encode, static_argnames="bits")(
            rows.astype(jnp.float32) - base.dequantize_rows(jnp.float32), bits=self.residual_bits
        )
        state = self._selector_state(stats, name, K)
        made = HostResidual(base, codes, scale, state, self.k_chunk, self.selector, (K, N), jnp.dtype(dtype))
        return to_host(made)

    def _selector_state(self, stats: Stats, name: str, K: int) -> jax.Array | None:
        match self.selector:
            case "bucket":
                need(stats, "DecDec", "thresholds")
                assert stats.thresholds is not None
                if stats.thresholds.shape != (K,):
                    raise ValueError(f"DecDec: thresholds must be [K], got {stats.thresholds.shape=}, {K=}")
                return edges(stats.thresholds, self.k_chunk)
            case "static":
                need(stats, "DecDec", "hessian_diag")
                return stats.hessian_diag
            case "random":
                return jax.random.uniform(layer_key(self.seed, name), (K,))
            case _:
                return None
