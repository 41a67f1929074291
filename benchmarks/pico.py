"""What the models that ship can do, on text and exercises they were not trained on.

    python benchmarks/pico.py --data ../shared/data --stories stories.txt --results docs/results

repeat      a passage of 200 uniform random tokens, whole or from a named place; passages of held-out text
            apart. Greedy and free running: a token counts as right where it equals the answer's token at
            the same position, so what follows a slip counts as wrong too unless the model stays in step.
lookup      the value of one key among 8, 32 and 64 pairs, keys and values random; greedy, right only as a
            whole (the line's end included). Also 8 questions one after another on one context, with the
            model's own earlier answers before the later ones.
sums        a + b, both below 100, after four worked ones. Training has drawn most of the 10,000 pairs: this
            measures what was learned by heart too.
text        bits per byte of the last 5 % of each text (`training/pico/corpus.py`), document by document.
            Every token is predicted, the document's end too. A document longer than the context is read
            through windows of the whole context, half a context apart, each with the begin token in front.
yardsticks  Witten-Bell byte n-grams (`witten_bell.py`) of the same training bytes, once of that text alone
            and once of all texts together, and gzip -9 of the held-out text. A zero byte ends each document,
            which costs them what <eos> costs a model; bits are divided by the bytes of text alone.
agreement   how often a draft's and a companion's arg max is the target's, after the same held-out tokens.

Why no exercise here was trained on: training draws from default_rng([seed, step, row, 2]), four words; here a
generator has five, the last not zero, so that no seed of training gives the same stream.
"""

import argparse
import gzip
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import Page, Run, Table, add_data, begin, load, parse, parser, texts
from tqdm import tqdm
from witten_bell import probabilities

import jaxllm as jl
from jaxllm.training.pico import corpus, exercises
from jaxllm.training.pico.exercises import REPEAT_ALL, REPEAT_PART, Exercise, Words

MEMBERS = ("target", "draft", "companion")
QUESTIONS = 8  # one after another on one context
SUMS = 5  # lines, the last asked
ORDERS = (2, 5)
END = b"\0"  # of a document, for the yardsticks
SEED = 20_261_121
CALL_TOKENS = 8192  # in one call of `predict`


def generator(kind: int, case: int) -> np.random.Generator:
    """Random numbers of one case that no training run draws."""
    return np.random.default_rng([SEED, kind, case, 0, 1])


def answers(
    model, prompts: Sequence[Sequence[int]], most: Sequence[int], stop: int, bar: tqdm, *, batch: int
) -> list[list[int]]:
    """Greedy continuations of up to `most[i]` tokens, the stop token included."""
    made = []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        outs = jl.generate(model, None, some, max_new_tokens=most[i : i + batch], stop_tokens=[stop])
        made += [out.token_ids for out in outs]
        bar.update(len(some))
    return made


def right(made: Sequence[int], answer: np.ndarray) -> int:
    """How many tokens of the answer came, position by position."""
    return sum(a == b for a, b in zip(made, answer.tolist(), strict=False))


def share(hits: Sequence[bool]) -> dict[str, float]:
    """Share of hits, with its standard error."""
    p = float(np.mean(hits))
    return {"cases": len(hits), "exact": p, "stderr": math.sqrt(p * (1 - p) / len(hits))}


def repeats(model, words: Words, cases: Sequence[Exercise], bar: tqdm, batch: int) -> dict[str, float]:
    """Tokens right among all of the answers, and answers right from beginning to end."""
    prompts = [one.tokens[: one.prompt_length].tolist() for one in cases]
    most = [len(one.answer) for one in cases]
    made = answers(model, prompts, most, words.eos, bar, batch=batch)
    hits = [right(ids, one.answer) for ids, one in zip(made, cases, strict=True)]
    whole = [n == len(one.answer) for n, one in zip(hits, cases, strict=True)]
    return {
        "cases": len(cases),
        "answer_tokens": sum(most),
        "tokens_right": sum(hits) / sum(most),
        "whole_right": float(np.mean(whole)),
    }


def exact(model, words: Words, cases: Sequence[Exercise], bar: tqdm, batch: int) -> dict[str, float]:
    """Answers right as a whole, for exercises whose answer ends with its line."""
    prompts = [one.tokens[: one.prompt_length].tolist() for one in cases]
    most = [max(len(one.answer) for one in cases)] * len(cases)
    made = answers(model, prompts, most, words.newline, bar, batch=batch)
    return share([ids == one.answer.tolist() for ids, one in zip(made, cases, strict=True)])


def conversations(model, words: Words, count: int, pairs: int, bar: tqdm, batch: int) -> dict[str, float]:
    """Several questions on each context; earlier ones stay before it with what the model answered."""
    histories, asked = [], []
    for case in range(count):
        one = exercises.lookup(generator(6, case), words, pairs, questions=QUESTIONS)
        tokens = one.tokens.tolist()
        gap = exercises.list_end(one.tokens, words)
        lines: list[list[int]] = [[]]
        for token in tokens[gap:-1]:
            lines[-1].append(token)
            if token == words.newline:
                lines.append([])
        histories.append(tokens[:gap])
        asked.append(lines[:-1])
    hits = []
    for q in range(QUESTIONS):
        prompts = [h + lines[q][:2] for h, lines in zip(histories, asked, strict=True)]
        made = answers(model, prompts, [3] * count, words.newline, bar, batch=batch)
        hits += [ids == lines[q][2:] for ids, lines in zip(made, asked, strict=True)]
        # the next question begins a line, whether or not the answer ended its own
        histories = [
            p + ids + [words.newline] * (ids[-1] != words.newline)
            for p, ids in zip(prompts, made, strict=True)
        ]
    return share(hits)


def passages(plain: Mapping[str, np.ndarray], case: int, size: int) -> np.ndarray:
    """A passage of held-out text, from one text after another."""
    long = [ids for ids in plain.values() if len(ids) >= size]
    if not long:
        raise ValueError(f"pico: a held-out text must have {size} tokens, got none")
    ids = long[case % len(long)]
    start = int(generator(3, case).integers(0, len(ids) - size + 1))
    return ids[start : start + size].astype(np.int32)


def examine(model, words: Words, plain: Mapping[str, np.ndarray], args) -> dict[str, Any]:
    """All exercises of one model."""
    cases, natural, size, batch = args.cases, args.natural, args.passage, args.batch
    N, count = range(cases), -(-cases // QUESTIONS)
    total = 3 * cases + 2 * natural + len(args.pairs) * cases + count * QUESTIONS
    found: dict[str, Any] = {"repeat": {}, "repeat_text": {}, "lookup": {}}
    prompts = {"whole": REPEAT_ALL[0], "part": REPEAT_PART[0]}
    with tqdm(total=total, unit="case", desc="exercises", file=sys.stderr) as bar:
        for kind, (name, prompt) in enumerate(prompts.items()):
            some = [exercises.repeat(generator(kind, i), words, size, prompt=prompt) for i in N]
            found["repeat"][name] = repeats(model, words, some, bar, batch)
            some = [
                exercises.repeat(
                    generator(kind, i), words, size, prompt=prompt, passage=passages(plain, i, size)
                )
                for i in range(natural)
            ]
            found["repeat_text"][name] = repeats(model, words, some, bar, batch)
        for pairs in args.pairs:
            some = [exercises.lookup(generator(4, i), words, pairs, questions=1) for i in N]
            found["lookup"][str(pairs)] = exact(model, words, some, bar, batch)
        middle = args.pairs[len(args.pairs) // 2]
        found["lookup"][f"{middle}, {QUESTIONS} questions"] = conversations(
            model, words, count, middle, bar, batch
        )
        some = [exercises.sums(generator(5, i), words, SUMS) for i in N]
        found["sums"] = exact(model, words, some, bar, batch)
    return found


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """(begin token and up to `context` tokens, how many of these were predicted before), in order."""
    bos, text = ids[:1], ids[1:]
    start, end = 0, 0
    while end < len(text):
        yield np.concatenate([bos, text[start : start + context]]), end - start
        end = min(start + context, len(text))
        start += stride


@jax.jit
def predict(model, tokens, lengths, targets):
    """log p(target) and the arg max after each token."""
    logits, _ = model(tokens, lengths=lengths)
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    return chosen - jax.nn.logsumexp(logits, axis=2), jnp.argmax(logits, axis=2)


def read_through(model, rows: Sequence[tuple[np.ndarray, int]], bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    """log p and arg max of every prediction not known before, in the order of the rows."""
    context = model.config.context
    groups: dict[int, list[int]] = {}
    for i, (row, _) in enumerate(rows):
        length = min(context, max(context // 4, 1 << (len(row) - 2).bit_length()))
        groups.setdefault(length, []).append(i)
    found: list[Any] = [None] * len(rows)
    for length, members in sorted(groups.items()):
        size = max(1, CALL_TOKENS // length)
        for first in range(0, len(members), size):
            some = members[first : first + size]
            tokens, targets = np.zeros((2, size, length), np.int32)
            lengths = np.ones((size,), np.int32)
            for j, i in enumerate(some):
                row = rows[i][0]
                n = len(row) - 1
                tokens[j, :n], targets[j, :n], lengths[j] = row[:-1], row[1:], n
            logp, best = jax.device_get(predict(model, tokens, lengths, targets))
            for j, i in enumerate(some):
                row, known = rows[i]
                found[i] = logp[j, known : len(row) - 1], best[j, known : len(row) - 1]
            bar.update(len(some))
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def yardsticks(some: Sequence[corpus.Text], bar: tqdm) -> dict[str, dict[str, float]]:
    """Bits per byte of text of what is no neural network, by text."""

    def joined(documents: Sequence[str]) -> bytes:
        return b"".join(d.encode() + END for d in documents)

    train = {t.name: joined(t.train) for t in some}
    held_out = {t.name: joined(t.held_out) for t in some}
    size = {t.name: sum(len(d.encode()) for d in t.held_out) for t in some}
    found: dict[str, dict[str, float]] = {t.name: {} for t in some}
    for order in ORDERS:
        every = -np.log2(probabilities(b"".join(train.values()), b"".join(held_out.values()), order))
        cuts = np.cumsum([len(text) for text in held_out.values()])[:-1]
        for name, bits in zip(held_out, np.split(every, cuts), strict=True):
            own = -np.log2(probabilities(train[name], held_out[name], order))
            found[name][f"witten_bell_{order}"] = float(own.sum()) / size[name]
            found[name][f"witten_bell_{order}_all"] = float(bits.sum()) / size[name]
        bar.update(1)
    for name, text in held_out.items():
        found[name]["gzip"] = 8 * len(gzip.compress(text, 9)) / size[name]
    return found


def read_texts(
    models: Mapping[str, Any], tokenizer: Any, some: Sequence[corpus.Text]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(bits per byte by text, agreement with the target by member)."""
    context = min(model.config.context for model in models.values())
    rows = {}
    for t in some:
        streams = [corpus.encode(tokenizer, [d]).astype(np.int32) for d in t.held_out]
        rows[t.name] = [w for ids in streams for w in windows(ids, context, context // 2)]
    bits: dict[str, Any] = {}
    agreement: dict[str, Any] = {name: {} for name in models if name != "target"}
    total = len(models) * sum(map(len, rows.values()))
    with tqdm(total=total, unit="window", desc="text", file=sys.stderr) as bar:
        for t in some:
            size = sum(len(d.encode()) for d in t.held_out)
            best = {}
            entry: dict[str, Any] = {"documents": len(t.held_out), "bytes": size, "bits_per_byte": {}}
            for name, model in models.items():
                logp, best[name] = read_through(model, rows[t.name], bar)
                entry["tokens"] = len(logp)
                entry["bits_per_byte"][name] = float(-logp.sum(dtype=np.float64)) / math.log(2) / size
            for name in agreement:
                agreement[name][t.name] = float((best[name] == best["target"]).mean())
            bits[t.name] = entry
    for found in agreement.values():
        found["mean"] = float(np.mean(list(found.values())))
    with tqdm(total=len(ORDERS), unit="order", desc="n-grams", file=sys.stderr) as bar:
        for name, found in yardsticks(some, bar).items():
            bits[name]["bits_per_byte"] |= found
    return bits, agreement


def goals(run: Run) -> list[dict[str, Any]]:
    """What the target should reach, and whether it does."""
    found, settings = run["exercises"]["target"], run["settings"]
    middle = str(settings["pairs"][len(settings["pairs"]) // 2])
    repeated = found["repeat"]["whole"]["tokens_right"]
    looked_up = found["lookup"][middle]["exact"]
    rows = [
        {"goal": f"repeats {settings['passage']} random tokens: tokens right", "want": 0.95, "got": repeated},
        {"goal": f"recalls one key of {middle}: values right", "want": 0.9, "got": looked_up},
    ]
    for row in rows:
        row["met"] = row["got"] >= row["want"]
    for name, entry in run["text"].items():
        bits = entry["bits_per_byte"]
        best = min(v for k, v in bits.items() if k not in MEMBERS)
        row = {"goal": f"bits per byte of {name}, below the best yardstick's"}
        rows.append(row | {"want": best, "got": bits["target"], "met": bits["target"] < best})
    return rows


def measure(args: argparse.Namespace) -> Run:
    """Exercises and texts, by all members asked for."""
    start = time.monotonic()
    some = texts(args)
    loaded = {name: load(args, name) for name in args.members}
    models = {name: model for name, (model, _) in loaded.items()}
    tokenizer = loaded["target"][1].backend_tokenizer
    words = Words.from_tokenizer(tokenizer)
    plain = {}
    for t in some:
        ids = corpus.encode(tokenizer, t.held_out)
        plain[t.name] = ids[np.isin(ids, words.ordinary)]
    settings = {name: getattr(args, name) for name in ("cases", "natural", "passage", "pairs", "batch")}
    context = min(model.config.context for model in models.values())
    run = begin(args, settings | {"context": context, "seed": SEED})
    run["parameters"] = {n: sum(x.size for x in jax.tree.leaves(m)) for n, m in models.items()}
    run["exercises"] = {name: examine(models[name], words, plain, args) for name in args.exercises}
    run["text"], run["agreement"] = read_texts(models, tokenizer, some)
    return run | {"seconds": time.monotonic() - start}


# -- the page


def page(run: Run) -> Page:
    """Goals, exercises, bits per byte, agreement."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in run["parameters"].items())
    text = (
        f"Parameters: {sizes}; float32; {run['seconds']:.0f} s. Exercises are greedy and free running, "
        "drawn from seeds that training cannot draw; texts are the parts held out."
    )
    tables = [_goals(run)]
    for member, found in run["exercises"].items():
        tables += [_repeats(member, found, run), _exact(member, found)]
    tables.append(_texts(run))
    if run["agreement"]:
        tables.append(_agreement(run))
    return Page("pico", text, tables)


def _goals(run: Run) -> Table:
    columns = {
        "goal": "what the target should reach",
        "wanted": "at least (bits per byte: less than)",
        "reached": "measured",
        "met": "whether it is",
    }
    rows = [
        (row["goal"], f"{row['want']:.3f}", f"{row['got']:.3f}", "yes" if row["met"] else "no")
        for row in goals(run)
    ]
    return Table("Goals", columns, rows)


def _repeats(member: str, found: dict[str, Any], run: Run) -> Table:
    columns = {
        f"repeat {run['settings']['passage']} tokens": "of what: all, or a part from a named place",
        "cases": "passages",
        "tokens right": "tokens that equal the answer's at their place",
        "wholly right": "answers right from beginning to end",
    }
    rows = [
        (f"{name}, {part}", got["cases"], f"{got['tokens_right']:.2%}", f"{got['whole_right']:.2%}")
        for kind, name in (("repeat", "random tokens"), ("repeat_text", "held-out text"))
        for part, got in found[kind].items()
    ]
    return Table(f"Repetition: {member}", columns, rows)


def _exact(member: str, found: dict[str, Any]) -> Table:
    columns = {
        "exercise": "a key looked up among so many pairs, or two numbers below 100 added",
        "cases": "questions",
        "right": "answers right as a whole, +- standard error",
    }
    every = {f"lookup among {pairs}": got for pairs, got in found["lookup"].items()}
    rows = [
        (name, got["cases"], f"{got['exact']:.2%} +- {got['stderr']:.2%}")
        for name, got in (every | {"sums": found["sums"]}).items()
    ]
    return Table(f"Exact answers: {member}", columns, rows)


def _texts(run: Run) -> Table:
    members = list(run["parameters"])
    columns = {"text": "one source of the corpus", "bytes": "held out"}
    columns |= dict.fromkeys(members, "bits per byte of a model")
    counted = "bits per byte of n-grams counted in that text alone / in all texts"
    columns |= {f"Witten-Bell {k}": counted for k in ORDERS}
    columns["gzip -9"] = "bits per byte of the held-out text, compressed by itself"
    rows = []
    for name, entry in run["text"].items():
        bits = entry["bits_per_byte"]
        counts = (f"{bits[f'witten_bell_{k}']:.3f} / {bits[f'witten_bell_{k}_all']:.3f}" for k in ORDERS)
        models = (f"{bits[m]:.3f}" for m in members)
        rows.append((name, f"{entry['bytes']:,}", *models, *counts, f"{bits['gzip']:.3f}"))
    context = run["settings"]["context"]
    text = f"Windows of {context} tokens, {context // 2} apart; every token is predicted."
    return Table("Bits per byte of held-out text", columns, rows, text)


def _agreement(run: Run) -> Table:
    names = [*run["text"], "mean"]
    columns = {"model": "whose likeliest token is compared with the target's"}
    columns |= dict.fromkeys(names, "share of tokens where both are the same")
    rows = [(member, *(f"{found[name]:.1%}" for name in names)) for member, found in run["agreement"].items()]
    return Table("Greedy agreement with the target", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("pico", __doc__)
    add_data(made)
    add = made.add_argument
    add("--models", type=Path, help="directory of target/ draft/ companion/; those that ship when left out")
    add("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS), help="which of them; target must be")
    add("--exercises", nargs="+", choices=MEMBERS, default=["target"], help="members that do the exercises")
    add("--cases", type=int, default=512, help="of each exercise")
    add("--natural", type=int, default=256, help="passages of held-out text to repeat")
    add("--passage", type=int, default=200, help="tokens of a passage")
    add(
        "--pairs",
        type=int,
        nargs="+",
        default=[8, 32, 64],
        help="of a list, the middle one for conversations",
    )
    add("--batch", type=int, default=64, help="cases at once")
    tiny = {"members": ["target", "draft"], "cases": 2, "natural": 1, "passage": 24, "pairs": [8], "batch": 2}
    args = parse(made, argv, tiny=tiny, needs=["data"])
    if not {"target"} <= set(args.exercises) <= set(args.members):
        made.error("--members must name all of --exercises, and these the target")
    if min(args.cases, args.natural, args.batch) < 1:
        made.error("--cases, --natural and --batch must be at least 1")
    common.main(args, measure, page)


if __name__ == "__main__":
    main()
