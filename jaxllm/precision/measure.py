"""The bits that a text really reads: each token's, each linear's, as it would choose where it is decoded.

    read = bits_read(model, tokens, context=512)
    read.mean, read.by_linear["layers.3.mlp.up"], read.by_window.std()

What counts are the planes of linears in planes, weighted by their sizes; embeddings, heads, tables and
estimators do not, as in DP-LLM's effective bits (arXiv:2508.06041; section 2.1).
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxllm.models.inputs import check_token_ids
from jaxllm.models.linears import linear_weights
from jaxllm.models.taps import WidthTap
from jaxllm.weights.planes.adaptive_planes import every_token_chooses


@dataclasses.dataclass(frozen=True)
class BitsRead:
    """Bits a weight that were read, on average over tokens."""

    mean: float
    by_linear: dict[str, float]
    by_window: Float32[np.ndarray, " W"]
    by_token: Float32[np.ndarray, "W T"]  # NaN where a window has no token


def bits_read(model, tokens: Any, *, context: int | None = None, batch: int = 8) -> BitsRead:
    """What a text reads, in windows of `context` tokens side by side (None: the model's own)."""
    context = model.config.context if context is None else context
    if not 1 <= context <= model.config.context:
        raise ValueError(f"bits_read: context must lie in [1, {model.config.context}], got {context=}")
    ids = check_token_ids("bits_read", tokens, model.config.vocab)
    if not len(ids):
        raise ValueError("bits_read: the text must have a token, got none")
    context = min(context, len(ids))
    rows = [ids[at : at + context] for at in range(0, len(ids), context)]
    windows = np.zeros((-(-len(rows) // batch) * batch, context), np.int32)
    real = np.zeros(windows.shape, bool)
    for i, row in enumerate(rows):
        windows[i, : len(row)], real[i, : len(row)] = row, True
    read: dict[str, list[np.ndarray]] = {}
    for at in range(0, len(windows), batch):
        some, lengths = windows[at : at + batch], np.maximum(real[at : at + batch].sum(axis=1), 1)
        for name, bits in widths_read(model, some, lengths.astype(np.int32)).items():
            read.setdefault(name, []).append(np.asarray(bits))
    sizes = {name: math.prod(w.shape) for name, w in linear_weights(model).items() if name in read}
    if not read:
        raise ValueError("bits_read: the model must have any-precision weights, got none")
    whole = {name: np.concatenate(parts) for name, parts in read.items()}
    total = sum(sizes.values())
    by_token = sum(whole[name] * (size / total) for name, size in sizes.items())
    by_token = np.where(real, by_token, np.nan)[: len(rows)].astype(np.float32)
    return BitsRead(
        mean=float(np.nanmean(by_token.astype(np.float64))),
        by_linear={name: float(bits[real].mean(dtype=np.float64)) for name, bits in whole.items()},
        by_window=np.nanmean(by_token, axis=1),
        by_token=by_token,
    )


@jax.jit
def widths_read(
    model, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> dict[str, Float[Array, "B T"]]:
    """The width at which each token reads each linear in planes."""
    read = WidthTap(model)
    every_token_chooses(model)(tokens, lengths=lengths, logits="none", tap=read)
    return read.widths
