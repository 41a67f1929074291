"""KVzip: a cached pair counts as much as the model looks at it while it repeats the context.

Kim et al., arXiv:2505.23416. The model is told to repeat the context, chunk by chunk, on top of the cache
that holds it, and the repetition is given to it token by token. The score of a key is the greatest
attention weight that any query of its chunk's repetition, prompt included, gives it; the softmax is over
the prefix, the chunk and the repetition itself (the published code's form of it). One chunk: the plain
maximum over all queries; more chunks: never less than with all keys in the softmax.

    scores = kvzip_scores(model, cache, context, tokenizer=tokenizer)                 # [L, B, K, T]
    small = evict(cache, scores, ratio=0.3)

The cache is read only. Costs about two more prefills; weights take O(chunk^2) / 8 of memory. KVzip+
(`output_aware`) weighs each weight by how far the value moves the output: |W_O v| / |h|, h what the layer
reads (NVIDIA's kvpress).

Letters: L layers without a window, B requests, K key heads, T tokens of the longest context.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache.dense import DenseCache, global_layers
from jaxllm.cache.paged import PagedCache
from jaxllm.cache.rows import dequantize, quantize, rotate_queries
from jaxllm.models.attention import score_rule
from jaxllm.models.inputs import STEP, pad_batch, require_global_layer, round_up
from jaxllm.models.taps import layer_tap
from jaxllm.ops.attention import heads_first
from pallas_kernels.decode_attention.partial_softmax import FLOAT32
from pallas_kernels.kvzip_score import attention_per_key

CHUNK, MIN_CHUNK = 2000, 16  # tokens that are repeated at a time
# between keys of the same token, in codes of 2 bits even, and those of another
MAX_KEY_DISTANCE = 0.7
# of the published code; pico was trained on them
FIRST_PROMPT = "\n\nRepeat the previous context exactly."
LATER_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatPrompt:
    """What stands before each chunk that is repeated, in token ids.

    first: before the first chunk. later: before the others, then the last `seed` ids of the chunk before.
    bridge: after either, as the end of the user's turn and the start of the answer.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    bridge: tuple[int, ...] = ()
    seed: int = 8

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, first: str = FIRST_PROMPT, later: str = LATER_PROMPT
    ) -> "RepeatPrompt":
        """The published prompts in a tokenizer's ids, with its chat template's end of turn or a line end."""

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        bridge = "\n"
        if getattr(tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": "@@@"}]
            whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            bridge = whole.partition("@@@")[2]
        return cls(first=encode(first), later=encode(later), bridge=encode(bridge))

    def before(self, last: np.ndarray | None) -> list[int]:
        """The ids before a chunk, given the last ids of the chunk before, None for the first."""
        if last is None:
            return [*self.first, *self.bridge]
        return [*self.later, *last.tolist(), *self.bridge]


def kvzip_scores(
    model,
    cache: DenseCache | PagedCache,
    context: Sequence[Sequence[int]],
    *,
    tokenizer: Any = None,
    replay: RepeatPrompt | None = None,
    prefix: int = 0,
    chunk: int | None = None,
    past_context: bool = False,
    output_aware: bool = False,
) -> Float[Array, "L B K T"]:
    """Scores of what the cache holds of each request's context; 0 behind the end of a shorter one.

    cache: holds `prefix` tokens, then the context, and nothing more. context: its token ids, a row a request.
    tokenizer: makes the published prompts; replay: other ones; neither: the context is repeated unasked.
    chunk: tokens repeated at a time; None: 2,000, or as many as fit the model's context behind the cache.
    past_context: the repetition may take positions past the model's context, as in the published code, with a
      warning: the model was never trained on them. Needs rotary positions; learned ones end with the context.

    Raises ValueError where the cache does not hold this context, or the repetition does not fit.
    """
    tokens, sizes = pad_batch("kvzip", model, context)
    require_global_layer("kvzip", model)
    _check(model, cache, tokens, sizes, prefix)
    replay = replay or (RepeatPrompt() if tokenizer is None else RepeatPrompt.from_tokenizer(tokenizer))
    B, T = tokens.shape
    asked = max(len(replay.before(None)), len(replay.before(np.zeros(replay.seed, np.int32))))
    if past_context and not hasattr(model.config, "rope"):
        raise ValueError(
            f"kvzip: past_context must be False without rotary positions, got a {type(model).__name__}"
        )
    chunk, room, wide = _fit(model, cache, asked, T, prefix, chunk, past_context)
    found = []
    for at in range(0, T, chunk):
        m = min(chunk, round_up(T - at))
        size = np.clip(sizes - at, 0, m)
        fed = np.zeros((B, min(room, asked + m)), np.int32)
        lengths = np.zeros(B, np.int32)
        for b, row in enumerate(tokens):
            if not size[b]:
                continue
            ids = replay.before(None if at == 0 else row[max(0, at - replay.seed) : at])
            lengths[b] = len(ids) + size[b]
            fed[b, : lengths[b]] = [*ids, *row[at : at + size[b]]]
        where = np.int32(prefix + at)
        found.append(
            score_chunk(model, wide, fed, lengths, size, where, prefix=prefix, m=m, output_aware=output_aware)
        )
    return jnp.concatenate(found, axis=-1)[..., :T]


def _fit(
    model,
    cache: DenseCache | PagedCache,
    asked: int,
    T: int,
    prefix: int,
    chunk: int | None,
    past_context: bool,
) -> tuple[int, int, Any]:
    """Tokens of a chunk, the most that are fed at once, and the cache with room for them.

    asked: tokens of the longest prompt. chunk: None is as many as fit, up to CHUNK.
    """
    context, held = model.config.context, prefix + T
    if chunk is None and past_context:
        chunk = CHUNK
    if chunk is None:
        free = context - held - asked
        # where there are several chunks, all but the last share a compilation with those of other texts
        several = free // STEP * STEP or free
        chunk = max(MIN_CHUNK, min(CHUNK, free if T <= free else several))
    if chunk < MIN_CHUNK:
        raise ValueError(f"kvzip: chunk must be at least {MIN_CHUNK} tokens, got {chunk=}")
    needed = asked + min(chunk, T)
    if held + needed > context and past_context:
        warnings.warn(
            f"kvzip: positions run past the model's context of {context}, to {held} + {needed} tokens",
            stacklevel=3,
        )
    elif held + needed > context:
        raise ValueError(
            f"kvzip: cache and repetition must fit the model's context of {context}, got "
            f"{held} + {needed} tokens; smaller chunks or past_context=True help"
        )
    room = asked + min(chunk, round_up(T))
    wide = kv.with_capacity(cache, round_up(held) + room)
    room = min(room, kv.max_chunk(wide))
    if room < needed:
        raise ValueError(
            f"kvzip: layers with a window must have slack for a repetition of {needed}, got {room}"
        )
    return chunk, room, wide


@partial(jax.jit, static_argnames=("prefix", "m", "output_aware"))
def score_chunk(
    model,
    cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    size: Int[Array, " B"],
    where: Int[Array, ""],
    *,
    prefix: int,
    m: int,
    output_aware: bool,
) -> Float[Array, "L B K m"]:
    """Scores of the m keys at `where`, while `tokens` are read behind the cache.

    lengths: of what is fed. size: how many of the m keys each request has.
    """
    B, T = tokens.shape
    step = jnp.arange(T)
    fed = step[None] < lengths[:, None]  # [B, T]
    own = (step[:, None] >= step[None])[None] & fed[:, None]  # [B, T, T]
    chunk = jnp.broadcast_to(jnp.arange(m)[None, None] < size[:, None, None], (B, T, m))
    seen = jnp.concatenate([jnp.ones((B, T, prefix), bool), chunk, own], axis=-1) & fed[:, :, None]
    scores: list[jax.Array] = []

    def of_keys(y):
        return jax.lax.dynamic_slice_in_dim(y, where, m, axis=1)

    def of_prefix_and_keys(y):
        return jnp.concatenate([y[:, :prefix], of_keys(y)], axis=1)

    def of_layer(
        layer: int, x: Float[Array, "B T D"], q: Float[Array, "B T H E"], keys: Float[Array, "B T K E"]
    ) -> None:
        held, attention = cache.keys[layer], model.layers[layer].attention
        new = quantize(heads_first(keys), held)  # as they will be read back
        before = jax.tree.map(of_prefix_and_keys, held)
        k = jnp.concatenate([dequantize(before), dequantize(new)], axis=1)
        share = None
        if output_aware:
            share = 1 / jnp.maximum(jnp.linalg.norm(x.astype(jnp.float32), axis=-1), 1e-12)
        rule = score_rule(attention)
        got = attention_per_key(rotate_queries(q, held), k, seen, share=share, **rule)
        got = got[..., prefix : prefix + m]  # [B, K, G, m]
        if output_aware:
            values = jax.tree.map(of_keys, cache.values[layer])
            got = got * _output_norms(attention.o.w.get_value(), dequantize(values), got.shape)
        scores.append(jnp.where(jnp.arange(m)[None, None] < size[:, None, None], got.max(2), 0.0))

    names = ("attention.q.in", "attention.queries", "attention.keys")
    tap = layer_tap(of_layer, names, global_layers(cache.windows))
    model(tokens, cache, lengths=lengths, logits="last", tap=tap)
    return jnp.stack(scores)


def _output_norms(w, values: Float[Array, "J m E"], shape) -> Float[Array, "B K G m"]:
    """|W_O v| of each query head's part of the output weight and each value."""
    B, K, G, m = shape
    rows = w.T if isinstance(w, jax.Array) else w.dequantize_rows(jnp.float32)  # [D, H E]
    rows = rows.astype(jnp.float32)
    parts = rows.reshape(rows.shape[0], K, G, -1)
    gram = jnp.einsum("nkgd,nkge->kgde", parts, parts, **FLOAT32)
    v = values.astype(jnp.float32).reshape(B, K, m, -1)
    square = jnp.einsum("bkmd,kgde,bkme->bkgm", v, gram, v, **FLOAT32)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def _check(model, cache, tokens: np.ndarray, sizes: np.ndarray, prefix: int) -> None:
    """Raises ValueError unless the cache holds these contexts: the first layer's keys tell tokens apart.

    Costs the first layer's keys of the context once more; nothing behind them is computed.
    """
    if not isinstance(cache, DenseCache) or cache.start is not None:
        raise ValueError(f"kvzip: the cache must hold every token, got a {type(cache).__name__} of some")
    held = np.asarray(cache.lengths).tolist()
    if held != (prefix + sizes).tolist():
        raise ValueError(
            f"kvzip: context must be what the cache holds behind {prefix=}, got {sizes.tolist()} tokens "
            f"for {held}"
        )
    T, R = tokens.shape[1], cache.keys[0].shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, -T % STEP)))
    far = np.asarray(_key_distance(model, cache.keys[0], tokens, np.int32(prefix), cache.extents))[:, :T]
    at = prefix + np.arange(T)[None]
    in_cache = (at < np.asarray(held)[:, None]) & (at >= np.asarray(held)[:, None] - R)
    other = (far > MAX_KEY_DISTANCE) & in_cache
    if other.any():
        b, t = np.argwhere(other)[0]
        raise ValueError(f"kvzip: context must be what the cache holds, got another token {t} of request {b}")


@jax.jit
def _key_distance(
    model, held, tokens: Int[Array, "B T"], prefix: Int[Array, ""], extents: Int[Array, " B"]
) -> Float[Array, "B T"]:
    """How far the first layer's keys of these tokens are from those held, relative to their size."""
    B, T = tokens.shape
    keys: list[jax.Array] = []

    def note(layer: int, k: jax.Array) -> None:
        keys.append(k)

    positions = jnp.broadcast_to(prefix + jnp.arange(T, dtype=jnp.int32), (B, T))
    tap = layer_tap(note, ("attention.keys",), [0])
    empty = model.make_cache(B, T, extents=extents)  # which says how keys are turned
    model(tokens, empty, positions=positions, logits="last", tap=tap)  # all but the keys is never computed
    new, old = heads_first(keys[0]).astype(jnp.float32), dequantize(held).astype(jnp.float32)
    new = rotate_queries(new, held)  # keys turn as queries do
    old = old[:, (prefix + jnp.arange(T)) % old.shape[1]]

    def square(x: Float[Array, "J T E"]) -> Float[Array, "B T"]:
        return jnp.square(x).reshape(B, -1, T, x.shape[-1]).sum((1, 3))

    return jnp.sqrt(square(new - old) / jnp.maximum(square(new), 1e-30))
