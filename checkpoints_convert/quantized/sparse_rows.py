"""Single weights of a linear by outputs (compressed sparse rows), as Any-Precision's files have them.

    rows int32 [N + 1]      the first place in `cols` of each output, and the end of the last
    cols int32 [n]          the input of each weight, ascending in an output
    vals float16 [n]        what is added to the level that stands there

In ours they lie in blocks of outputs (`jaxllm/weights/sparse.py`).

    SparseRows.of_tensors(tensors, K, N).part(base, 0, N)               # DenseAndSparse
    SparseRows.of_weight(w).cols
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoints_convert.quantized.words import Tensors, on_host
from jaxllm.weights.sparse import DenseAndSparse, block_rows


@dataclasses.dataclass(frozen=True)
class SparseRows:
    """The single weights of N outputs of K inputs."""

    rows: np.ndarray
    cols: np.ndarray
    vals: np.ndarray

    @classmethod
    def of_tensors(cls, tensors: Tensors, K: int, N: int) -> "SparseRows":
        """The single weights of a file, whose shapes are right; ValueError for places that are none."""
        rows, cols, vals = (np.asarray(tensors[name]) for name in ("rows", "cols", "vals"))
        if rows[0] != 0 or rows[N] != cols.size or (rows[1:] < rows[:-1]).any():  # int32 differences may wrap
            raise ValueError(f"rows must ascend from 0 to {cols.size}, got {rows[0]} to {rows[N]}")
        if cols.size and not 0 <= cols.min() <= cols.max() < K:
            raise ValueError(f"cols must be below {K}, got {cols.min()} to {cols.max()}")
        output = np.repeat(np.arange(N), np.diff(rows))
        if (np.diff(output * np.int64(K) + cols) <= 0).any():
            raise ValueError("cols must ascend in each output, got some that do not")
        return cls(rows, cols, vals)

    @classmethod
    def of_weight(cls, w: DenseAndSparse) -> "SparseRows":
        """Those of our weight; an added 0 is none."""
        K, N = w.shape
        values, places = np.asarray(w.kept), np.asarray(w.places)
        at = np.nonzero(values)
        output = at[0] * block_rows(K) + places[at] // K
        order = np.lexsort((places[at] % K, output))
        rows = np.concatenate([[0], np.cumsum(np.bincount(output, minlength=N))])
        return cls(rows.astype(np.int32), (places[at] % K)[order].astype(np.int32), values[at][order])

    @classmethod
    def none(cls, N: int) -> "SparseRows":
        """Those of N outputs that have none."""
        return cls(np.zeros(N + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float16))

    @classmethod
    def stacked(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        """Those of several weights along the outputs."""
        starts = np.cumsum([0, *(part.cols.size for part in parts)])
        rows = [part.rows[:-1] + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            np.concatenate([*rows, starts[-1:]]).astype(np.int32),
            np.concatenate([part.cols for part in parts]),
            np.concatenate([part.vals for part in parts]),
        )

    def part(self, base: Any, start: int, stop: int) -> DenseAndSparse:
        """Some outputs' weights, added to a base of these outputs."""
        K, N = base.shape
        R, rows = block_rows(K), self.rows[start : stop + 1]
        taken = slice(rows[0], rows[-1])
        output = np.repeat(np.arange(N), np.diff(rows))
        block = output // R
        counts = np.bincount(block, minlength=-(-N // R))
        slot = np.arange(block.size) - (np.cumsum(counts) - counts)[block]
        values = np.zeros((counts.size, max(1, counts.max())), np.float16)
        places = np.zeros(values.shape, np.uint16)
        values[block, slot] = self.vals[taken]
        places[block, slot] = output % R * K + self.cols[taken]
        return on_host(DenseAndSparse, base=base, kept=values, places=places, added=True)
