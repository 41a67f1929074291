"""Numbers that left the range of their type: which layer was first to give one, and what helps.

Where it happens a program carries a flag and nothing more; who finds it raised reads the text once again:

    first_nonfinite(model, ids)             # "layers.3.mlp.down.out", or None if all is finite
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxllm import cache as kv
from jaxllm.cache import Cache


def first_nonfinite(model, tokens: Any, *, source: Any = None, cache: Cache | None = None) -> str | None:
    """What first gives infinity or NaN while a row of tokens is read, as taps name it; None: nothing does.

    tokens: ids. source: ids that an encoder reads. cache: of one request, which the tokens continue.
    """
    row = np.asarray(tokens, np.int32)[None]
    if cache is not None:
        cache = kv.with_capacity(cache, int(cache.lengths.max()) + row.shape[1])
    read = None if source is None else np.asarray(source, np.int32)[None]
    names: list[str] = []

    @jax.jit
    def finite(model, source, tokens, cache) -> tuple[list[Bool[Array, ""]], Any]:
        found: list[jax.Array] = []
        names.clear()  # where it is traced again

        def tap(name: str, x: jax.Array) -> jax.Array:
            names.append(name)
            found.append(jnp.isfinite(x).all())
            return x

        more = {} if source is None else {"memory": model.encode(source, tap=tap)}
        logits, cache = model(tokens, cache, logits="last", tap=tap, **more)
        tap("logits", logits)
        return found, cache

    while row.shape[1]:
        size = row.shape[1] if cache is None else min(row.shape[1], kv.max_chunk(cache))
        found, cache = finite(model, read, row[:, :size], cache)
        wrong = np.flatnonzero(~np.asarray(found))
        if wrong.size:
            return names[wrong[0]]
        row = row[:, size:]
    return None


def nonfinite_message(who: str, model, where: str | None, of: str) -> str:
    """One line: logits must be finite; where they ceased to be and what helps. of: whose logits."""
    dtype = jnp.dtype(model.dtype).name
    first = "nothing when it was read again" if where is None else f"first {where}"
    helps = "other types reach farther: bfloat16, float32" if dtype == "float16" else "look at its weights"
    return f"{who}: logits must be finite, got inf or NaN in {of}: {first}, of a model in {dtype}; {helps}"
