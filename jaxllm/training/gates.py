"""Gates for a model, trained on KVzip's own scores of some texts (`eviction/gates.py`).

    jaxllm train gates --data texts/ --form fast --out gates/

A gate looks at one token at a time. So each text is read and, to be scored, repeated just once; what the
layers read of its tokens is kept beside the scores, and a step takes some tokens of whichever texts. The
default texts are those of pico: plain text, lists of keys and values, random passages.
"""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxllm.decoding import prefill
from jaxllm.eviction import kvzip
from jaxllm.eviction.gates import FastGate, Gate, ZapGate
from jaxllm.eviction.kvzip import MIN_CHUNK, RepeatPrompt
from jaxllm.models.inputs import pad_batch
from jaxllm.training.trainer import Trained, train

Form = Literal["fast", "zap", "zap-linear"]
KEY_SIZE, NUM_SINKS = 16, 16  # of Fast KVzip's keys; how many it compares with
TEXTS_AT_ONCE = 8  # texts that are scored together


def new_gates(model, form: Form, *, hidden: int = 512, seed: int = 0) -> Gate:
    """Gates that have learnt nothing. hidden: width of KVzap's MLP."""
    c = model.config
    windows = model.windows
    L, D, K, G = sum(w is None for w in windows), c.width, c.kv_heads, c.heads // c.kv_heads
    keys = iter(jax.random.split(jax.random.key(seed), 4))

    def draw(*shape: int, fan: int = D) -> jax.Array:
        return jax.random.normal(next(keys), shape) * fan**-0.5

    if form == "fast":
        return FastGate(
            queries=draw(L, D, K, G, KEY_SIZE),
            query_bias=jnp.zeros((L, K, G, KEY_SIZE)),
            query_norm=jnp.ones((L, KEY_SIZE)),
            keys=draw(L, D, K, KEY_SIZE),
            key_norm=jnp.ones((L, KEY_SIZE)),
            sinks=draw(L, K, NUM_SINKS, KEY_SIZE, fan=KEY_SIZE),
            bias=jnp.zeros((L, K, G)),
        )
    if form == "zap":
        up, down = draw(L, D, hidden), draw(L, hidden, K, fan=hidden)
        return ZapGate(up=up, up_bias=jnp.zeros((L, hidden)), down=down, down_bias=jnp.zeros((L, K)))
    if form == "zap-linear":
        return ZapGate(up=None, up_bias=None, down=draw(L, D, K), down_bias=jnp.zeros((L, K)))
    raise ValueError(f"new_gates: form must be fast, zap or zap-linear, got {form!r}")


def train_gates(
    model,
    texts: Sequence[Sequence[int]],
    *,
    form: Form = "fast",
    tokenizer: Any = None,
    replay: RepeatPrompt | None = None,
    prefix: int = 0,
    tokens: int = 2**18,
    steps: int = 4000,
    batch: int = 2048,
    hidden: int = 512,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Gate, Trained]:
    """Gates that guess KVzip's scores (KVzip+'s for "zap"), and the run's record.

    texts: rows of token ids; each must fit the model's context twice. The first `prefix` tokens of each are
      read but not learnt from. tokenizer, replay: as for `kvzip_scores`.
    tokens: how many are learnt from at most, drawn by seed from all texts; what the layers read of them is
      kept on the host, L D numbers a token.
    steps, batch: tokens are drawn by seed, `batch` a step. optimizer: None is AdamW, 5e-3 down to 0.

    Losses are means over tokens, summed over layers and heads.
    """
    rows, lengths = pad_batch("train_gates", model, texts)
    if not lengths.min() > prefix >= 0 or min(tokens, steps, batch) < 1:
        raise ValueError(
            "train_gates: texts must be longer than the prefix, tokens, steps and batch positive, got "
            f"{prefix=}, shortest={lengths.min()}, {tokens=}, {steps=}, {batch=}"
        )
    replay = replay or (RepeatPrompt() if tokenizer is None else RepeatPrompt.from_tokenizer(tokenizer))
    gates = new_gates(model, form, hidden=hidden, seed=seed)
    learnt = _drawn(rows.shape[1], lengths, prefix, tokens, seed)
    known = _examples(model, gates, texts, learnt, replay, prefix, form != "fast", progress)

    def batches(step: int) -> dict[str, np.ndarray]:
        size = len(known["inputs"])
        some = np.random.default_rng([seed, step]).choice(size, min(batch, size), replace=False)
        return {name: x[some] for name, x in known.items()}

    def loss(gates, batch):
        x, s = batch["inputs"], batch["scores"]
        return sum(gates.loss(i, x[None, :, i], s[:, i].T[None]).mean(-1).sum() for i in range(x.shape[1]))

    schedule = optax.cosine_decay_schedule(5e-3, steps)
    done = train(
        loss,
        gates,
        batches,
        optimizer=optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        steps=steps,
        progress=progress,
    )
    return done.params, done


def _drawn(
    T: int, lengths: Int[np.ndarray, " N"], prefix: int, tokens: int, seed: int
) -> Bool[np.ndarray, "N T"]:
    """At most `tokens` of those that stand behind the prefix, by seed."""
    at = np.arange(T)
    learnt = (at >= prefix) & (at < lengths[:, None])
    if learnt.sum() > tokens:
        every = np.flatnonzero(learnt)
        learnt = np.zeros_like(learnt)
        learnt.flat[np.random.default_rng(seed).choice(every, tokens, replace=False)] = True
    return learnt


def _examples(
    model,
    gates: Gate,
    texts: Sequence[Sequence[int]],
    learnt: Bool[np.ndarray, "N T"],
    replay: RepeatPrompt,
    prefix: int,
    output_aware: bool,
    progress: bool,
) -> dict[str, np.ndarray]:
    """What the layers read of the tokens that are learnt from [n, L, D], and their scores [n, L, K]."""
    rows, lengths = pad_batch("train_gates", model, texts)
    T = rows.shape[1]
    inputs, scores = [], []
    for start in tqdm(range(0, len(rows), TEXTS_AT_ONCE), "scores", file=sys.stderr, disable=not progress):
        some = slice(start, start + TEXTS_AT_ONCE)
        got = kvzip.kvzip_scores(
            model,
            prefill.prefill(model, texts[some], slack=prefix + T + 64),
            [text[prefix:] for text in texts[some]],
            replay=replay,
            prefix=prefix,
            chunk=max(MIN_CHUNK, T),  # one, of a size that texts of about one length share
            output_aware=output_aware,
        )
        row, t = np.nonzero(learnt[some])
        inputs.append(np.asarray(_inputs(model, gates, rows[some], lengths[some]))[:, row, t].swapaxes(0, 1))
        scores.append(np.asarray(got)[:, row, :, t - prefix])
    return {"inputs": np.concatenate(inputs), "scores": np.concatenate(scores)}


@jax.jit
def _inputs(model, gates: Gate, tokens, lengths) -> Float[Array, "L B T D"]:
    """What the layers with gates read."""
    tap, inputs = gates.capture_inputs(model)
    model(tokens, lengths=lengths, logits="last", tap=tap)
    return jnp.stack(inputs)
