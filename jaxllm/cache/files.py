"""A cache in a directory that another process opens. Lossless.

    save(evict(cache, scores, ratio=0.3), "prepared/", model)       # keys and values, codes and pages as is
    cache = load("prepared/", model)

A directory knows the model whose keys it holds; none but that opens it.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.coded import CodedRows
from jaxllm.cache.dense import DenseCache, Rows
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.storage.directory import new_directory
from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers

META, ARRAYS = "cache.json", "arrays.npz"
FINGERPRINTS = {2: fingerprint_of_first_numbers, 3: fingerprint}  # by the version of the file


def save(cache: DenseCache | PagedCache, path: str | Path, model) -> None:
    """Writes a cache to a new directory, whole or not at all.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    paged = isinstance(cache, PagedCache)
    tail = cache.tail if isinstance(cache, PagedCache) else cache
    meta: dict[str, Any] = {
        "format": "jaxllm cache",
        "version": 3,
        "model": fingerprint(model),
        "windows": list(tail.windows),
        "rows": tail.rows,
        "empty": tail.empty,
        "keys": _coding(tail.keys[0]),
        "values": _coding(tail.values[0]),
        "readers": cache.context.readers if isinstance(cache, PagedCache) else None,
    }
    named = {f"{'/'.join(_names(key))}": np.asarray(x) for key, x in jax.tree.leaves_with_path(cache)}
    meta["arrays"] = {name: [list(x.shape), x.dtype.name] for name, x in named.items()}
    with new_directory(path, num_bytes=sum(x.nbytes for x in named.values())) as out:
        (out / META).write_text(json.dumps(meta | {"paged": paged}) + "\n", "utf-8")
        raw = {name: np.ascontiguousarray(x).reshape(-1).view(np.uint8) for name, x in named.items()}
        np.savez(out / ARRAYS, **raw)  # type: ignore[arg-type]


def load(path: str | Path, model) -> DenseCache | PagedCache:
    """The cache of a directory that `save` wrote for this model.

    Raises FileNotFoundError where there is none, ValueError for another model's or one that is damaged.
    """
    path = Path(path)
    if not (path / META).is_file():
        raise FileNotFoundError(f"cache.load: {META} must be in the directory, got {str(path)!r}")
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        if meta["format"] != "jaxllm cache" or meta["version"] not in FINGERPRINTS:
            raise ValueError("it is of another version")
        if meta["model"] != FINGERPRINTS[meta["version"]](model):
            raise ValueError("it holds another model's keys")
        with np.load(path / ARRAYS) as stored:
            arrays = {
                name: jnp.asarray(stored[name].view(jnp.dtype(dtype)).reshape(shape))
                for name, (shape, dtype) in meta["arrays"].items()
            }
        return _rebuilt(meta, arrays)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cache.load: {str(path)!r} cannot be opened with this model: {reason}") from error


def _names(path) -> list[str]:
    return [str(getattr(key, "name", getattr(key, "idx", key))) for key in path]


def _coding(rows: Rows) -> dict[str, Any] | None:
    """What a cache's rows are written in besides their words."""
    if not isinstance(rows, CodedRows):
        return None
    names = ("bits", "group", "size", "rotated")
    return {name: getattr(rows, name) for name in names} | {"dtype": jnp.dtype(rows.dtype).name}


def _rebuilt(meta: dict[str, Any], arrays: dict[str, jax.Array]) -> DenseCache | PagedCache:
    def rows(name: str, coding: dict[str, Any] | None) -> Rows:
        if coding is None:
            return arrays[name]
        return CodedRows(arrays[f"{name}/words"], **(coding | {"dtype": jnp.dtype(coding["dtype"])}))

    at = "tail/" if meta["paged"] else ""
    layers = range(len(meta["windows"]))
    tail = DenseCache(
        keys=tuple(rows(f"{at}keys/{i}", meta["keys"]) for i in layers),
        values=tuple(rows(f"{at}values/{i}", meta["values"]) for i in layers),
        lengths=arrays[f"{at}lengths"],
        base=arrays.get(f"{at}base"),
        windows=tuple(meta["windows"]),
        rows=meta["rows"],
        empty=meta["empty"],
    )
    if not meta["paged"]:
        return tail
    plain = ("positions", "scores", "head", "filled", "first", "sizes", "prefix", "slot")
    context = Context(
        keys=rows("context/keys", meta["keys"]),
        values=rows("context/values", meta["values"]),
        **{name: arrays[f"context/{name}"] for name in plain},
        readers=meta["readers"],
    )
    return PagedCache(context, tail)
