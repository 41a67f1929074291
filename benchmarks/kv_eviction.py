"""How well a model works on a cache of which little is left, and how fast: KVzip and its rivals.

    python benchmarks/kv_eviction.py --text FILE --out results/            # pico
    python benchmarks/kv_eviction.py --what speed cost --out results/      # a random 200 M Llama, 4k tokens

    recall    lists of key=value lines of some 256, 512, 640 tokens; every key is asked on one compressed
              cache; value right as a whole. (pico was trained on lists of at most 64 lines.)
    repeat    uniform random tokens; the model repeats 256 whole, of 512 and 640 four named parts of 64
    text      256 tokens of text; over the next 128, perplexity and divergence (nats) from the full cache
    held      640 tokens of text written to a cache that never holds more than some tokens: divergence from
              the full cache over the last 384, next-token predictions
    speed     decoding with the full cache and with part of it: attention of one layer alone, and whole steps
    cost      what preparing a context costs, and asking it once it lies on the disk, against reading it again

Contexts are drawn by seed; chunks of repetition have 256 tokens at most. `snapkv, asked` scores with the
first question in its window, as it is published: that question is then easy, and the others are counted.
`kvzip, heads` drops whole heads by scores of another context. Ratios are of the context's pairs that stay;
the begin token always does. Bytes are those of all arrays held. Times are medians of interleaved rounds.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import machine
from flax import nnx
from quantization_tables import table
from tqdm import tqdm

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.cache import repack
from jaxllm.decoding import prefill
from jaxllm.eviction import baselines, kvzip, running_budget
from jaxllm.eviction.budget import evict
from jaxllm.eviction.gates import pico_gates
from jaxllm.eviction.heads import head_scores, spread
from jaxllm.models.decoder import Config, Decoder
from jaxllm.training.pico.exercises import REPEAT_ALL, REPEAT_PART, SEED_IDS, Words, list_end, lookup

RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
SIZES, LINE, PART = (256, 512, 640), 5, 64  # contexts; tokens of a line of a list, of a named part
CONTEXT, AFTER = 256, 128  # of `text`
HELD, START = (64, 128, 256), 256  # of `held`: budgets in tokens, and where counting begins
LLAMA = Config(
    layers=12, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, tied=True, context=8192
)


Scorer = Callable[[Any, list[int], list[int], int], jax.Array]  # cache, context, a first question, seed


def scorers(model, tokenizer, only: Sequence[str] | None) -> dict[str, tuple[Scorer, dict[str, Any]]]:
    """Scores of a cache that holds <bos> and the context `row`, and how its budget is spent."""
    replay = kvzip.Replay.of(tokenizer)
    whole = lambda row: [[tokenizer.bos_token_id, *row]]  # noqa: E731

    def with_question(cache, row, asked, seed):
        rows = [[tokenizer.bos_token_id, *row, *asked]]
        return baselines.snapkv_scores(model, rows, prefix=1, window=8)[..., : len(row)]

    def by_gate(form):
        gates = pico_gates(form)
        return lambda cache, row, asked, seed: prefill.prefill_scored(model, whole(row), gates, prefix=1)[1]

    zip_ = partial(kvzip.kvzip_scores, model, replay=replay, prefix=1, chunk=256)
    # heads are learnt from one context that no part measures: a list behind random tokens
    words, rng = Words.of(tokenizer), np.random.default_rng([0, 99])
    sample = [*rng.choice(words.ordinary, 128).tolist(), *listed(rng, words, 40)[0]]
    cache = filled(model, jnp.asarray([[words.bos, *sample]]), rows=len(sample) + 1)
    heads = head_scores(zip_(cache, [sample]))
    rival = lambda score, **more: lambda cache, row, asked, seed: score(model, whole(row), prefix=1, **more)  # noqa: E731
    every: dict[str, tuple[Scorer, dict[str, Any]]] = {
        "kvzip": (lambda cache, row, asked, seed: zip_(cache, [row]), {}),
        "kvzip+": (lambda cache, row, asked, seed: zip_(cache, [row], output_aware=True), {}),
        "fast kvzip": (by_gate("fast"), {}),
        "kvzap": (by_gate("zap"), {}),
        "kvzip, heads": (
            lambda cache, row, asked, seed: spread(heads, cache, prefix=1),
            {"budget": "head"},
        ),
        "h2o": (rival(baselines.h2o_scores), {}),
        "snapkv": (rival(baselines.snapkv_scores, window=16), {}),
        "snapkv, asked": (with_question, {}),
        "tova": (rival(baselines.tova_scores), {}),
        "expected": (rival(baselines.expected_scores), {}),
        "streaming": (rival(baselines.streaming_scores), {}),
        "random": (
            lambda cache, row, asked, seed: baselines.random_scores(model, whole(row), prefix=1, seed=seed),
            {},
        ),
    }
    if only and set(only) - set(every):
        raise SystemExit(
            f"kv_eviction.py: --only must name some of {', '.join(every)}, got {', '.join(only)}"
        )
    return {name: x for name, x in every.items() if only is None or name in only}


@partial(jax.jit, static_argnames="rows")
def filled(model, tokens, *, rows: int):
    """The cache of some tokens."""
    return model(tokens, model.make_cache(tokens.shape[0], rows), logits="last")[1]


def compressed(cache, scores, ratio: float, options: dict[str, Any]):
    return cache if ratio == 1 else evict(cache, scores, ratio=ratio, prefix=1, **options)


def listed(rng: np.random.Generator, words: Words, pairs: int) -> tuple[list[int], list[list[int]]]:
    """A list of key=value lines, and the lines in another order."""
    one = lookup(rng, words, pairs, value_tokens=2).tokens.tolist()  # one length, few compilations
    gap = list_end(one, words)
    lines: list[list[int]] = [[]]
    for token in one[gap:-1]:
        lines[-1].append(token)
        if token == words.newline:
            lines.append([])
    return one[1:gap], lines[:-1]


def part_recall(model, tokenizer, args) -> list[dict[str, Any]]:
    words, methods, found = Words.of(tokenizer), scorers(model, tokenizer, args.only), []
    cases = [(size, seed, case) for size in args.sizes for seed in args.seeds for case in range(args.cases)]
    for size, seed, case in tqdm(cases, "recall", file=sys.stderr):
        row, lines = listed(np.random.default_rng([seed, case, size]), words, size // LINE)
        prompts, answers = ([line[i] for line in lines] for i in (slice(0, 2), slice(2, None)))
        cache = filled(model, jnp.asarray([[words.bos, *row]]), rows=len(row) + 1)
        for name, (score, options) in methods.items():
            scores = score(cache, row, prompts[0], seed)
            for ratio in args.ratios:
                small = compressed(cache, scores, ratio, options)
                outs = jl.generate(
                    model, None, prompts, max_new_tokens=3, cache=small, stop_tokens=[words.newline]
                )
                hits = [o.token_ids == a for o, a in zip(outs, answers, strict=True)]
                found.append(
                    {"method": name, "ratio": ratio, "seed": seed, "size": size, "first": hits[0]}
                    | {"value": float(np.mean(hits[1:])), "bytes": kv.num_bytes(small)}
                )
    return found


def part_repeat(model, tokenizer, args) -> list[dict[str, Any]]:
    words, methods, found = Words.of(tokenizer), scorers(model, tokenizer, args.only), []
    cases = [(size, seed, case) for size in args.sizes for seed in args.seeds for case in range(args.cases)]
    for size, seed, case in tqdm(cases, "repeat", file=sys.stderr):
        rng = np.random.default_rng([seed, case, size, 1])
        row = rng.choice(words.ordinary, size).tolist()
        if size <= SIZES[0]:
            prompts, answers = [[*words.fixed[REPEAT_ALL[0]].tolist(), words.newline]], [row]
        else:
            places = rng.integers(0, size - SEED_IDS - PART, 4)
            ask = words.fixed[REPEAT_PART[0]].tolist()
            prompts = [[*ask, *row[at : at + SEED_IDS], words.newline] for at in places]
            answers = [row[at + SEED_IDS : at + SEED_IDS + PART] for at in places]
        cache = filled(model, jnp.asarray([[words.bos, *row]]), rows=size + 1)
        for name, (score, options) in methods.items():
            scores = score(cache, row, prompts[0], seed)
            for ratio in args.ratios:
                small = compressed(cache, scores, ratio, options)
                outs = jl.generate(
                    model,
                    None,
                    prompts,
                    max_new_tokens=len(answers[0]),
                    cache=small,
                    stop_tokens=[words.eos],
                )
                hits = [
                    np.mean([*map(int.__eq__, o.token_ids, a), *[0] * (len(a) - len(o.token_ids))])
                    for o, a in zip(outs, answers, strict=True)
                ]
                found.append(
                    {
                        "method": name,
                        "ratio": ratio,
                        "seed": seed,
                        "size": size,
                        "value": float(np.mean(hits)),
                    }
                )
    return found


@jax.jit
def log_probs(model, cache, tokens):
    return jax.nn.log_softmax(model(tokens, cache)[0])


def part_text(model, tokenizer, args) -> list[dict[str, Any]]:
    ids = tokenizer.encode(args.text.read_text("utf-8"), add_special_tokens=False)
    if len(ids) < CONTEXT + AFTER:
        raise SystemExit(f"kv_eviction.py: --text must have {CONTEXT + AFTER} tokens, got {len(ids)}")
    methods, found = scorers(model, tokenizer, args.only), []
    for seed in tqdm(args.seeds, "text", file=sys.stderr):
        for case in range(args.cases):
            at = int(np.random.default_rng([seed, case, 2]).integers(0, len(ids) - CONTEXT - AFTER + 1))
            row, after = ids[at : at + CONTEXT], ids[at + CONTEXT : at + CONTEXT + AFTER]
            cache = filled(model, jnp.asarray([[tokenizer.bos_token_id, *row]]), rows=CONTEXT + 1)
            cache = kv.grow(cache, CONTEXT + 1 + AFTER)
            tokens = jnp.asarray([after])
            given = log_probs(model, cache, tokens)
            for name, (score, options) in methods.items():
                scores = score(cache, row, after[:8], seed)
                for ratio in args.ratios:
                    small = compressed(cache, scores, ratio, options)
                    got = log_probs(model, kv.grow(small, AFTER) if ratio < 1 else small, tokens)
                    kl = float(jnp.sum(jnp.exp(given) * (given - got), axis=-1).mean())
                    nll = -float(jnp.take_along_axis(got[0, :-1], tokens[0, 1:, None], axis=1).mean())
                    result = {"method": name, "ratio": ratio, "seed": seed, "size": CONTEXT}
                    found.append(result | {"value": kl, "nll": nll})
    return found


@jax.jit
def _piece(model, gates, context, tail, tokens):
    """Log-probabilities of a piece of text, the tail with it, and its scores."""
    tap, inputs = gates.watch(model)
    logits, cache = model(tokens, kv.join(context, tail), tap=tap)
    return jax.nn.log_softmax(logits[0]), kv.split(cache)[1], gates.scores(inputs)


def part_held(model, tokenizer, args) -> list[dict[str, Any]]:
    ids = tokenizer.encode(args.text.read_text("utf-8"), add_special_tokens=False)
    size, buffer, found = SIZES[-1], 32, []
    by = {"fast kvzip": pico_gates("fast"), "kvzap": pico_gates("zap")}
    by |= dict.fromkeys(("streaming", "random"), by["fast kvzip"])  # whose scores are not used
    by = {name: gates for name, gates in by.items() if args.only is None or name in args.only}
    for seed in tqdm(args.seeds, "held", file=sys.stderr):
        for case in range(args.cases):
            rng = np.random.default_rng([seed, case, 3])
            at = int(rng.integers(0, len(ids) - size))
            row = [tokenizer.bos_token_id, *ids[at : at + size - 1]]
            given = log_probs(model, model.make_cache(1, size), jnp.asarray([row]))[0]
            for tokens in HELD:
                for name, gates in by.items():
                    hold = running_budget.Hold(gates=gates, tokens=tokens, buffer=buffer, recent=16)
                    cache, kl = hold.settled(model.make_cache(1, 1), None), []
                    for begin in range(0, size, buffer):
                        piece = jnp.asarray([row[begin : begin + buffer]])
                        got, tail, scores = _piece(model, gates, *kv.split(cache), piece)
                        if name == "streaming":
                            scores = jnp.broadcast_to(jnp.arange(begin, begin + buffer) * 1.0, scores.shape)
                        elif name == "random":
                            key = jax.random.fold_in(jax.random.key(seed), begin)
                            scores = jax.random.uniform(key, scores.shape)
                        cache = hold.settled(kv.join(cache.context, tail), scores)
                        want = given[begin : begin + buffer]
                        kl.append(jnp.sum(jnp.exp(want) * (want - got), axis=-1))
                    value = float(jnp.concatenate(kl)[START:].mean())
                    result = {"method": name, "ratio": tokens, "seed": seed, "size": size, "value": value}
                    found.append(result | {"bytes": kv.num_bytes(cache)})
    return found


def _operations(model, n: int, asked: int = 0, chunk: int = 0, prefix: int = 0) -> float:
    """Multiplications and additions of a prefill of n tokens, or of KVzip's scores of them (chunk > 0)."""
    c = model.config
    weights = sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model.layers))) if x.ndim == 2)
    each, read = 2 * weights, 4 * c.layers * c.heads * c.head_dim
    if not chunk:
        return each * n + read * n * (n + 1) / 2
    total = 0.0
    for at in range(0, n, chunk):
        m = min(chunk, n - at)
        q = asked + m
        total += each * q + read * (q * (prefix + n) + q * (q + 1) / 2) + read / 2 * q * (prefix + m + q)
    return total


def part_cost(pico, tokenizer, args) -> list[dict[str, Any]]:
    """Operations of scoring, and seconds of each step of preparing 4k tokens and of asking them."""
    replay = kvzip.Replay.of(tokenizer)
    asked = len(replay.before(np.zeros(replay.seed, np.int32)))
    model, rows, found = Decoder(LLAMA, rngs=nnx.Rngs(0)), args.rows, []
    for name, one, n, chunk in (
        *(("pico", pico, n, 256) for n in SIZES),
        ("201 M", model, rows, 2000),
    ):
        cost = _operations(one, n, asked, chunk, prefix=1) / _operations(one, n)
        found.append({"what": f"operations of scoring, {name}, {n} tokens", "prefills": cost})
    row = np.random.default_rng(0).integers(3, LLAMA.vocab, rows).tolist()
    question = [np.random.default_rng(1).integers(3, LLAMA.vocab, 32).tolist()]
    times: dict[str, list[float]] = {}

    def timed(what: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(do())
        times.setdefault(what, []).append(time.perf_counter() - start)
        return out

    ask = lambda cache: jl.generate(model, None, question, max_new_tokens=16, cache=cache)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 + min(args.rounds, 3)):
            full = timed("prefill", lambda: prefill.prefill(model, [row], slack=2100))
            scores = timed("scores", lambda full=full: kvzip.kvzip_scores(model, full, [row], replay=replay))
            small = timed("evict", lambda full=full, s=scores: evict(full, s, ratio=0.3))
            path = f"{folder}/{turn}"
            timed("save", lambda small=small, path=path: kv.save(small, path, model))
            del full, small
            again = timed("open", lambda path=path: kv.load(path, model))
            timed("question, opened", lambda again=again: ask(again))
            fresh = timed("prefill again", lambda: prefill.prefill(model, [row]))
            timed("question, full", lambda fresh=fresh: ask(fresh))
    prompts, hold = [[tokenizer.bos_token_id]] * 4, running_budget.Hold(gates=pico_gates(), tokens=256)
    write = lambda **more: jl.generate(  # noqa: E731
        pico, None, prompts, max_new_tokens=900, stop_tokens=[], **more
    )
    for _ in range(1 + args.rounds):
        timed("900 tokens by pico", write)
        timed("900 tokens by pico, 256 held", lambda: write(hold=hold))
    held = [len(h) for layer in repack.kept_positions(again) for b in layer for h in b]
    pages = sum(-(-n // again.context.keys.shape[1]) for n in held) * again.context.keys.shape[1]
    found += [{"what": name, "seconds": statistics.median(t[1:])} for name, t in times.items()]
    found.append({"what": "rows read a step", "full": rows * LLAMA.layers * LLAMA.kv_heads})
    found[-1] |= {"kept": sum(held), "pages": pages, "bytes": kv.num_bytes(again), "all": kv.num_bytes(fresh)}
    return found


def part_speed(_model, _tokenizer, args) -> list[dict[str, Any]]:
    """Milliseconds of one layer's attention and of whole steps, at several batches."""
    model, found, rows = Decoder(LLAMA, rngs=nnx.Rngs(0)), [], args.rows
    attend = jax.jit(
        lambda q, cache: kv.attend(
            q, cache, 0, cache.lengths[:, None], jnp.ones_like(cache.lengths), scale=0.125
        )
    )
    for batch in tqdm(args.batches, "speed", file=sys.stderr):
        cache = _random_cache(model, batch, rows)
        scores = jnp.asarray(_uneven(LLAMA.layers, batch, LLAMA.kv_heads, rows))
        caches = {"full": kv.grow(cache, rows + 8), "evicted": evict(cache, scores, ratio=0.3, rows=8)}
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


PARTS = {
    "recall": part_recall,
    "repeat": part_repeat,
    "text": part_text,
    "held": part_held,
    "speed": part_speed,
    "cost": part_cost,
}
TITLES = {
    "recall": "Values right, %, all keys but the first",
    "repeat": "Tokens repeated, %",
    "text": "Divergence from the full cache, nats a token",
    "held": "Divergence when no more than so many tokens are held, nats a token",
}


def markdown(run: dict[str, Any]) -> str:
    lines = ["# Eviction", "", f"{run['date']}, {run['machine']}, jax {run['jax']}; {run['settings']}.", ""]
    for what, title in TITLES.items():
        for size in sorted({r["size"] for r in run.get(what, [])}):
            results = [r for r in run[what] if r["size"] == size]
            ratios, rows = sorted({r["ratio"] for r in results}, reverse=True), []
            for name in dict.fromkeys(r["method"] for r in results):
                cells = []
                for ratio in ratios:
                    got = [r for r in results if (r["method"], r["ratio"]) == (name, ratio)]
                    seeds = [
                        np.mean([r["value"] for r in got if r["seed"] == s]) for s in {r["seed"] for r in got}
                    ]
                    scale, digits = (1, 4) if what in ("text", "held") else (100, 1)
                    cells.append(f"{scale * np.mean(seeds):.{digits}f} +- {scale * np.std(seeds):.{digits}f}")
                rows.append((name, *cells))
            head = ("method", *(f"{r:g}" for r in ratios))
            lines += [f"## {title}; contexts of {size} tokens", "", *table(head, rows)]
            if what == "text":
                nll: dict[Any, list[float]] = {}
                for r in results:
                    nll.setdefault((r["method"], r["ratio"]), []).append(r["nll"])
                rows = [(row[0], *(f"{np.exp(np.mean(nll[row[0], r])):.3f}" for r in ratios)) for row in rows]
                lines += ["", "## Perplexity of the same continuations", "", *table(head, rows)]
    if "speed" in run:
        body = [
            (f"{r['batch']}", r["what"], f"{r['full']:.2f}", f"{r['evicted']:.2f}", f"{r['faster']:.2f}")
            + (f"{r['full_bytes'] / 1e6:.0f}", f"{r['evicted_bytes'] / 1e6:.0f}")
            for r in run["speed"]
        ]
        head = ("batch", "what", "full, ms", "at 0.3, ms", "times faster", "full, MB", "at 0.3, MB")
        lines += ["## Decoding, 201 M random Llama, CPU, float32", "", *table(head, body)]
    if "cost" in run:
        tell = lambda r: ", ".join(f"{k} {v:,.3g}" for k, v in r.items() if k != "what")  # noqa: E731
        body = [(r["what"], tell(r)) for r in run["cost"]]
        lines += ["## Preparing a context and asking it", "", *table(("what", "measured"), body)]
    return "\n".join(lines)


MARKS, COLORS = "osv^Dx+*<>Ph", [*(f"C{i}" for i in range(10)), "black", "gold"]


def draw(run: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [(what, n) for what in TITLES for n in sorted({r["size"] for r in run.get(what, [])})]
    if not shown:
        return
    across = min(3, len(shown))
    figure = Figure(figsize=(5 * across, 4 * -(-len(shown) // across)), layout="constrained")
    cells = figure.subplots(-(-len(shown) // across), across, squeeze=False).ravel()
    for axes in cells[len(shown) :]:
        axes.axis("off")
    for axes, (what, size) in zip(cells, shown, strict=False):
        results = [r for r in run[what] if r["size"] == size]
        ratios = sorted({r["ratio"] for r in results})
        for i, name in enumerate(dict.fromkeys(r["method"] for r in results)):
            at = [[r["value"] for r in results if (r["method"], r["ratio"]) == (name, x)] for x in ratios]
            means = [(1 if what in ("text", "held") else 100) * np.mean(x) for x in at]
            axes.plot(ratios, means, color=COLORS[i], marker=MARKS[i], markersize=4, label=name)
        what_stays = "tokens held" if what == "held" else "part of the pairs that stay"
        axes.set(xlabel=f"{what_stays}; {size} tokens", title=TITLES[what])
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--model", help="as `jl.load` takes it (default: pico)")
    add("--text", type=Path, help="for text and held: one that the model was not trained on")
    add("--only", nargs="+", metavar="METHOD", help="measure these again; results of others stay as they are")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--cases", type=int, default=4, help="contexts a seed and size")
    add("--sizes", type=int, nargs="+", default=SIZES, help="tokens of contexts to be recalled, repeated")
    add("--ratios", type=float, nargs="+", default=RATIOS)
    add("--batches", type=int, nargs="+", default=[1, 8, 16])
    add("--rows", type=int, default=4096, help="context of `speed`")
    add("--rounds", type=int, default=5)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    needing = [what for what in args.what if what in ("text", "held")]
    if needing and args.text is None:
        parser.error(f"--text must be given for {', '.join(needing)}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "kv_eviction.json"
    run: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    run |= {"date": datetime.date.today().isoformat(), "machine": machine(), "jax": version("jax")}
    settings = f"{args.cases} contexts a seed, {len(args.seeds)} seeds; means +- deviation of seeds"
    if args.only and run.get("settings", settings) != settings:
        parser.error(f"--only goes with the settings of the others, {run['settings']!r}, got {settings!r}")
    run["settings"] = settings
    model, tokenizer = jl.load(args.model, dtype="float32")
    for what in args.what:
        others = [
            x for x in run.get(what, []) if args.only and x.get("method", args.only[0]) not in args.only
        ]
        run[what] = others + PARTS[what](model, tokenizer, args)
        file.write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "kv_eviction.md").write_text(markdown(run))
    draw(run, args.out / "kv_eviction.png")
    print(markdown(run))


if __name__ == "__main__":
    main()
