"""How many bytes a model takes: counted from the arrays that it holds, whatever their format.

    print(report_bytes(model))                      a table by layer
    dataclasses.asdict(report_bytes(model))         the same for JSON

The number of weights is the logical one (K x N of a format's `.shape`); the bytes are those of all
its leaves, so scales, tables, indices and padding count. An array that two layers share counts
once, where it comes first. On a mesh an array counts with its global size, however many devices
hold copies.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from tabulate import tabulate

from jaxllm.models.linears import linear_weights
from jaxllm.weights.matmul import FORMATS, num_bytes


def linear_bits(model) -> float:
    """Stored bits over the number of weights, of the linears of the blocks alone."""
    weights = [w for name, w in linear_weights(model).items() if "." in name]
    return 8 * sum(map(num_bytes, weights)) / sum(math.prod(w.shape) for w in weights)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one layer, or another part of the model, holds."""

    name: str
    weights: int  # logical numbers
    weight_bytes: int
    dtypes: tuple[str, ...]  # of the arrays, in alphabetical order

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes of a model by layer and in all."""

    layers: tuple[Part, ...]
    weights: int
    weight_bytes: int
    bits_per_weight: float

    def __str__(self) -> str:
        """A table, one line a layer."""
        dtypes = tuple(sorted({dtype for part in self.layers for dtype in part.dtypes}))
        total = Part("all", self.weights, self.weight_bytes, dtypes)
        rows = [
            (
                part.name,
                f"{part.weights:,}",
                f"{part.weight_bytes:,}",
                f"{part.bits_per_weight:.3f}",
                " ".join(part.dtypes),
            )
            for part in (*self.layers, total)
        ]
        head = ("part", "weights", "bytes", "bits/weight", "arrays")
        sides = ("left", "right", "right", "right", "left")
        # the heading as a row: as a heading tabulate pads it
        return tabulate([head, *rows], tablefmt="plain", colalign=sides, disable_numparse=True)


def report_bytes(model: Any) -> Report:
    """Bytes and bits per weight of any pytree: a model, a part of one, or an abstract one."""
    whole = (*FORMATS, nnx.Variable)  # what has a logical size of its own
    seen: set[int] = set()
    parts: dict[str, Part] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, whole))[0]:
        weight = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        arrays = [x for x in jax.tree.leaves(weight) if id(x) not in seen]
        if not arrays:
            continue
        seen.update(map(id, arrays))
        name = part_of(path)
        old = parts.get(name, Part(name, 0, 0, ()))
        parts[name] = Part(
            name,
            old.weights + math.prod(weight.shape),
            old.weight_bytes + sum(x.size * np.dtype(x.dtype).itemsize for x in arrays),
            tuple(sorted({*old.dtypes, *(str(x.dtype) for x in arrays)})),
        )
    weights = sum(part.weights for part in parts.values())
    weight_bytes = sum(part.weight_bytes for part in parts.values())
    if weights == 0:
        raise ValueError(f"report_bytes: needs a tree with arrays, got {type(model).__name__}")
    return Report(tuple(parts.values()), weights, weight_bytes, 8 * weight_bytes / weights)


def part_of(path: tuple[Any, ...]) -> str:
    """The layer a leaf belongs to: its path up to the first number, or else its first name."""
    names = re.findall(r"\w+", jax.tree_util.keystr(path))
    for i, name in enumerate(names):
        if name.isdigit():
            return ".".join(names[: i + 1])
    return names[0] if names else "model"
