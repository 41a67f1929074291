"""Gates for a model, trained on KVzip's own scores of some texts (`cache/gates.py`).

    python -m jaxllm.training.gates --data texts/ --form fast --out gates/

Each text is read once, repeated once to be scored, and then seen again by the gates: a step reads some texts
with the frozen model, through the same function that scores a text later, and compares with the scores kept.
The default texts are those of pico: plain text, lists of keys and values, random passages.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.cache.gates import FastGate, Gate, ZapGate, save_gates
from jaxllm.cache.kvzip import LEAST, Replay
from jaxllm.cache.prepare import padded
from jaxllm.training import corpus
from jaxllm.training.exercises import Words, list_end, lookup
from jaxllm.training.trainer import Trained, train

Form = Literal["fast", "zap", "zap-linear"]
SIZE, SINKS = 16, 16  # of Fast KVzip's keys; how many it compares with
AT_ONCE = 8  # texts that are scored together


def new_gates(model, form: Form, *, hidden: int = 512, seed: int = 0) -> Gate:
    """Gates that have learnt nothing. hidden: width of KVzap's MLP."""
    c = model.config
    windows = model.windows
    L, D, K, G = sum(w is None for w in windows), c.width, c.kv_heads, c.heads // c.kv_heads
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    draw = lambda *shape, fan=D: jax.random.normal(next(keys), shape) * fan**-0.5  # noqa: E731
    if form == "fast":
        return FastGate(
            queries=draw(L, D, K, G, SIZE),
            query_bias=jnp.zeros((L, K, G, SIZE)),
            query_norm=jnp.ones((L, SIZE)),
            keys=draw(L, D, K, SIZE),
            key_norm=jnp.ones((L, SIZE)),
            sinks=draw(L, K, SINKS, SIZE, fan=SIZE),
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
    replay: Replay | None = None,
    prefix: int = 0,
    steps: int = 1000,
    batch: int = 8,
    hidden: int = 512,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Gate, Trained]:
    """Gates that guess KVzip's scores (KVzip+'s for "zap"), and the run's record.

    texts: rows of token ids; each must fit the model's context twice. The first `prefix` tokens of each are
      read but not learnt from. tokenizer, replay: as for `kvzip_scores`.
    steps, batch: texts are drawn by seed, `batch` a step. optimizer: None is AdamW, 5e-3 down to 0.

    Losses are means over tokens, summed over layers and heads.
    """
    rows, lengths = padded("train_gates", model, texts)
    if not lengths.min() > prefix >= 0 or steps < 1:
        given = f"{prefix=}, {steps=}, shortest={lengths.min()}"
        raise ValueError(f"train_gates: texts must be longer than the prefix, steps positive, got {given}")
    replay = replay or (Replay() if tokenizer is None else Replay.of(tokenizer))
    slack = prefix + rows.shape[1] + 64
    scores = []
    for at in tqdm(range(0, len(rows), AT_ONCE), "scores", file=sys.stderr, disable=not progress):
        some = [list(text) for text in texts[at : at + AT_ONCE]]
        got = kv.kvzip_scores(
            model,
            kv.prefill(model, some, slack=slack),
            [text[prefix:] for text in some],
            replay=replay,
            prefix=prefix,
            chunk=max(LEAST, *map(len, some)),
            output_aware=form != "fast",
        )
        scores.append(np.pad(got, [(0, 0)] * 3 + [(prefix, rows.shape[1] - prefix - got.shape[-1])]))
    known = np.concatenate(scores, axis=1).swapaxes(0, 1)  # [N, L, K, T]

    def batches(step: int) -> dict[str, np.ndarray]:
        some = np.random.default_rng([seed, step]).choice(len(rows), min(batch, len(rows)), replace=False)
        return {"tokens": rows[some], "lengths": lengths[some], "scores": known[some]}

    def loss(params, batch):
        model, gates, scores = params["model"], params["gates"], batch["scores"]
        tap, found = gates.watch(model, lambda i, x: gates.loss(i, x, scores[:, i]))
        model(batch["tokens"], lengths=batch["lengths"], logits="last", tap=tap)
        at = jnp.arange(batch["tokens"].shape[1])
        real = (at[None] >= prefix) & (at[None] < batch["lengths"][:, None])
        return sum(jnp.where(real[:, None], x, 0.0).sum() for x in found) / real.sum().astype(jnp.float32)

    schedule = optax.cosine_decay_schedule(5e-3, steps)
    done = train(
        loss,
        {"model": model, "gates": new_gates(model, form, hidden=hidden, seed=seed)},
        batches,
        optimizer=optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        steps=steps,
        trainable=lambda path, leaf: path.startswith("['gates']"),
        progress=progress,
    )
    return done.params["gates"], done


def pico_texts(
    tokenizer, texts: Sequence[corpus.Text], count: int, *, longest: int, seed: int
) -> list[list[int]]:
    """Contexts behind a begin token: plain text (half), lists of keys and values, random passages."""
    words, rows = Words.of(tokenizer), []
    inner = tokenizer.backend_tokenizer
    streams = [corpus.encode(inner, text.train) for text in texts]
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        length = int(rng.integers(longest // 4, longest))
        if i % 4 < 2:
            stream = streams[rng.integers(len(streams))]
            at = rng.integers(0, max(1, len(stream) - length))
            row = stream[at : at + length]
        elif i % 4 == 2:
            row = lookup(rng, words, min(length // 5, 64)).tokens[1:]  # the list, without the questions
            row = row[: list_end(row, words)]
        else:
            row = rng.choice(words.ordinary, length)
        rows.append([words.bos, *(int(token) for token in row)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as `jl.load` takes it, with pico's tokenizer (default: pico)")
    add("--data", type=Path, required=True, help="folder of the texts that pico is trained on")
    add("--stories", type=Path, help="file of sampled stories")
    add("--form", choices=("fast", "zap", "zap-linear"), default="fast")
    add("--hidden", type=int, default=512, help="width of the MLP of zap")
    add("--texts", type=int, default=256)
    add("--longest", type=int, default=448, help="tokens of a text; it must fit the context twice")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = jl.load(args.model, dtype="float32")
    texts = corpus.read(args.data, args.stories)
    rows = pico_texts(tokenizer, texts, args.texts, longest=args.longest, seed=args.seed)
    gates, done = train_gates(
        model,
        rows,
        form=args.form,
        tokenizer=tokenizer,
        prefix=1,
        steps=args.steps,
        batch=args.batch,
        hidden=args.hidden,
        seed=args.seed,
    )
    notes = {name: getattr(args, name) for name in ("form", "texts", "longest", "steps", "batch", "seed")}
    first, last = (float(np.mean(x)) for x in (done.losses[:50], done.losses[-50:]))
    half = jax.tree.map(lambda x: x.astype(jnp.float16), gates)
    save_gates(half, args.out, **notes, loss_first_50=round(first, 4), loss_last_50=round(last, 4))
    print(f"loss {first:.3f} -> {last:.3f} in {done.seconds:.0f} s")


if __name__ == "__main__":
    main()
