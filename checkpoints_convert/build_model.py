"""A family's table, a config and the tensors of files make a model: one loop for all families."""

import dataclasses
import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from checkpoints_convert.families.family import Family, Tensor, tensors_of
from checkpoints_convert.materialize import Read, materialize, named_leaves
from checkpoints_convert.quantized.linears import (
    names_of,
    possible_names,
    read_linears,
    split,
    without_empty_biases,
)
from checkpoints_convert.tensor_files import FLOATS, NAMES, listed, same


def build_model(
    family: Family,
    config,
    found: dict[str, np.ndarray],
    *,
    dtype=None,
    mesh=None,
    mapped=False,
    scheme=None,
) -> nnx.Module:
    """The model of a config with the tensors that were found, each read when its leaf is filled.

    mapped: as in `materialize`. scheme: how some linears are quantized (`quantized.scheme.Scheme`).

    A head of its own in the files is kept where the config ties it, with a warning, as in transformers 5.

    Raises ValueError, listing names, when tensors are missing or left over, or of another shape.
    """
    model, leaves, wanted = described(family, config)
    names = [tensor.theirs for tensor in wanted]
    if scheme is not None:
        names += possible_names(scheme, wanted)
    found = with_usual_names(family, found, names)
    if config.tied and has_own_head(family, found, wanted, scheme):
        model, leaves, wanted = described(family, dataclasses.replace(config, tied=False))
    if scheme is None:
        check_names(family, found, wanted)
        return materialize(model, reader(found, wanted, leaves), dtype=dtype, mesh=mesh, mapped=mapped)
    dense, linears = split(scheme, wanted, found)
    found = without_empty_biases(linears, wanted, found)
    check_names(family, found, [*dense, *(name for one in linears for name in names_of(scheme, one, found))])
    read = reader(found, dense, leaves)
    table = next(tensor for tensor in dense if "embedding.table" in tensor.ours)
    kind = read(table.ours[0], leaves[table.ours[0]].shape).dtype if dtype is None else np.dtype(dtype)
    formats = read_linears(scheme, linears, found, leaves, kind)
    return materialize(model, read, dtype=dtype, mesh=mesh, mapped=mapped, formats=formats)


def described(family: Family, config) -> tuple[nnx.Module, dict[str, Any], list[Tensor]]:
    """The model of a config in shapes only, its leaves by name, and the tensors that hold them."""
    model = family.model(config, rngs=None)
    leaves = named_leaves(model)
    return model, leaves, tensors_of(family, leaves)


def has_own_head(family: Family, found: dict, wanted: list[Tensor], scheme) -> bool:
    """Whether the files have a head that is no copy of the embedding, of whatever type; warns of it."""
    head = next(row.theirs for row in family.rows if row.ours == ("head.w",))
    table = next(tensor.theirs for tensor in wanted if "embedding.table" in tensor.ours)
    packed = scheme is not None and f"{head.removesuffix('.weight')}.{scheme.main}" in found
    dense = head in found and table in found and not is_copy(found[head], found[table])
    if packed or dense:
        warnings.warn(
            f"checkpoint: config.json ties the head, yet {head} differs from {table}: it is kept, as in "
            "transformers 5",
            stacklevel=2,
        )
    return packed or dense


def is_copy(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether one tensor is the other, in its own type or in that of the narrower."""
    if a.dtype == b.dtype or a.shape != b.shape or not {a.dtype, b.dtype} <= set(FLOATS.values()):
        return same(a, b)
    narrow, wide = sorted((a, b), key=_precision)
    with np.errstate(over="ignore"):
        return all(same(x, y.astype(x.dtype)) for x, y in zip(narrow, wide, strict=True))  # row by row


def _precision(value: np.ndarray) -> tuple[int, int]:
    """What orders float types: bytes, then bits of the fraction."""
    return value.dtype.itemsize, ml_dtypes.finfo(value.dtype).nmant


def with_usual_names(family: Family, found: dict, wanted: list[str]) -> dict:
    """The tensors under the family's usual names: files differ in what stands before (`model.`)."""
    found = dict(found)
    for name, other in family.aliases:
        if name not in found and other in found:
            found[name] = found.pop(other)
    usual = family.prefixes[0]
    names = [name for name in wanted if name.startswith(usual)]
    for prefix in (*family.prefixes, ""):
        usual_name = {prefix + name.removeprefix(usual): name for name in names}
        if any(name in found for name in usual_name):
            return {usual_name.get(name, name): value for name, value in found.items()}
    return found


def check_names(family: Family, found: dict, wanted: list[Tensor]) -> None:
    """Raises ValueError, listing names, unless the files have just what the config asks for."""
    names = {tensor.theirs for tensor in wanted}
    missing = sorted(names - found.keys())
    ignored = re.compile("|".join(family.ignored) or "(?!)")
    left = [name for name in sorted(found.keys() - names) if not ignored.search(name)]
    table = next((t.theirs for t in wanted if "embedding.table" in t.ours), None)
    if table in found and "lm_head.weight" in left:  # its copy, or the head were one of the model's
        left.remove("lm_head.weight")
    if missing or left:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(left)} left over ({listed(left)})"] if left else []
        raise ValueError(
            f"checkpoint: the files must have the tensors of {family.model_type}, got {'; '.join(parts)}"
        )


def reader(found: dict[str, np.ndarray], wanted: list[Tensor], leaves: dict[str, Any]) -> Read:
    """What gives `materialize` each leaf: its rows of the mapped tensor it lies in."""
    place = {}
    for tensor in wanted:
        value = found[tensor.theirs]
        parts = [leaves[name].shape for name in tensor.ours]
        must = (sum(part[0] for part in parts), *parts[0][1:])
        must = must[::-1] if tensor.transposed else must
        if value.shape != must:
            raise ValueError(f"checkpoint: {tensor.theirs} must have shape {must}, got {value.shape}")
        if value.dtype not in FLOATS.values():
            kind = NAMES[value.dtype]
            raise ValueError(
                f"checkpoint: numbers must be of {', '.join(FLOATS)}, got {tensor.theirs} of {kind}"
            )
        start = 0
        for name, part in zip(tensor.ours, parts, strict=True):
            place[name] = (tensor, start, start + part[0])
            start += part[0]

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor, start, stop = place[name]
        value = found[tensor.theirs]
        value = (value.T if tensor.transposed else value)[start:stop]
        return value.astype(np.float32) if value.dtype == np.float64 else value

    return read
