"""What every language model offers beside its forward pass: its type, its windows, its cache."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxllm import cache as kv
from jaxllm.cache import DenseCache
from jaxllm.models.layers import Embedding


class LanguageModel(nnx.Module):
    """A pytree of weights that maps token ids to logits.

    A model has `layers` (of the decoder, where there are two stacks), which a cache counts, and a `config`
    with `layers`, `kv_heads`, `head_dim`, `vocab`, `context` and `stop_tokens`.
    """

    config: Any
    embedding: Embedding

    @property
    def dtype(self):
        """The type of activations: that of the embedding."""
        return self.embedding.table.get_value().dtype

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer sees, in tokens; None: all of the text."""
        return (None,) * self.config.layers

    def make_cache(
        self, batch: int, rows: int, *, slack: int = 0, dtype: Any = None, bits: int | None = None
    ) -> DenseCache:
        """An empty cache for `rows` tokens a request.

        slack: the longest chunk after the first, or rollback, that layers with a window must survive.
        dtype: of keys and values; None is the model's.
        bits: of the codes that hold keys and values, 2, 4 or 8; None holds them as they are.
        """
        return kv.dense.make(
            batch,
            windows=self.windows,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
            rows=rows,
            slack=slack,
            dtype=self.dtype if dtype is None else jnp.dtype(dtype),
            bits=bits,
        )
