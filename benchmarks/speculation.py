"""Drafted tokens: how many stand, how often the model is asked, and what a text takes by the clock.

    python benchmarks/speculation.py --prompts spec_bench_question.jsonl --results docs/results

    drafts      pico's target with each draft, on prompts of people and on its own exercises of repeating, by
                batch and sampler, against the same call without one, interleaved
    rows        a step of so many rows of one text, over a step of one, of a random Llama of 200 M parameters
    synthetic   that Llama with a random draft of a tenth of its size, whose tokens are the model's own with a
                stated probability each: what drafting costs and looking saves, whatever stands

--prompts is JSON lines with "turns" (Spec-Bench); taken are first turns that fit the context with what is to
be written. Steps are counted by the library, seconds are of `timings`: from the first token to the last.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
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
from jaxllm.decoding.drafts import ModelDraft, Proposal
from jaxllm.models.decoder import Config, Decoder
from jaxllm.pytree import pytree, static
from jaxllm.training.pico import exercises

LLAMA = Config(
    layers=12, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, tied=True, context=1024
)
SMALL = dataclasses.replace(LLAMA, layers=4, width=320, heads=5, kv_heads=1, ffn=880, vocab=32000)
PLAIN = "no draft"
SAMPLERS = {
    "greedy": (jl.Sampler(), "token"),
    "drawn, token": (jl.Sampler(temperature=0.8), "token"),
    "drawn, block": (jl.Sampler(temperature=0.8), "block"),
    "drawn, noise": (jl.Sampler(temperature=0.8), "noise"),
}


# -- pico


def drafts(args, target, draft, companion) -> dict[str, jl.Speculation | None]:
    """Who drafts, by name."""
    made = {
        "pico draft": jl.Speculation(draft=draft, tokens=args.tokens),
        "pico companion": jl.Speculation(draft=companion, tokens=args.tokens),
        "half of its layers": jl.Speculation(
            draft=jl.first_layers(target, target.config.layers // 2), tokens=args.tokens
        ),
        "look-up": jl.Speculation(draft=jl.LookupDraft(), tokens=2 * args.tokens),
    }
    return {PLAIN: None} | {name: made[name] for name in args.only}


def prompts_of(args, tokenizer, context: int) -> dict[str, list[list[int]]]:
    """Prompts by where they come from, as many as the largest batch."""
    count, room = max(args.batch), context - args.new
    if args.tiny:
        asked = [f"Tom saw a ball number {i}." for i in range(count)]
    else:
        lines = args.prompts.read_text("utf-8").split("\n")
        asked = [json.loads(line)["turns"][0] for line in lines if line]
    ids = [tokenizer.encode(text) for text in asked]
    words = exercises.Words.from_tokenizer(tokenizer, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    rng, size = np.random.default_rng(0), 24 if args.tiny else 160
    repeats = []
    for _ in range(count):
        passage = np.asarray(ids[rng.integers(len(ids))], np.int32)[1 : size + 1]
        one = exercises.repeat(rng, words, 0, passage=passage, prompt=exercises.REPEAT_ALL[0])
        repeats.append(one.tokens[: one.prompt_length].tolist())
    fitting = [row for row in ids if len(row) <= room]
    return {"prompts": fitting[:count], "repeating": [row for row in repeats if len(row) <= room]}


def with_drafts(args, run: Run) -> None:
    """One entry a set, batch, sampler and draft."""
    target, tokenizer = load(args)
    members = (load(args, name)[0] for name in ("draft", "companion"))
    methods = drafts(args, target, *members)
    sets = prompts_of(args, tokenizer, target.config.context)
    run["settings"]["prompts that fit"] = {name: len(rows) for name, rows in sets.items()}
    run["drafts"] = []
    cases = [(s, b, n) for s in sets for b in args.batch for n in args.samplers]
    for name, batch, sampler in tqdm(cases, file=sys.stderr):
        how, verification = SAMPLERS[sampler]
        options = {"max_new_tokens": args.new, "sampler": how, "stop_tokens": (), "seed": 1}
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        outs: dict[str, list[jl.Completion]] = {}
        for turn, method in rounds(methods, args.rounds):
            asked = methods[method]
            if asked is not None:
                asked = dataclasses.replace(asked, verification=verification)
            outs[method] = jl.generate(
                target, None, sets[name][:batch], speculation=asked, timings=True, **options
            )
            if turn:
                seconds[method].append(outs[method][0].timings.decode_s)
        for method in methods:
            made = outs[method]
            same = [a.token_ids == b.token_ids for a, b in zip(made, outs[PLAIN], strict=True)]
            entry = {"set": name, "batch": batch, "sampler": sampler, "draft": method, "same": np.mean(same)}
            if method != PLAIN:
                of = [one.speculation for one in made]
                entry |= {key: sum(getattr(one, key) for one in of) for key in ("proposed", "stood", "steps")}
            run["drafts"].append(entry | {"tokens": batch * (args.new - 1), "seconds": seconds[method]})
        save(args, run)


# -- a model whose cost is real


@pytree
class Synthetic:
    """A draft that costs what `real` does and proposes the model's own tokens, each with a probability."""

    real: ModelDraft
    text: jax.Array  # int32 [B, N]: what the model writes
    probability: jax.Array

    count: int = static()

    def start(self, tokens, lengths, room):
        """As the real one."""
        return self.real.start(tokens, lengths, room)

    def keep(self, state, lengths):
        """As the real one."""
        return self.real.keep(state, lengths)

    def propose(self, state, requests, written, lengths, on):
        """Drafted for nothing, then replaced by what the model writes next, or by what it does not."""
        made, state = self.real.propose(state, requests, written, lengths, on)
        places = written.counts[:, None] + jnp.arange(self.count)[None]
        right = jnp.take_along_axis(self.text, jnp.minimum(places, self.text.shape[1] - 1), axis=1)
        key = jax.random.fold_in(jax.random.key(5), written.counts.sum())
        hit = jax.random.uniform(key, right.shape) < self.probability
        wrong = (right + 1) % self.real.vocab
        never = made.tokens < 0  # what is drafted must be computed before it is replaced
        return Proposal(jnp.where(hit | never, right, wrong), made.lengths, None), state


def llama(args) -> tuple[Decoder, Decoder]:
    """The random model, and a draft of a tenth of it."""
    sizes = (common.TINY, dataclasses.replace(common.TINY, layers=1)) if args.tiny else (LLAMA, SMALL)
    target, draft = (Decoder(size, rngs=nnx.Rngs(i)) for i, size in enumerate(sizes))
    return target, draft


def rows_of_a_text(args, target: Decoder) -> list[dict[str, Any]]:
    """Seconds of a step of so many rows behind a text."""
    cache = target.make_cache(1, 256, slack=max(args.rows))
    cache = target(jnp.ones((1, 100), jnp.int32), cache)[1]

    @jax.jit
    def step(model, cache, tokens):
        return model(tokens, cache)[0]

    found: dict[int, list[float]] = {rows: [] for rows in args.rows}
    for turn, rows in rounds(found, args.rounds):
        tokens = jnp.full((1, rows), 7, jnp.int32)
        jax.block_until_ready(step(target, cache, tokens))
        took = [timed(lambda tokens=tokens: step(target, cache, tokens))[1] for _ in range(5)]
        if turn:
            found[rows].append(float(np.median(took)))
    return [{"rows": rows, "seconds": some} for rows, some in found.items()]


def synthetic(args, target: Decoder, draft: Decoder) -> list[dict[str, Any]]:
    """Seconds of a text, by how often drafts stand."""
    prompt = [[5, 6, 7, 8]]
    options = {"max_new_tokens": args.new, "stop_tokens": (), "timings": True}
    plain = jl.generate(target, None, prompt, **options)[0]
    methods: dict[str, jl.Speculation | None] = {PLAIN: None}
    for probability in args.probabilities:
        real = ModelDraft(draft, args.tokens, target.config.vocab)
        text = jnp.asarray([plain.token_ids], jnp.int32)
        made = Synthetic(real, text, jnp.float32(probability), args.tokens)
        methods[f"{probability:g}"] = jl.Speculation(draft=made, tokens=args.tokens)
    found: dict[str, list[float]] = {name: [] for name in methods}
    last: dict[str, jl.Completion] = {}
    for turn, name in rounds(methods, args.rounds):
        last[name] = jl.generate(target, None, prompt, speculation=methods[name], **options)[0]
        if turn:
            found[name].append(last[name].timings.decode_s)
    entries = []
    for name, seconds in found.items():
        of = last[name].speculation
        counts = {} if of is None else dataclasses.asdict(of)
        same = last[name].token_ids == plain.token_ids
        entries.append(
            {"stands with": name, "seconds": seconds, "same": same, "tokens": args.new - 1} | counts
        )
    return entries


# -- the page


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for; those of a run in --results stay."""
    settings = {
        key: getattr(args, key) for key in ("tokens", "new", "rounds", "batch", "rows", "probabilities")
    }
    settings["prompts"] = args.prompts and args.prompts.name
    run = resume(args, begin(args, settings))
    if "drafts" in args.what:
        with_drafts(args, run)
    if {"rows", "synthetic"} & set(args.what):
        target, draft = llama(args)
        if "rows" in args.what:
            run["rows"] = rows_of_a_text(args, target)
            save(args, run)
        if "synthetic" in args.what:
            run["synthetic"] = synthetic(args, target, draft)
            save(args, run)
    return run


def page(run: Run) -> Page:
    """The table of each part."""
    s = run["settings"]
    text = (
        f"Up to {s['tokens']} tokens drafted at a time (look-up: {2 * s['tokens']}), {s['new']} written; "
        f"{s['rounds']} interleaved rounds, medians (least to most), ratios within a round."
    )
    tables = []
    if "drafts" in run:
        tables.append(drafts_table(run["drafts"]))
    if "rows" in run:
        tables.append(rows_table(run["rows"]))
    if "synthetic" in run:
        tables.append(synthetic_table(run["synthetic"]))
    return Page("Drafted tokens", text, tables)


DRAFTED = {
    "stand": "share of drafted tokens that stand",
    "a step": "tokens that a request gets each time the model is asked",
    "faster": "how many times, against no draft",
}


def counted(one: dict[str, Any], plain: list[float]) -> tuple[str, ...]:
    """What `DRAFTED` says."""
    stand = f"{one['stood'] / max(one['proposed'], 1):.2f}"
    steps = one["tokens"] / one["steps"] if one["steps"] else 0.0
    return stand, f"{steps:.2f}", show(ratios(plain, one["seconds"]), 2)


def drafts_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "prompts": "of people (prompts), or passages to be written again (repeating)",
        "batch": "requests at once",
        "sampler": "the likeliest, or at temperature 0.8; how drafts are looked at",
        "draft": "who drafts",
        "same": "share of texts that are those without a draft",
    } | DRAFTED
    rows = []
    plain: list[float] = []
    for one in found:
        if one["draft"] == PLAIN:
            plain = one["seconds"]
            continue
        head = (one["set"], one["batch"], one["sampler"], one["draft"], f"{one['same']:.2f}")
        rows.append(head + counted(one, plain))
    return Table("pico", columns, rows)


def rows_table(found: list[dict[str, Any]]) -> Table:
    columns = {"rows": "of one text, in one step", "ms": "a step", "over one row": "within a round"}
    rows = [
        (
            r["rows"],
            show([1e3 * s for s in r["seconds"]], 1),
            show(ratios(r["seconds"], found[0]["seconds"]), 2),
        )
        for r in found
    ]
    return Table("Rows of a step, 201 M Llama", columns, rows)


def synthetic_table(found: list[dict[str, Any]]) -> Table:
    columns = {
        "stands with": "probability of each drafted token, made so",
        "same": "whether the text is that without a draft",
    } | DRAFTED
    rows = [
        (one["stands with"], "yes" if one["same"] else "no", *counted(one, found[0]["seconds"]))
        for one in found[1:]
    ]
    return Table("A draft of a tenth, 201 M Llama, one request", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("speculation", __doc__)
    add = made.add_argument
    parts, names = (
        ("drafts", "rows", "synthetic"),
        ("pico draft", "pico companion", "half of its layers", "look-up"),
    )
    add("--what", nargs="+", choices=parts, default=parts)
    add("--prompts", type=Path, help="JSON lines with turns")
    add("--only", nargs="+", choices=names, default=names, help="drafts")
    add("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS])
    add("--batch", type=int, nargs="+", default=[1, 4, 16])
    add("--tokens", type=int, default=4, help="drafted at most; look-up: twice as many")
    add("--new", type=int, default=96, help="tokens to write")
    add("--rounds", type=int, default=7)
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 8])
    add("--probabilities", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.9])
    tiny = {"rounds": 1, "batch": [2], "new": 8, "tokens": 2, "rows": [1, 2], "probabilities": [0.7]}
    tiny |= {"only": ["look-up", "half of its layers"], "samplers": ["greedy"]}
    common.main(parse(made, argv, tiny=tiny, needs=("prompts",)), measure, page)


if __name__ == "__main__":
    main()
