"""SqueezeLLM: each output's weights clustered on a line, weighted by how much the loss feels each. Lossy.

arXiv:2306.07629, section 4.1: the 2**bits levels of a row minimise J = sum_k f_k (w_k - level)^2, f the
diagonal Fisher information (the square of each *sequence's* gradient, summed). Solved as Any-Precision's code
does (arXiv:2402.10517): sorted rows, where clusters are intervals; greedy k-means++; Lloyd's step on the
borders. Ours differs so:

- several starts, the best kept (`restarts=1` is the papers'), or the optimum itself (`exact`): dynamic
  programming over intervals, 2**bits K log K steps a row, also what tests hold the heuristic against;
- float32 on any device: rows are centred and scaled, running sums are kept as pairs of float32 (48 bits), as
  differences of plain ones lose a light cluster that stands behind a heavy one;
- nothing counts for nothing: f is at least 2**-30 of its row's mean, so that clusters of zero weight or fewer
  weighted values than levels are no special cases, and spare levels serve what is left;
- what is random depends on (seed, layer name, row) only: not on the batch, the device or the order.

With `outliers` (section 4.2), so many weights of each block of outputs are kept apart in float16 and count
for nothing in the tables: a ninth of them those of greatest f (the paper's 0.05 of 0.45 %), the others the
largest. The paper's thresholds are of a whole model.

Stored as a `Codebook` whose tables ascend, with outliers as a `DenseAndSparse` around it. Memory: some ten
times AT_ONCE numbers beside rows and weights.

    w = SqueezeLlm(bits=3).quantize(rows, Stats(fisher=fisher), name="layers.0.up", dtype=rows.dtype)

Letters: K inputs, N outputs, m = 2**bits levels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.quant.methods.curvature import importance
from jaxllm.quant.methods.k_means import k_means, row_keys
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights.codebook import Codebook, from_codes
from jaxllm.weights.sparse import DenseAndSparse, block_rows, encode, highest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqueezeLlm:
    """Fisher-weighted k-means of each output's weights.

    restarts: how many starts of Lloyd's algorithm, of which the best is kept. exact: the optimum instead, in
    2**bits K log K steps a row. outliers: the share of weights that are kept in float16, at most 0.05; None
    for none.
    """

    bits: int = 3
    seed: int = 0
    restarts: int = 8
    exact: bool = False
    outliers: float | None = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"SqueezeLlm: bits must be 1 to 8, got bits={self.bits}")
        if self.restarts < 1:
            raise ValueError(f"SqueezeLlm: restarts must be at least 1, got restarts={self.restarts}")
        if self.outliers is not None and not 0 < self.outliers <= 0.05:
            raise ValueError(f"SqueezeLlm: outliers must be above 0, at most 0.05, got {self.outliers}")

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"fisher"})

    def quantize(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> Codebook | DenseAndSparse:
        need(stats, "SqueezeLlm", "fisher")
        assert stats.fisher is not None
        N, K = rows.shape
        weights, inner, kept, m = importance(rows, stats.fisher), rows, None, 0
        if self.outliers is not None:
            m = max(1, int(self.outliers * block_rows(K) * K))
            kept = _outliers(rows, stats.fisher, m)
            inner = jnp.where(kept, 0.0, rows)
            weights = importance(inner, stats.fisher)
        codes, table = k_means(
            inner,
            weights,
            row_keys(self.seed, name, N),
            bits=self.bits,
            restarts=self.restarts,
            exact=self.exact,
        )
        base = from_codes(codes, table, bits=self.bits, dtype=dtype)
        return base if kept is None else encode(base, rows, kept, m)


@functools.partial(jax.jit, static_argnames="m")
def _outliers(rows: Float[Array, "N K"], fisher: Float[Array, "N K"], m: int) -> Bool[Array, "N K"]:
    """Of each block of outputs, the m weights that no table should have to serve."""
    felt = highest(fisher, m // 9)
    return felt | highest(jnp.where(felt, 0.0, jnp.abs(rows)), m - m // 9)
