"""A family's table, a config and the tensors of files make a model: one loop for all families."""

import re
from typing import Any

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
from checkpoints_convert.tensor_files import FLOATS, NAMES, listed


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

    Raises ValueError, listing names, when tensors are missing or left over, or of another shape.
    """
    model = family.model(config, rngs=None)  # shapes only
    leaves = named_leaves(model)
    wanted = tensors_of(family, leaves)
    if scheme is None:
        found = with_usual_names(family, found, [tensor.theirs for tensor in wanted])
        check_names(family, found, wanted)
        return materialize(model, reader(found, wanted, leaves), dtype=dtype, mesh=mesh, mapped=mapped)
    names = [tensor.theirs for tensor in wanted] + possible_names(scheme, wanted)
    found = with_usual_names(family, found, names)
    dense, linears = split(scheme, wanted, found)
    found = without_empty_biases(linears, wanted, found)
    check_names(family, found, [*dense, *(name for one in linears for name in names_of(scheme, one, found))])
    read = reader(found, dense, leaves)
    table = next(tensor for tensor in dense if "embedding.table" in tensor.ours)
    kind = read(table.ours[0], leaves[table.ours[0]].shape).dtype if dtype is None else np.dtype(dtype)
    formats = read_linears(scheme, linears, found, leaves, kind)
    return materialize(model, read, dtype=dtype, mesh=mesh, mapped=mapped, formats=formats)


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
    copies = [name for name in left if name.endswith("lm_head.weight")]  # of the table, if tied
    for name in copies if table in found else ():
        if not same(found[name], found[table]):
            raise ValueError(f"checkpoint: config.json ties the head, yet {name} differs from {table}")
        left.remove(name)
    if missing or left:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(left)} left over ({listed(left)})"] if left else []
        raise ValueError(
            f"checkpoint: the files must have the tensors of {family.model_type}, got {'; '.join(parts)}"
        )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))  # row by row


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
