"""How fast the solvers of quantization are, on random matrices of the shapes of a 200 M Llama.

    python benchmarks/quantization_speed.py --out results/
    python benchmarks/quantization_speed.py --tiny --out results/       # that it runs; its times mean nothing

    solvers    each method's `solve` on the four shapes of a block of the model that decode.py makes (width
               1024, key heads 256, feed-forward 2816), 2 bits, group 32; compiled, statistics given
    curvature  sums over 128 x 2,048 tokens of what a block's four inputs need: x^2, or x x^T. One batch of 8
               sequences is timed and counted 16 times; the model's own pass, the same for both, is left out
    descent    LNQ's blocked descent, one sweep at 3 bits, against the same sweep input by input (one compiled
               step an input) and output by output (one compiled sweep an output)

Runs are interleaved, their order alternates; medians (least to most), ratios within a round. `--clock cpu`
adds up all threads: on a machine that others use, it is what does not depend on them. Memory is how
far the peak resident size rose during a compiled run, in units of the rows in float32.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import machine, spread
from quantization import measured
from quantization_error import statistics_of, tokens, weights
from quantization_tables import table
from tqdm import tqdm

import jaxllm as jl
from jaxllm.ops.packing import unpack
from jaxllm.quant.methods.lnq import _nearest, descend
from jaxllm.quant.statistics import Stats
from jaxllm.quant.sums import _of_input

BLOCK = {(1024, 1024): 2, (1024, 256): 2, (1024, 2816): 2, (2816, 1024): 1}  # (K, N): how many a block has
INPUTS = {1024: 3, 2816: 1}  # K: how many different inputs a block's linears read
TOKENS, BATCH = 128 * 2048, 8 * 2048
TINY_BLOCK, TINY_INPUTS = {(64, 32): 2, (96, 64): 1}, {64: 3, 96: 1}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HIGHEST = jax.lax.Precision.HIGHEST


def solvers(bits: int, group: int) -> dict[str, Any]:
    """What is timed; those of `SLOW` once only."""
    grid = {"bits": bits, "group": group}
    return {
        "RTN": jl.Rtn(**grid),
        "RTN, clipped": jl.Rtn(**grid, clip=True),
        "GPTQ, as published": jl.Gptq(**grid, act_order=False, clip=False),
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
    for turn in range(args.rounds + 1):
        names = [name for name in works if turn < 2 or name not in once]
        for name in names if turn % 2 else names[::-1]:
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
            name: partial(method.solve, rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
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


def part_curvature(args) -> dict[str, Any]:
    """Seconds of a block's sums over all tokens."""
    inputs, batch = (TINY_INPUTS, 256) if args.tiny else (INPUTS, BATCH)
    found = []
    for K in tqdm(inputs, "curvature", file=sys.stderr):
        x = jnp.asarray(np.random.default_rng(K).normal(0, 1, (batch, K)), jnp.float32)
        part = jnp.ones(batch, jnp.int32)
        compiled = jax.jit(_of_input, static_argnames="want")
        works = {
            want: partial(compiled, x, part, want=frozenset({want})) for want in ("hessian_diag", "hessian")
        }
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
    start = jl.SqueezeLlm(bits=bits, restarts=1).solve(
        rows, Stats(fisher=jnp.ones((N, K))), name="", dtype=jnp.float32
    )
    codes, levels = unpack(start.codes), start.table.astype(jnp.float32)
    pull = hessian / jnp.diag(hessian)[:, None]
    pull = pull.at[jnp.arange(K), jnp.arange(K)].set(0.0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def of_input(error, code, w, pull, table, i):
        u = w[i] - jnp.matmul(pull[i], error, precision=HIGHEST)
        level, c = _nearest(u, table)
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


PARTS = {
    "solvers": part_solvers,
    "curvature": part_curvature,
    "descent": part_descent,
}


# -- what comes of it


def show(values: list[float], digits: int = 3) -> str:
    """Median (least to most)."""
    got = spread(values)
    return f"{got['median']:.{digits}f} ({got['min']:.{digits}f} to {got['max']:.{digits}f})"


def totals(run: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of a block's solves, a round each, by method."""
    block = TINY_BLOCK if run["tiny"] else BLOCK
    found: dict[str, list[float]] = {}
    for r in run["solvers"]["shapes"]:
        times = [block[r["K"], r["N"]] * s for s in r["seconds"]]
        have = found.get(r["method"])
        found[r["method"]] = times if have is None else [a + b for a, b in zip(have, times, strict=True)]
    return found


def curvatures(run: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a block's sums over all tokens, by statistic."""
    inputs = TINY_INPUTS if run["tiny"] else INPUTS
    found: dict[str, float] = {}
    for r in run["curvature"]["inputs"]:
        seconds = statistics.median(r["seconds"]) * TOKENS / r["tokens"] * inputs[r["K"]]
        found[r["statistic"]] = found.get(r["statistic"], 0.0) + seconds
    return found


def markdown(run: dict[str, Any]) -> str:
    lines = [
        "# Solvers",
        "",
        f"{run['date']}, {run['machine']}, jax {run['jax']}; {run['rounds']} rounds.",
        "",
    ]
    if "solvers" in run:
        lines += ["## A matrix, 2 bits, group 32", ""]
        shapes = [
            (f"{r['K']} x {r['N']}", r["method"], show(r["seconds"]), f"{r['first']:.1f}")
            + ("" if r["memory_in_rows"] is None else f"{r['memory_in_rows']:.1f}",)
            for r in run["solvers"]["shapes"]
        ]
        lines += table(("K x N", "method", "seconds", "first, compiling", "memory / rows"), shapes)
        lines += ["## A block", "", *_block(run)]
    if "descent" in run:
        part = run["descent"]
        ours = part["seconds"]["blocked"]
        rows = []
        for name, times in part["seconds"].items():
            ratio = show([a / b for a, b in zip(times, ours, strict=True)], 1)
            rows.append((name, show(times), ratio, f"{part['same_codes'][name]:.4f}"))
        lines += [f"## LNQ's descent, {part['K']} x {part['N']}, {part['bits']} bits, one sweep", ""]
        lines += table(("how", "seconds", "times the blocked", "same codes"), rows)
    return "\n".join(lines)


def _block(run: dict[str, Any]) -> list[str]:
    solved = totals(run)
    names = [name for name in ("GPTQ", "GPTQ, one round", "GPTQ, as published") if name in solved]
    summed = curvatures(run) if "curvature" in run else {}
    rows = []
    for name, times in solved.items():
        ratios = [
            show([a / b for a, b in zip(solved[slow], times, strict=False)], 1)
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
        rows.append((name, show(times), *ratios, full))
    head = ("method", "seconds", *(f"{name} / it" for name in names), "with curvature (GPTQ / it)")
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in summed.items())
    return table(head, rows) + ([f"Sums over {TOKENS:,} tokens: {told} a block.", ""] if told else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    add("--rounds", type=int, default=5)
    add("--only", nargs="+", help="of `solvers` these methods; GPTQ must be among them")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: seconds of all threads together")
    add("--tiny", action="store_true", help="tiny matrices")
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "quantization_speed.json"
    run: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    run |= {"date": datetime.date.today().isoformat(), "machine": machine(), "jax": version("jax")}
    run |= {"rounds": args.rounds, "tiny": args.tiny, "clock": args.clock}
    for what in args.what:
        run[what] = PARTS[what](args)
        file.write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "quantization_speed.md").write_text(markdown(run))
    print(markdown(run))


if __name__ == "__main__":
    main()
