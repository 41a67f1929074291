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

With `outliers` (section 4.2), so many weights are kept apart in float16 and count for nothing in the tables:
the largest, and those of greatest f (`outliers.py`).

Stored as a `Codebook` whose tables ascend, with outliers as a `DenseAndSparse` around it. Memory: some ten
times AT_ONCE numbers beside rows and weights.

    w = SqueezeLlm(bits=3).quantize(rows, Stats(fisher=fisher), name="layers.0.up", dtype=rows.dtype)

Letters: K inputs, N outputs, m = 2**bits levels.
"""

import dataclasses

import jax

from jaxllm.quant.methods.k_means import k_means, row_keys
from jaxllm.quant.methods.outliers import check_share, put_back, set_apart
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights.codebook import Codebook, from_codes
from jaxllm.weights.sparse import DenseAndSparse


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
        check_share("SqueezeLlm", self.outliers)

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"fisher"})

    def quantize(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> Codebook | DenseAndSparse:
        need(stats, "SqueezeLlm", "fisher")
        assert stats.fisher is not None
        inner, weights, kept = set_apart(rows, stats.fisher, self.outliers, who="SqueezeLlm")
        codes, table = k_means(
            inner,
            weights,
            row_keys(self.seed, name, len(rows)),
            bits=self.bits,
            restarts=self.restarts,
            exact=self.exact,
        )
        base = from_codes(codes, table, bits=self.bits, dtype=dtype)
        return put_back(base, rows, kept, self.outliers)
