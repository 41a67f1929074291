"""A model whose leaves come from somewhere else, one at a time: what every converter ends in.

The model is given without memory (shapes only); each leaf is then read, cast and put where its
sharding says, so that the host never holds more than the model and one tensor (weights of other
formats wait on the host, each until it is placed). A leaf is named by its path in the model:
"layers.3.attention.q.w", "norm.scale".
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.pytree import is_variable, path_name
from jaxllm.sharding import shardings
from jaxllm.weights.dense import Dense

# What reads a leaf: given its name and the shape it must have, the array, mapped or not.
Read = Callable[[str, tuple[int, ...]], np.ndarray]


def leaf_name(path) -> str:
    """The path of a leaf as a name: without the variable and the dense format inside."""
    return path_name(path).removesuffix(".rows").removesuffix(".value")


def named_leaves(model: nnx.Module) -> dict[str, Any]:
    """Every leaf of a model by its name; shapes only where the model is abstract."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    return {leaf_name(path): leaf for path, leaf in leaves}


def named_weights(model: nnx.Module) -> dict[str, Any]:
    """Every weight of a model by the name of its leaf: an array, or a format other than dense."""
    found, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model), is_leaf=is_variable)
    values = {leaf_name(path): variable.get_value() for path, variable in found}
    return {name: value.rows if isinstance(value, Dense) else value for name, value in values.items()}


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
            filled.append(_placed(_read(read, leaf_name(path), leaf.shape), place, dtype, mapped=mapped))
    return nnx.merge(graph, jax.tree_util.tree_unflatten(tree, filled))


def with_formats(state, formats: dict[str, Any]):
    """The state of an abstract model with formats in place of dense weights; takes them out of `formats`."""

    def one(path, variable):
        name = leaf_name(path)
        return variable.replace(formats.pop(name)) if name in formats else variable

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_variable)


def _one_by_one(leaves: list) -> Iterator[Any]:
    """The entries of a list that loses them on the way."""
    leaves.reverse()
    while leaves:
        yield leaves.pop()


def _read(read: Read, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = read(name, shape)
    if value.shape != shape:
        raise ValueError(f"checkpoint: {name} must have shape {shape}, got {value.shape}")
    return value


def _placed(value: np.ndarray, place: jax.sharding.Sharding, dtype, *, mapped: bool):
    """What was read, as it is or on its devices; a function, so that no name outlives it."""
    return value if mapped and dtype in (None, value.dtype) else put(value, place, dtype)


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
