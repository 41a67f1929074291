"""How rows of a cache lie in a tile of the Triton kernel: columns, their groups, and rows side by side.

Letters: E head size, X columns of a chunk.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.coded import Code
from pallas_kernels.decode_attention.digits import fields_of_half


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows lie in a tile: `parts` of them side by side, each so many columns wide.

    A column is a number of a plain row, or a half of a word of a coded one, with `fields` numbers.
    """

    E: int
    code: Code | None
    parts: int

    @property
    def fields(self) -> int:
        return 1 if self.code is None else fields_of_half(self.code.bits)

    @property
    def columns(self) -> int:
        """Of a row."""
        return -(-self.E // self.fields)

    @property
    def width(self) -> int:
        """Columns of a row, filled up to a power of two."""
        return pl.next_power_of_2(self.columns)

    @property
    def groups(self) -> int:
        return 1 if self.code is None else -(-self.E // self.code.group_size)

    def chunks(self) -> list["Chunk"]:
        """All columns: at once if they have one group, else about a group at a time."""
        whole = self.parts * self.width
        size = whole if self.groups == 1 else pl.next_power_of_2(self.columns // self.groups + 1) // 2
        size = max(16, size)
        found = [Chunk(self, first, size) for first in range(0, whole, size)]
        return [chunk for chunk in found if chunk.groups()]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring columns of rows that stand side by side."""

    rows: Rows
    first: int
    size: int

    def columns(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each column, which of the rows it is of, its number there, and whether there is one."""
        c = self.first + lax.iota(jnp.int32, self.size)
        part, column = lax.div(c, self.rows.width), lax.rem(c, self.rows.width)
        return part, column, (part < self.rows.parts) & (column < self.rows.columns)

    def groups(self) -> list[int]:
        """Those of which it has numbers."""
        rows, found = self.rows, set()
        for c in range(self.first, min(self.first + self.size, rows.parts * rows.width)):
            for e in range(c % rows.width * rows.fields, (c % rows.width + 1) * rows.fields):
                if e < rows.E:
                    found.add(0 if rows.code is None else e // rows.code.group_size)
        return sorted(found)

    def numbers(self, field: int, group: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each column, which row and number a field is, and whether it is one of the group."""
        part, column, valid = self.columns()
        e, size = column * self.rows.fields + field, self.rows.E
        if self.rows.code is not None:
            size = self.rows.code.group_size
        valid = valid & (e < self.rows.E) & (e >= group * size) & (e < (group + 1) * size)
        return part, e, valid


class Place(NamedTuple):
    """Where a tile begins, and which of its lines are wanted: from `first` on, so many."""

    row: Any
    first: Any
    count: Any

    @classmethod
    def of(cls, row: Any, stop: Any, last: int | None) -> "Place":
        """For rows from `row` to `stop`; it begins at `last` at the latest, unless that is negative."""
        here = row if last is None or last < 0 else jnp.minimum(row, last)
        return cls(here, row - here, stop - row)

    def holds(self, line: jax.Array) -> jax.Array:
        """Whether lines are wanted."""
        return (line - self.first).astype(jnp.uint32) < self.count.astype(jnp.uint32)
