"""Scores of whole heads, learnt from one text and used for any other: no pass over a new text at all.

    heads = head_scores(kvzip_scores(model, cache, sample))          # [L, K], once
    save_heads(heads, "heads/", model)
    scores = broadcast_head_scores(load_heads("heads/", model=model), cache)
    small = evict(cache, scores, ratio=0.6, budget="whole_heads")

The context-independent form of KVzip (arXiv:2505.23416), as DuoAttention divides heads (arXiv:2410.10819): a
head that is dropped keeps the prefix and what comes after the context only. Of several samples, prose and
code say, a head counts what it counts in the one where it counts most. Lossy, and more so than scores of the
text itself.

Letters: L layers without a window, B requests, K key heads, T tokens.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.cache.dense import DenseCache, global_layers
from jaxllm.cache.paged import PagedCache
from jaxllm.storage import checksums
from jaxllm.storage.directory import new_directory
from jaxllm.storage.metadata import excerpt, one_line, read_meta, write_meta

HEADS_JSON = "heads.json"
FORMAT, VERSIONS = "jaxllm head scores", (1, 2)  # from 2 on with checksums


def head_scores(scores: Float[Array, "L B K T"]) -> Float[Array, "L K"]:
    """The greatest score that any row of a head has."""
    return scores.max((1, 3))


def broadcast_head_scores(
    heads: Float[Array, "L K"], cache: DenseCache | PagedCache, *, prefix: int = 0
) -> Float[Array, "L B K T"]:
    """Scores for `evict` of all that a cache holds behind `prefix`, or of the context that it held."""
    keys = (cache.tail if isinstance(cache, PagedCache) else cache).keys
    L, K = len(global_layers(cache.windows)), keys[0].shape[0] // len(cache.lengths)
    if heads.shape != (L, K):
        raise ValueError(
            f"broadcast_head_scores: heads must be [L, K] = {(L, K)} of this cache, got {heads.shape}"
        )
    if isinstance(cache, PagedCache):
        context = cache.context
        T = int(context.context_lengths[context.context_of_request].max())
    else:
        T = int(cache.lengths.max()) - prefix
    if not 0 <= prefix or T < 1:
        raise ValueError(
            "broadcast_head_scores: the cache must hold more than the prefix, "
            f"got {prefix=}, {T + prefix} tokens"
        )
    return jnp.broadcast_to(heads[:, None, :, None], (L, len(cache.lengths), K, T))


def save_heads(heads: Float[Array, "L K"], path: str | Path, model) -> None:
    """Writes a new directory, whole or not at all. Raises FileExistsError where `path` exists."""
    with new_directory(path, who="save_heads") as out:
        meta = {"of": _sizes(model), "scores": np.asarray(heads, np.float64).tolist()}
        write_meta(out / HEADS_JSON, FORMAT, VERSIONS[-1], meta)
        checksums.write(out, [HEADS_JSON])


def load_heads(*paths: str | Path, model, verify: bool = True) -> Float[Array, "L K"]:
    """The scores of one directory, or the greatest of several.

    verify: compares the files with their checksums first.

    Raises FileNotFoundError where there are none, ValueError for those of a model of other sizes or damaged
    ones.
    """
    if not paths:
        raise ValueError("load_heads: at least one directory must be given, got none")
    found = []
    for path in map(Path, paths):
        meta = read_meta("load_heads", path / HEADS_JSON, FORMAT, *VERSIONS)
        if verify:
            checksums.verify("load_heads", path, [HEADS_JSON], required=meta["version"] > 1)
        try:
            if meta.get("of") != _sizes(model):
                theirs = excerpt(meta.get("of"))
                raise ValueError(f"it is of a model of {theirs}, this one has {_sizes(model)}")
            found.append(_scores(meta.get("scores"), model.config.kv_heads))
        except ValueError as error:
            why = one_line(error)
            raise ValueError(f"load_heads: {str(path)!r} cannot be used with this model: {why}") from error
    if len({scores.shape for scores in found}) > 1:
        raise ValueError(f"load_heads: all must have as many layers, got {[len(scores) for scores in found]}")
    return jnp.asarray(np.max(found, axis=0))


def _scores(rows, kv_heads: int) -> Float[np.ndarray, "L K"]:
    """Scores from JSON."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == kv_heads for row in rows):
        raise ValueError(f"scores must be rows of {kv_heads} numbers, got {excerpt(rows)}")
    greatest = float(np.finfo(np.float32).max)
    for score in (score for row in rows for score in row):
        if type(score) not in (int, float) or not -greatest <= score <= greatest:
            raise ValueError(f"scores must be numbers of float32, got {excerpt(score)}")
    return np.asarray(rows, np.float32).reshape(-1, kv_heads)


def _sizes(model) -> dict[str, int]:
    names = ("layers", "width", "heads", "kv_heads", "head_dim", "vocab")
    return {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
