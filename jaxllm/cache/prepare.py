"""A text read once: into a cache, and a cache into a directory that another process opens.

    cache = prefill(model, [ids])                                   # a DenseCache of the texts
    save(evict(cache, scores, ratio=0.3), "prepared/", model)       # keys and values, codes and pages as is
    cache = load("prepared/", model)

Saving and loading are lossless. A directory knows the model whose keys it holds; none but that opens it.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm import cache as kv
from jaxllm.atomic import new_directory
from jaxllm.cache.dense import DenseCache, Rows
from jaxllm.cache.gates import Gate, Hold
from jaxllm.cache.paged import Context, PagedCache
from jaxllm.cache.quantized import CodedRows
from jaxllm.measure.perplexity import as_tokens, refuse_encoder

META, ARRAYS = "cache.json", "arrays.npz"
STEP = 64  # lengths are rounded up to multiples, so that texts of about one length share a compilation


def prefill(
    model, tokens: Sequence[Sequence[int]], *, slack: int = 0, bits: int | None = None, chunk: int = 2048
) -> DenseCache:
    """The cache of some texts, rows of token ids; `kv.grow` makes room for more.

    slack: the longest chunk that layers with a window must take later (KVzip's repetition). bits: of rows in
    codes, 2, 4 or 8. chunk: tokens that are read at once.
    """
    rows, lengths = _filled_up("prefill", model, tokens)
    cache = model.make_cache(len(rows), rows.shape[1], slack=slack, bits=bits)
    return _read(model, cache, rows, lengths, chunk)[0]


def prefill_scored(
    model,
    tokens: Sequence[Sequence[int]],
    gates: Gate,
    *,
    prefix: int = 0,
    slack: int = 0,
    bits: int | None = None,
    chunk: int = 2048,
) -> tuple[DenseCache, Float[Array, "L B K T"]]:
    """As `prefill`, and the gates' scores of what stands behind `prefix`, from the same pass."""
    rows, lengths = _filled_up("prefill_scored", model, tokens)
    if not 0 <= prefix < lengths.min():
        raise ValueError(f"prefill_scored: rows must have more than {prefix=} tokens, got {lengths.tolist()}")
    cache = model.make_cache(len(rows), rows.shape[1], slack=slack, bits=bits)
    cache, scores = _read(model, cache, rows, lengths, chunk, gates)
    real = np.arange(rows.shape[1]) < lengths[:, None]
    scores = jnp.where(real[None, :, None], jnp.concatenate(scores, axis=-1), 0.0)
    return cache, scores[..., prefix : lengths.max()]


def prefill_held(
    model, tokens: Sequence[Sequence[int]], hold: Hold, *, bits: int | None = None
) -> PagedCache:
    """The cache of some texts within a budget, `hold.buffer` tokens being read at a time.

    What lies in memory does not grow with the texts; while the budget is restored it is two pools and a tail.
    """
    rows, lengths = _filled_up("prefill_held", model, tokens)
    hold.gates.layers(model)  # or it raises
    cache = hold.settled(model.make_cache(len(rows), 1, slack=hold.buffer, bits=bits), None)
    at = 0
    while at < lengths.max():
        context, tail = kv.split(cache)
        part = rows[:, at : at + min(hold.buffer, kv.room(tail))]
        sizes = np.clip(lengths - at, 0, part.shape[1])
        _, tail, scores = read(model, hold.gates, None, context, part, tail, sizes)
        cache = hold.settled(kv.join(context, tail), scores)
        at += part.shape[1]
    return cache


def _filled_up(who: str, model, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows, lengths = padded(who, model, tokens)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % STEP))), lengths


def _read(
    model, cache: DenseCache, rows: np.ndarray, lengths: np.ndarray, chunk: int, gates: Gate | None = None
):
    """The cache with the rows read, some tokens at a time, and the scores [L, B, K, _] of each time."""
    if chunk < 1:
        raise ValueError(f"prefill: chunk must be at least 1 token, got {chunk=}")
    at, found = 0, []
    while at < rows.shape[1]:
        part = rows[:, at : at + min(chunk, kv.room(cache))]
        sizes = np.clip(lengths - at, 0, part.shape[1])
        _, cache, scores = read(model, gates, None, None, part, cache, sizes)
        found.append(scores)
        at += part.shape[1]
    return cache, found


def padded(who: str, model, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids [B, T], filled up on the right, and their lengths [B].

    Raises ValueError for ids out of range, for rows that are empty or longer than the model's context, and
    for a model that reads a source.
    """
    refuse_encoder(who, model)
    rows = [as_tokens(who, row, model.config.vocab) for row in tokens]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    if not rows or not 1 <= lengths.min() <= lengths.max() <= model.config.context:
        got = lengths.tolist()
        raise ValueError(f"{who}: rows must have 1 to {model.config.context} tokens, got {got}")
    filled = np.zeros((len(rows), lengths.max()), np.int32)
    for b, row in enumerate(rows):
        filled[b, : len(row)] = row
    return filled, lengths


def sees_all(who: str, model) -> None:
    """Raises ValueError unless a layer sees all of the text: from the others nothing is evicted."""
    if None not in model.windows:
        raise ValueError(f"{who}: a layer must see all of the text, got a model of windows only")


def forward(model, gates: Gate | None, memory, context: Context | None, tokens, tail: DenseCache, lengths):
    """Logits of the last tokens, the tail with all of them in it, and the gates' scores of them if any."""
    tap, inputs = (None, []) if gates is None else gates.watch(model)
    more = {} if memory is None else {"memory": memory}
    logits, cache = model(tokens, kv.join(context, tail), lengths=lengths, logits="last", tap=tap, **more)
    return logits, kv.split(cache)[1], None if gates is None else gates.scores(inputs)


read = partial(jax.jit, donate_argnames="tail")(forward)


def save(cache: DenseCache | PagedCache, path: str | Path, model) -> None:
    """Writes a cache to a new directory, whole or not at all.

    Raises FileExistsError where `path` exists, OSError when the disk is full.
    """
    from jaxllm.quant.calibrate import fingerprint

    paged = isinstance(cache, PagedCache)
    tail = cache.tail if isinstance(cache, PagedCache) else cache
    meta: dict[str, Any] = {
        "format": "jaxllm cache",
        "version": 2,
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
    from jaxllm.quant.calibrate import fingerprint

    path = Path(path)
    if not (path / META).is_file():
        raise FileNotFoundError(f"cache.load: {META} must be in the directory, got {str(path)!r}")
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        if meta["format"] != "jaxllm cache" or meta["version"] != 2:
            raise ValueError("it is of another version")
        if meta["model"] != fingerprint(model):
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
