"""How fast a model works on a cache of which little is left, and what preparing one costs.

    python benchmarks/kv_speed.py --results docs/results

    speed     decoding with the full cache and with 30 % of it: attention of one layer alone, and whole steps
    cost      what preparing a context costs, and asking it once it lies on the disk, against reading it
              again; 900 tokens written by pico with and without a budget of 256

The model of both is a random 201 M Llama in float32. Heads keep very different parts, as KVzip's do. Bytes
are those of all arrays held. What stays of a model's knowledge, `kv_eviction.py` measures.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parts import common
from parts.common import (
    Page,
    Run,
    Table,
    begin,
    load,
    parse,
    parser,
    ratios,
    resume,
    rounds,
    save,
    show,
    timed,
)
from tqdm import tqdm

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm import eviction
from jaxllm.cache import repack
from jaxllm.models.decoder import Config, Decoder
from jaxllm.training.gates import new_gates

RATIO = 0.3
LLAMA = Config(
    layers=12, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, tied=True, context=8192
)
SIZES = (256, 512, 640)  # contexts of pico whose operations are counted
ASKED, WRITTEN = 32, 16  # tokens of a question and of its answer


def llama(args) -> Any:
    """The model of both parts."""
    return Decoder(common.TINY if args.tiny else LLAMA, rngs=nnx.Rngs(0))


# -- speed


def part_speed(args) -> list[dict[str, Any]]:
    """Seconds of one layer's attention and of whole steps, a round each, at several batches."""
    model, found = llama(args), []
    for batch in tqdm(args.batches, "speed", file=sys.stderr):
        cache = _random_cache(model, batch, args.rows)
        scores = jnp.asarray(_uneven(model.config.layers, batch, model.config.kv_heads, args.rows))
        caches = {
            "full": kv.with_capacity(cache, args.rows + 8),
            "evicted": eviction.evict(cache, scores, ratio=RATIO, capacity=8),
        }
        for what, times in _decoded(model, caches, batch, args).items():
            found.append(
                {"batch": batch, "what": what, "seconds": times}
                | {f"{name}_bytes": kv.num_bytes(c) for name, c in caches.items()}
            )
    return found


def _decoded(model, caches: dict[str, Any], batch: int, args) -> dict[str, dict[str, list[float]]]:
    """Seconds of an attention and of a step with each cache, a round each."""
    c = model.config
    q = jax.random.normal(jax.random.key(1), (batch, 1, c.heads, c.head_dim))
    token = jnp.ones((batch, 1), jnp.int32)
    parts = {name: kv.split_context(cache) for name, cache in caches.items()}
    times: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in caches} for what in ("attention", "step")
    }
    for turn, name in rounds(caches, args.rounds):
        context, tail = parts[name]
        whole = kv.with_context(context, tail)
        attended = timed(lambda cache=whole: [_attend(q, cache) for _ in range(5)])[1] / 5
        spent = []
        for _ in range(3):
            tail, seconds = timed(lambda c=context, t=tail: _step(model, c, t, token))
            spent.append(seconds)
        parts[name] = context, kv.truncate(tail, jnp.full(batch, args.rows, jnp.int32))
        if turn:
            times["attention"][name].append(attended)
            times["step"][name].append(statistics.mean(spent))
    return times


@jax.jit
def _attend(q, cache):
    one = jnp.ones_like(cache.lengths)
    return kv.attend(q, cache, 0, cache.lengths[:, None], one, scale=q.shape[-1] ** -0.5)


@partial(jax.jit, donate_argnames="tail")
def _step(model, context, tail, token):
    _, cache = model(token, kv.with_context(context, tail), logits="last")
    return kv.split_context(cache)[1]


def _random_cache(model, batch: int, rows: int):
    cache = model.make_cache(batch, rows)

    def fill(i, x):
        return jax.random.normal(jax.random.key(i), x.shape, x.dtype)

    keys, values = (tuple(fill(i, x) for i, x in enumerate(some)) for some in (cache.keys, cache.values))
    lengths = jnp.full(batch, rows, jnp.int32)
    return dataclasses.replace(cache, keys=keys, values=values, lengths=lengths, is_first_chunk=False)


def _uneven(L: int, B: int, K: int, T: int) -> np.ndarray:
    """Scores by which heads keep from next to nothing to nearly all, as KVzip's do."""
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (L, B, K, 1)) + rng.normal(0, 1, (L, B, K, T))).astype(np.float32)


# -- cost


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


def part_cost(args) -> list[dict[str, Any]]:
    """Operations of scoring, and seconds of each step of preparing a context and of asking it."""
    pico, tokenizer = load(args)
    replay = eviction.RepeatPrompt.from_tokenizer(tokenizer)
    asked = len(replay.before(np.zeros(replay.seed, np.int32)))
    model, found = llama(args), []
    for name, one, n, chunk in (
        *(("pico", pico, n, 256) for n in SIZES),
        ("201 M", model, args.rows, 2000),
    ):
        cost = _operations(one, n, asked, chunk, prefix=1) / _operations(one, n)
        found.append({"what": f"operations of scoring, {name}, {n} tokens", "prefills": cost})
    times, small, full = _prepared(model, replay, args)
    times |= _written(pico, tokenizer, args)
    found += [{"what": name, "seconds": seconds} for name, seconds in times.items()]
    c = model.config
    kept = [len(head) for layer in repack.positions_by_head(small) for b in layer for head in b]
    page_size = small.context.keys.shape[1]
    found.append(
        {
            "what": "rows read a step",
            "full": args.rows * c.layers * c.kv_heads,
            "kept": sum(kept),
            "pages": sum(-(-n // page_size) for n in kept) * page_size,
            "kept_bytes": kv.num_bytes(small),
            "full_bytes": kv.num_bytes(full),
        }
    )
    return found


def _prepared(model, replay, args) -> tuple[dict[str, list[float]], Any, Any]:
    """Seconds of preparing and asking a context; the opened cache and the full one."""
    vocab, times = model.config.vocab, dict[str, list[float]]()
    row = np.random.default_rng(0).integers(3, vocab, args.rows).tolist()
    question = [np.random.default_rng(1).integers(3, vocab, ASKED).tolist()]

    def clocked(turn: int, what: str, work: Callable[[], Any]) -> Any:
        got, seconds = timed(work)
        if turn:  # round 0 compiles
            times.setdefault(what, []).append(seconds)
        return got

    def ask(cache) -> Any:
        return jl.generate(model, None, question, max_new_tokens=WRITTEN, cache=cache)

    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 + min(args.rounds, 3)):
            do, path = partial(clocked, turn), f"{folder}/{turn}"
            slack = args.rows // 2 + 52  # room to repeat a chunk
            full = do("prefill", lambda slack=slack: jl.prefill(model, [row], slack=slack))
            scores = do("scores", lambda full=full: eviction.kvzip_scores(model, full, [row], replay=replay))
            small = do("evict", lambda full=full, s=scores: eviction.evict(full, s, ratio=RATIO))
            do("save", lambda small=small, path=path: kv.save(small, path, model))
            del full, small
            again = do("open", lambda path=path: kv.load(path, model))
            do("question, opened", lambda again=again: ask(again))
            fresh = do("prefill again", lambda: jl.prefill(model, [row]))
            do("question, full", lambda fresh=fresh: ask(fresh))
    return times, again, fresh


def _written(pico, tokenizer, args) -> dict[str, list[float]]:
    """Seconds of writing with and without a budget."""
    prompts = [[tokenizer.bos_token_id]] * 4
    gates = new_gates(pico, "fast") if args.tiny else eviction.pico_gates()
    budget = eviction.CacheBudget(gates=gates, tokens=args.budget)
    works: dict[str, dict[str, Any]] = {
        f"{args.written} tokens by pico": {},
        f"{args.written} tokens by pico within {args.budget}": {"cache": jl.CacheOptions(budget=budget)},
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn, name in rounds(works, args.rounds):
        _, seconds = timed(
            lambda more=works[name]: jl.generate(
                pico, None, prompts, max_new_tokens=args.written, stop_tokens=[], **more
            )
        )
        if turn:
            times[name].append(seconds)
    return times


# -- the page

PARTS = {"speed": part_speed, "cost": part_cost}


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for; those of a run in --results stay."""
    run = resume(args, begin(args, {"rows": args.rows, "rounds": args.rounds}))
    for what in args.what:
        run[what] = PARTS[what](args)
        save(args, run)
    return run


def page(run: Run) -> Page:
    """A table a part."""
    tables = []
    if "speed" in run:
        tables.append(_speed(run["speed"]))
    if "cost" in run:
        tables += _cost(run["cost"])
    sizes = run["settings"]
    text = (
        f"A random Llama of 201 M parameters, float32, contexts of {sizes['rows']:,} tokens, of which the "
        f"full cache holds all and the other {RATIO:.0%}; medians of {sizes['rounds']} interleaved rounds "
        "(least to most)."
    )
    return Page("Eviction: speed and cost", text, tables)


def _speed(found: list[dict[str, Any]]) -> Table:
    columns = {
        "batch": "requests at once",
        "what": "attention of one layer, or a whole step of decoding",
        "full, ms": "milliseconds with the full cache",
        "evicted, ms": f"with {RATIO:.0%} of it",
        "times faster": "full by evicted, within a round",
        "full, MB": "megabytes of the full cache",
        "evicted, MB": f"of {RATIO:.0%} of it, with everything that says what lies where",
    }
    rows = []
    for r in found:
        full, small = ([1e3 * s for s in r["seconds"][name]] for name in ("full", "evicted"))
        sizes = (f"{r[f'{name}_bytes'] / 1e6:.0f}" for name in ("full", "evicted"))
        rows.append(
            (r["batch"], r["what"], show(full, 2), show(small, 2), show(ratios(full, small), 2), *sizes)
        )
    return Table("Decoding", columns, rows)


def _cost(found: list[dict[str, Any]]) -> list[Table]:
    operations = [(r["what"], f"{r['prefills']:.2f}") for r in found if "prefills" in r]
    seconds = [(r["what"], show(r["seconds"])) for r in found if "seconds" in r]
    (read,) = (r for r in found if r["what"] == "rows read a step")
    names = {"full": "full cache", "kept": "pairs that stay", "pages": "rows of the pages they lie in"}
    rows = [(name, f"{read[key]:,}") for key, name in names.items()]
    rows += [(f"bytes of the {key} cache", f"{read[f'{key}_bytes']:,}") for key in ("full", "kept")]
    return [
        Table(
            "Operations of scoring",
            {"what": "what is scored", "prefills": "how many times those of reading the same tokens"},
            operations,
        ),
        Table("Preparing a context and asking it", {"what": "the step", "seconds": "compiled"}, seconds),
        Table(
            "What a step of decoding reads",
            {"what": "of all layers and heads", "count": "rows of keys and values, or bytes"},
            rows,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("kv_speed", __doc__)
    add = made.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--batches", type=int, nargs="+", default=[1, 8, 16])
    add("--rows", type=int, default=4096, help="tokens of the context")
    add("--rounds", type=int, default=5)
    add("--written", type=int, default=900, help="tokens that pico writes")
    add("--budget", type=int, default=256, help="tokens that its cache may hold")
    tiny = {"batches": [2], "rows": 128, "rounds": 1, "written": 24, "budget": 48}
    common.main(parse(made, argv, tiny=tiny), measure, page)


if __name__ == "__main__":
    main()
