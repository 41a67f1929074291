"""What the methods of quantization leave of the errors of a large random matrix, at code and at total bits.

    python benchmarks/quantization_error.py --results docs/results

Perplexity of a small model judges the tables of codebooks too hard: they weigh less the larger K is, and here
K = 1024. Weights are Student-t; inputs share 64 latent numbers a token, each on a log-normal scale; the size
of the gradients depends on the token's latent numbers. Errors are of tokens not calibrated on, relative to no
weights at all: of the outputs, and of the outputs times the gradients (what GuidedQuant bounds).
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, save, show
from tqdm import tqdm

import jaxllm as jl
from jaxllm.quant.statistics import Stats
from jaxllm.weights.matmul import bits_per_weight

HIGHEST = jax.lax.Precision.HIGHEST
NESTED = (3, 4, 5, 6)


def weights(K: int, N: int, seed: int = 0) -> jax.Array:
    """Rows [N, K] of Student-t numbers (5 degrees of freedom)."""
    return jnp.asarray(np.random.default_rng([seed, K, N]).standard_t(5, (N, K)) * 0.02, jnp.float32)


def tokens(K: int, N: int, T: int, seed: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [T, K] and output gradients [T, N]; `part` tells calibration (0) from judging (1)."""
    fixed = np.random.default_rng([seed, K, N, 1])
    scale, mix = fixed.lognormal(0, 1, K), fixed.normal(0, 1, (64, K)) / 8
    taste = fixed.normal(0, 1, 64) / 8
    rng = np.random.default_rng([seed, K, N, 2 + part])
    latent = rng.normal(0, 1, (T, 64))
    x = (rng.normal(0, 1, (T, K)) * 0.7 + latent @ mix) * scale
    # squares vary e-fold: T tokens count as many as T / e would whose gradients are of one size
    g = np.exp(0.5 * latent @ taste)[:, None] * rng.normal(0, 1, (T, N))
    return x.astype(np.float32), g.astype(np.float32)


@partial(jax.jit, static_argnames="length")
def statistics_of(x: np.ndarray, g: np.ndarray, length: int = 128) -> Stats:
    """All that the methods ask for, of sequences of `length` tokens."""
    saliency = (g * g).mean(1)
    fisher = sum(
        jnp.matmul(g[i : i + length].T, x[i : i + length], precision=HIGHEST) ** 2
        for i in range(0, len(x), length)
    )
    return Stats(
        hessian_diag=(x * x).sum(0),
        mean=jnp.abs(x).mean(0),
        hessian=jnp.matmul(x.T, x, precision=HIGHEST),
        guided_hessian=jnp.matmul((x * saliency[:, None]).T, x, precision=HIGHEST)[None],
        fisher=fisher,
        sample=x[:512],
        tokens=len(x),
    )


def left(K: int, N: int, T: int, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each method leaves of the errors of one matrix."""
    rows, stats = weights(K, N, seed), statistics_of(*tokens(K, N, T, seed, 0))
    x, g = (jnp.asarray(a) for a in tokens(K, N, T, seed, 1))
    whole, found = jnp.matmul(x, rows.T, precision=HIGHEST) ** 2, []
    jobs = [job for job in compared(seed, args.bits) if args.only is None or job[0] in args.only]
    for name, bits, method in tqdm(jobs, f"seed {seed}", file=sys.stderr):
        w = method.quantize(rows, stats, name="up", dtype=jnp.float32)
        for read in NESTED if name == "Any-Precision" else (bits,):
            at = w.at(read) if name == "Any-Precision" else w
            off = jnp.matmul(x, (rows - at.dequantize_rows()).T, precision=HIGHEST) ** 2
            found.append(
                {"method": name, "bits": read, "seed": seed, "bits_per_weight": bits_per_weight(at)}
                | {"output": float(off.sum() / whole.sum())}
                | {"loss": float((off * g * g).sum() / (whole * g * g).sum())}
            )
    return found


def compared(seed: int, widths: Sequence[int]) -> list[tuple[str, int | None, Any]]:
    """Name, width (where it has one) and method."""
    found: list[tuple[str, int | None, Any]] = []
    for bits in widths:
        grid = {"bits": bits, "group_size": 32}
        methods = {
            "RTN": jl.Rtn(**grid),
            "RTN, clipped": jl.Rtn(**grid, clip=True),
            "GPTQ": jl.Gptq(**grid),
            "GPTQ, guided": jl.Gptq(**grid, guided=True),
            "AWQ": jl.Awq(**grid),
            "DASH-Q": jl.DashQ(**grid),
            "DASH-Q, feedback, whole zero": jl.DashQ(**grid, integer_zero_point=True, feedback=True),
            "SqueezeLLM": jl.SqueezeLlm(bits=bits, seed=seed),
            "LNQ": jl.Lnq(bits=bits, seed=seed),
            "LNQ, guided": jl.Lnq(bits=bits, guided=True, seed=seed),
        }
        found += [(name, bits, method) for name, method in methods.items()]
    nested = jl.AnyPrecision(seed_bits=3, parent_bits=6, seed=seed)
    return [*found, ("Any-Precision", None, nested), ("2/4/16-bit", None, jl.MixedTwoBit(seed=seed))]


def errors(run: dict[str, Any]) -> dict[tuple[str, int | None], tuple[float, list[float], list[float]]]:
    """Of each method and width its total bits and, in percent, its errors by seed."""
    found: dict[Any, Any] = {}
    for r in run["results"]:
        got = found.setdefault((r["method"], r["bits"]), (r["bits_per_weight"], [], []))
        got[1].append(100 * r["output"])
        got[2].append(100 * r["loss"])
    return found


def page(run: Run) -> Page:
    """A table and a figure."""
    sizes = run["settings"]
    spread = "median of the seeds (least to most)"
    columns = {
        "method": "what quantized the matrix",
        "bits": "of a code",
        "total bits": "bits a weight, everything stored counted",
        "outputs, %": f"squared error of the outputs, of what no weights at all have; {spread}",
        "outputs x gradients, %": f"the same of outputs times the gradients of the loss by them; {spread}",
    }
    rows = [
        (name, bits or "", f"{total:.3f}", show(output), show(loss))
        for (name, bits), (total, output, loss) in errors(run).items()
    ]
    text = (
        f"One random matrix, K = {sizes['K']}, N = {sizes['N']}, {sizes['tokens']:,} tokens to calibrate on "
        "and as many to judge, seeds "
        + ", ".join(map(str, sizes["seeds"]))
        + ". Weights are Student-t; inputs "
        "share 64 latent numbers a token. A small model judges the tables of codebooks too hard: they weigh "
        "less the larger K is."
    )
    return Page(
        "What quantization leaves of the error of a large matrix",
        text,
        [Table("Errors", columns, rows)],
        {"errors": partial(draw, run)},
    )


MARKS, COLORS = "osv^Dx+*<>ph", [*(f"C{i}" for i in range(10)), "black", "gold"]


def draw(run: dict[str, Any]) -> Any:
    """The errors against code bits and against total bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    found = errors(run)
    for i, name in enumerate(dict.fromkeys(name for name, _ in found)):
        points = [(bits, *found[n, bits]) for n, bits in found if n == name]
        for axes, at in zip(sides, (0, 1), strict=True):
            xy = [(p[at], statistics.mean(p[3])) for p in points if p[at] is not None]
            if xy:
                look = {"marker": MARKS[i], "color": COLORS[i], "markersize": 4, "linewidth": 0.8}
                axes.plot(*zip(*xy, strict=True), **look, label=name)
    for axes, what in zip(sides, ("bits of a code", "total bits a weight"), strict=True):
        axes.set(xlabel=what, ylabel="error of outputs times gradients, % of no weights", yscale="log")
        axes.grid(alpha=0.3)
    sides[0].legend(*sides[1].get_legend_handles_labels(), fontsize=7, loc="lower left")  # it has all
    return figure


def measure(args: argparse.Namespace) -> Run:
    """All methods on the matrices of all seeds."""
    K, N, T = args.shape
    run = begin(args, {"K": K, "N": N, "tokens": T, "seeds": args.seeds, "bits": args.bits}) | {"results": []}
    for seed in args.seeds:
        run["results"] += left(K, N, T, seed, args)
        save(args, run)
    return run


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("quantization_error", __doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    made.add_argument("--only", nargs="+", metavar="METHOD", help="names of methods; others are left out")
    made.add_argument("--shape", type=int, nargs=3, default=(1024, 256, 4096), metavar=("K", "N", "TOKENS"))
    tiny = {"seeds": [0], "bits": [2], "shape": (64, 16, 256), "only": ["RTN", "LNQ", "Any-Precision"]}
    common.main(parse(made, argv, tiny=tiny), measure, page)


if __name__ == "__main__":
    main()
