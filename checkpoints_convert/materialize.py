"""A model whose leaves come from somewhere else, one at a time: what every converter ends in.

The model is given without memory (shapes only); each leaf is then read, cast and put where its
sharding says, so that the host never holds more than the model and one tensor (weights of other
formats wait on the host, each until it is placed). A leaf is named by its path in the model:
"layers.3.attention.q.w", "norm.scale". What is stacked of experts is read and written one by one:
"layers.3.mlp.up.0.w", "layers.3.mlp.up.1.w", ...
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.pytree import is_variable, path_name
from jaxllm.sharding import shardings
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts, MappedStack, members, parts, stack

# What reads a leaf: given its name and the shape it must have, the array, mapped or not.
Read = Callable[[str, tuple[int, ...]], np.ndarray]


def is_stacked(path) -> bool:
    """Whether a leaf holds the rows of several experts."""
    return path_name(path).endswith(".stack.rows")


def leaf_names(path, experts: int) -> list[str]:
    """The path of a leaf as a name: without the variable and the dense format inside.

    experts: how many are in a leaf of their rows, which has a name for each.
    """
    name = path_name(path).removesuffix(".rows").removesuffix(".stack").removesuffix(".value")
    linear, _, last = name.rpartition(".")
    return [f"{linear}.{e}.{last}" for e in range(experts)] if is_stacked(path) else [name]


def named_leaves(model: nnx.Module) -> dict[str, Any]:
    """Every leaf of a model by its name; shapes only where the model is abstract."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        stacked = is_stacked(path)
        names = leaf_names(path, leaf.shape[0] if stacked else 1)
        named |= {name: _expert(leaf, e) if stacked else leaf for e, name in enumerate(names)}
    return named


def _expert(leaf, e: int):
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if abstract else leaf[e]


def named_weights(model: nnx.Module) -> dict[str, Any]:
    """Every weight of a model by the name of its leaf: an array, or a format other than dense."""
    found, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model), is_leaf=is_variable)
    named: dict[str, Any] = {}
    for path, variable in found:
        value = variable.get_value()
        named |= zip(_variable_names(path, value), parts(value), strict=True)
    return {name: value.rows if isinstance(value, Dense) else value for name, value in named.items()}


def _variable_names(path, value: Any) -> list[str]:
    """The names of the weights in a variable."""
    linear, _, last = path_name(path).removesuffix(".value").rpartition(".")
    return [f"{name}.{last}" if name else last for name in members(linear, value)]


def materialize(
    model: nnx.Module,
    read: Read,
    *,
    dtype=None,
    mesh=None,
    mapped: bool = False,
    formats: dict[str, Any] | None = None,
) -> nnx.Module:
    """An abstract model with `read(name, shape)` at every leaf.

    model: its leaves are shapes, as those of a model made with `rngs=None` are.
    dtype: of all leaves that are read; None keeps what is read.
    mesh: the model is sharded over it by its own table.
    mapped: what is read in its own type stays what `read` gave, a view of a mapped file.
    formats: weights by the names of the dense leaves whose place they take, in host memory; emptied, so that
      each is freed when it has been copied to its place.
    """
    graph, state = nnx.split(model)
    if formats:
        state = with_formats(state, formats)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    if mesh is None:
        places = [jax.sharding.SingleDeviceSharding(jax.local_devices()[0])] * len(leaves)
    else:
        places = jax.tree.leaves(shardings(nnx.merge(graph, state), mesh))
    del state
    filled: list[Any] = []
    for (path, leaf), place in zip(_one_by_one(leaves), places, strict=True):
        if isinstance(leaf, np.ndarray):  # a format's, in its own type
            filled.append(put(leaf, place))
        else:
            filled.append(_placed(_read(read, path, leaf.shape, mapped), place, dtype, mapped=mapped))
    return nnx.merge(graph, jax.tree_util.tree_unflatten(tree, filled))


def with_formats(state, formats: dict[str, Any]):
    """The state of an abstract model with formats in place of dense weights; takes them out of `formats`."""

    def one(path, variable):
        value = variable.get_value()
        names = _variable_names(path, value)
        given = [formats.pop(name) for name in names if name in formats]
        if given and len(given) < len(names):
            raise ValueError(
                f"checkpoint: all experts must be stored alike, got {len(given)} of {len(names)} quantized "
                f"of {names[0]}"
            )
        if not given:
            return variable
        return variable.replace(stack(given) if isinstance(value, Experts) else given[0])

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_variable)


def _one_by_one(leaves: list) -> Iterator[Any]:
    """The entries of a list that loses them on the way."""
    leaves.reverse()
    while leaves:
        yield leaves.pop()


def _read(read: Read, path, shape: tuple[int, ...], mapped: bool) -> np.ndarray | MappedStack:
    if is_stacked(path):
        rows = [_checked(read, name, shape[1:]) for name in leaf_names(path, shape[0])]
        return MappedStack(rows) if mapped and len({x.dtype for x in rows}) == 1 else np.stack(rows)
    return _checked(read, leaf_names(path, 1)[0], shape)


def _checked(read: Read, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = read(name, shape)
    if value.shape != shape:
        raise ValueError(f"checkpoint: {name} must have shape {shape}, got {value.shape}")
    return value


def _placed(value: np.ndarray | MappedStack, place: jax.sharding.Sharding, dtype, *, mapped: bool):
    """What was read, as it is or on its devices; a function, so that no name outlives it."""
    return value if mapped and dtype in (None, value.dtype) else put(np.asarray(value), place, dtype)


def put(value: np.ndarray, place: jax.sharding.Sharding, dtype=None) -> jax.Array:
    """A copy of `value` on its devices; of a mapped file only each device's part is read."""
    dtype = np.dtype(value.dtype if dtype is None else dtype)
    made = jax.make_array_from_callback(value.shape, place, lambda index: aligned_copy(value[index], dtype))
    return jax.block_until_ready(made)  # where it was copied once more, ours is gone before the next


def aligned_copy(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in memory that starts at a multiple of 64 bytes: JAX on a CPU keeps such and copies others.

    The copy is needed even where nothing is cast: the memory kept must not be the mapped file.
    """
    memory = np.empty(value.size * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + value.size * dtype.itemsize].view(dtype).reshape(value.shape)
    copy[...] = value
    return copy
