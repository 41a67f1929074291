"""Token ids on their way into a model: checked, filled up to one length, rounded up to buckets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

STEP = 64  # lengths are rounded up to multiples, so that texts of about one length share a compilation


def pad_batch(who: str, model, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids [B, T], filled up on the right, and their lengths [B].

    Raises ValueError for ids out of range, for rows that are empty or longer than the model's context, and
    for a model that reads a source.
    """
    require_decoder_only(who, model)
    rows = [check_token_ids(who, row, model.config.vocab) for row in tokens]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    if not rows or not 1 <= lengths.min() <= lengths.max() <= model.config.context:
        got = lengths.tolist()
        raise ValueError(f"{who}: rows must have 1 to {model.config.context} tokens, got {got}")
    filled = np.zeros((len(rows), lengths.max()), np.int32)
    for b, row in enumerate(rows):
        filled[b, : len(row)] = row
    return filled, lengths


def require_global_layer(who: str, model) -> None:
    """Raises ValueError unless a layer sees all of the text: from the others nothing is evicted."""
    if None not in model.windows:
        raise ValueError(f"{who}: a layer must see all of the text, got a model of windows only")


def round_up(n: int) -> int:
    """The least multiple of `STEP` that is not below n."""
    return -(-n // STEP) * STEP


def bucket(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below n."""
    power = 1
    while power < n:
        if n <= power + power // 2 and power > 1:
            return power + power // 2
        power *= 2
    return power


def require_decoder_only(who: str, model: Any) -> None:
    """Raises ValueError for a model that predicts nothing without a source."""
    if hasattr(model, "encode"):
        name = type(model).__name__
        raise ValueError(f"{who}: the model must be a decoder alone, got {name}, which reads a source")


def check_token_ids(who: str, tokens: Any, vocab: int) -> Integer[np.ndarray, " N"]:
    """`tokens` on the host, once they are known to be a row of ids below `vocab`."""
    tokens = np.asarray(tokens)
    tokens = tokens if tokens.size else tokens.astype(np.int32)  # an empty list has no integers
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{who}: tokens must be one row of integers, got {tokens.shape=}, {tokens.dtype=}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        wrong = tokens[(tokens < 0) | (tokens >= vocab)][0]
        raise ValueError(f"{who}: token ids must lie in [0, {vocab}), got token={wrong}")
    return tokens
