"""Where a model's weights lie on a mesh: a table a model, one function that reads it.

A model class has `SHARDING`, pairs of (pattern, PartitionSpec) over the logical axes of each parameter; a
weight's logical axes are [K, N] and its format maps them to its leaves. Axis names are "model" (tensor
parallel), "data", and "kv", which stands for "model" where the key heads can be split over it and for
replication where there are fewer heads than shards.

    mesh = make_mesh(data=2, model=4)
    model = shard(model, mesh)
"""

import re

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.pytree import is_variable, path_name
from jaxllm.weights.host_residual import to_host
from jaxllm.weights.matmul import FORMATS


def make_mesh(*, data: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh of data * model devices with axes "data" and "model"."""
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(model, mesh: Mesh):
    """The model's state with a NamedSharding in place of each array. Works on abstract models.

    Raises ValueError when an axis cannot be split evenly.
    """
    table = [(re.compile(pattern), spec) for pattern, spec in type(model).SHARDING]
    size = mesh.shape["model"]
    kv_heads = getattr(model.config, "kv_heads", None) or model.config.heads

    def place(path, variable):
        name, value = path_name(path), variable.get_value()
        spec = next((spec for pattern, spec in table if pattern.search(name)), P())
        if "kv" in spec and kv_heads >= size and kv_heads % size:
            raise ValueError(
                f"shardings: the mesh must divide the key heads, got {kv_heads} heads, {size} shards"
            )
        kv = "model" if kv_heads >= size else None
        spec = P(*(kv if axis == "kv" else axis for axis in spec))
        specs = spec
        if isinstance(value, FORMATS):
            specs = value.partition_specs(P(*spec, *(None,) * (2 - len(spec))))
        return variable.replace(jax.tree.map(lambda x, s: _place(name, x, s, mesh), value, specs))

    return jax.tree_util.tree_map_with_path(place, nnx.state(model), is_leaf=is_variable)


def _place(name: str, array, spec: P, mesh: Mesh) -> NamedSharding:
    for size, axis in zip(array.shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"shardings: the mesh must divide {name}, got {array.shape} over {mesh.shape[axis]} {axis!r}"
            )
    return NamedSharding(mesh, spec)


def shard(model, mesh: Mesh):
    """The model with its weights moved to where its table puts them on the mesh."""
    graph, state = nnx.split(model)
    return to_host(nnx.merge(graph, jax.device_put(state, shardings(model, mesh))))
