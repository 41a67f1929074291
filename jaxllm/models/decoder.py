"""The Llama line of decoders: Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi 3; of experts.

One forward pass; what tells the families apart are features of the config, never their names. A block is

    x = x + post?(attention(norm(x)))
    x = x + post?(mlp(norm(x)))                 mlp(h) = down(act(gate(h)) * up(h))

with grouped-query attention (arXiv:2305.13245), rotary positions (`rope.py`), RMS norms (arXiv:1910.07467),
and optionally biases on q, k, v, norms of q and k per head (Qwen 3, Gemma 3), sliding windows by layer
(Mistral, Gemma), norms after each part, soft caps and scaled embeddings (Gemma 2), a second rotation for the
layers with a window (Gemma 3), many mlps of which a token reads some (Mixtral, Qwen 3 MoE; `experts.py`), and
sinks that take weight from all keys (GPT-OSS). Norms, rotation, softmax and logits are float32 whatever the
weights are.

    model = Decoder(TINY, rngs=nnx.Rngs(0))
    logits, _ = model(jnp.array([[1, 2, 3]]))                # [B, T, V]

Letters: B batch, T tokens of this chunk, D width, H query heads, K key heads, E head size, V vocabulary.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache import Cache
from jaxllm.models.attention import cached_attention, extents, score_rule, split_heads
from jaxllm.models.experts import ExpertMlp
from jaxllm.models.language_model import LanguageModel
from jaxllm.models.layers import (
    ACTIVATIONS,
    Activation,
    Embedding,
    Linear,
    RmsNorm,
    constant,
    default_positions,
    early_input,
    last_token,
)
from jaxllm.models.linears import linear_weights
from jaxllm.models.rope import Rope, rotate
from jaxllm.models.stages import Batch, Stage, State
from jaxllm.models.taps import Tap, probe, scoped
from jaxllm.weights.planes.adaptive_planes import is_adaptive
from pallas_kernels.decode_attention.partial_softmax import soft_cap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and features of a decoder; hashable, so usable as a static argument."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # longest sequence, in tokens
    tied: bool = True  # the head is the embedding
    rope: Rope = Rope()
    local_rope: Rope | None = None  # for layers with a window, if other than `rope`
    windows: tuple[int | None, ...] = ()  # tokens a layer sees, itself included; () sees all everywhere
    activation: Activation = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # 1 where files store a norm's scale minus one (Gemma)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None is 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    stop_tokens: tuple[int, ...] = ()  # any of them ends a generation
    experts: int = 0  # in the feed-forward part of a layer; 0: one mlp that all tokens read
    experts_per_token: int = 0
    expert_ffn: int = 0  # as `ffn`, of each expert
    dense_layers: tuple[int, ...] = ()  # those with one mlp all the same (Qwen 3 MoE)
    renormalize: bool = True  # the shares of the experts of a token add up to 1
    expert_bias: bool = False  # of the router as well
    glu_limit: float | None = None  # where gates and ups of experts are cut off (GPT-OSS)
    attention_sinks: bool = False  # a score of each head that takes weight from all keys (GPT-OSS)

    def __post_init__(self):
        if self.experts and not (1 <= self.experts_per_token <= self.experts and self.expert_ffn >= 1):
            raise ValueError(
                "decoder: experts_per_token must be 1 to experts, and expert_ffn at least 1, "
                f"got {self.experts_per_token=}, {self.experts=}, {self.expert_ffn=}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"decoder: kv_heads must divide heads, got {self.heads=}, {self.kv_heads=}")
        if len(self.windows) not in (0, self.layers):
            raise ValueError(f"decoder: one window a layer, got {len(self.windows)} for {self.layers=}")

    def window(self, layer: int) -> int | None:
        """How many tokens the layer sees, or None for all."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of the layer is a choice of experts."""
        return self.experts > 0 and layer not in self.dense_layers


TINY = Config(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=128, context=64, tied=False)

# Logical axes of each parameter on a mesh with the axis "model"; weights are [K, N]. First match decides,
# what matches nothing is replicated. "kv" is "model" where the key heads can be split, else replicated.
SHARDING = (
    (r"embedding\.table", P(None, "model")),
    (r"head\.w", P(None, "model")),
    (r"attention\.q\.w|mlp\.(gate|up)\.w", P(None, "model")),
    (r"attention\.[kv]\.w", P(None, "kv")),
    (r"attention\.o\.w|mlp\.down\.w", P("model", None)),
    (r"mlp\.(gate|up)\.biases", P(None, "model")),
    (r"attention\.q\.bias|mlp\.(gate|up)\.bias", P("model")),
    (r"attention\.[kv]\.bias", P("kv")),
)


class Attention(nnx.Module):
    """Grouped-query attention of one layer, with its rotation and its window."""

    def __init__(self, config: Config, window: int | None, *, rngs: nnx.Rngs | None, dtype):
        c = config

        def linear(K: int, N: int, bias: bool) -> Linear:
            return Linear(K, N, bias=bias, std=K**-0.5, rngs=rngs, dtype=dtype)

        def norm() -> RmsNorm:
            return RmsNorm(c.head_dim, eps=c.norm_eps, offset=c.norm_offset, rngs=rngs, dtype=dtype)

        self.q = linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = linear(c.heads * c.head_dim, c.width, c.out_bias)
        self.q_norm = norm() if c.qk_norm else None
        self.k_norm = norm() if c.qk_norm else None
        self.rope = c.local_rope if window is not None and c.local_rope is not None else c.rope
        self.window = window
        self.head_dim = c.head_dim
        self.scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        self.softcap = c.attention_softcap
        self.sinks = nnx.Param(constant(rngs, c.heads, 0.0, dtype)) if c.attention_sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None,
        index: int,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        tap: Tap | None,
        early: Float[Array, "B T D"] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q = split_heads(self.q(x, scoped(tap, "q"), early=early), self.head_dim)  # [B, T, H, E]
        k = split_heads(self.k(x, scoped(tap, "k"), early=early), self.head_dim)  # [B, T, K, E]
        v = split_heads(self.v(x, scoped(tap, "v"), early=early), self.head_dim)  # [B, T, K, E]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rope.angles(self.head_dim, positions, extents(cache, positions, lengths))
        q = probe(tap, "queries", rotate(q, cos, sin))
        k = probe(tap, "keys", rotate(k, cos, sin))
        v = probe(tap, "values", v)
        y, cache = cached_attention(
            q,
            k,
            v,
            cache,
            index,
            positions,
            lengths,
            window=self.window,
            **score_rule(self),
        )
        return self.o(y.reshape(*x.shape[:2], -1), scoped(tap, "o")), cache


class Mlp(nnx.Module):
    """The gated feed-forward part of one layer (arXiv:2002.05202)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype):

        def linear(K: int, N: int) -> Linear:
            return Linear(K, N, bias=config.mlp_bias, std=K**-0.5, rngs=rngs, dtype=dtype)

        self.gate = linear(config.width, config.ffn)
        self.up = linear(config.width, config.ffn)
        self.down = linear(config.ffn, config.width)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "B T D"], tap: Tap | None, early: Float[Array, "B T D"] | None
    ) -> Float[Array, "B T D"]:
        gate = ACTIVATIONS[self.activation](self.gate(x, scoped(tap, "gate"), early=early))
        return self.down(gate * self.up(x, scoped(tap, "up"), early=early), scoped(tap, "down"))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs | None, dtype):
        c = config

        def norm() -> RmsNorm:
            return RmsNorm(c.width, eps=c.norm_eps, offset=c.norm_offset, rngs=rngs, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(c, c.window(layer), rngs=rngs, dtype=dtype)
        self.attention_post_norm = norm() if c.post_norms else None
        self.mlp_norm = norm()
        self.mlp = (ExpertMlp if c.has_experts(layer) else Mlp)(c, rngs=rngs, dtype=dtype)
        self.mlp_post_norm = norm() if c.post_norms else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None = None,
        *,
        index: int = 0,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap | None = None,
        early: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The block's output, and the cache with this layer's rows appended (not yet advanced).

        index: which layer of the cache is this block's. positions, lengths: as in `Decoder.__call__`.
        early: what went into the feed-forward part of the block before, for weights that look at it.
        """
        middle, cache = self.attend(
            x, cache, index=index, positions=positions, lengths=lengths, tap=tap, early=early
        )
        return self.feed_forward(middle, tap=tap, early=x), cache

    def attend(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None = None,
        *,
        index: int = 0,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap | None = None,
        early: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The first half of the block: what goes into its feed-forward part, and the cache."""
        positions, lengths = default_positions(x.shape[:2], cache, positions, lengths)
        a = self.attention
        seen = early_input(self.attention_norm, early, a.q, a.k, a.v)
        h = self.attention_norm(x)
        h, cache = a(h, cache, index, positions, lengths, scoped(tap, "attention"), seen)
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))
        return probe(tap, "middle", x), cache

    def feed_forward(
        self, x: Float[Array, "B T D"], *, tap: Tap | None = None, early: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """The second half. early: what went into the first."""
        h = self.mlp_norm(x)
        if isinstance(self.mlp, Mlp):
            seen = early_input(self.mlp_norm, early, self.mlp.gate, self.mlp.up)
            h = self.mlp(h, scoped(tap, "mlp"), seen)
        else:
            h = self.mlp(h, scoped(tap, "mlp"))
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        return probe(tap, "out", x)


class Decoder(LanguageModel):
    """A language model of the Llama line: a pytree whose leaves are its weights.

    rngs: where the first weights are drawn from; None: they are shapes (`jax.ShapeDtypeStruct`), and no
    memory is taken.
    """

    SHARDING = SHARDING

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        self.config = c = config

        def head() -> Linear:
            return Linear(c.width, c.vocab, std=c.width**-0.5, rngs=rngs, dtype=dtype)

        self.embedding = Embedding(c.vocab, c.width, std=c.width**-0.5, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Block(c, i, rngs=rngs, dtype=dtype) for i in range(c.layers)])
        self.norm = RmsNorm(c.width, eps=c.norm_eps, offset=c.norm_offset, rngs=rngs, dtype=dtype)
        self.head = None if c.tied else head()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer sees; None: all of the text."""
        return self.config.windows or super().windows

    def stages(self) -> list[Stage]:
        """As any model's; where weights look at what the block before left, that goes along."""
        embed, *blocks = super().stages()
        looks = any(is_adaptive(w) and w.early for w in linear_weights(self).values())
        if looks:
            blocks = [dataclasses.replace(stage, run=decode_with_early) for stage in blocks]
        return [embed, *blocks]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x

    def unembed(self, x: Float[Array, "*B D"], tap: Tap | None = None) -> Float[Array, "*B V"]:
        """Float32 logits of any layer's output: final norm, head, soft cap."""
        x = probe(tap, "norm", self.norm(x))
        if self.head is None:
            logits = self.embedding.logits(x)
        else:
            logits = self.head(x, scoped(tap, "head"), jnp.float32)
        return soft_cap(logits, self.config.logit_softcap)

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

        tokens: the next tokens of each request. Where requests differ in length, the shorter ones are padded
          on the right with any valid id and `lengths` says how many tokens are real.
        cache: what came before; from `make_cache`. A chunk sees it and itself.
        positions: where the tokens stand, if not right behind the cache.
        logits: "last" gives one row a request, that of its last real token, and saves the other products;
          "none" gives what `unembed` reads [B, T, D], which is cut into slices where all logits are too many.
        tap: see `taps.py`.
        """
        positions, lengths = default_positions(tokens.shape, cache, positions, lengths)
        x, early = probe(tap, "embedding", self.embed(tokens)), None
        for i, layer in enumerate(self.layers):
            of_layer = scoped(tap, f"layers.{i}")
            middle, cache = layer.attend(
                x, cache, index=i, positions=positions, lengths=lengths, tap=of_layer, early=early
            )
            x, early = layer.feed_forward(middle, tap=of_layer, early=x), middle
        if cache is not None:
            cache = kv.advance(cache, lengths)
        if logits == "last":
            x = last_token(x, lengths)
        return (x if logits == "none" else self.unembed(x, tap)), cache


def decode_with_early(block: Block, shared, state: State, batch: Batch, tap: Tap | None) -> State:
    """The stage of a layer whose weights look at what the one before left as `early`."""
    found: State = {}

    def keep(name: str, x: jax.Array) -> jax.Array:
        if name == "middle":
            found["early"] = x
        return probe(tap, name, x)

    lengths = batch.lengths["target"]
    found["target"], _ = block(state["target"], lengths=lengths, tap=keep, early=state.get("early"))
    return found
