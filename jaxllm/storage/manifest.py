"""What a saved pytree is made of, as JSON: formats by name, static fields, shapes and types of arrays.

An array is described by shape and type, a pytree's class by its name, static fields and parts, a tuple by its
items. Names are looked up among the classes that a caller gives, weights' where none are, and never imported.

    described = describe(weight, "head")
    np.savez(file, **pack_arrays(dict(arrays_of(weight, "head"))))
    weight = build(described, "head", unpack_arrays(np.load(file)))
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from math import prod
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.storage import former_names
from jaxllm.storage.metadata import excerpt
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
        elif part is not None or field.name not in _optional(type(value)):
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


def build(described: Any, name: str, make: Make, classes: Classes | None = None) -> Any:
    """A weight from what the manifest says; `make(name, shape, dtype)` gives each array by its name there.

    Raises ValueError in one line for what `describe` does not write.
    """
    classes = weight_classes() if classes is None else classes
    if described is None:
        return None
    kind = entry_of(described, "type", str, name)
    if kind == "array":
        return make(name, *_array_type(described, name))
    if kind == "tuple":
        items = enumerate(entry_of(described, "items", list, name))
        return tuple(build(part, f"{name}/{i}", make, classes) for i, part in items)
    known = {cls.__name__: cls for cls in classes}
    if kind not in known:
        raise ValueError(f"load: {name} must be of a format of {', '.join(known)}, got format={kind!r}")
    described = {"fields": {}, "static": {}} | described
    fields, now = entry_of(described, "fields", dict, name), former_names.FIELDS.get(kind, {})
    parts: dict[str, Any] = dict.fromkeys(_optional(known[kind]))
    parts |= {now.get(key, key): build(part, f"{name}/{key}", make, classes) for key, part in fields.items()}
    for key, former in former_names.BYTES.get(kind, {}).items():
        if getattr(parts.get(key), "dtype", None) == former:
            parts[key] = _as_bytes(parts[key])
    for later, same in former_names.LATER.get(kind, {}).items():
        if later not in parts and same in fields:  # an array of its own: each may be given away
            parts[later] = build(fields[same], f"{name}/{same}", make, classes)
    given = entry_of(described, "static", dict, name)
    static = {now.get(key, key): from_json(part) for key, part in given.items()}
    must = {f.name: bool(f.metadata.get("static")) for f in dataclasses.fields(known[kind])}
    if must != dict.fromkeys(parts, False) | dict.fromkeys(static, True):
        raise ValueError(f"load: {name} must have the fields of {kind}, got {[*parts, *static]}")
    declared = get_type_hints(known[kind])
    for key, part in static.items():
        if not fits(part, declared[key]):
            raise ValueError(f"load: {name} must have {key} of its type, got {key}={excerpt(part)}")
    made: Any = object.__new__(known[kind])  # as when JAX rebuilds it: leaves may be shapes
    for key, part in (parts | static).items():
        object.__setattr__(made, key, part)
    return made


def _optional(kind: Any) -> list[str]:
    """Parts that are None where a file does not say them: they came later than others of the class."""
    fields = (f for f in dataclasses.fields(kind) if not f.metadata.get("static"))
    return [f.name for f in fields if f.default is None]


def _as_bytes(x: Any) -> Any:
    """The bits of an array of 8-bit numbers, or of one that is only described."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.uint8)
    return x.view(jnp.uint8)


def entry_of(described: Any, key: str, kind: type, name: str) -> Any:
    """An entry of a JSON object, of the type that it must have."""
    if not isinstance(described, dict) or type(described.get(key)) is not kind:
        got = described.get(key) if isinstance(described, dict) else described
        raise ValueError(f"load: {name} must have {key}, a JSON {kind.__name__}, got {excerpt(got)}")
    return described[key]


def _array_type(described: dict[str, Any], name: str) -> tuple[tuple[int, ...], Any]:
    """Shape and type of an array."""
    shape, kind = entry_of(described, "shape", list, name), entry_of(described, "dtype", str, name)
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"load: {name} must have a shape of whole numbers, got {excerpt(shape)}")
    return tuple(shape), _dtype(kind, name)


def _dtype(kind: Any, name: str) -> Any:
    """A type of numbers from its name."""
    try:
        dtype = jnp.dtype(kind) if isinstance(kind, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.name != kind or not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
        raise ValueError(f"load: {name} must be of a type of numbers, got dtype={excerpt(kind)}")
    return dtype


def pack_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as their bytes, for `np.savez`, which knows no bfloat16."""
    return {name: np.ascontiguousarray(x).reshape(-1).view(np.uint8) for name, x in arrays.items()}


def unpack_arrays(stored: Mapping[str, np.ndarray]) -> Make:
    """What gives `build` the arrays that `pack_arrays` packed."""

    def make(name: str, shape: tuple[int, ...], dtype) -> jax.Array:
        packed = stored[name] if name in stored else None
        size = prod(shape) * dtype.itemsize
        if packed is None or packed.dtype != np.uint8 or packed.shape != (size,):
            got = None if packed is None else f"{packed.dtype}{list(packed.shape)}"
            raise ValueError(f"load: {name} must be stored as uint8[{size}], got {got}")
        return jnp.asarray(packed.view(dtype).reshape(shape))

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
    """The value that `to_json` wrote; `classes` are the dataclasses that a file may name here.

    Raises ValueError in one line where a field has not the type that it is declared with.
    """
    if isinstance(value, list):
        return tuple(from_json(part, classes) for part in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(part, classes) for key, part in value.items() if key != "type"}
    kind = value.get("type")
    if kind == "dtype":
        return _dtype(fields.get("name"), "a static field")
    made = next((cls for cls in classes if cls.__name__ == kind), None)
    if made is None:
        raise ValueError(f"load: the manifest names an unknown type, got type={excerpt(kind)}")
    declared = get_type_hints(made)
    unknown = fields.keys() - declared.keys()
    if unknown:
        raise ValueError(f"load: {kind} has no field {', '.join(sorted(unknown))}: a newer version wrote it")
    for field in dataclasses.fields(made):
        if field.name not in fields:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"load: {kind} must have {field.name}, got {', '.join(fields)}")
        elif not fits(fields[field.name], declared[field.name]):
            must, got = declared[field.name], excerpt(fields[field.name])
            raise ValueError(
                f"load: {field.name} of {kind} must be {getattr(must, '__name__', must)}, got {got!r}"
            )
    return made(**fields)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the type that a dataclass declares: a whole number is a float too."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        same_length = parts[-1] is Ellipsis or len(parts) == len(value)
        return isinstance(value, tuple) and same_length and all(fits(part, parts[0]) for part in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (Any, object, type):  # a type of numbers, mostly
        return True
    return type(value) is hint
