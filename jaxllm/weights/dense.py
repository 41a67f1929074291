"""The plain format: every number of the weight as it is. Lossless.

The logical shape is [K, N], K inputs and N outputs, and `y = x @ w`. Stored as `rows` [N, K], one row an
output: the order of every checkpoint, so that a file is mapped and never transposed, and for a
single row on a CPU each output is one contiguous dot product.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxllm.ops.gather import gather
from jaxllm.pytree import pytree


@pytree
class Dense:
    """A [K, N] weight held as its N output rows.

    holds: rows.shape == (N, K); rows.dtype == dtype
    """

    rows: jax.Array  # [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        N, K = self.rows.shape
        return K, N

    @property
    def dtype(self):
        return self.rows.dtype

    def dequantize_rows(self, dtype) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        return self.rows.astype(dtype)

    can_gather_rows = True

    def gather_rows(self, index: Int[Array, " n"]) -> "Dense":
        """The weight of some outputs."""
        return Dense(gather(self.rows, index))

    def partition_specs(self, spec: PartitionSpec) -> "Dense":
        """Where the leaf goes when the logical [K, N] axes are laid out as `spec`."""
        K, N = spec
        return jax.tree.map(lambda rows: PartitionSpec(N, K), self)
