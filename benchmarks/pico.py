"""What the models that ship can do, on text and exercises they were not trained on.

    python benchmarks/pico.py --data ../shared/data --stories stories.txt --out results/

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
import datetime
import gzip
import importlib.resources
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import machine
from tqdm import tqdm
from witten_bell import probabilities

import jaxllm as jl
from jaxllm.training.pico import corpus, exercises
from jaxllm.training.pico.exercises import REPEAT_ALL, REPEAT_PART, Exercise, Words

MEMBERS = ("target", "draft", "companion")
PASSAGE = 200  # tokens
PAIRS = (8, 32, 64)
QUESTIONS = 8  # one after another on one context
SUMS = 5  # lines, the last asked
ORDERS = (2, 5)
END = b"\0"  # of a document, for the yardsticks
SEED = 20_261_121
VERSIONS = {"python": platform.python_version(), "jax": jax.__version__, "jaxllm": jl.__version__}
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


def passages(plain: Mapping[str, np.ndarray], case: int) -> np.ndarray:
    """A passage of held-out text, from one text after another."""
    texts = [ids for ids in plain.values() if len(ids) >= PASSAGE]
    if not texts:
        raise ValueError(f"pico: a held-out text must have {PASSAGE} tokens, got none")
    ids = texts[case % len(texts)]
    start = int(generator(3, case).integers(0, len(ids) - PASSAGE + 1))
    return ids[start : start + PASSAGE].astype(np.int32)


def examine(
    model, words: Words, plain: Mapping[str, np.ndarray], *, cases: int, natural: int, batch: int
) -> dict[str, Any]:
    """All exercises of one model."""
    N = range(cases)
    total = 2 * cases + 2 * natural + (len(PAIRS) + 1) * cases
    total += -(-cases // QUESTIONS) * QUESTIONS
    found: dict[str, Any] = {"repeat": {}, "repeat_text": {}, "lookup": {}}
    prompts = {"whole": REPEAT_ALL[0], "part": REPEAT_PART[0]}
    with tqdm(total=total, unit="case", desc="exercises", file=sys.stderr) as bar:
        for kind, (name, prompt) in enumerate(prompts.items()):
            some = [exercises.repeat(generator(kind, i), words, PASSAGE, prompt=prompt) for i in N]
            found["repeat"][name] = repeats(model, words, some, bar, batch)
            some = [
                exercises.repeat(
                    generator(kind, i), words, PASSAGE, prompt=prompt, passage=passages(plain, i)
                )
                for i in range(natural)
            ]
            found["repeat_text"][name] = repeats(model, words, some, bar, batch)
        for pairs in PAIRS:
            some = [exercises.lookup(generator(4, i), words, pairs, questions=1) for i in N]
            found["lookup"][str(pairs)] = exact(model, words, some, bar, batch)
        count = -(-cases // QUESTIONS)
        found["lookup"]["32, 8 questions"] = conversations(model, words, count, 32, bar, batch)
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


def yardsticks(texts: Sequence[corpus.Text], bar: tqdm) -> dict[str, dict[str, float]]:
    """Bits per byte of text of what is no neural network, by text."""

    def joined(documents: Sequence[str]) -> bytes:
        return b"".join(d.encode() + END for d in documents)

    train = {t.name: joined(t.train) for t in texts}
    held_out = {t.name: joined(t.held_out) for t in texts}
    size = {t.name: sum(len(d.encode()) for d in t.held_out) for t in texts}
    found: dict[str, dict[str, float]] = {t.name: {} for t in texts}
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
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[corpus.Text]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(bits per byte by text, agreement with the target by member)."""
    context = min(model.config.context for model in models.values())
    rows = {}
    for t in texts:
        streams = [corpus.encode(tokenizer, [d]).astype(np.int32) for d in t.held_out]
        rows[t.name] = [w for ids in streams for w in windows(ids, context, context // 2)]
    bits: dict[str, Any] = {}
    agreement: dict[str, Any] = {name: {} for name in models if name != "target"}
    total = len(models) * sum(map(len, rows.values()))
    with tqdm(total=total, unit="window", desc="text", file=sys.stderr) as bar:
        for t in texts:
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
        for name, found in yardsticks(texts, bar).items():
            bits[name]["bits_per_byte"] |= found
    return bits, agreement


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the target should reach, and whether it does."""
    found = report["exercises"]["target"]
    repeated = found["repeat"]["whole"]["tokens_right"]
    looked_up = found["lookup"]["32"]["exact"]
    rows = [
        {"goal": f"repeats {PASSAGE} random tokens: tokens right", "want": 0.95, "got": repeated},
        {"goal": "recalls one key of 32: values right", "want": 0.9, "got": looked_up},
    ]
    for row in rows:
        row["met"] = row["got"] >= row["want"]
    for name, entry in report["text"].items():
        bits = entry["bits_per_byte"]
        best = min(v for k, v in bits.items() if k not in MEMBERS)
        row = {"goal": f"bits per byte of {name}, below the best yardstick's"}
        rows.append(row | {"want": best, "got": bits["target"], "met": bits["target"] < best})
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    run = report["settings"]
    sizes = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
    lines = [
        "# pico",
        "",
        f"{report['date']}, {report['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f"; {report['seconds']:.0f} s. Parameters: {sizes}; float32. Exercises are greedy and free "
        "running, drawn from seeds that training cannot draw; texts are the parts held out.",
        "",
        "| goal | wanted | reached | met |",
        "|---|---|---|---|",
    ]
    for goal in report["goals"]:
        met = "yes" if goal["met"] else "no"
        lines.append(f"| {goal['goal']} | {goal['want']:.3f} | {goal['got']:.3f} | {met} |")
    for member, found in report["exercises"].items():
        lines += ["", f"## Exercises: {member}", ""]
        lines += [
            f"| repeat {PASSAGE} tokens | cases | tokens right | answers wholly right |",
            "|---|---|---|---|",
        ]
        for kind, name in (("repeat", "random tokens"), ("repeat_text", "held-out text")):
            for part, got in found[kind].items():
                lines.append(
                    f"| {name}, {part} | {got['cases']} | {got['tokens_right']:.2%} "
                    f"| {got['whole_right']:.2%} |"
                )
        lines += ["", "| exact answers | cases | right |", "|---|---|---|"]
        table = {f"lookup among {pairs}": got for pairs, got in found["lookup"].items()}
        for name, got in (table | {"sums": found["sums"]}).items():
            right = f"{got['exact']:.2%} ± {got['stderr']:.2%}"
            lines.append(f"| {name} | {got['cases']} | {right} |")
    members = list(report["parameters"])
    heads = ["text", "bytes", *members, *(f"Witten-Bell {k} (own / all)" for k in ORDERS), "gzip -9"]
    lines += ["", "## Bits per byte of held-out text", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    for name, entry in report["text"].items():
        bits = entry["bits_per_byte"]
        cells = [name, f"{entry['bytes']:,}", *(f"{bits[m]:.3f}" for m in members)]
        for k in ORDERS:
            cells.append(f"{bits[f'witten_bell_{k}']:.3f} / {bits[f'witten_bell_{k}_all']:.3f}")
        lines.append("| " + " | ".join([*cells, f"{bits['gzip']:.3f}"]) + " |")
    lines += [
        "",
        f"Windows of {run['context']} tokens, {run['context'] // 2} apart; every token is predicted.",
    ]
    if report["agreement"]:
        names = [*report["text"], "mean"]
        lines += ["", "## Greedy agreement with the target", "", "| | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for member, found in report["agreement"].items():
            lines.append(f"| {member} | " + " | ".join(f"{found[n]:.1%}" for n in names) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, help="directory of target/ draft/ companion/; those that ship when left out")
    add("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS), help="which of them; target must be")
    add("--exercises", nargs="+", choices=MEMBERS, default=["target"], help="members that do the exercises")
    add("--data", type=Path, required=True, help="directory of the texts")
    add("--stories", type=Path, help="the file of stories given to training")
    add("--cases", type=int, default=512, help="of each exercise")
    add("--natural", type=int, default=256, help="passages of held-out text to repeat")
    add("--batch", type=int, default=64, help="cases at once")
    add("--out", type=Path, help="directory for pico.json and pico.md")
    args = parser.parse_args(argv)
    if not {"target"} <= set(args.exercises) <= set(args.members):
        parser.error("--members must name all of --exercises, and these the target")
    if min(args.cases, args.natural, args.batch) < 1:
        parser.error("--cases, --natural and --batch must be at least 1")

    begin = time.monotonic()
    texts = corpus.read(args.data, args.stories)
    folder = args.models or Path(str(importlib.resources.files("jaxllm"))) / "pico"
    loaded = {name: jl.load(folder / name, dtype="float32") for name in args.members}
    models = {name: model for name, (model, _) in loaded.items()}
    tokenizer = loaded["target"][1].backend_tokenizer
    words = Words.of(tokenizer)
    plain = {}
    for t in texts:
        ids = corpus.encode(tokenizer, t.held_out)
        plain[t.name] = ids[np.isin(ids, words.ordinary)]
    found = {
        name: examine(models[name], words, plain, cases=args.cases, natural=args.natural, batch=args.batch)
        for name in args.exercises
    }
    bits, agreement = read_texts(models, tokenizer, texts)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": VERSIONS,
        "settings": {
            "cases": args.cases,
            "natural": args.natural,
            "batch": args.batch,
            "context": min(model.config.context for model in models.values()),
            "seed": SEED,
        },
        "parameters": {n: sum(x.size for x in jax.tree.leaves(m)) for n, m in models.items()},
        "exercises": found,
        "text": bits,
        "agreement": agreement,
        "seconds": time.monotonic() - begin,
    }
    report["goals"] = goals(report)
    text = markdown(report)
    print(text)
    print(json.dumps(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "pico.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "pico.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
