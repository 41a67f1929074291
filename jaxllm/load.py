"""Models from files and into files: one `load` for every source, and the native format.

    model, tokenizer = load()                          # the small model that ships
    model, tokenizer = load("org/name", dtype="bfloat16")
    save(model, "out/", tokenizer)
    model, tokenizer = load("out/")

A native directory holds `weights/` (Orbax), the tokenizer's files and `manifest.json`: the model's
class, its config, and for each weight the name of its format, its static fields, and shape and type
of each array. A format is looked up by name in `quant.matmul.FORMATS` and a model in `models()`;
nothing that a file names is ever imported. Saving and
loading are lossless, for any format: a new one needs no code here.

This is the only file that names `checkpoints_convert`, and only inside functions.
"""

import dataclasses
import importlib.resources
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jaxllm.quant.matmul
from jaxllm.atomic import new_directory
from jaxllm.models.rope import Rope
from jaxllm.quant.dec_dec import to_host

MANIFEST = "manifest.json"
VERSION = 1


def models() -> dict[str, tuple[type, type]]:
    """The model classes a manifest may name, each with its config. Closed on purpose."""
    from jaxllm.models import decoder, gpt, t5

    return {
        "Decoder": (decoder.Decoder, decoder.Config),
        "Gpt": (gpt.Gpt, gpt.Config),
        "T5": (t5.T5, t5.Config),
    }


def load(
    path_or_id=None,
    *,
    dtype=None,
    mesh=None,
    mapped: bool = False,
    revision=None,
    local_files_only: bool = False,
):
    """A model and its tokenizer (None if it has none).

    path_or_id: a native directory, a Hugging Face directory, a llama2.c `.bin` file, or an id on
      the Hugging Face hub; None is the model that ships.
    dtype: what weights are cast to, such as "bfloat16"; None keeps theirs. Only plain weights can
      be cast.
    mesh: where the model is sharded by its own table (`sharding.make_mesh`).
    mapped: what needs no cast and lies in safetensors files stays there as views, and is read whenever it is
      used: for `quantize`, which then never holds the whole. The files must stay as they are meanwhile.
    revision, local_files_only: for hub ids.

    Errors are one line: FileNotFoundError where nothing is found, ValueError where what is found
    cannot be read.
    """
    dtype = None if dtype is None else float_type(dtype)
    if mapped and mesh is not None:
        raise ValueError("load: mapped weights lie in files, on no mesh: give one of mapped and mesh")
    if path_or_id is None:
        path_or_id = Path(str(importlib.resources.files("jaxllm") / "pico" / "target"))
        if not path_or_id.is_dir():
            raise FileNotFoundError("load: the model that ships is missing from this installation")
    path = Path(path_or_id)
    if (path / MANIFEST).is_file():
        return load_native(path, dtype=dtype, mesh=mesh)
    if path.is_file():
        return _load_file(path, dtype=dtype, mesh=mesh)
    from checkpoints_convert import huggingface

    return huggingface.load(
        path_or_id,
        dtype=dtype,
        mesh=mesh,
        mapped=mapped,
        revision=revision,
        local_files_only=local_files_only,
    )


def float_type(dtype):
    """A float type from its name or itself."""
    try:
        made = jnp.dtype(dtype)
    except TypeError:
        made = None
    if made not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"load: dtype must be float32, bfloat16 or float16, got {dtype=}")
    return made


def _load_file(path: Path, *, dtype, mesh):
    """A llama2.c file; anything else is refused with what to do."""
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix in (".pt", ".pth", ".ckpt", ".pkl") or head[:2] == b"PK" or head[:1] == b"\x80":
        raise ValueError(
            "load: a pickle can run code when opened, so it never is: convert it to safetensors "
            f"where you trust it, with transformers' save_pretrained, got {str(path)!r}"
        )
    if path.suffix == ".json":
        from checkpoints_convert import mingpt

        return mingpt.load(path, dtype=dtype, mesh=mesh)
    if path.suffix != ".bin":
        raise ValueError(f"load: must be a directory, a hub id or a llama2.c .bin file, got {str(path)!r}")
    from checkpoints_convert import llama2c

    return llama2c.load(path, dtype=dtype, mesh=mesh)


Layout = Literal["native", "huggingface"]


def save(
    model: nnx.Module,
    path,
    tokenizer=None,
    *,
    to: Layout = "native",
    model_type: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory, whole or not at all.

    to: "native" for any weights, "huggingface" for dense ones and a directory that transformers
      loads; then `model_type` is the family to write (None: the first that can say the model's
      config) and `max_shard_bytes` the most weights in one file.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    if to == "native":
        save_native(model, path, tokenizer)
        return
    from checkpoints_convert import huggingface

    huggingface.save(model, tokenizer, path, model_type=model_type, max_shard_bytes=max_shard_bytes)


def convert(src, dst, to: Layout = "native", *, dtype=None):
    """Reads a checkpoint and writes it as another directory; returns the model and its tokenizer.

    A Hugging Face directory is written as the family it was read as.
    """
    if Path(dst).exists():
        raise FileExistsError(f"convert: the output must not exist yet, got {str(dst)!r}")
    model, tokenizer = load(src, dtype=dtype)
    model_type = None
    if to == "huggingface":
        from checkpoints_convert import huggingface

        model_type = huggingface.model_type_of(src)
    save(model, dst, tokenizer, to=to, model_type=model_type)
    return model, tokenizer


def save_native(model: Any, path, tokenizer=None) -> None:
    """Writes a native directory; TypeError for a weight of an unknown format."""
    import orbax.checkpoint as ocp

    name, config = type(model).__name__, model.config
    if models().get(name, (None,))[0] is not type(model):
        raise TypeError(f"save: the model must be one of {', '.join(models())}, got {name}")
    described: dict[str, Any] = {}
    arrays: dict[str, jax.Array] = {}
    for key, variable in _variables(nnx.state(model)):
        value = variable.get_value()
        described[key] = describe(value, key)
        arrays |= dict(arrays_of(value, key))
    manifest = {
        "format": "jaxllm",
        "version": VERSION,
        "model": name,
        "config": to_json(config),
        "weights": described,
    }
    with new_directory(path, num_bytes=sum(array.nbytes for array in arrays.values())) as out:
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out / "weights", arrays)
            checkpointer.wait_until_finished()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log: it prints the traceback of an error that is raised anyway."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_native(path, *, dtype=None, mesh=None):
    """The model and tokenizer of a directory that `save` wrote."""
    from checkpoints_convert import huggingface

    path = Path(path).absolute()
    manifest = _read_manifest(path)
    model_class, config_class = models()[manifest["model"]]
    config = from_json(manifest["config"], config_class)
    graph, state = nnx.split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    weights = manifest["weights"]
    _check_weights(dict(_variables(state)), weights)
    rebuild = lambda make: _replace(  # noqa: E731
        state, {key: build(described, key, make) for key, described in weights.items()}
    )
    abstract = rebuild(_shape)
    restored = _restore(path / "weights", nnx.merge(graph, abstract), mesh)
    model = nnx.merge(graph, rebuild(lambda key, shape, dtype: restored[key]))
    if dtype is not None:
        model = _cast(model, dtype)
    return to_host(model), huggingface.load_tokenizer(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"load: {MANIFEST} of {str(path)!r} must be JSON: {error}") from error
    version, name = manifest.get("version"), manifest.get("model")
    if manifest.get("format") != "jaxllm" or version != VERSION:
        raise ValueError(f"load: {MANIFEST} must be of version {VERSION}, got {version=}")
    if name not in models():
        raise ValueError(f"load: model must be one of {', '.join(models())}, got model={name!r}")
    return manifest


def _variables(state) -> Iterator[tuple[str, nnx.Variable]]:
    """Name and variable of each weight of a state."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)
    for path, variable in found:
        yield jax.tree_util.keystr(path, simple=True, separator="."), variable


def _replace(state, values: dict[str, Any]):
    """The state with other values, by name."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(values[name(path)]), state, is_leaf=is_variable
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
        made = build(weights[key], key, lambda key, shape, dtype: jax.ShapeDtypeStruct(shape, dtype))
        shape, must = tuple(made.shape), tuple(variable.get_value().shape)
        if shape != must:
            raise ValueError(f"load: {key} must have shape {must}, got {shape=}")


def _shape(name: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _restore(path: Path, abstract: nnx.Module, mesh) -> dict[str, jax.Array]:
    """The arrays of an Orbax directory by name, of the abstract model's types and shapes."""
    import orbax.checkpoint as ocp

    want = {key: leaf for name, v in _variables(nnx.state(abstract))
            for key, leaf in arrays_of(v.get_value(), name)}  # fmt: skip
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(want, place)
    else:
        from jaxllm.sharding import shardings

        places = {key: leaf for name, v in _variables(shardings(abstract, mesh))
                  for key, leaf in arrays_of(v.get_value(), name)}  # fmt: skip
    target = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[key]) for key, leaf in want.items()
    }
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path)
            stored = getattr(stored, "item_metadata", stored).tree
            _check_stored(stored, target)
            return checkpointer.restore(path, target)
    except (OSError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"load: the weights in {str(path)!r} cannot be read: {reason}") from error


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
    from jaxllm.quant.dense import Dense

    def one(variable):
        match variable.get_value():
            case Dense(rows):
                return variable.replace(Dense(rows.astype(dtype)))
            case jax.Array() as value if jnp.issubdtype(value.dtype, jnp.floating):
                return variable.replace(value.astype(dtype))
            case _:
                return variable

    graph, state = nnx.split(model)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(one, state, is_leaf=is_variable))


# A weight is an array or a format; a format's fields are arrays, formats or parts, tuples of these, None, or
# static values.


def formats() -> dict[str, type]:
    """What a file may name, and what it is made of."""
    known = (*jaxllm.quant.matmul.FORMATS, *jaxllm.quant.matmul.PARTS)
    return {cls.__name__: cls for cls in known}


def describe(value: Any, name: str) -> dict[str, Any] | None:
    """What the manifest says of a weight."""
    if value is None:
        return None
    if hasattr(value, "dtype") and not dataclasses.is_dataclass(value):
        return {"type": "array", "shape": list(value.shape), "dtype": jnp.dtype(value.dtype).name}
    if isinstance(value, tuple):
        return {"type": "tuple", "items": [describe(part, f"{name}/{i}") for i, part in enumerate(value)]}
    if type(value) not in formats().values():
        raise TypeError(f"save: {name} must be an array or a format, got {type(value).__name__}")
    described: dict[str, Any] = {"type": type(value).__name__}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if field.metadata.get("static"):
            described.setdefault("static", {})[field.name] = to_json(part)
        else:
            described.setdefault("fields", {})[field.name] = describe(part, f"{name}/{field.name}")
    return described


def arrays_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each array of a weight by its name in the file: the weight's, then the path of fields."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from arrays_of(part, f"{name}/{i}")
    elif dataclasses.is_dataclass(value) and type(value) in formats().values():
        for field in dataclasses.fields(value):
            if not field.metadata.get("static"):
                yield from arrays_of(getattr(value, field.name), f"{name}/{field.name}")
    elif value is not None:
        yield name, value


def build(described: dict[str, Any] | None, name: str, make) -> Any:
    """A weight from what the manifest says; `make(name, shape, dtype)` gives each array."""
    if described is None:
        return None
    kind = described["type"]
    if kind == "array":
        return make(name, tuple(described["shape"]), jnp.dtype(described["dtype"]))
    if kind == "tuple":
        return tuple(build(part, f"{name}/{i}", make) for i, part in enumerate(described["items"]))
    if kind not in formats():
        raise ValueError(f"load: {name} must be of a format of {', '.join(formats())}, got format={kind!r}")
    parts = {key: build(part, f"{name}/{key}", make) for key, part in described.get("fields", {}).items()}
    static = {key: from_json(part) for key, part in described.get("static", {}).items()}
    names = {field.name for field in dataclasses.fields(formats()[kind])}
    if names != parts.keys() | static.keys():
        raise ValueError(f"load: {name} must have the fields of {kind}, got {[*parts, *static]}")
    made: Any = object.__new__(formats()[kind])  # as when JAX rebuilds it: leaves may be shapes
    for key, part in (parts | static).items():
        object.__setattr__(made, key, part)
    return made


# Static values and configs in JSON: numbers, strings, None, tuples of these, types, configs.


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


def from_json(value: Any, config_class: type | None = None) -> Any:
    """The value that `to_json` wrote; `config_class` is what the outermost dictionary makes."""
    if isinstance(value, list):
        return tuple(from_json(part) for part in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(part) for key, part in value.items() if key != "type"}
    kind = value.get("type")
    if kind == "dtype":
        return jnp.dtype(fields["name"])
    made = config_class if config_class is not None else Rope if kind == "Rope" else None
    if made is None or made.__name__ != kind:
        raise ValueError(f"load: {MANIFEST} names an unknown type, got type={kind!r}")
    unknown = fields.keys() - {field.name for field in dataclasses.fields(made)}
    if unknown:
        raise ValueError(f"load: {kind} has no field {', '.join(sorted(unknown))}: a newer version wrote it")
    return made(**fields)
