"""What describes one family of checkpoints: how its config reads, which tensor is which leaf.

A `Row` says that one of their tensors is some of our leaves stacked along the first axis ("{i}" is
the layer, "{e}" the expert): a plain rename has one leaf, a fused q, k, v three. A row whose leaves a
model does not have (biases, a tied head) is left out. So one table serves reading and writing, and every
family goes through the one loop of `build_model.py`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from checkpoints_convert import tensor_files
from checkpoints_convert.json_fields import Kind
from jaxllm.models import layers as ours
from jaxllm.storage.metadata import excerpt

Tensors = dict[str, np.ndarray]  # those of files, by name
Entry = tensor_files.Tensor  # one to be written: name, shape, type, and what makes it

# Their names of activations, and ours: all of transformers' but `prelu` and `xielu`, which have weights.
TANH_FORMS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
ACTIVATIONS = (
    {name: name for name in ours.ACTIVATIONS if name != "gelu_tanh"}
    | {name: "gelu_tanh" for name in TANH_FORMS}
    | {"swish": "silu", "gelu_python": "gelu"}
)


def activation(name: str | None) -> Any:
    """Our name of an activation; ValueError for one that we have not."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"huggingface.load: activation must be one of {known}, got {excerpt(name)}")
    return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class Row:
    """Their tensor, and the leaves of ours that are stacked in it."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # their matrix is [in, out] (GPT-2)
    when: str | None = None  # a leaf without which the row is left out
    unless: str | None = None  # a leaf with which the row is left out


def row(theirs: str, *ours: str, transposed: bool = False, when=None, unless=None) -> Row:
    """A row of a table."""
    return Row(theirs, ours, transposed, when, unless)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str  # its class with a language model head
    model: type  # ours
    config: Callable[[dict[str, Any]], Any]  # config.json, defaults filled in, to ours
    to_hf_config: Callable[[Any], dict[str, Any]]  # ours to config.json
    rows: tuple[Row, ...]
    defaults: dict[str, Any]  # what a key means that config.json leaves out
    fields: dict[str, Kind]  # what each key that `config` reads must be
    layers: tuple[str, ...] = ("num_hidden_layers",)  # the keys that say how many layers there are
    flat: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # config.json with its parts on one level
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)  # patterns of tensors that say nothing
    aliases: tuple[tuple[str, str], ...] = ()  # (usual name, name some files have in its place)
    prefixes: tuple[str, ...] = ("model.",)  # of files: each is tried in place of the first, "" too
    usual: Callable[[Tensors], Tensors] | None = None  # tensors in another layout to those of the table
    as_written: Callable[[list[Entry]], list[Entry]] | None = None  # and back, where it is the only one
    coded_experts: bool = True  # whether its experts are written in codes, one by one


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the leaves it holds, for a model at hand."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


def stem(tensor: Tensor) -> str | None:
    """The name of their linear, None for a tensor that is no linear's weight."""
    linear = tensor.theirs.endswith(".weight") and all(name.endswith(".w") for name in tensor.ours)
    return tensor.theirs.removesuffix(".weight") if linear else None


def tensors_of(family: Family, leaves: dict[str, Any]) -> list[Tensor]:
    """The family's table written out for a model with these leaves, layer by layer.

    Raises ValueError for a leaf that the table does not have.
    """
    found: list[tuple[int, int, int, Tensor]] = []
    for order, one in enumerate(family.rows):
        pattern = re.escape(one.ours[0])
        for letter in "ie":
            pattern = pattern.replace(re.escape(f"{{{letter}}}"), rf"(?P<{letter}>\d+)")
        for match in filter(None, (re.fullmatch(pattern, name) for name in leaves)):
            numbers = match.groupdict()
            if one.when is not None and _numbered(one.when, numbers) not in leaves:
                continue
            if one.unless is not None and _numbered(one.unless, numbers) in leaves:
                continue
            ours = tuple(_numbered(name, numbers) for name in one.ours)
            tensor = Tensor(_numbered(one.theirs, numbers), ours, one.transposed)
            found.append((int(numbers.get("i", -1)), order, int(numbers.get("e", -1)), tensor))
    tensors = [tensor for *_, tensor in sorted(found, key=lambda entry: entry[:3])]
    unknown = set(leaves) - {name for tensor in tensors for name in tensor.ours}
    if unknown:
        raise ValueError(
            f"huggingface: {family.model_type} has no name for {', '.join(sorted(unknown)[:8])}; "
            "only dense weights can be written"
        )
    return tensors


def _numbered(name: str, numbers: dict[str, str]) -> str:
    """A name of a table with the layer and the expert in it."""
    for letter, number in numbers.items():
        name = name.replace(f"{{{letter}}}", number)
    return name
