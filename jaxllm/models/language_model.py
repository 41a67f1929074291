"""What every language model offers beside its forward pass: its type, its windows, its cache, its stages."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm import cache as kv
from jaxllm.cache import DenseCache
from jaxllm.models.layers import Embedding
from jaxllm.models.stages import Stage, State


class LanguageModel(nnx.Module):
    """A pytree of weights that maps token ids to logits.

    A model has `layers` (of the decoder, where there are two stacks), which a cache counts, and a `config`
    with `layers`, `kv_heads`, `head_dim`, `vocab`, `context` and `stop_tokens`.
    """

    config: Any
    embedding: Embedding
    layers: Any
    sides: tuple[str, ...] = ("target",)  # whose tokens it reads; "source" of what an encoder reads

    def __repr__(self) -> str:
        """Family, sizes, type, weights, bytes and bits; never the numbers in it."""
        c, leaves = self.config, jax.tree.leaves(self)
        values = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(self))]
        weights = sum(math.prod(value.shape) for value in values)
        held = sum(x.size * jnp.dtype(x.dtype).itemsize for x in leaves)
        return (
            f"{type(self).__name__}({c.layers} layers, width {c.width}, vocabulary {c.vocab:,}, context "
            f"{c.context:,}, {jnp.dtype(self.dtype).name}; {weights:,} weights, {held:,} bytes, "
            f"{8 * held / weights:.2f} bits a weight)"
        )

    __str__ = __repr__  # NNX's lists every parameter

    @property
    def dtype(self):
        """The type of activations: that of the embedding."""
        return self.embedding.table.get_value().dtype

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer sees, in tokens; None: all of the text."""
        return (None,) * self.config.layers

    def stages(self) -> list[Stage]:
        """The way of text through the model, from an empty state to what `unembed` reads."""
        blocks = [
            Stage(f"layers.{i}", block, None, "target", decode_target) for i, block in enumerate(self.layers)
        ]
        return [Stage("", self, None, "target", embed_target), *blocks]

    def make_cache(
        self,
        batch: int,
        capacity: int,
        *,
        slack: int = 0,
        dtype: Any = None,
        bits: int | None = None,
        extents: Any = 0,
    ) -> DenseCache:
        """An empty cache for `capacity` tokens a request.

        slack: the longest chunk after the first, or rollback, that layers with a window must survive.
        dtype: of keys and values; None is the model's.
        bits: of the codes that hold keys and values, 2, 4 or 8; None holds them as they are.
        extents: how many tokens a request may come to have, for all or each; 0: as many as its first chunk.
          A rotation with two lists of factors (longrope) chooses once, by it; others do not look at it.
        """
        cache = kv.dense.make(
            batch,
            windows=self.windows,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
            slack=slack,
            dtype=self.dtype if dtype is None else jnp.dtype(dtype),
            bits=bits,
        )
        return dataclasses.replace(cache, extents=jnp.broadcast_to(jnp.asarray(extents, jnp.int32), (batch,)))


def embed_target(model, shared, state: State, batch, tap) -> State:
    """The stage before the layers of a decoder."""
    return {"target": model.embed(batch.tokens["target"])}


def decode_target(block, shared, state: State, batch, tap) -> State:
    """The stage of a layer that sees the targets alone."""
    return {"target": block(state["target"], lengths=batch.lengths["target"], tap=tap)[0]}
