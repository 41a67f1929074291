"""How well a model works on a cache of which little is left: KVzip, gates that learn it, and the baselines.

    python benchmarks/kv_eviction.py --data ../shared/data --results docs/results

    recall    lists of key=value lines of some tokens; every key is asked on one compressed cache; a value is
              right as a whole. (pico was trained on lists of at most 64 lines.)
    repeat    uniform random tokens; the model repeats 256 whole, of more four named parts of 64
    text      256 tokens of text; over the next 128, perplexity and divergence (nats) from the full cache
    budget    640 tokens of text written to a cache that never holds more than some tokens: divergence from
              the full cache over the last 384, next-token predictions

The text is the held-out part of WikiText-2, as `training/pico/corpus.py` parts it. Contexts are drawn by
seed; ratios are of the context's pairs that stay, and the begin token always does. How fast all that is,
`kv_speed.py` measures.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import (
    Page,
    Run,
    Table,
    add_data,
    begin,
    load,
    model_name,
    parse,
    parser,
    resume,
    save,
    texts,
)
from parts.kv_methods import Methods, compressed, filled, listed, methods
from tqdm import tqdm

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm import eviction
from jaxllm.training.gates import new_gates
from jaxllm.training.pico.exercises import REPEAT_ALL, REPEAT_PART, SEED_IDS, Words

LINE, PART = 5, 64  # tokens of a line of a list, of a named part
WHOLE = 256  # tokens that are repeated whole, at most

Found = list[dict[str, Any]]


def cases(args, what: str, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(size, seed, case) of one part."""
    every = [(size, seed, case) for size in sizes for seed in args.seeds for case in range(args.cases)]
    return iter(tqdm(every, what, file=sys.stderr))


def part_recall(model, tokenizer, some: Methods, args) -> Found:
    words, found = Words.from_tokenizer(tokenizer), []
    for size, seed, case in cases(args, "recall", args.sizes):
        row, lines = listed(np.random.default_rng([seed, case, size]), words, size // LINE)
        prompts, answers = ([line[i] for line in lines] for i in (slice(0, 2), slice(2, None)))
        cache = filled(model, jnp.asarray([[words.bos, *row]]), capacity=len(row) + 1)
        for name, ratio, small in compressed(some, cache, row, prompts[0], seed, args.ratios):
            outs = jl.generate(
                model, None, prompts, max_new_tokens=3, cache=small, stop_tokens=[words.newline]
            )
            hits = [o.token_ids == a for o, a in zip(outs, answers, strict=True)]
            found.append(
                {"method": name, "ratio": ratio, "seed": seed, "size": size, "first": hits[0]}
                | {"value": float(np.mean(hits[1:])), "bytes": kv.num_bytes(small)}
            )
    return found


def part_repeat(model, tokenizer, some: Methods, args) -> Found:
    words, found = Words.from_tokenizer(tokenizer), []
    for size, seed, case in cases(args, "repeat", args.sizes):
        row, prompts, answers = _repetition(words, np.random.default_rng([seed, case, size, 1]), size)
        cache = filled(model, jnp.asarray([[words.bos, *row]]), capacity=size + 1)
        for name, ratio, small in compressed(some, cache, row, prompts[0], seed, args.ratios):
            outs = jl.generate(
                model, None, prompts, max_new_tokens=len(answers[0]), cache=small, stop_tokens=[words.eos]
            )
            hits = [
                np.mean([*map(int.__eq__, o.token_ids, a), *[0] * (len(a) - len(o.token_ids))])
                for o, a in zip(outs, answers, strict=True)
            ]
            found.append(
                {"method": name, "ratio": ratio, "seed": seed, "size": size, "value": float(np.mean(hits))}
            )
    return found


def _repetition(words: Words, rng: np.random.Generator, size: int):
    """A context of random tokens, what asks for all or four parts of it, and the answers."""
    row = rng.choice(words.ordinary, size).tolist()
    if size <= WHOLE:
        return row, [[*words.fixed[REPEAT_ALL[0]].tolist(), words.newline]], [row]
    places = rng.integers(0, size - SEED_IDS - PART, 4)
    ask = words.fixed[REPEAT_PART[0]].tolist()
    prompts = [[*ask, *row[at : at + SEED_IDS], words.newline] for at in places]
    return row, prompts, [row[at + SEED_IDS : at + SEED_IDS + PART] for at in places]


def text_ids(tokenizer, args) -> list[int]:
    """The text that is judged on."""
    found = texts(args)
    one = next((t for t in found if t.name == "wikitext2"), found[-1])
    ids = tokenizer.encode("\n".join(one.held_out), add_special_tokens=False)
    if len(ids) <= max(args.context + args.after, args.length):
        raise SystemExit(f"kv_eviction.py: the text must be longer than what is read, got {len(ids)} tokens")
    return ids


@jax.jit
def log_probs(model, cache, tokens):
    return jax.nn.log_softmax(model(tokens, cache)[0])


def divergence(given, got):
    """Kullback-Leibler divergence of each prediction, in nats."""
    return jnp.sum(jnp.exp(given) * (given - got), axis=-1)


def part_text(model, tokenizer, some: Methods, args) -> Found:
    ids, found, whole = text_ids(tokenizer, args), [], args.context + args.after
    for size, seed, case in cases(args, "text", [args.context]):
        at = int(np.random.default_rng([seed, case, 2]).integers(0, len(ids) - whole + 1))
        row, after = ids[at : at + size], ids[at + size : at + whole]
        cache = filled(model, jnp.asarray([[tokenizer.bos_token_id, *row]]), capacity=size + 1)
        tokens, given = jnp.asarray([after]), None
        for name, ratio, small in compressed(some, cache, row, after[:8], seed, args.ratios):
            rows = args.after if name != "everything" else size + 1 + args.after
            got = log_probs(model, kv.with_capacity(small, rows), tokens)
            given = got if given is None else given  # everything comes first
            nll = -float(jnp.take_along_axis(got[0, :-1], tokens[0, 1:, None], axis=1).mean())
            result = {"method": name, "ratio": ratio, "seed": seed, "size": size, "nll": nll}
            found.append(result | {"value": float(divergence(given, got).mean())})
    return found


@jax.jit
def _piece(model, gates, context, tail, tokens):
    """Log-probabilities of a piece of text, the tail with it, and its scores."""
    tap, inputs = gates.capture_inputs(model)
    logits, cache = model(tokens, kv.with_context(context, tail), tap=tap)
    return jax.nn.log_softmax(logits[0]), kv.split_context(cache)[1], gates.scores(inputs)


def part_budget(model, tokenizer, gates: dict[str, eviction.Gate], args) -> Found:
    ids, found = text_ids(tokenizer, args), []
    by = gates | dict.fromkeys(("streaming", "random"), gates["fast kvzip"])  # whose scores are not used
    by = {name: gate for name, gate in by.items() if args.only is None or name in args.only}
    for size, seed, case in cases(args, "budget", [args.length]):
        at = int(np.random.default_rng([seed, case, 3]).integers(0, len(ids) - size))
        row = [tokenizer.bos_token_id, *ids[at : at + size - 1]]
        given = log_probs(model, model.make_cache(1, size), jnp.asarray([row]))[0]
        for tokens in args.budgets:
            for name, gate in by.items():
                kl, cache = _within(model, name, gate, row, given, tokens, seed)
                value = float(kl[2 * size // 5 :].mean())
                result = {"method": name, "ratio": tokens, "seed": seed, "size": size, "value": value}
                found.append(result | {"bytes": kv.num_bytes(cache)})
    return found


def _within(model, name: str, gate: eviction.Gate, row: list[int], given, tokens: int, seed: int):
    """Divergence of each prediction where a text is read within a budget, and the cache at its end."""
    buffer = 32
    hold = eviction.CacheBudget(gates=gate, tokens=tokens, buffer=buffer, recent=16)
    cache, kl = hold.enforce(model.make_cache(1, 1), None), []
    for start in range(0, len(row), buffer):
        piece = jnp.asarray([row[start : start + buffer]])
        got, tail, scores = _piece(model, gate, *kv.split_context(cache), piece)
        if name == "streaming":
            scores = jnp.broadcast_to(jnp.arange(start, start + buffer) * 1.0, scores.shape)
        elif name == "random":
            scores = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), start), scores.shape)
        cache = hold.enforce(kv.with_context(cache.context, tail), scores)
        kl.append(divergence(given[start : start + buffer], got))
    return jnp.concatenate(kl), cache


PARTS: dict[str, Callable[..., Found]] = {
    "recall": part_recall,
    "repeat": part_repeat,
    "text": part_text,
    "budget": part_budget,
}


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for; of a run in --results, other parts and methods stay."""
    settings = {"model": model_name(args), "seeds": args.seeds}  # parts may differ in contexts and ratios
    run = resume(args, begin(args, settings))
    model, tokenizer = load(args)
    gates = {
        name: new_gates(model, form) if args.tiny else eviction.pico_gates(form)
        for name, form in (("fast kvzip", "fast"), ("kvzap", "zap"))
    }
    some = methods(model, tokenizer, gates, args.only)
    for what in args.what:
        again = {"everything", *some} if args.only else None
        others = [
            r
            for r in run.get(what, [])
            if r["size"] not in sizes(args, what) or (again and r["method"] not in again)
        ]
        run[what] = others + PARTS[what](model, tokenizer, gates if what == "budget" else some, args)
        save(args, run)
    return run


def sizes(args: argparse.Namespace, what: str) -> Sequence[int]:
    """Tokens of the contexts of a part."""
    return {"text": [args.context], "budget": [args.length]}.get(what, args.sizes)


# -- the page

TITLES = {
    "recall": "Values right, %",
    "repeat": "Tokens repeated, %",
    "text": "Divergence from the full cache, nats a token",
    "budget": "Divergence within a budget of tokens, nats a token",
}
STAYS = {"budget": "tokens that the cache may hold"}  # of what the columns are
STAYS |= dict.fromkeys(("recall", "repeat", "text"), "where this part of the context's pairs stays")


def page(run: Run) -> Page:
    """A table and a figure a part and size, another table of perplexities."""
    shown = [(what, size) for what in TITLES for size in sorted({r["size"] for r in run.get(what, [])})]
    tables = []
    for what, size in shown:
        results = [r for r in run[what] if r["size"] == size]
        tables.append(_table(what, size, results, partial(_spread, what=what)))
        if what == "text":
            tables.append(_table("perplexity", size, results, _perplexity))
    text = (
        "Keys and values scored once, some of them kept, and the model asked or read on with what is left: "
        f"{run['settings']['model']}, float32. Means over contexts, +- the standard deviation of the seeds' "
        "means."
    )
    return Page("Eviction", text, tables, {"curves": partial(draw, run, shown)})


def _table(what: str, size: int, results: Found, tell: Callable[[Found], str]) -> Table:
    ratios = sorted({r["ratio"] for r in results if r["method"] != "everything"}, reverse=True)
    names = dict.fromkeys(r["method"] for r in results)
    every = [r for r in results if r["method"] == "everything"]
    rows = [
        (
            name,
            *(tell([r for r in results if (r["method"], r["ratio"]) == (name, ratio)]) for ratio in ratios),
        )
        for name in names
        if name != "everything"
    ]
    columns = {"method": "whose scores choose"}
    columns |= {f"{ratio:g}": STAYS.get(what, STAYS["text"]) for ratio in ratios}
    title = TITLES.get(what, "Perplexity of the same continuations")
    told = f"{_contexts(results)}. "
    if every and what != "text":
        told += f"With everything kept: {tell(every)}."
    return Table(f"{title}; contexts of {size} tokens", columns, rows, told.strip())


def _contexts(results: Found) -> str:
    """How many were measured."""
    seeds = {r["seed"] for r in results}
    first = results[0]
    same = [r for r in results if (r["method"], r["ratio"]) == (first["method"], first["ratio"])]
    return f"{len(same)} contexts, {len(seeds)} seeds"


def _spread(got: Found, what: str) -> str:
    means = [np.mean([r["value"] for r in got if r["seed"] == s]) for s in sorted({r["seed"] for r in got})]
    scale, digits = (1, 4) if what in ("text", "budget") else (100, 1)
    return f"{scale * np.mean(means):.{digits}f} +- {scale * np.std(means):.{digits}f}"


def _perplexity(got: Found) -> str:
    return f"{np.exp(np.mean([r['nll'] for r in got])):.3f}"


MARKS, COLORS = "osv^Dx+*<>Ph", [*(f"C{i}" for i in range(10)), "black", "gold"]


def draw(run: Run, shown: Sequence[tuple[str, int]]) -> Any:
    """Every part and size against what stays, a line a method."""
    from matplotlib.figure import Figure

    across = min(3, len(shown))
    figure = Figure(figsize=(5 * across, 4 * -(-len(shown) // across)), layout="constrained")
    cells = figure.subplots(-(-len(shown) // across), across, squeeze=False).ravel()
    for axes in cells[len(shown) :]:
        axes.axis("off")
    names = list(dict.fromkeys(r["method"] for what, _ in shown for r in run[what]))
    names = [name for name in names if name != "everything"]
    for axes, (what, size) in zip(cells, shown, strict=False):
        results = [r for r in run[what] if r["size"] == size and r["method"] != "everything"]
        for name in dict.fromkeys(r["method"] for r in results):
            i, own = names.index(name), [r for r in results if r["method"] == name]
            ratios = sorted({r["ratio"] for r in own})
            at = [[r["value"] for r in own if r["ratio"] == ratio] for ratio in ratios]
            means = [(1 if what in ("text", "budget") else 100) * np.mean(values) for values in at]
            axes.plot(ratios, means, color=COLORS[i], marker=MARKS[i], markersize=4, label=name)
        axes.set(xlabel=f"{STAYS[what].removeprefix('where this ')}; {size} tokens", title=TITLES[what])
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("kv_eviction", __doc__)
    add_data(made)
    add = made.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--model", help="as `jl.load` takes it, of pico's shape (default: pico)")
    add("--only", nargs="+", metavar="METHOD", help="measure these again; results of others stay as they are")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--cases", type=int, default=4, help="contexts a seed and size")
    add("--ratios", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2, 0.1])
    add(
        "--sizes", type=int, nargs="+", default=[256, 512], help="tokens of contexts to be recalled, repeated"
    )
    add("--context", type=int, default=256, help="tokens that `text` reads")
    add("--after", type=int, default=128, help="tokens that `text` then judges")
    add("--length", type=int, default=640, help="tokens that `budget` reads; the last three fifths count")
    add("--budgets", type=int, nargs="+", default=[64, 128, 256], help="tokens that `budget` may hold")
    tiny = {"seeds": [0], "cases": 1, "ratios": [0.3], "sizes": [40], "context": 32, "after": 16}
    tiny |= {"length": 64, "budgets": [24], "only": ["kvzip", "fast kvzip"]}
    common.main(parse(made, argv, tiny=tiny, needs=["data"]), measure, page)


if __name__ == "__main__":
    main()
