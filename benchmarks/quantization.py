"""Every quantization method at 2, 3 and 4 bits on one model: total bits, perplexity, divergence, seconds.

    python benchmarks/quantization.py --calibration FILE --text FILE --out results/         # pico
    python benchmarks/quantization.py --model stories260K.bin --calibration FILE --lines FILE --out results/

Calibration and evaluation text must differ (checked: no line of 40 or more characters in both). --text is one
text, cut into windows of --context tokens; --lines has one story a line, each cut to --context tokens, lines
that are equal but for case taken once. Perplexity and the mean Kullback-Leibler divergence to the given
model, in nats a token, are over all predictions; bits a weight count everything stored for the linears of
the blocks. Seconds are of `jl.quantize` as a whole, compilation and calibration included.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxllm as jl
from jaxllm.quant.any_precision import BitPlanes
from jaxllm.quant.quantize import linear_bits


def methods(bits: int, group: int) -> dict[str, Any]:
    """What is compared at one width."""
    grid = {"bits": bits, "group": group}
    return {
        "RTN": jl.Rtn(**grid),
        "RTN, clipped": jl.Rtn(**grid, clip=True),
        "GPTQ": jl.Gptq(**grid),
        "GPTQ, guided": jl.Gptq(**grid, guided=True),
        "AWQ": jl.Awq(**grid),
        "DASH-Q, paper": jl.DashQ(**grid, mode="paper"),
        "DASH-Q": jl.DashQ(**grid),
        "DASH-Q, whole zero": jl.DashQ(**grid, zero_code=True),
        "DASH-Q, feedback": jl.DashQ(**grid, feedback=True),
        "DASH-Q, feedback, whole zero": jl.DashQ(**grid, zero_code=True, feedback=True),
        "SqueezeLLM": jl.SqueezeLlm(bits=bits),
        "LNQ": jl.Lnq(bits=bits),
        "LNQ, guided": jl.Lnq(bits=bits, guided=True),
    }


def others() -> dict[str, Any]:
    """What has no width of its own."""
    return {
        "2/4/16-bit at 2.91": jl.MixedTwoBit(),
        "NestedFP, fp8": jl.NestedFp(mode="fp8"),
        "NestedFP, fp16": jl.NestedFp(mode="fp16"),
        "DecDEC on 3-bit RTN": jl.DecDec(base=jl.Rtn(bits=3, group=32), k_chunk=51),
    }


def rows_of(tokenizer, args) -> list[list[int]]:
    """The evaluation sequences."""
    if args.lines is None:
        ids = tokenizer.encode(args.text.read_text("utf-8"))
        begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids, size = ids[len(begin) :], args.context - len(begin)
        return [begin + ids[i : i + size] for i in range(0, min(len(ids), args.tokens) - 1, size)]
    lines = args.lines.read_bytes().decode("utf-8").splitlines()
    distinct = {line.lower(): line for line in reversed(lines) if line.strip()}
    return [tokenizer.encode(line)[: args.context] for line in reversed(distinct.values())]


@jax.jit
def judge(model, reference, tokens, lengths):
    """Sums over real predictions: negative log-likelihood, divergence from the reference, their number."""
    ours, theirs = (jax.nn.log_softmax(m(tokens, lengths=lengths)[0][:, :-1]) for m in (model, reference))
    real = (jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
    came = jnp.take_along_axis(ours, tokens[:, 1:, None], axis=2)[..., 0]
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return -(came * real).sum(), (divergence * real).sum(), real.sum()


def measure(model, reference, rows: list[list[int]], batch: int = 8) -> dict[str, float]:
    """Perplexity and divergence from the reference."""
    T = max(map(len, rows))
    sums = np.zeros(3)
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        tokens, lengths = np.zeros((batch, T), np.int32), np.ones((batch,), np.int32)
        for j, row in enumerate(part):
            tokens[j, : len(row)], lengths[j] = row, len(row)
        sums += np.asarray(judge(model, reference, tokens, lengths), np.float64)
    nll, divergence, count = sums
    return {"perplexity": float(np.exp(nll / count)), "kl": float(divergence / count), "tokens": int(count)}


def compare(model, rows, text, args) -> Iterator[dict[str, Any]]:
    """One result a method and width; the model as it is first."""
    yield {"method": "the model as given", "bits": None} | measure(model, model, rows)
    jobs = [(name, bits, method) for bits in args.bits for name, method in methods(bits, args.group).items()]
    jobs += [(name, None, method) for name, method in others().items()]
    jobs += [("Any-Precision", bits, None) for bits in sorted({3, 4, 5, 6} | set(args.bits)) if bits >= 3]
    parent = None
    for name, bits, method in tqdm(jobs, "methods", file=sys.stderr):
        start = time.perf_counter()
        if method is None:  # one parent serves all its widths
            if parent is None:
                parent = jl.quantize(model, jl.AnyPrecision(parent_bits=6, seed_bits=3), text, progress=False)
            small = read_at(parent, bits)
        else:
            small = jl.quantize(model, method, text, progress=False)
        jax.block_until_ready(jax.tree.leaves(small))
        seconds = time.perf_counter() - start
        yield {
            "method": name,
            "bits": bits,
            "bits_per_weight": linear_bits(small),
            "seconds": seconds,
        } | measure(small, model, rows)


def read_at(model, bits: int):
    """The Any-Precision model read at another width."""
    at = lambda w: w.at(bits) if isinstance(w, BitPlanes) else w  # noqa: E731
    return jax.tree.map(at, model, is_leaf=lambda w: isinstance(w, BitPlanes))


def markdown(run: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "# Quantization methods",
        "",
        f"{run['date']}, {run['machine']}, jax {run['jax']}; model {run['model']}, "
        f"{run['evaluated']:,} predictions, {run['calibration_tokens']:,} tokens to calibrate on, "
        f"group {run['group']}.",
        "",
        "| method | bits | total bits a weight | perplexity | KL to the model | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in run["results"]:
        cells = [
            r["method"],
            r["bits"] or "",
            f"{r.get('bits_per_weight', 32):.3f}",
            f"{r['perplexity']:.3f}",
        ]
        lines.append(
            "| " + " | ".join(map(str, [*cells, f"{r['kl']:.5f}", f"{r.get('seconds', 0):.1f}"])) + " |"
        )
    return "\n".join(lines) + "\n"


def draw(run: dict[str, Any], path: Path) -> None:
    """Divergence against total bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(r["method"] for r in run["results"] if "bits_per_weight" in r))
    for i, name in enumerate(names):
        points = [(r["bits_per_weight"], r["kl"]) for r in run["results"] if r["method"] == name]
        axes.plot(*zip(*points, strict=True), marker="osv^Dx+*"[i % 8], linewidth=0.8, label=name)
    axes.set(xlabel="total bits a weight", ylabel="KL to the model, nats a token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as `jl.load` takes it (default: pico)")
    add("--calibration", type=Path, required=True)
    add("--text", type=Path)
    add("--lines", type=Path)
    add("--bits", type=int, nargs="+", default=[2, 3, 4])
    add("--group", type=int, default=32)
    add("--context", type=int, default=512)
    add("--tokens", type=int, default=8192, help="of --text, at most")
    add("--sequences", type=int, default=64, help="calibration pieces of --length tokens")
    add("--length", type=int, default=256)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    if (args.text is None) == (args.lines is None):
        parser.error("exactly one of --text and --lines must be given")
    learnt, judged = (p.read_text("utf-8") for p in (args.calibration, args.text or args.lines))
    shared = {line for line in learnt.splitlines() if len(line) >= 40} & set(judged.splitlines())
    if shared:
        parser.error(
            f"calibration and evaluation text must differ, both have the line {next(iter(shared))[:40]!r}"
        )
    model, tokenizer = jl.load(args.model, dtype="float32")
    text = jl.text_sequences(model, tokenizer, learnt, length=args.length, limit=args.sequences)
    rows = rows_of(tokenizer, args)
    results = list(compare(model, rows, text, args))
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "jax": version("jax"),
        "model": Path(args.model).name if args.model else "pico target",
        "group": args.group,
        "evaluated": results[0]["tokens"],
        "calibration_tokens": sum(map(len, text)),
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quantization.json").write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "quantization.md").write_text(markdown(run))
    draw(run, args.out / "quantization.png")
    print(markdown(run))


if __name__ == "__main__":
    main()
