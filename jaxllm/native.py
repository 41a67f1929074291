"""The native directory: any model in any weight format, written and read without loss.

It holds `weights/` (Orbax), the tokenizer's files and `manifest.json`: the model's class, its config, and for
each weight the name of its format, its static fields, and shape and type of each array
(`storage/manifest.py`). A model is looked up by name in `models()`, a format in `weights.matmul.FORMATS`;
nothing that a file names is ever imported. A new format needs no code here.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.rope import Rope
from jaxllm.pytree import is_variable, path_name
from jaxllm.storage import checksums
from jaxllm.storage.directory import new_directory
from jaxllm.storage.manifest import Make, arrays_of, build, describe, entry_of, from_json, to_json
from jaxllm.storage.metadata import one_line, read_meta, write_meta
from jaxllm.storage.orbax_files import reading, write
from jaxllm.storage.tokenizer import load_tokenizer
from jaxllm.weights.experts import Experts
from jaxllm.weights.host_residual import to_host
from jaxllm.weights.matmul import matmul
from jaxllm.weights.weight import Weight

MANIFEST = "manifest.json"
WEIGHTS = "weights"
FORMAT, VERSIONS = "jaxllm", (1, 2)  # from 2 on with checksums


def models() -> dict[str, tuple[type, type]]:
    """The model classes a manifest may name, each with its config. Closed on purpose."""
    from jaxllm.models import decoder, gpt, t5

    return {
        "Decoder": (decoder.Decoder, decoder.Config),
        "Gpt": (gpt.Gpt, gpt.Config),
        "T5": (t5.T5, t5.Config),
    }


def save_native(model: Any, path, tokenizer=None) -> None:
    """Writes a native directory; TypeError for a weight of an unknown format."""
    name, config = type(model).__name__, model.config
    if models().get(name, (None,))[0] is not type(model):
        raise TypeError(f"save: the model must be one of {', '.join(models())}, got {name}")
    described: dict[str, Any] = {}
    arrays: dict[str, jax.Array] = {}
    for key, variable in _variables(nnx.state(model)):
        value = variable.get_value()
        described[key] = describe(value, key)
        arrays |= dict(arrays_of(value, key))
    manifest = {"model": name, "config": to_json(config), "weights": described}
    size = sum(array.nbytes for array in arrays.values())
    with new_directory(path, who="save", num_bytes=size) as out:
        write_meta(out / MANIFEST, FORMAT, VERSIONS[-1], manifest)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))
        write(out / WEIGHTS, arrays)
        checksums.write(out, [MANIFEST, WEIGHTS])


def load_native(path, *, dtype=None, mesh=None, verify: bool = True):
    """The model and tokenizer of a directory that `save` wrote.

    verify: compares the files with their checksums first (`storage/checksums.py` says what it costs).
    """
    path = Path(path).absolute()
    manifest = _read_manifest(path)
    if verify:
        checksums.verify("load", path, [MANIFEST, WEIGHTS], required=manifest["version"] > 1)
    weights = entry_of(manifest, "weights", dict, MANIFEST)
    model_class, config_class = models()[manifest["model"]]
    config = from_json(entry_of(manifest, "config", dict, MANIFEST), (config_class, Rope))
    _check_config(config, config_class, len(weights))
    graph, state = nnx.split(model_class(config, rngs=None))
    _check_weights(dict(_variables(state)), weights)

    def rebuild(make: Make):
        return _replace(state, {key: build(described, key, make) for key, described in weights.items()})

    types: dict[str, Any] = {}

    def name_in_file(key: str, shape: tuple[int, ...], dtype) -> str:
        types[key] = dtype
        return key

    in_file = _arrays(rebuild(name_in_file))
    restored = _restore(path, nnx.merge(graph, rebuild(_shape)), in_file, types, mesh)
    _check_indices(restored)
    model = nnx.merge(graph, rebuild(lambda key, shape, dtype: restored.pop(key)))  # one at a time changes
    if dtype is not None:
        model = _cast(model, dtype)
    return to_host(model), load_tokenizer(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_meta("load", path / MANIFEST, FORMAT, *VERSIONS)
    name = entry_of(manifest, "model", str, MANIFEST)
    if name not in models():
        raise ValueError(f"load: model must be one of {', '.join(models())}, got model={name!r}")
    return manifest


def _check_config(config: Any, must: Any, num_weights: int) -> None:
    """Raises ValueError for sizes that no model has, before one is built of them: a layer has weights."""
    if not isinstance(config, must):
        raise ValueError(f"load: config must be a {must.__name__} of the model, got {type(config).__name__}")
    for field in dataclasses.fields(must):
        size = getattr(config, field.name)
        most = num_weights if field.name in ("layers", "encoder_layers") else 1 << 31
        if field.default is dataclasses.MISSING and not 1 <= size <= most:
            raise ValueError(f"load: {field.name} of {MANIFEST} must be 1 to {most}, got {size}")


def _variables(state) -> Iterator[tuple[str, nnx.Variable]]:
    """Name and variable of each weight of a state."""
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)
    for path, variable in found:
        yield path_name(path), variable


def _arrays(state) -> dict[str, Any]:
    """Each array of a state by its name."""
    return {key: leaf for name, v in _variables(state) for key, leaf in arrays_of(v.get_value(), name)}


def _replace(state, values: dict[str, Any]):
    """The state with other values, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(values[path_name(path)]), state, is_leaf=is_variable
    )


def _check_weights(variables: dict[str, nnx.Variable], weights: dict[str, Any]) -> None:
    """Raises ValueError unless the manifest has just the model's weights, in their shapes."""
    if variables.keys() != weights.keys():
        differ = sorted(variables.keys() ^ weights.keys())
        raise ValueError(
            f"load: {MANIFEST} must have the model's weights, got {len(differ)} names that differ: "
            f"{differ[0]}, ..."
        )
    for key, variable in variables.items():
        made, must = build(weights[key], key, _shape), tuple(variable.get_value().shape)
        try:
            shape = None if made is None or isinstance(made, tuple) else tuple(made.shape)
            one = made.one if isinstance(made, Experts) else made
            if shape == must and isinstance(one, Weight):
                *experts, K, _ = must
                x = jax.ShapeDtypeStruct((1, K), jnp.float32)
                shape = (*experts, K, jax.eval_shape(matmul, x, one).shape[1])
            if isinstance(made, Experts) and len({x.shape[0] for x in jax.tree.leaves(made)}) > 1:
                raise ValueError("an array of different numbers of experts")
        except Exception as error:  # what JAX says of shapes that do not go together
            raise ValueError(f"load: {key} must have parts that fit, got {one_line(error)[:200]}") from error
        if shape != must:
            raise ValueError(f"load: {key} must have shape {must}, got {shape=}")


def _shape(name: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _restore(
    path: Path, abstract: nnx.Module, in_file: dict[str, str], types: dict[str, Any], mesh
) -> dict[str, jax.Array]:
    """The arrays of a native directory, of the abstract model's shapes, by their names there.

    in_file: these names by the model's. types: of the arrays by these names. Both are others where an
      earlier version wrote the file.
    """
    want = _arrays(nnx.state(abstract))
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(want, place)
    else:
        from jaxllm.sharding import shardings

        places = _arrays(shardings(abstract, mesh))
    target = {
        in_file[key]: jax.ShapeDtypeStruct(leaf.shape, types[in_file[key]], sharding=places[key])
        for key, leaf in want.items()
    }
    with reading("load", path / WEIGHTS) as (checkpointer, where):
        stored = checkpointer.metadata(where)
        stored = getattr(stored, "item_metadata", stored).tree
        _check_stored(stored, target)
        return checkpointer.restore(where, target)


def _check_indices(arrays: dict[str, jax.Array]) -> None:
    """Raises ValueError for indices of nothing, which products would clip, and orders that are none."""
    for key, index in arrays.items():
        if key.endswith("/order") and not np.array_equal(np.sort(index), np.arange(index.size)):
            raise ValueError(f"load: {key} must name each of {index.size} inputs once")
        if key.endswith("/exception_of_output"):
            R = arrays[key.removesuffix("_of_output") + "s"].shape[-2]
            low, high = (int(index.min()), int(index.max())) if index.size else (0, 0)
            if not -1 <= low <= high < R:
                raise ValueError(f"load: {key} must be -1 to {R - 1}, got {low} to {high}")


def _check_stored(stored: dict[str, Any], target: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError unless arrays are what the manifest says: Orbax casts silently."""
    if stored.keys() != target.keys():
        differ = sorted(stored.keys() ^ target.keys())
        raise ValueError(f"load: weights and {MANIFEST} must name the same arrays, got {differ[0]}")
    for key, leaf in target.items():
        have = stored[key]
        if jnp.dtype(have.dtype) != leaf.dtype or tuple(have.shape) != leaf.shape:
            raise ValueError(
                f"load: {key} must be {leaf.dtype}{list(leaf.shape)} by {MANIFEST}, "
                f"got {jnp.dtype(have.dtype)}{list(have.shape)}"
            )


def _cast(model: nnx.Module, dtype) -> nnx.Module:
    """The model with plain float weights in another type; other formats know their own."""
    from jaxllm.weights.dense import Dense

    def one(variable):
        match variable.get_value():
            case Dense(rows):
                return variable.replace(Dense(rows.astype(dtype)))
            case Experts(Dense(rows)):
                return variable.replace(Experts(Dense(rows.astype(dtype))))
            case jax.Array() as value if jnp.issubdtype(value.dtype, jnp.floating):
                return variable.replace(value.astype(dtype))
            case _:
                return variable

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(one, state, is_leaf=is_variable))
