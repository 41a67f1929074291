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
from jaxllm.storage.directory import new_directory
from jaxllm.storage.metadata import one_line, read_meta, write_meta

HEADS_JSON, FORMAT = "heads.json", "jaxllm head scores"


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
        write_meta(out / HEADS_JSON, FORMAT, 1, meta)


def load_heads(*paths: str | Path, model) -> Float[Array, "L K"]:
    """The scores of one directory, or the greatest of several.

    Raises FileNotFoundError where there are none, ValueError for those of a model of other sizes or damaged
    ones.
    """
    if not paths:
        raise ValueError("load_heads: at least one directory must be given, got none")
    found = []
    for path in map(Path, paths):
        meta = read_meta("load_heads", path / HEADS_JSON, FORMAT, 1)
        try:
            if meta["of"] != _sizes(model):
                raise ValueError(f"it is of a model of {meta['of']}, this one has {_sizes(model)}")
            scores = np.asarray(meta["scores"], np.float32)
            if scores.ndim != 2 or scores.shape[1] != model.config.kv_heads or not np.isfinite(scores).all():
                raise ValueError(f"scores must be numbers [L, K], got {scores.shape}")
            found.append(scores)
        except (ValueError, KeyError, TypeError) as error:
            why = one_line(error)
            raise ValueError(f"load_heads: {str(path)!r} cannot be used with this model: {why}") from error
    if len({scores.shape for scores in found}) > 1:
        raise ValueError(f"load_heads: all must have as many layers, got {[len(scores) for scores in found]}")
    return jnp.asarray(np.max(found, axis=0))


def _sizes(model) -> dict[str, int]:
    names = ("layers", "width", "heads", "kv_heads", "head_dim", "vocab")
    return {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
