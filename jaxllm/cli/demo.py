"""`jaxllm demo`: what the library does, shown on the model that ships, written down as a report.

A report is a list of sections, a section a list of rows (name, value, unit) with a sentence before
them; `SECTIONS` names the functions that make them, in order. A method that lands later adds its
function there. `run` gives the same report as a dict, `report.json` and `report.md`.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from tabulate import tabulate

import jaxllm as jl
from jaxllm.cli.options import JSON
from jaxllm.cli.output import note, print_json, to_json
from jaxllm.measure.perplexity import score
from jaxllm.measure.report import linear_bits
from jaxllm.models.linears import linear_weights
from jaxllm.precision import DpLlm, bits_read, set_target
from jaxllm.storage.directory import new_directory
from jaxllm.training.pico import exercises

PROMPTS = ("Once upon a time", "The king", "Tom has 3 apples and buys 4 more.")

# Written for this file: text that no model has been trained on.
PASSAGE = (
    "The lamp in the old lighthouse went out on the second night of the storm. Anna heard the wind "
    "before she saw the dark, and she knew that the boats would come back soon. She took the small "
    "stove from the kitchen, carried it up the long stairs, and set it behind the glass. The fire "
    "was weak, but it was warm and it did not go out. All night she fed it with bits of wood. In "
    "the morning the men came up the path, wet and tired, and asked who had lit it. Anna said that "
    "nobody had. They looked at the stove, and at her black hands, and they laughed."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One fact of a report."""

    name: str
    value: float | int | str
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Facts that belong together, and the figure that shows them."""

    name: str
    title: str
    text: str
    rows: tuple[Row, ...]
    figure: str | None = None


@dataclasses.dataclass(frozen=True)
class DemoContext:
    """What every section is given."""

    model: Any
    tokenizer: Any
    out: Path  # figures go here


def generation(context: DemoContext) -> Section:
    """What the model says to three prompts."""
    outs = jl.generate(context.model, context.tokenizer, list(PROMPTS), max_new_tokens=48)
    rows = (Row(prompt, out.text) for prompt, out in zip(PROMPTS, outs, strict=True))
    return Section("generation", "Text", "Greedy, 48 tokens at most.", tuple(rows))


def perplexity(context: DemoContext) -> Section:
    """How well the model predicts a text it has not seen."""
    ids = context.tokenizer.encode(PASSAGE)
    found = jl.perplexity(context.model, ids, num_bytes=len(PASSAGE.encode()))
    assert found.bits_per_byte is not None  # num_bytes was given
    rows = (
        Row("perplexity", round(found.perplexity, 3)),
        Row("bits per byte", round(found.bits_per_byte, 3), "bits"),
        Row("tokens predicted", found.tokens),
    )
    return Section("perplexity", "Perplexity", "Of a passage that was written for this.", rows)


def size(context: DemoContext) -> Section:
    """Bytes of the weights."""
    held = jl.report_bytes(context.model)
    rows = (
        Row("weights", held.weights),
        Row("their bytes", held.weight_bytes, "bytes"),
        Row("bits per weight", round(held.bits_per_weight, 3), "bits"),
    )
    return Section("size", "Size", "Counted from the arrays that are held.", rows)


def speed(context: DemoContext) -> Section:
    """Tokens per second once compiled, alone and eight requests at a time."""
    rows = []
    for batch in (1, 8):
        prompts = [PASSAGE[: 100 + i] for i in range(batch)]
        rates = []
        for _ in range(4):
            start = time.perf_counter()
            outs = jl.generate(context.model, context.tokenizer, prompts, max_new_tokens=64, stop_tokens=())
            rates.append(sum(len(o.token_ids) for o in outs) / (time.perf_counter() - start))
        rows.append(Row(f"batch {batch}", round(float(np.median(rates[1:])), 1), "tokens/s"))
    text = f"Prefill included, compilation (the first run) not; median of 3 on {device()}."
    return Section("speed", "Speed", text, tuple(rows))


def repetition(context: DemoContext) -> Section:
    """A passage read twice: what the model has in its cache, it need not guess."""
    passage = np.asarray(context.tokenizer.encode(PASSAGE, add_special_tokens=False), np.int32)
    words = words_of(context.tokenizer)
    one = exercises.repeat(
        np.random.default_rng(0), words, 0, passage=passage, prompt=exercises.REPEAT_ALL[0]
    )
    scored = score(context.model, [one.tokens])
    reads = {}
    rows = [Row("tokens", len(passage))]
    for name, begin in (("first time", 1), ("again", one.prompt_length)):
        span = slice(begin - 1, begin - 1 + len(passage))  # score[j] is that of token j + 1
        reads[name] = -scored.logprobs[0][span] / np.log(2)
        right = 100 * float(scored.greedy[0][span].mean())
        rows.append(Row(f"{name}: bits per token", round(float(reads[name].mean()), 3), "bits"))
        rows.append(Row(f"{name}: likeliest token right", round(right, 1), "%"))
    figure = "repetition.png"
    draw_reads(context.out / figure, reads)
    text = (
        "The same passage twice in one context, with KVzip's repeat prompt between. The second "
        "time the answer stands in the cache; a cache that loses something loses it here."
    )
    return Section("repetition", "A passage read twice", text, tuple(rows), figure)


def words_of(tokenizer) -> exercises.Words:
    """What exercises are made of, in the tokenizer's own ids."""
    return exercises.Words.from_tokenizer(tokenizer, bos=tokenizer.bos_token, eos=tokenizer.eos_token)


def quantization(context: DemoContext) -> Section:
    """The same model in fewer bits: bytes and perplexity."""
    passage = context.tokenizer.encode(PASSAGE)
    given = jl.perplexity(context.model, passage).perplexity
    stats = jl.calibrate(context.model, own_text(context), want={"hessian", "hessian_diag"}, progress=False)
    rows = [Row("as it is", round(given, 3), f"perplexity, {linear_bits(context.model):.3f} bits a weight")]
    points: dict[str, list[tuple[float, float]]] = {}
    for name, label, method in compared(context.model):
        small = jl.quantize(context.model, method, stats, progress=False)
        found = jl.perplexity(small, passage).perplexity
        bits, size = linear_bits(small), jl.report_bytes(small).weight_bytes
        points.setdefault(name, []).append((bits, found))
        rows.append(
            Row(label, round(found, 3), f"perplexity, {bits:.3f} bits a weight, {size:,} bytes in all")
        )
    figure = "quantization.png"
    draw_bits(context.out / figure, points, given)
    text = (
        "Of the passage above. Methods that learn from text learnt from what the model wrote itself. Bits "
        "count everything that is stored for the linears of the blocks; bytes are of the whole model."
    )
    return Section("quantization", "Quantization", text, tuple(rows), figure)


def own_text(context: DemoContext) -> list[list[int]]:
    """What the model writes itself, 24 times 96 tokens: text to calibrate on, wherever it runs."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(24)]
    sampler = jl.Sampler(temperature=1.0)
    outs = jl.generate(context.model, context.tokenizer, prompts, max_new_tokens=96, sampler=sampler, seed=1)
    return [[*o.prompt_ids, *o.token_ids] for o in outs]


def compared(model) -> Iterator[tuple[str, str, Any]]:
    """Name, label and method of what the quantization section shows."""
    group_size = min(32, *(w.shape[0] for w in linear_weights(model).values()))
    for bits in (2, 3, 4):
        yield "RTN", f"RTN, {bits} bits", jl.Rtn(bits=bits, group_size=group_size)
        yield (
            "DASH-Q",
            f"DASH-Q, {bits} bits",
            jl.DashQ(bits=bits, group_size=group_size, integer_zero_point=True),
        )
        yield "GPTQ", f"GPTQ, {bits} bits", jl.Gptq(bits=bits, group_size=group_size)
    yield "NestedFP, fp8", "NestedFP, fp8 mode", jl.NestedFp(mode="fp8")


def precision(context: DemoContext) -> Section:
    """One model of 3 and 4 bits, each token's width chosen while it runs."""
    passage, text = context.tokenizer.encode(PASSAGE), own_text(context)
    planes = jl.quantize(context.model, jl.AnyPrecision(parent_bits=4, restarts=1), text, progress=False)
    method = DpLlm(targets=(3.25, 3.5, 3.75), memory_bits=4.0, estimator="linear", steps=0)
    chooses = jl.attach_precision(planes, method, text, progress=False)
    models = {"3 bits": jl.read_at(planes, 3), "4 bits": planes}
    models |= {f"target {bits:g}": set_target(chooses, bits) for bits in method.targets}
    rows = []
    for name, model in models.items():
        found, read = jl.perplexity(model, passage).perplexity, bits_read(model, passage).mean
        rows.append(Row(name, round(found, 3), f"perplexity, {read:.3f} bits a weight read"))
    text_of = (
        "Any-Precision planes that DP-LLM reads 3 or 4 of, token by token and linear by linear, more of "
        "those that need them by the gradients of a text. A target is one number of the same program. Of "
        "the passage above."
    )
    return Section("precision", "Bits chosen while it runs", text_of, tuple(rows))


def eviction(context: DemoContext) -> Section:
    """A list of keys read once, most of it forgotten, every key asked."""
    model, tokenizer = context.model, context.tokenizer
    words = words_of(tokenizer)
    one = exercises.lookup(np.random.default_rng(1), words, 32, value_tokens=1).tokens
    gap = exercises.list_end(one, words)
    rows, lines = [one[:gap].tolist()], one[gap:-1].reshape(-1, 4)  # key = value newline
    cache = jl.prefill(model, rows)
    methods = jl.eviction.METHODS
    scores = {
        "kvzip": methods["kvzip"].score(model, cache, rows, prefix=1, tokenizer=tokenizer),
        "snapkv": methods["snapkv"].score(model, cache, rows, prefix=1, window=16),
        "random": methods["random"].score(model, cache, rows, prefix=1),
    }
    kept: dict[str, jl.cache.Cache] = {"everything": cache}
    for name, ratio in (("kvzip", 0.3), ("kvzip", 0.1), ("snapkv", 0.3), ("random", 0.3)):
        left = jl.eviction.evict(cache, scores[name], ratio=ratio, prefix=1, capacity=8)
        kept[f"{methods[name].title}, {ratio:.0%} of the pairs"] = left
    found = []
    for name, small in kept.items():
        outs = jl.generate(model, None, lines[:, :2].tolist(), max_new_tokens=1, cache=small)
        right = np.mean([out.token_ids == [value] for out, value in zip(outs, lines[:, 2], strict=True)])
        size = jl.cache.num_bytes(small)
        found.append(Row(name, round(100 * float(right), 1), f"% of the keys right, {size:,} bytes held"))
    text = (
        f"A list of {len(lines)} keys and values, {gap} tokens, read once; then all keys are asked on what "
        "each method has left of it. No method has seen the questions. Bytes are of all arrays, with room "
        "for questions and answers."
    )
    return Section("eviction", "A cache that forgets", text, tuple(found))


SECTIONS: tuple[Callable[[DemoContext], Section], ...] = (
    generation,
    perplexity,
    repetition,
    size,
    speed,
    quantization,
    precision,
    eviction,
)


def run(
    out: Path | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Makes the report of the shipped model in the new directory `out`; returns it as a dict.

    out: None takes jaxllm-report, or jaxllm-report-2, ... where that exists.
    model, tokenizer: another model than the shipped one.
    note: is told what is being done.
    """
    out = free_name(Path("jaxllm-report")) if out is None else out
    begin = time.perf_counter()
    with new_directory(out, who="demo") as unfinished:
        if model is None:
            model, tokenizer = jl.load()
        sections = []
        for number, section in enumerate(SECTIONS, 1):
            note(f"{number}/{len(SECTIONS)} {section.__name__}: {section.__doc__}")
            sections.append(section(DemoContext(model, tokenizer, unfinished)))
        report = {
            "out": str(out),
            "jaxllm": jl.__version__,
            "jax": jax.__version__,
            "device": device(),
            "seconds": round(time.perf_counter() - begin, 1),
            "sections": [dataclasses.asdict(section) for section in sections],
        }
        (unfinished / "report.json").write_text(to_json(report, indent=1), "utf-8")
        (unfinished / "report.md").write_text(markdown(report), "utf-8")
    return report


def free_name(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    number, name = 1, wanted
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}-{number}")
    return name


def device() -> str:
    """What the numbers were measured on."""
    one = jax.devices()[0]
    if one.platform == "cpu":
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{len(jax.devices())} x {one.device_kind}"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# jaxllm demo", ""]
    lines += [
        f"jaxllm {report['jaxllm']}, jax {report['jax']}, {report['device']}, {report['seconds']} s in all.",
        "",
    ]
    for section in report["sections"]:
        rows = [(cell(row["name"]), cell(f"{row['value']} {row['unit']}")) for row in section["rows"]]
        table = tabulate(rows, ("", ""), tablefmt="github", disable_numparse=True)
        lines += [f"## {section['title']}", "", section["text"], "", table, ""]
        if section["figure"]:
            lines += [f"![{section['title']}]({section['figure']})", ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that stays inside its table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def draw_reads(path: Path, reads: dict[str, np.ndarray]) -> None:
    """Bits per token of each reading, side by side along the passage, as a PNG."""
    from matplotlib.figure import Figure  # subtle: pyplot would choose a backend and keep state

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, bits), colour in zip(reads.items(), ("#b0b0b0", "#0b6e99"), strict=True):
        axes.plot(bits, label=f"{name}: {bits.mean():.2f} bits a token", color=colour, lw=1.4)
    axes.set(xlabel="token of the passage", ylabel="surprise (bits)", ylim=(0, None))
    axes.set_title("What the model has read it need not guess", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw_bits(path: Path, points: dict[str, list[tuple[float, float]]], given: float) -> None:
    """Perplexity against bits, a line a method, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, some) in enumerate(points.items()):
        axes.plot(*zip(*some, strict=True), marker="ovsD^"[i % 5], label=name, lw=1.2, ms=5)
    axes.axhline(given, color="#808080", ls=":", label="as it is")
    axes.set(xlabel="stored bits a weight of the blocks' linears", ylabel="perplexity")
    axes.set(xscale="log", yscale="log", xticks=(2, 3, 4, 6, 8, 12, 16))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FormatStrFormatter("%g"))
    axes.set_title("Fewer bits", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Directory to make for the report.")
@JSON
def demo(out: Path | None, as_json: bool) -> None:
    """Show the model that ships: text, measures, a figure; writes a report."""
    report = run(out, note=note)
    if as_json:
        print_json(report)
    else:
        click.echo((Path(report["out"]) / "report.md").read_text("utf-8"))
