"""What a saved pytree is made of, as JSON: formats by name, static fields, shapes and types of arrays.

An array is described by shape and type, a pytree's class by its name, static fields and parts, a tuple by its
items. Names are looked up among the classes that a caller gives, weights' where none are, and never imported.

    described = describe(weight, "head")
    np.savez(file, **pack_arrays(dict(arrays_of(weight, "head"))))
    weight = build(described, "head", unpack_arrays(np.load(file)))
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.storage import former_names
from jaxllm.weights import matmul

Classes = tuple[type, ...]

# What gives each array of a pytree: from its name, its shape and its type.
Make = Callable[[str, tuple[int, ...], Any], Any]


def weight_classes() -> Classes:
    """What weights are made of."""
    return (*matmul.FORMATS, *matmul.PARTS)


def describe(value: Any, name: str, classes: Classes | None = None) -> dict[str, Any] | None:
    """What the manifest says of a weight, or of another pytree made of `classes`."""
    classes = weight_classes() if classes is None else classes
    if value is None:
        return None
    if hasattr(value, "dtype") and not dataclasses.is_dataclass(value):
        return {"type": "array", "shape": list(value.shape), "dtype": jnp.dtype(value.dtype).name}
    if isinstance(value, tuple):
        return {
            "type": "tuple",
            "items": [describe(part, f"{name}/{i}", classes) for i, part in enumerate(value)],
        }
    if type(value) not in classes:
        raise TypeError(f"save: {name} must be an array or a format, got {type(value).__name__}")
    described: dict[str, Any] = {"type": type(value).__name__}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if field.metadata.get("static"):
            described.setdefault("static", {})[field.name] = to_json(part)
        else:
            described.setdefault("fields", {})[field.name] = describe(part, f"{name}/{field.name}", classes)
    return described


def arrays_of(value: Any, name: str, classes: Classes | None = None) -> Iterator[tuple[str, Any]]:
    """Each array of a weight by its name in the file: the weight's, then the path of fields."""
    classes = weight_classes() if classes is None else classes
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from arrays_of(part, f"{name}/{i}", classes)
    elif type(value) in classes:
        for field in dataclasses.fields(value):
            if not field.metadata.get("static"):
                yield from arrays_of(getattr(value, field.name), f"{name}/{field.name}", classes)
    elif value is not None:
        yield name, value


def build(described: dict[str, Any] | None, name: str, make: Make, classes: Classes | None = None) -> Any:
    """A weight from what the manifest says; `make(name, shape, dtype)` gives each array by its name there."""
    classes = weight_classes() if classes is None else classes
    if described is None:
        return None
    kind = described["type"]
    if kind == "array":
        return make(name, tuple(described["shape"]), jnp.dtype(described["dtype"]))
    if kind == "tuple":
        items = enumerate(described["items"])
        return tuple(build(part, f"{name}/{i}", make, classes) for i, part in items)
    known = {cls.__name__: cls for cls in classes}
    if kind not in known:
        raise ValueError(f"load: {name} must be of a format of {', '.join(known)}, got format={kind!r}")
    fields, now = described.get("fields", {}), former_names.FIELDS.get(kind, {})
    parts = {now.get(key, key): build(part, f"{name}/{key}", make, classes) for key, part in fields.items()}
    for later, same in former_names.LATER.get(kind, {}).items():
        if later not in parts:  # an array of its own: each may be given away
            parts[later] = build(fields[same], f"{name}/{same}", make, classes)
    static = {now.get(key, key): from_json(part) for key, part in described.get("static", {}).items()}
    names = {field.name for field in dataclasses.fields(known[kind])}
    if names != parts.keys() | static.keys():
        raise ValueError(f"load: {name} must have the fields of {kind}, got {[*parts, *static]}")
    made: Any = object.__new__(known[kind])  # as when JAX rebuilds it: leaves may be shapes
    for key, part in (parts | static).items():
        object.__setattr__(made, key, part)
    return made


def pack_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as their bytes, for `np.savez`, which knows no bfloat16."""
    return {name: np.ascontiguousarray(x).reshape(-1).view(np.uint8) for name, x in arrays.items()}


def unpack_arrays(stored: Mapping[str, np.ndarray]) -> Make:
    """What gives `build` the arrays that `pack_arrays` packed."""

    def make(name: str, shape: tuple[int, ...], dtype) -> jax.Array:
        return jnp.asarray(stored[name].view(dtype).reshape(shape))

    return make


def to_json(value: Any) -> Any:
    """A static value or a config as JSON."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"type": "dtype", "name": jnp.dtype(value).name}


def from_json(value: Any, classes: tuple[type, ...] = ()) -> Any:
    """The value that `to_json` wrote; `classes` are the dataclasses that a file may name here."""
    if isinstance(value, list):
        return tuple(from_json(part, classes) for part in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(part, classes) for key, part in value.items() if key != "type"}
    kind = value.get("type")
    if kind == "dtype":
        return jnp.dtype(fields["name"])
    made = next((cls for cls in classes if cls.__name__ == kind), None)
    if made is None:
        raise ValueError(f"load: the manifest names an unknown type, got type={kind!r}")
    unknown = fields.keys() - {field.name for field in dataclasses.fields(made)}
    if unknown:
        raise ValueError(f"load: {kind} has no field {', '.join(sorted(unknown))}: a newer version wrote it")
    return made(**fields)
