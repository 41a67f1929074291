"""T5: an encoder reads the source, a decoder writes the target and sees the source in each layer.

Raffel et al., arXiv:1910.10683 (v1.0); Shazeer, arXiv:2002.05202 (v1.1's gated GELU). Blocks are

    encoder   x = x + attention(norm(x));  x = x + mlp(norm(x))
    decoder   x = x + attention(norm(x));  x = x + cross(norm(x), memory);  x = x + mlp(norm(x))

with RMS norms, no biases on linears, and no scaling of scores. Where a token stands is known only
through a number that each head adds to the scores of self-attention, one for each bucket of
distances, the same in all layers. v1.0 has mlp(h) = down(relu(up(h))) and a head that is the
embedding, read after scaling by 1 / sqrt(width); v1.1 has mlp(h) = down(gelu(gate(h)) * up(h)) and
a head of its own. Norms, softmax and logits are float32 whatever the weights are; float16, for
which T5 was not trained, is kept finite as in Hugging Face's version.

    model = T5(TINY, rngs=nnx.Rngs(0))
    memory = model.encode(jnp.array([[5, 6, 7]]))
    logits, _ = model(jnp.array([[model.config.decoder_start]]), memory=memory)      # [B, T, V]

Letters: B batch, T tokens of this chunk, S source tokens, D width, H heads, E head size, F ffn,
V vocabulary.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache import DenseCache
from jaxllm.models.attention import cached_attention, split_heads
from jaxllm.models.language_model import LanguageModel
from jaxllm.models.layers import (
    ACTIVATIONS,
    Activation,
    Embedding,
    Linear,
    RmsNorm,
    default_positions,
    last_token,
)
from jaxllm.models.relative_bias import RelativeBias
from jaxllm.models.stages import Stage, State
from jaxllm.models.taps import Tap, probe, scoped
from jaxllm.ops.attention import (
    DistanceBias,
    Reach,
    attention,
    heads_first,
    needs_tiles,
    tiled_attention,
)
from jaxllm.pytree import pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and features; hashable, so usable as a static argument."""

    encoder_layers: int
    layers: int  # of the decoder
    width: int
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int = 2**31 - 1  # longest target to generate, in tokens; distances know no limit, int32 does
    tied: bool = True  # the head is the embedding
    head_scale: float = 1.0  # on what the head reads; v1.0: 1 / sqrt(width)
    gated: bool = False
    activation: Activation = "relu"
    buckets: int = 32  # of distances; the encoder has one half for each direction
    max_distance: int = 128  # from which on all distances are one
    norm_eps: float = 1e-6
    decoder_start: int = 0  # the token that every target begins with
    stop_tokens: tuple[int, ...] = ()  # any of them ends a generation

    def __post_init__(self):
        if self.buckets % 4 or self.buckets // 2 >= self.max_distance:
            raise ValueError(
                "t5: buckets must be a multiple of 4 and less than twice max_distance, "
                f"got {self.buckets=}, {self.max_distance=}"
            )

    @property
    def kv_heads(self) -> int:
        return self.heads


TINY = Config(encoder_layers=2, layers=2, width=32, heads=4, head_dim=8, ffn=64, vocab=128)


def v1_0(layers: int, width: int, heads: int, ffn: int, head_dim: int = 64) -> Config:
    """One of the published sizes of T5 (arXiv:1910.10683, section 3.7)."""
    sizes: dict[str, Any] = {"width": width, "heads": heads, "head_dim": head_dim, "ffn": ffn}
    scale = width**-0.5
    return Config(
        encoder_layers=layers, layers=layers, **sizes, vocab=32_128, head_scale=scale, stop_tokens=(1,)
    )


T5_SMALL = v1_0(6, 512, 8, 2048)
T5_BASE = v1_0(12, 768, 12, 3072)
T5_LARGE = v1_0(24, 1024, 16, 4096)
T5_3B = v1_0(24, 1024, 32, 16_384, head_dim=128)
T5_11B = v1_0(24, 1024, 128, 65_536, head_dim=128)


def v1_1(layers: int, width: int, heads: int, ffn: int) -> Config:
    """One of the sizes of T5 v1.1, which are those of Flan-T5 too."""
    config = v1_0(layers, width, heads, ffn)
    return dataclasses.replace(config, tied=False, head_scale=1.0, gated=True, activation="gelu_tanh")


T5_V1_1_SMALL = v1_1(8, 512, 6, 1024)
T5_V1_1_BASE = v1_1(12, 768, 12, 2048)
T5_V1_1_LARGE = v1_1(24, 1024, 16, 2816)
T5_V1_1_XL = v1_1(24, 2048, 32, 5120)
T5_V1_1_XXL = v1_1(24, 4096, 64, 10_240)

# Logical axes of each parameter on a mesh with the axis "model"; weights are [K, N]. First match
# decides, what matches nothing is replicated. "kv" is "model" where the heads can be split, else
# replicated.
SHARDING = (
    (r"embedding\.table", P(None, "model")),
    (r"relative\.table", P(None, "kv")),  # a column a head
    (r"head\.w", P(None, "model")),
    (r"(attention|cross)\.q\.w|mlp\.(gate|up)\.w", P(None, "model")),
    (r"(attention|cross)\.[kv]\.w", P(None, "kv")),
    (r"(attention|cross)\.o\.w|mlp\.down\.w", P("model", None)),
)


@pytree
class CrossKV:
    """What the decoder sees of the sources: keys and values of each of its layers."""

    keys: tuple[jax.Array, ...]  # a layer: [B H, S, E]
    values: tuple[jax.Array, ...]  # a layer: [B H, S, E]
    lengths: jax.Array  # [B] int32


class Attention(nnx.Module):
    """The four linears of self-attention or cross-attention; scores are not scaled."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):
        c, inner = config, config.heads * config.head_dim

        def linear(K: int, N: int, std: float) -> Linear:
            return Linear(K, N, std=std, rngs=rngs, dtype=dtype)

        self.q = linear(c.width, inner, (c.width * c.head_dim) ** -0.5)
        self.k = linear(c.width, inner, c.width**-0.5)
        self.v = linear(c.width, inner, c.width**-0.5)
        self.o = linear(inner, c.width, inner**-0.5)
        self.head_dim = c.head_dim

    # the names under which every model shows what its cache is given; nothing is turned here
    def queries(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T H E"]:
        q = split_heads(self.q(x, scoped(tap, "q")), self.head_dim)
        return probe(tap, "queries", q)

    def keys(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T H E"]:
        k = split_heads(self.k(x, scoped(tap, "k")), self.head_dim)
        return probe(tap, "keys", k)

    def values(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T H E"]:
        v = split_heads(self.v(x, scoped(tap, "v")), self.head_dim)
        return probe(tap, "values", v)

    def out(self, y: Float[Array, "B T H E"], tap: Tap | None) -> Float[Array, "B T D"]:
        return self.o(y.reshape(*y.shape[:2], -1), scoped(tap, "o"))


class Mlp(nnx.Module):
    """The feed-forward part of one layer, with a gate or without."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):

        def linear(K: int, N: int) -> Linear:
            return Linear(K, N, std=K**-0.5, rngs=rngs, dtype=dtype)

        self.gate = linear(config.width, config.ffn) if config.gated else None
        self.up = linear(config.width, config.ffn)
        self.down = linear(config.ffn, config.width)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.activation]
        # subtle: trained T5 leaves the range of float16 here, and inf - inf would follow in `down`
        inner = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        h = self.up(x, scoped(tap, "up"), inner)
        h = act(h) if self.gate is None else act(self.gate(x, scoped(tap, "gate"), inner)) * h
        return self.down(h, scoped(tap, "down"), x.dtype)


def residual_add(x: Float[Array, "B T D"], h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The sum, in float16 cut to its range."""
    x = x + h
    if x.dtype == jnp.float16:
        x = jnp.clip(x, jnp.finfo(x.dtype).min, jnp.finfo(x.dtype).max)
    return x


def relative_bias(config: Config, *, causal: bool, rngs: nnx.Rngs | None, dtype) -> RelativeBias:
    """Of one of the two stacks, shared by its layers."""
    c, std = config, config.width**-0.5
    return RelativeBias(c.buckets, c.max_distance, c.heads, causal=causal, std=std, rngs=rngs, dtype=dtype)


def attend_source(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    lengths: Int[Array, " B"],
    bias: DistanceBias | None = None,
) -> Float[Array, "B T H E"]:
    """Attention to a source's real tokens, `lengths` of S; by tiles where there are too many scores.

    bias: of distances, added to the scores.
    """
    at, of = (jnp.arange(n, dtype=jnp.int32)[None] for n in (q.shape[1], k.shape[1]))
    if needs_tiles(q, k.shape[1]):
        reach = Reach(at, jnp.where(of < lengths[:, None], of, -1), causal=False)
        return tiled_attention(q, k, v, reach, scale=1.0, bias=bias)
    added = None if bias is None else bias(of[:, None] - at[:, :, None])  # [1, H, T, S]
    return attention(q, k, v, (of < lengths[:, None])[:, None], scale=1.0, bias=added)


class EncoderBlock(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):
        self.attention_norm = RmsNorm(config.width, eps=config.norm_eps, rngs=rngs, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RmsNorm(config.width, eps=config.norm_eps, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        lengths: Int[Array, " B"],
        bias: DistanceBias,
        tap: Tap | None = None,
    ) -> Float[Array, "B S D"]:
        """x: of the source, `lengths` real tokens. bias: the encoder's, `encoder.relative`."""
        part, t = self.attention, scoped(tap, "attention")
        h = self.attention_norm(x)
        q, k, v = part.queries(h, t), part.keys(h, t), part.values(h, t)
        y = attend_source(q, heads_first(k), heads_first(v), lengths, bias)
        x = residual_add(x, part.out(y, t))
        x = residual_add(x, self.mlp(self.mlp_norm(x), scoped(tap, "mlp")))
        return probe(tap, "out", x)


class Encoder(nnx.Module):
    """All layers of the encoder, their shared bias and the final norm."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):
        self.relative = relative_bias(config, causal=False, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            [EncoderBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.encoder_layers)]
        )
        self.norm = RmsNorm(config.width, eps=config.norm_eps, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B S D"], lengths: Int[Array, " B"], tap: Tap | None = None
    ) -> Float[Array, "B S D"]:
        for i, layer in enumerate(self.layers):
            x = layer(x, lengths, self.relative, scoped(tap, f"layers.{i}"))
        return probe(tap, "norm", self.norm(x))


class Block(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):

        def norm() -> RmsNorm:
            return RmsNorm(config.width, eps=config.norm_eps, rngs=rngs, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.cross_norm = norm()
        self.cross = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: DenseCache | None = None,
        *,
        memory: CrossKV,
        bias: DistanceBias,
        index: int = 0,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T D"], DenseCache | None]:
        """The block's output, and the cache with this layer's rows appended (not yet advanced).

        memory: of the sources. bias: the model's, `model.relative`. index: which layer of the cache
          and of the memory is this block's. positions, lengths: as in `T5.__call__`.
        """
        positions, lengths = default_positions(x.shape[:2], cache, positions, lengths)
        part, t = self.attention, scoped(tap, "attention")
        h = self.attention_norm(x)
        q, k, v = part.queries(h, t), part.keys(h, t), part.values(h, t)
        y, cache = cached_attention(q, k, v, cache, index, positions, lengths, scale=1.0, bias=bias)
        x = residual_add(x, part.out(y, t))

        part, t = self.cross, scoped(tap, "cross")
        q = part.queries(self.cross_norm(x), t)
        keys, values = memory.keys[index], memory.values[index]
        y = attend_source(q, keys, values, memory.lengths)
        x = residual_add(x, part.out(y, t))

        x = residual_add(x, self.mlp(self.mlp_norm(x), scoped(tap, "mlp")))
        return probe(tap, "out", x), cache


class T5(LanguageModel):
    """An encoder and a decoder, whose are `layers` and the cache: a pytree of weights.

    rngs: where the first weights are drawn from; None: they are shapes (`jax.ShapeDtypeStruct`), and no
    memory is taken.
    """

    SHARDING = SHARDING
    sides = ("source", "target")

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):

        def head() -> Linear:
            return Linear(config.width, config.vocab, std=config.width**-0.5, rngs=rngs, dtype=dtype)

        self.config = config
        self.embedding = Embedding(config.vocab, config.width, std=1.0, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.relative = relative_bias(config, causal=True, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.layers)])
        self.norm = RmsNorm(config.width, eps=config.norm_eps, rngs=rngs, dtype=dtype)
        self.head = None if config.tied else head()

    def encode(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"] | None = None, *, tap: Tap | None = None
    ) -> CrossKV:
        """What the decoder will see of the sources; `lengths` tokens of each are real."""
        _, lengths = default_positions(tokens.shape, None, None, lengths)
        x = probe(tap, "encoder.embedding", self.embed(tokens))
        x = self.encoder(x, lengths, scoped(tap, "encoder"))
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            t = scoped(tap, f"layers.{i}.cross")
            keys.append(heads_first(layer.cross.keys(x, t)))
            values.append(heads_first(layer.cross.values(x, t)))
        return CrossKV(tuple(keys), tuple(values), lengths)

    def stages(self) -> list[Stage]:
        """Embed sources, the encoder's layers, its norm and embed targets, the decoder's layers."""
        encoder = self.encoder
        return [
            Stage("", self, None, "source", embed_source),
            *_blocks("encoder.layers", encoder.layers, encoder.relative, "source", encode_source),
            Stage("", self, encoder.norm, "target", end_source),
            *_blocks("layers", self.layers, self.relative, "target", decode_target),
        ]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads, of the encoder or of the decoder."""
        return self.embedding(tokens)

    def unembed(self, x: Float[Array, "*B D"], tap: Tap | None = None) -> Float[Array, "*B V"]:
        """Float32 logits of any decoder layer's output: final norm, scale, head."""
        x = probe(tap, "norm", self.norm(x))
        if self.head is None:
            logits = self.embedding.logits(x)
        else:
            logits = self.head(x, scoped(tap, "head"), jnp.float32)
        return logits * self.config.head_scale

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: DenseCache | None = None,
        *,
        memory: CrossKV,
        lengths: Int[Array, " B"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        logits: Literal["all", "last", "none"] = "all",
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], DenseCache | None]:
        """Float32 logits of a chunk of targets, and the cache with it (None if none was given).

        memory: of the sources, from `encode`. A target begins with `config.decoder_start`.
        The other arguments mean what they mean in `decoder.Decoder`; `positions` count only against
          a cache, as distances.
        """
        if memory.lengths.shape[0] != tokens.shape[0]:
            raise ValueError(
                "t5: memory must hold one source a request, "
                f"got {memory.lengths.shape[0]} for {tokens.shape=}"
            )
        positions, lengths = default_positions(tokens.shape, cache, positions, lengths)
        x = probe(tap, "embedding", self.embed(tokens))
        for i, layer in enumerate(self.layers):
            t, at = scoped(tap, f"layers.{i}"), {"positions": positions, "lengths": lengths}
            x, cache = layer(x, cache, memory=memory, bias=self.relative, index=i, tap=t, **at)
        if cache is not None:
            cache = kv.advance(cache, lengths)
        if logits == "last":
            x = last_token(x, lengths)
        return (x if logits == "none" else self.unembed(x, tap)), cache


# -- stages (`models/stages.py`), and what runs one


def _blocks(name: str, layers, relative: RelativeBias, side: str, run) -> list[Stage]:
    return [Stage(f"{name}.{i}", block, relative, side, run) for i, block in enumerate(layers)]


def embed_source(model: T5, shared, state: State, batch, tap) -> State:
    """The stage before the encoder's layers."""
    return {"source": model.embed(batch.tokens["source"])}


def encode_source(block: EncoderBlock, relative: RelativeBias, state: State, batch, tap) -> State:
    """The stage of a layer of the encoder."""
    return {"source": block(state["source"], batch.lengths["source"], relative, tap)}


def end_source(model: T5, norm: RmsNorm, state: State, batch, tap) -> State:
    """The stage between the two stacks."""
    return {"source": norm(state["source"]), "target": model.embed(batch.tokens["target"])}


def decode_target(block: Block, relative: RelativeBias, state: State, batch, tap) -> State:
    """The stage of a layer of the decoder, which reads keys and values of the sources itself."""
    seen, t = state["source"], scoped(tap, "cross")
    keys, values = heads_first(block.cross.keys(seen, t)), heads_first(block.cross.values(seen, t))
    memory = CrossKV((keys,), (values,), batch.lengths["source"])
    lengths = batch.lengths["target"]
    return {"target": block(state["target"], memory=memory, bias=relative, lengths=lengths, tap=tap)[0]}
