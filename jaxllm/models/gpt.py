"""The GPT line of decoders: GPT-2, minGPT, OPT, and the shapes of GPT-3.

Radford et al. 2019 (GPT-2), Brown et al., arXiv:2005.14165 (GPT-3), Zhang et al., arXiv:2205.01068
(OPT). One forward pass; what tells them apart are features of the config, never their names.
Positions are learned, every head has its own keys, norms are layer norms, and a block is

    x = x + attention(norm(x))                  norm first (all but OPT-350M)
    x = x + mlp(norm(x))                        mlp(h) = down(act(up(h)))

    x = norm(x + attention(x))                  norm after (OPT-350M, which has no final norm)
    x = norm(x + mlp(x))

OPT's table of positions begins with two rows that are never read (`position_offset`), and
OPT-350M's tokens are narrower than its blocks (`embedding_width`), with a linear on either side.
Norms, softmax and logits are float32 whatever the weights are. The fused q, k, v of checkpoints are
three linears.

    model = Gpt(TINY, rngs=nnx.Rngs(0))
    logits, _ = model(jnp.array([[1, 2, 3]]))                # [B, T, V]

Letters: B batch, T tokens of this chunk, D width, H heads, E head size, F ffn, V vocabulary.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache import Cache
from jaxllm.models.attention import cached_attention, split_heads
from jaxllm.models.language_model import LanguageModel
from jaxllm.models.layers import (
    ACTIVATIONS,
    Activation,
    Embedding,
    LayerNorm,
    Linear,
    default_positions,
    last_token,
)
from jaxllm.models.taps import Tap, probe, scoped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and features; hashable, so usable as a static argument."""

    layers: int
    width: int
    heads: int
    ffn: int
    vocab: int
    context: int  # longest sequence, in tokens: positions there are
    tied: bool = True  # the head is the embedding
    embedding_width: int | None = None  # of a token, where other than `width` (OPT-350M)
    position_offset: int = 0  # rows of the table of positions before position 0 (OPT: 2)
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-5
    norm_first: bool = True  # False: norms after each sum
    final_norm: bool = True
    bias: bool = True  # on every linear of a block
    norm_affine: bool = True  # norms scale and shift (not in some of OPT)
    attention_scale: float | None = None  # None is 1 / sqrt(head_dim)
    scale_by_layer: bool = False  # scores of layer i divided by i + 1 as well
    stop_tokens: tuple[int, ...] = ()  # any of them ends a generation

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"gpt: heads must divide width, got {self.heads=}, {self.width=}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads

    def scale(self, layer: int) -> float:
        """What scores of a layer are multiplied by."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_layer else scale


TINY = Config(layers=2, width=32, heads=4, ffn=64, vocab=128, context=64)


def gpt2(layers: int, width: int, heads: int) -> Config:
    """One of the four published sizes of GPT-2."""
    return Config(layers=layers, width=width, heads=heads, ffn=4 * width, vocab=50_257, context=1024)


GPT2_SMALL = gpt2(12, 768, 12)
GPT2_MEDIUM = gpt2(24, 1024, 16)
GPT2_LARGE = gpt2(36, 1280, 20)
GPT2_XL = gpt2(48, 1600, 25)


def opt(layers: int, width: int, heads: int, **features) -> Config:
    """One of the published sizes of OPT (arXiv:2205.01068, table 1)."""
    return Config(
        layers=layers,
        width=width,
        heads=heads,
        ffn=4 * width,
        vocab=50_272,
        context=2048,
        position_offset=2,
        activation="relu",
        **features,
    )


OPT_125M = opt(12, 768, 12)
OPT_350M = opt(24, 1024, 16, norm_first=False, final_norm=False, embedding_width=512)
OPT_1_3B = opt(24, 2048, 32)
OPT_2_7B = opt(32, 2560, 32)
OPT_6_7B = opt(32, 4096, 32)
OPT_13B = opt(40, 5120, 40)
OPT_30B = opt(48, 7168, 56)
OPT_66B = opt(64, 9216, 72)


def gpt3(layers: int, width: int, heads: int) -> Config:
    """A GPT-3 shape, with GPT-2's 50,257 tokens filled up to a multiple of 1,024."""
    return Config(layers=layers, width=width, heads=heads, ffn=4 * width, vocab=51_200, context=2048)


# The four sizes that ExeGPT (ASPLOS 2024, table 2) schedules; 175B is GPT-3's own.
GPT_39B = gpt3(48, 8192, 64)
GPT_101B = gpt3(80, 10240, 80)
GPT_175B = gpt3(96, 12288, 96)
GPT_341B = gpt3(120, 15360, 120)

# Logical axes of each parameter on a mesh with the axis "model"; weights are [K, N]. First match
# decides, what matches nothing is replicated. "kv" is "model" where the heads can be split, else
# replicated. Embedding and head are split by width: no mesh divides GPT-2's 50,257 tokens.
SHARDING = (
    (r"embedding\.table", P("model", None)),
    (r"head\.w", P("model", None)),
    (r"attention\.q\.w|mlp\.up\.w", P(None, "model")),
    (r"attention\.[kv]\.w", P(None, "kv")),
    (r"attention\.o\.w|mlp\.down\.w", P("model", None)),
    (r"attention\.q\.bias|mlp\.up\.bias", P("model")),
    (r"attention\.[kv]\.bias", P("kv")),
)


class Attention(nnx.Module):
    """Attention of one layer; each head has its own keys and values."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs | None, dtype):
        c = config

        def linear() -> Linear:
            return Linear(c.width, c.width, bias=c.bias, std=c.width**-0.5, rngs=rngs, dtype=dtype)

        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.head_dim = c.head_dim
        self.scale = c.scale(layer)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None,
        index: int,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        tap: Tap | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        # the names under which every model shows what its cache is given; nothing is turned here
        q = probe(tap, "queries", split_heads(self.q(x, scoped(tap, "q")), self.head_dim))  # [B, T, H, E]
        k = probe(tap, "keys", split_heads(self.k(x, scoped(tap, "k")), self.head_dim))  # [B, T, H, E]
        v = probe(tap, "values", split_heads(self.v(x, scoped(tap, "v")), self.head_dim))  # [B, T, H, E]
        y, cache = cached_attention(q, k, v, cache, index, positions, lengths, scale=self.scale)
        return self.o(y.reshape(*x.shape[:2], -1), scoped(tap, "o")), cache


class Mlp(nnx.Module):
    """The feed-forward part of one layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):

        def linear(K: int, N: int) -> Linear:
            return Linear(K, N, bias=config.bias, std=K**-0.5, rngs=rngs, dtype=dtype)

        self.up = linear(config.width, config.ffn)
        self.down = linear(config.ffn, config.width)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], tap: Tap | None) -> Float[Array, "B T D"]:
        h = ACTIVATIONS[self.activation](self.up(x, scoped(tap, "up")))
        return self.down(h, scoped(tap, "down"))


def layer_norm(config: Config, D: int, *, rngs: nnx.Rngs | None, dtype) -> LayerNorm:
    """A norm of these models."""
    return LayerNorm(D, eps=config.norm_eps, affine=config.norm_affine, rngs=rngs, dtype=dtype)


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs | None, dtype):
        self.attention_norm = layer_norm(config, config.width, rngs=rngs, dtype=dtype)
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.mlp_norm = layer_norm(config, config.width, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)
        self.norm_first = config.norm_first

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None = None,
        *,
        index: int = 0,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The block's output, and the cache with this layer's rows appended (not yet advanced).

        index: which layer of the cache is this block's. positions, lengths: as in `Gpt.__call__`.
        """
        positions, lengths = default_positions(x.shape[:2], cache, positions, lengths)
        h = self.attention_norm(x) if self.norm_first else x
        h, cache = self.attention(h, cache, index, positions, lengths, scoped(tap, "attention"))
        x = x + h if self.norm_first else self.attention_norm(x + h)
        h = self.mlp_norm(x) if self.norm_first else x
        h = self.mlp(h, scoped(tap, "mlp"))
        x = x + h if self.norm_first else self.mlp_norm(x + h)
        return probe(tap, "out", x), cache


class Gpt(LanguageModel):
    """A language model of the GPT line: a pytree whose leaves are its weights.

    rngs: where the first weights are drawn from; None: they are shapes (`jax.ShapeDtypeStruct`), and no
    memory is taken.
    """

    SHARDING = SHARDING

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        self.config = config
        width = config.width
        narrow = width if config.embedding_width is None else config.embedding_width
        self.embedding = Embedding(config.vocab, narrow, std=narrow**-0.5, rngs=rngs, dtype=dtype)
        self.positions = Embedding(
            config.context + config.position_offset, width, std=width**-0.5, rngs=rngs, dtype=dtype
        )

        def linear(K: int, N: int) -> Linear:
            return Linear(K, N, std=K**-0.5, rngs=rngs, dtype=dtype)

        def norm() -> LayerNorm:
            return layer_norm(config, width, rngs=rngs, dtype=dtype)

        self.project_in = None if config.embedding_width is None else linear(narrow, width)
        self.layers = nnx.List([Block(config, i, rngs=rngs, dtype=dtype) for i in range(config.layers)])
        self.norm = norm() if config.final_norm else None
        self.project_out = None if config.embedding_width is None else linear(width, narrow)
        self.head = None if config.tied else linear(narrow, config.vocab)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Array, "B T D"]:
        """What the first layer reads.

        positions: from 0 if None. Those of real tokens must be less than `config.context`; where
          padding stands beyond it, the last row is taken.
        """
        x = self.embedding(tokens)
        if self.project_in is not None:
            x = self.project_in(x, scoped(tap, "project_in"))
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        row = jnp.minimum(positions, self.config.context - 1) + self.config.position_offset
        return x + jnp.broadcast_to(self.positions(row), x.shape)

    def unembed(self, x: Float[Array, "*B D"], tap: Tap | None = None) -> Float[Array, "*B V"]:
        """Float32 logits of any layer's output: final norm, head."""
        if self.norm is not None:
            x = probe(tap, "norm", self.norm(x))
        if self.project_out is not None:
            x = self.project_out(x, scoped(tap, "project_out"))
        if self.head is None:
            return self.embedding.logits(x)
        return self.head(x, scoped(tap, "head"), jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        logits: Literal["all", "last", "none"] = "all",
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], Cache | None]:
        """Float32 logits of a chunk, and the cache with the chunk in it (None if none was given).

        The arguments mean what they mean in `decoder.Decoder`.
        """
        positions, lengths = default_positions(tokens.shape, cache, positions, lengths)
        x = probe(tap, "embedding", self.embed(tokens, positions, tap))
        for i, layer in enumerate(self.layers):
            x, cache = layer(
                x,
                cache,
                index=i,
                positions=positions,
                lengths=lengths,
                tap=scoped(tap, f"layers.{i}"),
            )
        if cache is not None:
            cache = kv.advance(cache, lengths)
        if logits == "last":
            x = last_token(x, lengths)
        return (x if logits == "none" else self.unembed(x, tap)), cache
