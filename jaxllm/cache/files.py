"""A cache in a directory that another process opens. Lossless.

    save(evict(cache, scores, ratio=0.3), "prepared/", model)       # keys and values, codes and pages as is
    cache = load("prepared/", model)

A directory knows the model whose keys it holds; none but that opens it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.coded import QuantizedRows
from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.cache.rows import Rows
from jaxllm.storage import checksums
from jaxllm.storage.arrays import read_npz
from jaxllm.storage.directory import new_directory
from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers
from jaxllm.storage.former_names import FIELDS
from jaxllm.storage.manifest import arrays_of, build, describe, pack_arrays, unpack_arrays
from jaxllm.storage.metadata import one_line, read_meta, write_meta

DESCRIPTION, ARRAYS = "cache.json", "arrays.npz"  # files of the directory
FORMAT, VERSION = "jaxllm cache", 5
CHECKED = 5  # the first version with checksums
FINGERPRINTS = {2: fingerprint_of_first_numbers} | dict.fromkeys((3, 4, VERSION), fingerprint)  # by version
CLASSES = (DenseCache, PagedCache, Context, QuantizedRows)  # what a file may name


def save(cache: DenseCache | PagedCache, path: str | Path, model) -> None:
    """Writes a cache to a new directory, whole or not at all.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    meta = {"model": fingerprint(model), "cache": describe(cache, "cache", CLASSES)}
    arrays = dict(arrays_of(cache, "cache", CLASSES))
    with new_directory(path, who="cache.save", num_bytes=sum(x.nbytes for x in arrays.values())) as out:
        write_meta(out / DESCRIPTION, FORMAT, VERSION, meta)
        np.savez(out / ARRAYS, **pack_arrays(arrays))
        checksums.write(out, [DESCRIPTION, ARRAYS])


def load(path: str | Path, model, *, verify: bool = True) -> DenseCache | PagedCache:
    """The cache of a directory that `save` wrote for this model.

    verify: compares the files with their checksums first.

    Raises FileNotFoundError where there is none, ValueError for another model's or one that is damaged.
    """
    path = Path(path)
    meta = read_meta("cache.load", path / DESCRIPTION, FORMAT, *FINGERPRINTS)
    if verify:
        checksums.verify("cache.load", path, [DESCRIPTION, ARRAYS], required=meta["version"] >= CHECKED)
    try:
        if meta.get("model") != FINGERPRINTS[meta["version"]](model):
            raise ValueError("it holds another model's keys")
        stored = read_npz(path / ARRAYS)
        if meta["version"] == 2:
            return _of_version_2(meta, stored)
        cache = build(meta.get("cache"), "cache", unpack_arrays(stored), CLASSES)
        if not isinstance(cache, DenseCache | PagedCache):
            raise ValueError(f"it must hold a DenseCache or a PagedCache, got {type(cache).__name__}")
        _check_shapes(cache, model)
        _check_indices(cache)
        return cache
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        why = one_line(error)
        raise ValueError(f"cache.load: {str(path)!r} cannot be opened with this model: {why}") from error


def _check_shapes(cache: DenseCache | PagedCache, model) -> None:
    """Raises ValueError for arrays that do not fit each other and the model, and indices of another type."""
    tail = cache.tail if isinstance(cache, PagedCache) else cache
    K, E, B = model.config.kv_heads, model.config.head_dim, tail.lengths.size
    if not len(tail.keys) == len(tail.values) == len(tail.windows) == len(model.windows):
        got = len(tail.keys), len(tail.values), len(tail.windows)
        raise ValueError(f"it must hold {len(model.windows)} layers, got keys, values, windows of {got}")
    rows: dict[str, tuple[Rows, tuple[int, ...]]] = {}
    for i, (keys, values) in enumerate(zip(tail.keys, tail.values, strict=True)):
        shape = (B * K, *keys.shape[1:2], E)
        rows |= {f"keys of layer {i}": (keys, shape), f"values of layer {i}": (values, shape)}
    indices: dict[str, tuple[jax.Array, tuple[int, ...]]] = {}
    indices |= {"lengths": (tail.lengths, (B,)), "extents": (tail.extents, (B,))}
    if tail.start is not None:
        indices["start"] = (tail.start, (B,))
    if isinstance(cache, PagedCache):
        context = cache.context
        pages = context.page_head.size, *context.positions.shape[1:2]
        rows |= {"keys": (context.keys, (*pages, E)), "values": (context.values, (*pages, E))}
        rows["scores"] = (context.scores, pages)
        N, L = context.context_lengths.size, sum(window is None for window in tail.windows)
        indices |= {
            "positions": (context.positions, pages),
            "page_head": (context.page_head, pages[:1]),
            "page_lengths": (context.page_lengths, pages[:1]),
            "page_offsets": (context.page_offsets, (L, N * K + 1)),
            "context_lengths": (context.context_lengths, (N,)),
            "prefix": (context.prefix, ()),
            "context_of_request": (context.context_of_request, (B,)),
        }
    for name, (array, shape) in (rows | indices).items():
        if array.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {array.shape}")
    for name, (index, _) in indices.items():
        if index.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, got {index.dtype}")
    for name, (held, _) in rows.items():
        if isinstance(held, QuantizedRows):
            coding = {"bits": held.bits, "group_size": held.group_size, "dtype": held.dtype}
            width = QuantizedRows.zeros((1, 1, E), rotated=held.rotated, **coding).words.shape[2]
            if held.words.shape[2] != width:
                raise ValueError(f"{name} must have {width} words a row, got {held.words.shape[2]}")


def _check_indices(cache: DenseCache | PagedCache) -> None:
    """Raises ValueError for rows, pages or requests beyond what there is, which reads would clip."""
    tail = cache.tail if isinstance(cache, PagedCache) else cache
    most = np.iinfo(np.int32).max
    bounds = {"lengths": (tail.lengths, 0, most), "extents": (tail.extents, 0, most)}
    if tail.start is None:
        bounds["lengths"] = (tail.lengths, 0, tail.capacity)
    else:
        bounds["start"] = (tail.start, 0, most)
    if isinstance(cache, PagedCache):
        context = cache.context
        (P, C), J = context.positions.shape, context.page_offsets.shape[1] - 1
        bounds |= {
            "positions": (context.positions, -1, most),
            "page_head": (context.page_head, 0, max(J - 1, 0)),
            "page_lengths": (context.page_lengths, 0, C),
            "page_offsets": (context.page_offsets, 0, P),
            "context_lengths": (context.context_lengths, 0, most),
            "prefix": (context.prefix, 0, most),
            "context_of_request": (context.context_of_request, 0, len(context.context_lengths) - 1),
        }
    for name, (values, least, greatest) in bounds.items():
        found = np.asarray(values)
        if found.size and not (least <= found.min() and found.max() <= greatest):
            raise ValueError(f"{name} must lie in {least} to {greatest}, got {found.min()} to {found.max()}")
    if isinstance(cache, PagedCache) and (np.diff(cache.context.page_offsets) < 0).any():
        raise ValueError("page_offsets must not fall")


def _of_version_2(meta: dict[str, Any], stored: Mapping[str, np.ndarray]) -> DenseCache | PagedCache:
    """The cache of a file of version 0.1.0, which said its layout in words of its own."""
    make = unpack_arrays(stored)
    arrays = {
        name: make(name, tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype) in meta["arrays"].items()
    }

    def made(cls: type, **fields: Any) -> Any:
        now = FIELDS[cls.__name__]
        return cls(**{now.get(name, name): value for name, value in fields.items()})

    def rows(name: str, coding: dict[str, Any] | None) -> Rows:
        if coding is None:
            return arrays[name]
        words, dtype = arrays[f"{name}/words"], jnp.dtype(coding["dtype"])
        return made(QuantizedRows, words=words, **(coding | {"dtype": dtype}))

    at = "tail/" if meta["paged"] else ""
    layers = range(len(meta["windows"]))
    tail = made(
        DenseCache,
        keys=tuple(rows(f"{at}keys/{i}", meta["keys"]) for i in layers),
        values=tuple(rows(f"{at}values/{i}", meta["values"]) for i in layers),
        lengths=arrays[f"{at}lengths"],
        base=arrays.get(f"{at}base"),
        extents=jnp.array(arrays[f"{at}lengths"]),
        windows=tuple(meta["windows"]),
        rows=meta["rows"],
        empty=meta["empty"],
    )
    if not meta["paged"]:
        return tail
    plain = ("positions", "scores", "head", "filled", "first", "sizes", "prefix", "slot")
    context = made(
        Context,
        keys=rows("context/keys", meta["keys"]),
        values=rows("context/values", meta["values"]),
        **{name: arrays[f"context/{name}"] for name in plain},
        readers=meta["readers"],
    )
    return PagedCache(context, tail)
