"""Frozen dataclasses that are JAX pytrees: the shape of every weight format and every cache; names of leaves.

Construction runs `__init__`; rebuilding from leaves does not, because JAX rebuilds containers around
tracers, `None` and extra batch axes, where a check or an annotation would be wrong.
"""

import dataclasses
import math
from typing import TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct as Shape

T = TypeVar("T")
SAID = ("shape", "dtype")  # what a summary begins with


def static(default=dataclasses.MISSING):
    """A field that is part of the type: hashable, compared by value, fixed while tracing."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass registered with JAX: fields are children, `static()` fields are metadata.

    @pytree
    class Int8Blocks:
        codes: jax.Array
        scale: jax.Array
        group_size: int = static()
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    if "__repr__" not in cls.__dict__:
        cls.__repr__ = _summary  # type: ignore[method-assign]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = [f.name for f in fields if not f.metadata.get("static")]
    meta = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(obj):
        children = [(jax.tree_util.GetAttrKey(name), getattr(obj, name)) for name in data]
        return children, tuple(getattr(obj, name) for name in meta)

    def flatten(obj):
        return [getattr(obj, name) for name in data], tuple(getattr(obj, name) for name in meta)

    def unflatten(aux, children):
        obj = object.__new__(cls)  # construction validates, reconstruction does not
        for name, value in zip([*data, *meta], [*children, *aux], strict=True):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _summary(obj) -> str:
    """One line: what has a shape and a type as it, and its size; else the fields. Never the numbers in it.

    Affine([4096, 1024] float32 in 4.50 bits, group_size=32)
    Packed(words=uint32[64, 4, 4], bits=4, size=128)
    """
    fields = {f.name: f.metadata.get("static") for f in dataclasses.fields(obj)}
    shape, dtype = getattr(obj, "shape", None), getattr(obj, "dtype", None)
    leaves = jax.tree.leaves(obj)
    if (
        shape is None
        or dtype is None
        or not leaves
        or not all(isinstance(x, jax.Array | Shape) for x in leaves)
    ):
        return f"{type(obj).__name__}({', '.join(f'{name}={_brief(getattr(obj, name))}' for name in fields)})"
    bits = 8 * sum(x.size * x.dtype.itemsize for x in leaves) / max(math.prod(shape), 1)
    known = [f"{list(shape)} {jnp.dtype(dtype).name} in {bits:.2f} bits"]
    inner = [f"{name}={_brief(getattr(obj, name))}" for name in ("base", "weight") if name in fields]
    own = [f"{name}={getattr(obj, name)!r}" for name in fields if fields[name] and name not in SAID]
    return f"{type(obj).__name__}({', '.join(known + inner + own)})"


def _brief(value) -> str:
    """An array by type and shape, anything else as it prints."""
    if isinstance(value, jax.Array | Shape | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_brief, value))})"
    return repr(value)


def path_name(path) -> str:
    """The path of a leaf as people write it: "layers.3.attention.q.w"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_variable(leaf: object) -> bool:
    """Where a walk through a model's state ends: at variables, whatever format their values have."""
    return isinstance(leaf, nnx.Variable)
