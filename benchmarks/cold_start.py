"""What a first run waits for: with no compiled programs kept, and with all of them.

    python benchmarks/cold_start.py --results docs/results

Each task runs in fresh processes on pico's draft: the first finds JAX's compilation cache empty, the second
finds what the first left there, as the command line keeps it between runs. In the second process the task
runs once more, when nothing is left to compile. Seconds are of the task alone, not of importing and loading.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, save
from tqdm import tqdm

import jaxllm as jl
from jaxllm.quant.calibrate import calibrate

STATISTICS = {"fisher", "guided_hessian", "hessian", "hessian_diag", "mean", "thresholds"}


def generate(model, tokenizer, tokens) -> Any:
    """Some tokens after a prompt."""
    return jl.generate(model, tokenizer, [tokens[0].tolist()], max_new_tokens=32, seed=0)


def prefill(model, tokenizer, tokens) -> Any:
    """A cache of one text."""
    return jl.prefill(model, [tokens[0].tolist()])


def kvzip(model, tokenizer, tokens) -> Any:
    """The same, and which of its pairs can go."""
    ids = [tokens[0].tolist()]
    return jl.eviction.kvzip_scores(model, jl.prefill(model, ids), ids, tokenizer=tokenizer)


def statistics(model, tokenizer, tokens) -> Any:
    """All statistics of some texts."""
    return calibrate(model, tokens, want=STATISTICS, progress=False)


def quantize(method: Any) -> Callable[..., Any]:
    """A model by a method."""
    return lambda model, tokenizer, tokens: jl.quantize(model, method, tokens, progress=False)


TASKS: dict[str, Callable[..., Any]] = {
    "prefill": prefill,
    "generate": generate,
    "KVzip's scores": kvzip,
    "calibrate": statistics,
    "RTN": quantize(jl.Rtn(bits=4)),
    "AWQ": quantize(jl.Awq(bits=4)),
    "GPTQ": quantize(jl.Gptq(bits=4)),
    "DASH-Q": quantize(jl.DashQ(bits=3)),
    "SqueezeLLM": quantize(jl.SqueezeLlm(bits=3)),
    "LNQ": quantize(jl.Lnq(bits=3)),
    "Any-Precision": quantize(jl.AnyPrecision()),
}


def run_once(args: argparse.Namespace) -> None:
    """In a process of its own: prints the seconds of a task, and of the same again."""
    model, tokenizer = common.load(args, "draft")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (args.texts, args.tokens))
    seconds = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(jax.tree.leaves(TASKS[args.task](model, tokenizer, tokens)))
        seconds.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    print(json.dumps(seconds))


def measure(args: argparse.Namespace) -> Run:
    """All tasks, each with an empty cache and a filled one."""
    run = begin(args, {"texts": args.texts, "tokens": args.tokens, "rounds": args.rounds}) | {"results": []}
    for name in tqdm(args.only, "tasks", file=sys.stderr):
        found: dict[str, Any] = {"task": name, "empty": [], "filled": [], "again": []}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as cache:
                found["empty"].append(process(args, name, cache)[0])
                once, again = process(args, name, cache)
                found["filled"].append(once)
                found["again"].append(again)
        run["results"].append(found)
        save(args, run)
    return run


def process(args: argparse.Namespace, task: str, cache: str) -> list[dict[str, float]]:
    """What `run_once` prints in a fresh process that keeps compiled programs in `cache`."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sizes = [f"--texts={args.texts}", f"--tokens={args.tokens}", *(["--tiny"] if args.tiny else [])]
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, *sizes]
    done = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cold_start.py: {task} must run in a process of its own, got {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def page(run: Run) -> Page:
    """The page."""
    rows = [
        [one["task"]]
        + [
            common.show([x[clock] for x in one[when]], 2)
            for clock in ("cpu", "wall")
            for when in ("empty", "filled", "again")
        ]
        for one in run["results"]
    ]
    sizes = run["settings"]
    columns = {"task": "what runs in a fresh process, on pico's draft"}
    for clock, words in (("CPU", "seconds of all threads"), ("wall", "seconds on the wall")):
        columns[f"{clock}, empty"] = f"{words}, of the first run with an empty compilation cache"
        columns[f"{clock}, filled"] = f"{words}, of the first run with a filled one"
        columns[f"{clock}, again"] = f"{words}, of a second run in one process"
    text = (
        f"Texts for calibration: {sizes['texts']} of {sizes['tokens']} random tokens; a prompt is the first."
    )
    return Page("What a first run waits for", text, [Table("Seconds", columns, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("cold_start", __doc__)
    made.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    made.add_argument("--task", choices=TASKS, help="run this one here and print its seconds")
    made.add_argument("--texts", type=int, default=8)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=1)
    args = parse(made, argv, tiny={"only": ["prefill"], "texts": 2, "tokens": 16})
    if args.task:
        run_once(args)
        return
    common.main(args, measure, page)


if __name__ == "__main__":
    main()
