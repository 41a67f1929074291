"""Which linears of a checkpoint are quantized, and how each is read, part by part."""

from typing import Any

import numpy as np

from checkpoints_convert import tensor_files
from checkpoints_convert.families.family import Tensor, stem
from checkpoints_convert.quantized.any_precision import BySparse
from checkpoints_convert.quantized.compressed_tensors import ByTarget
from checkpoints_convert.quantized.gptq import ByModule
from checkpoints_convert.quantized.scheme import Scheme
from checkpoints_convert.quantized.words import Tensors

BySome = ByModule | ByTarget | BySparse  # linears of one checkpoint stored in several ways


def way_of(scheme: Scheme | BySome, tensor: Tensor) -> Scheme:
    """How one linear is stored."""
    return scheme.scheme_of(str(stem(tensor))) if isinstance(scheme, BySome) else scheme


def last_names(scheme: Scheme | BySome) -> set[str]:
    """What the names of a linear's tensors end in."""
    ways = scheme.schemes if isinstance(scheme, BySome) else (scheme,)
    return {last for way in ways for last in way.shapes(32, 32)}  # the same for all sizes


def possible_names(scheme: Scheme | BySome, wanted: list[Tensor]) -> list[str]:
    """The names that linears' tensors may have, and their biases'."""
    stems = [name for tensor in wanted if (name := stem(tensor)) is not None]
    return [f"{name}.{last}" for name in stems for last in (*last_names(scheme), "bias")]


def split(scheme: Scheme | BySome, wanted: list[Tensor], found: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are dense in these files, and those that are quantized."""
    dense: list[Tensor] = []
    quantized: list[Tensor] = []
    for tensor in wanted:
        is_quantized = stem(tensor) is not None and f"{stem(tensor)}.{scheme.main}" in found
        (quantized if is_quantized else dense).append(tensor)
        if is_quantized and tensor.transposed and not scheme.transposes:
            raise ValueError(f"checkpoint: {scheme.name} has no [in, out] matrices, got {tensor.theirs}")
    return dense, quantized


def names_of(scheme: Scheme | BySome, tensor: Tensor, found: Tensors) -> list[Tensor]:
    """What the files must have of a linear, and may have and do."""
    way = way_of(scheme, tensor)
    names = {last: f"{stem(tensor)}.{last}" for last in way.shapes(32, 32)}
    must = [name for last, name in names.items() if last not in way.optional or name in found]
    return [Tensor(name, tensor.ours, False) for name in must]


def without_empty_biases(quantized: list[Tensor], wanted: list[Tensor], found: Tensors) -> Tensors:
    """The tensors but biases of quantized linears that the model has not and that are 0.

    Some versions of AutoGPTQ gave every linear a bias.
    """
    extra = {f"{stem(tensor)}.bias" for tensor in quantized} - {tensor.theirs for tensor in wanted}
    return {name: value for name, value in found.items() if name not in extra or np.any(value)}


def read_linears(
    scheme: Scheme | BySome, quantized: list[Tensor], found: Tensors, leaves: dict[str, Any], dtype
) -> dict[str, Any]:
    """Our weight for each of our leaves, in host memory. All shapes are checked before any is read."""
    given = []
    for tensor in quantized:
        sizes = [leaves[name].shape for name in tensor.ours]
        K, N = sizes[0][1], sum(size[0] for size in sizes)
        names = names_of(scheme, tensor, found)
        tensors = {entry.theirs.rpartition(".")[2]: found[entry.theirs] for entry in names}
        try:
            check(way_of(scheme, tensor), tensors, K, N)
        except ValueError as error:
            raise ValueError(f"checkpoint: {stem(tensor)}: {error}") from error
        given.append((tensor, tensors, K, N))
    weights = {}
    for tensor, tensors, K, N in given:
        try:
            linear = way_of(scheme, tensor).read(tensors, K, N)
        except ValueError as error:
            raise ValueError(f"checkpoint: {stem(tensor)}: {error}") from error
        start = 0
        for name in tensor.ours:
            stop = start + leaves[name].shape[0]
            weights[name] = linear.part(start, stop, dtype)
            start = stop
    return weights


def check(scheme: Scheme, tensors: Tensors, K: int, N: int) -> None:
    """Raises ValueError unless the tensors of a linear are of the shapes and types they must be."""
    for last, (shape, kinds) in scheme.shapes(K, N).items():
        value = tensors.get(last)
        if value is None:
            continue  # optional: names are checked before
        kind = tensor_files.NAMES[value.dtype]
        if value.shape != shape or kind not in kinds:
            must = f"{' or '.join(kinds)} {list(shape)}"
            raise ValueError(f"{last} must be {must} by config.json, got {kind} {list(value.shape)}")
