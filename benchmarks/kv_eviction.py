"""How well a model works on a cache of which little is left, and how fast: KVzip and its rivals.

    python benchmarks/kv_eviction.py --text FILE --out results/            # pico
    python benchmarks/kv_eviction.py --what speed --out results/           # a random 200 M Llama, 4k tokens

    recall    a list of key=value lines; every key is asked on one compressed cache. Value right as a whole
    repeat    200 uniform random tokens; the model repeats them. Tokens right, greedy, free running
    text      256 tokens of text, and the divergence (nats a token) from the full cache over the next 128
    speed     decoding with the full cache and with part of it: attention of one layer alone, and whole steps

Contexts are drawn by seed; `snapkv, asked` scores with the first question in its window, as it is published:
that question is then easy, and the others are counted. Ratios are of the context's pairs that stay; the begin
token always does. Bytes are those of all arrays held. Times are medians of interleaved rounds.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import machine
from quantization_tables import table
from tqdm import tqdm

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.models.decoder import Config, Decoder
from jaxllm.training.exercises import REPEAT_ALL, Words, lookup

RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
PAIRS, PASSAGE, CONTEXT, AFTER = 32, 200, 256, 128
LLAMA = Config(
    layers=12, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, tied=True, context=8192
)


def scorers(model, tokenizer, asked: list[int]) -> dict[str, Callable[..., Any]]:
    """Each gives scores of a cache that holds <bos> and the context `row`."""
    replay = kv.Replay.of(tokenizer)
    whole = lambda row: [[tokenizer.bos_token_id, *row]]  # noqa: E731

    def with_question(cache, row, seed):
        rows = [[tokenizer.bos_token_id, *row, *asked]]
        return kv.snapkv_scores(model, rows, prefix=1, window=8)[..., : len(row)]

    zip_ = partial(kv.kvzip_scores, model, replay=replay, prefix=1, chunk=256)
    return {
        "kvzip": lambda cache, row, seed: zip_(cache, [row]),
        "kvzip+": lambda cache, row, seed: zip_(cache, [row], output_aware=True),
        "h2o": lambda cache, row, seed: kv.h2o_scores(model, whole(row), prefix=1),
        "snapkv": lambda cache, row, seed: kv.snapkv_scores(model, whole(row), prefix=1, window=16),
        "snapkv, asked": with_question,
        "tova": lambda cache, row, seed: kv.tova_scores(model, whole(row), prefix=1),
        "streaming": lambda cache, row, seed: kv.streaming_scores(model, whole(row), prefix=1),
        "random": lambda cache, row, seed: kv.random_scores(model, whole(row), prefix=1, seed=seed),
    }


@partial(jax.jit, static_argnames="rows")
def filled(model, tokens, *, rows: int):
    """The cache of some tokens."""
    return model(tokens, model.make_cache(tokens.shape[0], rows), logits="last")[1]


def compressed(cache, scores, ratio: float):
    return cache if ratio == 1 else kv.evict(cache, scores, ratio=ratio, prefix=1)


def part_recall(model, tokenizer, args) -> list[dict[str, Any]]:
    words, found = Words.of(tokenizer), []
    for seed in tqdm(args.seeds, "recall", file=sys.stderr):
        for case in range(args.cases):
            one = lookup(np.random.default_rng([seed, case]), words, PAIRS).tokens.tolist()
            gap = next(i for i in range(len(one)) if one[i : i + 2] == [words.newline] * 2) + 2
            row, lines = one[1:gap], [[]]
            for token in one[gap:-1]:
                lines[-1].append(token)
                if token == words.newline:
                    lines.append([])
            prompts, answers = ([line[i] for line in lines[:-1]] for i in (slice(0, 2), slice(2, None)))
            cache = filled(model, jnp.asarray([one[:gap]]), rows=gap)
            for name, score in scorers(model, tokenizer, prompts[0]).items():
                scores = score(cache, row, seed)
                for ratio in args.ratios:
                    small = compressed(cache, scores, ratio)
                    outs = jl.generate(
                        model, None, prompts, max_new_tokens=3, cache=small, stop_tokens=[words.newline]
                    )
                    hits = [o.token_ids == a for o, a in zip(outs, answers, strict=True)]
                    found.append(
                        {"method": name, "ratio": ratio, "seed": seed, "first": hits[0]}
                        | {"value": float(np.mean(hits[1:])), "bytes": kv.num_bytes(small)}
                    )
    return found


def part_repeat(model, tokenizer, args) -> list[dict[str, Any]]:
    words, found = Words.of(tokenizer), []
    prompt = [*words.fixed[REPEAT_ALL[0]].tolist(), words.newline]
    for seed in tqdm(args.seeds, "repeat", file=sys.stderr):
        for case in range(args.cases):
            row = np.random.default_rng([seed, case, 1]).choice(words.ordinary, PASSAGE).tolist()
            cache = filled(model, jnp.asarray([[words.bos, *row]]), rows=PASSAGE + 1)
            for name, score in scorers(model, tokenizer, prompt).items():
                scores = score(cache, row, seed)
                for ratio in args.ratios:
                    small = compressed(cache, scores, ratio)
                    out = jl.generate(
                        model, None, [prompt], max_new_tokens=PASSAGE, cache=small, stop_tokens=[words.eos]
                    )[0]
                    hits = sum(a == b for a, b in zip(out.token_ids, row, strict=False))
                    found.append({"method": name, "ratio": ratio, "seed": seed, "value": hits / PASSAGE})
    return found


@jax.jit
def log_probs(model, cache, tokens):
    return jax.nn.log_softmax(model(tokens, cache)[0])


def part_text(model, tokenizer, args) -> list[dict[str, Any]]:
    ids = tokenizer.encode(args.text.read_text("utf-8"), add_special_tokens=False)
    if len(ids) < CONTEXT + AFTER:
        raise SystemExit(f"kv_eviction.py: --text must have {CONTEXT + AFTER} tokens, got {len(ids)}")
    found = []
    for seed in tqdm(args.seeds, "text", file=sys.stderr):
        for case in range(args.cases):
            at = int(np.random.default_rng([seed, case, 2]).integers(0, len(ids) - CONTEXT - AFTER + 1))
            row, after = ids[at : at + CONTEXT], ids[at + CONTEXT : at + CONTEXT + AFTER]
            cache = filled(model, jnp.asarray([[tokenizer.bos_token_id, *row]]), rows=CONTEXT + 1)
            cache = kv.grow(cache, CONTEXT + 1 + AFTER)
            tokens = jnp.asarray([after])
            given = log_probs(model, cache, tokens)
            for name, score in scorers(model, tokenizer, after[:8]).items():
                scores = score(cache, row, seed)
                for ratio in args.ratios:
                    small = compressed(cache, scores, ratio)
                    got = log_probs(model, kv.grow(small, AFTER) if ratio < 1 else small, tokens)
                    kl = float(jnp.sum(jnp.exp(given) * (given - got), axis=-1).mean())
                    found.append({"method": name, "ratio": ratio, "seed": seed, "value": kl})
    return found


def part_speed(_model, _tokenizer, args) -> list[dict[str, Any]]:
    """Milliseconds of one layer's attention and of whole steps, at several batches."""
    from flax import nnx

    model, found, rows = Decoder(LLAMA, rngs=nnx.Rngs(0)), [], args.rows
    attend = jax.jit(
        lambda q, cache: kv.attend(
            q, cache, 0, cache.lengths[:, None], jnp.ones_like(cache.lengths), scale=0.125
        )
    )
    for batch in tqdm(args.batches, "speed", file=sys.stderr):
        cache = _random_cache(model, batch, rows)
        scores = jnp.asarray(_uneven(LLAMA.layers, batch, LLAMA.kv_heads, rows))
        caches = {"full": kv.grow(cache, rows + 8), "evicted": kv.evict(cache, scores, ratio=0.3, rows=8)}
        q = jax.random.normal(jax.random.key(1), (batch, 1, LLAMA.heads, LLAMA.head_dim))
        token = jnp.ones((batch, 1), jnp.int32)
        parts = {name: kv.split(c) for name, c in caches.items()}
        times: dict[tuple[str, str], list[float]] = {}
        for turn in range(args.rounds + 1):
            for name in caches:
                context, tail = parts[name]
                start = time.perf_counter()
                for _ in range(5):
                    jax.block_until_ready(attend(q, kv.join(context, tail)))
                middle = time.perf_counter()
                for _ in range(3):
                    tail = jax.block_until_ready(_step(model, context, tail, token))
                end = time.perf_counter()
                parts[name] = context, kv.truncate(tail, jnp.full(batch, rows, jnp.int32))
                if turn:
                    times.setdefault((name, "attention"), []).append((middle - start) / 5)
                    times.setdefault((name, "step"), []).append((end - middle) / 3)
        for what in ("attention", "step"):
            ratio = [a / b for a, b in zip(times["full", what], times["evicted", what], strict=True)]
            found.append(
                {"batch": batch, "what": what, "faster": statistics.median(ratio)}
                | {name: 1e3 * statistics.median(times[name, what]) for name in caches}
                | {f"{name}_bytes": kv.num_bytes(c) for name, c in caches.items()}
            )
    return found


@partial(jax.jit, donate_argnames="tail")
def _step(model, context, tail, token):
    _, cache = model(token, kv.join(context, tail), logits="last")
    return kv.split(cache)[1]


def _random_cache(model, batch: int, rows: int):
    cache = model.make_cache(batch, rows)
    fill = lambda i, x: jax.random.normal(jax.random.key(i), x.shape, x.dtype)  # noqa: E731
    keys, values = (tuple(fill(i, x) for i, x in enumerate(some)) for some in (cache.keys, cache.values))
    lengths = jnp.full(batch, rows, jnp.int32)
    return dataclasses.replace(cache, keys=keys, values=values, lengths=lengths, empty=False)


def _uneven(L: int, B: int, K: int, T: int) -> np.ndarray:
    """Scores by which heads keep from next to nothing to nearly all, as KVzip's do."""
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (L, B, K, 1)) + rng.normal(0, 1, (L, B, K, T))).astype(np.float32)


PARTS = {"recall": part_recall, "repeat": part_repeat, "text": part_text, "speed": part_speed}
TITLES = {
    "recall": "Values right, %, all keys but the first",
    "repeat": "Tokens repeated, %",
    "text": "Divergence from the full cache, nats a token",
}


def markdown(run: dict[str, Any]) -> str:
    lines = ["# Eviction", "", f"{run['date']}, {run['machine']}, jax {run['jax']}; {run['settings']}.", ""]
    for what, title in TITLES.items():
        if what not in run:
            continue
        results, rows = run[what], []
        ratios = sorted({r["ratio"] for r in results}, reverse=True)
        for name in dict.fromkeys(r["method"] for r in results):
            cells = []
            for ratio in ratios:
                got = [r for r in results if (r["method"], r["ratio"]) == (name, ratio)]
                seeds = [
                    np.mean([r["value"] for r in got if r["seed"] == s]) for s in {r["seed"] for r in got}
                ]
                scale, digits = (1, 4) if what == "text" else (100, 1)
                cells.append(f"{scale * np.mean(seeds):.{digits}f} +- {scale * np.std(seeds):.{digits}f}")
            rows.append((name, *cells))
        lines += [f"## {title}", "", *table(("method", *(f"{r:g}" for r in ratios)), rows)]
    if "speed" in run:
        body = [
            (f"{r['batch']}", r["what"], f"{r['full']:.2f}", f"{r['evicted']:.2f}", f"{r['faster']:.2f}")
            + (f"{r['full_bytes'] / 1e6:.0f}", f"{r['evicted_bytes'] / 1e6:.0f}")
            for r in run["speed"]
        ]
        head = ("batch", "what", "full, ms", "at 0.3, ms", "times faster", "full, MB", "at 0.3, MB")
        lines += ["## Decoding, 201 M random Llama, CPU, float32", "", *table(head, body)]
    return "\n".join(lines)


def draw(run: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [what for what in TITLES if what in run]
    if not shown:
        return
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        results = run[what]
        ratios = sorted({r["ratio"] for r in results})
        for i, name in enumerate(dict.fromkeys(r["method"] for r in results)):
            at = [[r["value"] for r in results if (r["method"], r["ratio"]) == (name, x)] for x in ratios]
            axes.plot(ratios, [np.mean(x) for x in at], marker="osv^Dx+*"[i % 8], markersize=4, label=name)
        axes.set(xlabel="part of the context's pairs that stay", title=TITLES[what])
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--model", help="as `jl.load` takes it (default: pico)")
    add("--text", type=Path, help="for `text`: one that the model was not trained on")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--cases", type=int, default=8, help="contexts a seed")
    add("--ratios", type=float, nargs="+", default=RATIOS)
    add("--batches", type=int, nargs="+", default=[1, 8, 16])
    add("--rows", type=int, default=4096, help="context of `speed`")
    add("--rounds", type=int, default=5)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    if "text" in args.what and args.text is None:
        parser.error("--text must be given for `text`")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "kv_eviction.json"
    run: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    run |= {"date": datetime.date.today().isoformat(), "machine": machine(), "jax": version("jax")}
    run["settings"] = f"{args.cases} contexts a seed, {len(args.seeds)} seeds; means +- deviation of seeds"
    model, tokenizer = jl.load(args.model, dtype="float32")
    for what in args.what:
        run[what] = PARTS[what](model, tokenizer, args)
        file.write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "kv_eviction.md").write_text(markdown(run))
    draw(run, args.out / "kv_eviction.png")
    print(markdown(run))


if __name__ == "__main__":
    main()
