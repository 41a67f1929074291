"""What choosing between fp16 and fp8 by load does to latency: traces through a simulated engine.

    python benchmarks/precision_load.py --profile CSV --traces CSV CSV --results docs/results

SIMULATED: nothing is computed. What a step costs is stated by the profile (Vidur's measured times of
Llama-2-7B's operations on an H100, one row a number of tokens) and by these assumptions: products in fp16
mode take 1.064 times the profile's (NestedFP's overhead, arXiv:2506.02024, section 5.2), in fp8 mode half of
it; other operations are the same in both; attention reads keys and values (2 x 4096 x 32 layers x 2 bytes a
row) at 80 % of 3.35 TB/s. Policies: fp16 only, fp8 only, the paper's rule of 1,024 tokens, and an objective
with hysteresis.
"""

import argparse
import csv
import datetime
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, resume, save
from tqdm import tqdm

from jaxllm.precision import Always, LatencyObjective, Load, Request, TokenThreshold, replay

PRODUCTS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
OTHERS = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add", "add")
LAYERS, WIDTH, BANDWIDTH = 32, 4096, 0.8 * 3.35e12
OVERHEAD, HALF = 1.064, 0.5
TINY_PROFILE = ((1.0, 0.2, 0.02), (1024.0, 0.7, 0.1), (4096.0, 2.4, 0.4))  # tokens, products, others in ms


class H100:
    """Seconds of a step by a profile: (tokens, milliseconds of a layer's products and of all else)."""

    def __init__(self, profile: Sequence[tuple[float, float, float]]):
        self.tokens, self.products, self.others = np.asarray(sorted(profile)).T

    def __call__(self, level: int, load: Load) -> float:
        """At level 0 fp16, at 1 fp8."""
        products, others = (
            float(np.interp(load.tokens, self.tokens, times)) for times in (self.products, self.others)
        )
        rows = 2 * WIDTH * LAYERS * 2 * load.context / BANDWIDTH
        return LAYERS * ((HALF if level else OVERHEAD) * products + others) / 1e3 + rows


def read_profile(file: Path) -> list[tuple[float, float, float]]:
    """Median milliseconds of a layer on one GPU."""
    found = []
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["num_tensor_parallel_workers"] == "1":
                sums = (
                    sum(float(row[f"time_stats.{op}.median"]) for op in ops) for ops in (PRODUCTS, OTHERS)
                )
                found.append((float(row["num_tokens"]), *sums))
    return found


def read_trace(file: Path, limit: int, rate: float) -> list[Request]:
    """The first requests of one of Azure's traces, coming `rate` times as fast."""
    requests: list[Request] = []
    opened = gzip.open(file, "rt", newline="") if file.suffix == ".gz" else file.open(newline="")
    with opened as lines:
        for row in csv.DictReader(lines):
            time = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() / rate
            start = requests[0].arrival if requests else time
            requests.append(Request(time, int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))))
            if len(requests) == limit:
                break
    start = requests[0].arrival
    return sorted(Request(r.arrival - start, r.prompt, r.new) for r in requests)


def tiny_trace() -> list[Request]:
    """A burst between calm minutes."""
    rng = np.random.default_rng(0)
    arrivals = np.sort(np.concatenate([rng.random(20) * 20, 8 + rng.random(30)]))
    return [Request(float(t), int(rng.integers(10, 900)), int(rng.integers(1, 40))) for t in arrivals]


def measure(args: argparse.Namespace) -> Run:
    """One entry a trace, rate and policy."""
    names = ("limit", "rates", "step", "first", "batch", "tokens")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"traces": [file.name for file in args.traces], "profile": args.profile and args.profile.name}
    run = resume(args, begin(args, settings))
    cost = H100(TINY_PROFILE if args.tiny else read_profile(args.profile))
    policies: dict[str, Any] = {
        "fp16 only": Always(0),
        "fp8 only": Always(1),
        "paper: fp8 above 1,024 tokens": TokenThreshold(1024),
        "ours: the objective, with hysteresis": LatencyObjective(step=args.step, first=args.first, cost=cost),
    }
    run["replays"] = []
    for name in args.traces or ["a burst"]:
        for rate in args.rates:
            requests = tiny_trace() if args.tiny else read_trace(name, args.limit, rate)
            for who, policy in tqdm(policies.items(), f"{name} x {rate:g}", file=sys.stderr):
                found = replay(requests, policy, cost, batch=args.batch, tokens=args.tokens)
                run["replays"].append(
                    {
                        "trace": str(getattr(name, "name", name)),
                        "rate": rate,
                        "policy": who,
                        "requests per second": len(requests) / max(requests[-1].arrival, 1e-9),
                        "within": found.within(first=args.first, step=args.step),
                        "fp16 steps": int(found.levels[0]) / int(found.levels.sum()),
                        "fp16 tokens": int(found.tokens[0]) / int(found.tokens.sum()),
                        "first p90": float(np.quantile(found.first, 0.9)),
                        "between p90": float(np.quantile(found.between, 0.9)),
                    }
                )
        save(args, run)
    return run


def page(run: Run) -> Page:
    """A table."""
    s = run["settings"]
    text = (
        "**Simulated**: step times are those of a measured profile and stated assumptions (the script's "
        f"docstring); no model ran. Objectives: first token within {s['first']:g} s, {1e3 * s['step']:g} ms "
        f"between tokens on average. Up to {s['batch']} requests and {s['tokens']:,} tokens a step, the "
        f"first {s['limit']:,} requests of each trace."
    )
    columns = {
        "trace": "file, and how many times as fast requests come",
        "policy": "who chooses the mode of each step",
        "req/s": "requests that come a second",
        "within": "share of requests within both objectives",
        "fp16 steps": "share of steps in fp16",
        "fp16 tokens": "share of tokens",
        "first p90": "seconds to the first token, of nine in ten requests at most",
        "between p90": "milliseconds between tokens",
    }
    rows = [
        (
            f"{r['trace']} x {r['rate']:g}",
            r["policy"],
            f"{r['requests per second']:.1f}",
            f"{r['within']:.1%}",
            f"{r['fp16 steps']:.1%}",
            f"{r['fp16 tokens']:.1%}",
            f"{r['first p90']:.2f}",
            f"{1e3 * r['between p90']:.1f}",
        )
        for r in run["replays"]
    ]
    return Page("Precision by load (simulated)", text, [Table("Traces", columns, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("precision_load", __doc__)
    add = made.add_argument
    add("--profile", type=Path, help="Vidur's profile of Llama-2-7B's operations")
    add("--traces", type=Path, nargs="+", default=[], help="CSV of Azure's columns, also gzipped")
    add("--limit", type=int, default=8000, help="requests of a trace")
    add("--rates", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="times as fast as they came")
    add("--step", type=float, default=0.033, help="seconds between tokens that are asked for")
    add("--first", type=float, default=1.0, help="seconds to the first token")
    add("--batch", type=int, default=256)
    add("--tokens", type=int, default=2048)
    tiny = {"limit": 50, "rates": [1.0], "batch": 16, "tokens": 512}
    common.main(parse(made, argv, tiny=tiny, needs=("profile",)), measure, page)


if __name__ == "__main__":
    main()
