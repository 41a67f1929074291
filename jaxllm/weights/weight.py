"""What every stored weight is: the contract of the formats.

A weight of K inputs and N outputs, in whatever format, holds:

    shape == (K, N)                               static: known while tracing
    dtype                                         what it was quantized from: the type of its numbers
    dequantize_rows(t).shape == (N, K)            one row an output, of type t
    y == x @ dequantize_rows(t).T                 y [*B, N] for x [*B, K], unless a format rounds x as well
    tree.structure(partition_specs(P(k, n))) == tree.structure(w)
                                                  a PartitionSpec in place of each leaf

and where rows lie by themselves (`RowWeight`), for index [n] of outputs:

    gather_rows(index).shape == (K, n)            the same format, of these outputs alone
    gather_rows(index).dequantize_rows(t) == dequantize_rows(t)[index]

Each format's docstring adds what holds of its own arrays. Formats are frozen pytrees (`pytree.py`): they are
traced, mapped, donated and stacked as arrays are, so leaves may be tracers, shapes or have leading axes.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int


@runtime_checkable
class Weight(Protocol):
    """A stored [K, N] weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        ...

    @property
    def dtype(self) -> Any:
        """The numpy dtype that it was quantized from."""
        ...

    def dequantize_rows(self, dtype) -> jax.Array:
        """The weight's rows [N, K] as numbers, one an output."""
        ...

    def partition_specs(self, spec: PartitionSpec) -> "Weight":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        ...


@runtime_checkable
class RowWeight(Weight, Protocol):
    """A weight whose rows lie by themselves: what an embedding can be stored as."""

    @property
    def can_gather_rows(self) -> bool:
        """Whether they do in this one."""
        ...

    def gather_rows(self, index: Int[Array, " n"]) -> "Weight":
        """The weight [K, n] of some outputs: nothing else is read."""
        ...
