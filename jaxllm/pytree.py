"""Frozen dataclasses that are JAX pytrees: the shape of every weight format and every cache.

Construction runs `__init__`; rebuilding from leaves does not, because JAX rebuilds containers around
tracers, `None` and extra batch axes, where a check or an annotation would be wrong.
"""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


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
        group: int = static()
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
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
