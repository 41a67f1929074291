"""How fast the solvers of quantization are, on random matrices of the shapes of a 200 M Llama.

    python benchmarks/quantization_speed.py --results docs/results

    solvers    each method's `quantize` on the four shapes of a block of the model that decode.py makes (width
               1024, key heads 256, feed-forward 2816), 2 bits, group 32; compiled, statistics given
    curvature  sums over 128 x 2,048 tokens of what a block's four inputs need: x^2, or x x^T. One batch of 8
               sequences is timed and counted 16 times; the model's own pass, the same for both, is left out
    descent    LNQ's blocked descent, one sweep at 3 bits, against the same sweep input by input (one compiled
               step an input) and output by output (one compiled sweep an output)
    k_means    SqueezeLLM's levels of 64 rows of 4,096 weights: of eight starts the best, or the optimum

Runs are interleaved, their order alternates; medians (least to most), ratios within a round. `--clock cpu`
adds up all threads: on a machine that others use, it is what does not depend on them. Memory is how
far the peak resident size rose during a compiled run, in units of the rows in float32.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, measured, parse, parser, ratios, resume, rounds, save, show
from quantization_error import statistics_of, tokens, weights
from tqdm import tqdm

import jaxllm as jl
from jaxllm.ops.packing import unpack
from jaxllm.quant.methods.k_means import k_means, row_keys
from jaxllm.quant.methods.lnq import descend
from jaxllm.quant.statistics import Stats

BLOCK = {(1024, 1024): 2, (1024, 256): 2, (1024, 2816): 2, (2816, 1024): 1}  # (K, N): how many a block has
INPUTS = {1024: 3, 2816: 1}  # K: how many different inputs a block's linears read
TOKENS, BATCH = 128 * 2048, 8 * 2048
TINY_BLOCK, TINY_INPUTS = {(64, 32): 2, (96, 64): 1}, {64: 3, 96: 1}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HIGHEST = jax.lax.Precision.HIGHEST


def solvers(bits: int, group_size: int) -> dict[str, Any]:
    """What is timed; those of `SLOW` once only."""
    grid = {"bits": bits, "group_size": group_size}
    return {
        "RTN": jl.Rtn(**grid),
        "RTN, clipped": jl.Rtn(**grid, clip=True),
        "GPTQ, as published": jl.Gptq(**grid, act_order=False, clip=False, rounds=1),
        "GPTQ, one round": jl.Gptq(**grid, rounds=1),
        "GPTQ": jl.Gptq(**grid),
        "DASH-Q, paper": jl.DashQ(**grid, mode="paper"),
        "DASH-Q": jl.DashQ(**grid),
        "2/4/16-bit": jl.MixedTwoBit(),
        "SqueezeLLM": jl.SqueezeLlm(bits=bits),
        "LNQ": jl.Lnq(bits=bits),
    }


SLOW = ("SqueezeLLM", "LNQ", "2/4/16-bit")


def interleaved(
    works: dict[str, Callable[[], Any]], args, once: tuple[str, ...] = ()
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float | None]]:
    """Seconds of each round; seconds of the first run, which compiles; the least growth of memory."""
    times: dict[str, list[float]] = {name: [] for name in works}
    first, memory = {}, {}
    for turn, name in rounds(works, args.rounds):
        if turn > 1 and name in once:
            continue
        _, seconds, grown = measured(works[name], CLOCKS[args.clock])
        if turn == 0:
            first[name] = seconds
            continue
        times[name].append(seconds)
        if grown is not None:
            memory[name] = min(grown, memory.get(name, grown))
    return times, first, memory


# -- the parts


def part_solvers(args) -> dict[str, Any]:
    """Seconds a shape and method."""
    block = TINY_BLOCK if args.tiny else BLOCK
    found = []
    for K, N in tqdm(block, "solvers", file=sys.stderr):
        rows = weights(K, N)
        stats = statistics_of(*tokens(K, N, 2 * K, 0, 0))
        works = {
            name: partial(method.quantize, rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
            for name, method in solvers(2, 32).items()
            if args.only is None or name in args.only
        }
        times, first, memory = interleaved(works, args, SLOW)
        for name in works:
            in_rows = None if name not in memory else memory[name] / (4 * K * N)
            found.append(
                {"K": K, "N": N, "method": name, "seconds": times[name]}
                | {"first": first[name], "memory_in_rows": in_rows}
            )
    return {"shapes": found}


@jax.jit
def diagonal(x):
    """sum_t x[t]^2 of inputs [T, K]."""
    return jnp.sum(x * x, axis=0)


@jax.jit
def gram(x):
    """sum_t x[t] x[t]^T, in the precision that calibration takes."""
    return jnp.matmul(x.T, x, precision=HIGHEST)


def part_curvature(args) -> dict[str, Any]:
    """Seconds of a block's sums over all tokens."""
    inputs, batch = (TINY_INPUTS, 256) if args.tiny else (INPUTS, BATCH)
    found = []
    for K in tqdm(inputs, "curvature", file=sys.stderr):
        x = jnp.asarray(np.random.default_rng(K).normal(0, 1, (batch, K)), jnp.float32)
        works = {"hessian_diag": partial(diagonal, x), "hessian": partial(gram, x)}
        times, _, _ = interleaved(works, args)
        for want in works:
            found.append({"K": K, "statistic": want, "seconds": times[want], "tokens": batch})
    return {"inputs": found}


def part_descent(args) -> dict[str, Any]:
    """Seconds of one sweep."""
    K = N = 64 if args.tiny else 1024
    rows, bits = weights(K, N), 3
    hessian = statistics_of(*tokens(K, N, 2 * K, 0, 0)).hessian
    assert hessian is not None
    start = jl.SqueezeLlm(bits=bits, restarts=1).quantize(
        rows, Stats(fisher=jnp.ones((N, K))), name="", dtype=jnp.float32
    )
    codes, levels = unpack(start.codes), start.table.astype(jnp.float32)
    pull = hessian / jnp.diag(hessian)[:, None]
    pull = pull.at[jnp.arange(K), jnp.arange(K)].set(0.0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def of_input(error, code, w, pull, table, i):
        u = w[i] - jnp.matmul(pull[i], error, precision=HIGHEST)
        c = jnp.argmin(jnp.abs(u[None] - table), axis=0).astype(jnp.uint8)
        level = jnp.take_along_axis(table, c[None].astype(jnp.int32), axis=0)[0]
        return error.at[i].set(level - w[i]), code.at[i].set(c)

    def by_input():
        w, table = rows.T, levels.T
        error = jnp.take_along_axis(levels, codes.astype(jnp.int32), axis=1).T - w
        code = codes.T + jnp.uint8(0)
        for i in range(K):
            error, code = of_input(error, code, w, pull, table, i)
        return code.T

    one = jax.jit(partial(descend, cycles=1))

    def by_output():
        return jnp.concatenate(
            [one(rows[j : j + 1], hessian, codes[j : j + 1], levels[j : j + 1]) for j in range(N)]
        )

    works = {
        "blocked": lambda: descend(rows, hessian, codes, levels, cycles=1),
        "input by input": by_input,
        "output by output": by_output,
    }
    times, _, _ = interleaved(works, args)
    expected = works["blocked"]()
    same = {name: float((work() == expected).mean()) for name, work in works.items()}
    return {"K": K, "N": N, "bits": bits, "seconds": times, "same_codes": same}


def part_k_means(args) -> dict[str, Any]:
    """Seconds of all rows, by bits and search."""
    N, K = (4, 96) if args.tiny else (64, 4096)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(0.02 * rng.standard_t(4, (N, K)), jnp.float32)
    felt = jnp.asarray(rng.chisquare(1, (N, K)), jnp.float32)
    keys, found = row_keys(0, "", N), []
    for bits in (3, 4):
        works = {
            "best of 8 starts": partial(k_means, rows, felt, keys, bits=bits),
            "optimum": partial(k_means, rows, felt, keys, bits=bits, exact=True),
        }
        times, first, _ = interleaved(works, args)
        for how in works:
            found.append({"bits": bits, "how": how, "seconds": times[how], "first": first[how]})
    return {"N": N, "K": K, "searches": found}


PARTS = {
    "solvers": part_solvers,
    "curvature": part_curvature,
    "descent": part_descent,
    "k_means": part_k_means,
}


# -- what comes of it


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for; those of a run in --results with the same settings stay."""
    if args.only and "GPTQ" not in args.only:
        raise SystemExit(f"quantization_speed.py: --only must name GPTQ, got {', '.join(args.only)}")
    if args.one_core:  # before JAX starts its threads, which take it over
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run = resume(args, begin(args, {"rounds": args.rounds, "clock": args.clock, "one_core": args.one_core}))
    for what in args.what:
        run[what] = PARTS[what](args)
        save(args, run)
    return run


def totals(run: Run) -> dict[str, list[float]]:
    """Seconds of a block's solves, a round each, by method."""
    block = TINY_BLOCK if run["tiny"] else BLOCK
    found: dict[str, list[float]] = {}
    for r in run["solvers"]["shapes"]:
        times = [block[r["K"], r["N"]] * s for s in r["seconds"]]
        have = found.get(r["method"])
        found[r["method"]] = times if have is None else [a + b for a, b in zip(have, times, strict=True)]
    return found


def curvatures(run: Run) -> dict[str, float]:
    """Median seconds of a block's sums over all tokens, by statistic."""
    inputs = TINY_INPUTS if run["tiny"] else INPUTS
    found: dict[str, float] = {}
    for r in run["curvature"]["inputs"]:
        seconds = statistics.median(r["seconds"]) * TOKENS / r["tokens"] * inputs[r["K"]]
        found[r["statistic"]] = found.get(r["statistic"], 0.0) + seconds
    return found


SECONDS = "median of the rounds (least to most), compiled"


def page(run: Run) -> Page:
    """A table a part."""
    tables = []
    if "solvers" in run:
        tables += [_matrices(run), _block(run)]
    if "descent" in run:
        tables.append(_descent(run["descent"]))
    if "k_means" in run:
        tables.append(_searches(run["k_means"]))
    sizes = run["settings"]
    text = (
        "Solvers of quantization on random matrices of the shapes of a 201 M Llama (width 1024, key heads "
        f"256, feed-forward 2816); {sizes['rounds']} interleaved rounds, {sizes['clock']} clock"
        f"{', one core' if sizes['one_core'] else ''}."
    )
    return Page("How fast quantization's solvers are", text, tables)


def _matrices(run: Run) -> Table:
    columns = {
        "K x N": "inputs and outputs of the matrix",
        "method": "what quantized it",
        "seconds": SECONDS,
        "first, compiling": "seconds of the first run, compilation included",
        "memory / rows": "how far the peak resident size rose in a compiled run, in matrices of float32",
    }
    rows = [
        (f"{r['K']} x {r['N']}", r["method"], show(r["seconds"]), f"{r['first']:.1f}")
        + ("" if r["memory_in_rows"] is None else f"{r['memory_in_rows']:.1f}",)
        for r in run["solvers"]["shapes"]
    ]
    return Table("A matrix, 2 bits, group 32", columns, rows)


def _block(run: Run) -> Table:
    solved = totals(run)
    names = [name for name in ("GPTQ", "GPTQ, one round", "GPTQ, as published") if name in solved]
    summed = curvatures(run) if "curvature" in run else {}
    rows = []
    for name, times in solved.items():
        over = [
            show(ratios(solved[slow], times), 1)
            if len(times) == len(solved[slow])
            else f"{statistics.median(solved[slow]) / times[0]:.1f}"
            for slow in names
        ]
        diagonal = name.startswith("DASH-Q") or name == "RTN, clipped"
        full = ""
        if summed and (diagonal or name in names):
            own = statistics.median(times) + summed["hessian_diag" if diagonal else "hessian"]
            theirs = statistics.median(solved["GPTQ"]) + summed["hessian"]
            full = f"{own:.1f} ({theirs / own:.1f})"
        rows.append((name, show(times), *over, full))
    columns = {"method": "what quantized the block's linears", "seconds": SECONDS}
    columns |= {f"{name} / it": "how many times as long that takes, within a round" for name in names}
    columns["with curvature (GPTQ / it)"] = (
        "seconds with the sums that the method needs (how many times GPTQ)"
    )
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in summed.items())
    text = f"Sums over {TOKENS:,} tokens: {told} a block." if told else ""
    return Table("A block", columns, rows, text)


def _descent(part: dict[str, Any]) -> Table:
    ours = part["seconds"]["blocked"]
    rows = [
        (name, show(times), show(ratios(times, ours), 1), f"{part['same_codes'][name]:.4f}")
        for name, times in part["seconds"].items()
    ]
    columns = {
        "how": "blocked is the library's; the others take one compiled step an input or sweep an output",
        "seconds": SECONDS,
        "times the blocked": "within a round",
        "same codes": "share of codes equal to the blocked descent's",
    }
    return Table(f"LNQ's descent, {part['K']} x {part['N']}, {part['bits']} bits, one sweep", columns, rows)


def _searches(part: dict[str, Any]) -> Table:
    rows = []
    for r in part["searches"]:
        starts = next(s for s in part["searches"] if s["bits"] == r["bits"])
        each = [1e3 * seconds / part["N"] for seconds in r["seconds"]]
        over = show(ratios(r["seconds"], starts["seconds"]), 1)
        rows.append((r["bits"], r["how"], show(each, 2), over, f"{r['first']:.1f}"))
    columns = {
        "bits": "of a code",
        "levels": "how they are found",
        "ms a row": SECONDS,
        "times the starts": "within a round",
        "first, compiling": "seconds of the first run, compilation included",
    }
    return Table(f"Levels of {part['N']} rows of {part['K']} weights", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("quantization_speed", __doc__)
    add = made.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--rounds", type=int, default=5)
    add("--only", nargs="+", help="of `solvers` these methods; GPTQ must be among them")
    add("--one-core", action="store_true", help="use no more (Linux)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: seconds of all threads together")
    tiny = {"rounds": 1, "only": ["GPTQ", "LNQ"]}
    common.main(parse(made, argv, tiny=tiny), measure, page)


if __name__ == "__main__":
    main()
