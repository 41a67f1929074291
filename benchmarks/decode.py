"""Greedy decoding on a CPU: jaxllm against Hugging Face transformers on the same random weights.

    python benchmarks/decode.py --results docs/results    about 200 M parameters, some minutes

A random Llama-shaped model is written once by transformers and loaded by both. Each library lives
in one process of its own for the whole run and is told by a pipe when to work, so that the threads
of one do not disturb the other; within a round both get the same prompts, and who goes first
alternates. Medians over rounds, with the least and the greatest; ratios are taken within a round.

    prefill   from the call to each request's first token (all of the prompt, one row of logits)
    decode    from the first token to the last: (new - 1) x batch tokens
    total     the whole call: new x batch tokens

transformers is run as a user would: `generate`, its default attention and cache, torch's default
threads; times within a call are taken by a stopping criterion, which sees every token. jaxllm's
are those of `jl.generate(..., timings=True)`. Compiling is left out (the first call of each setting,
reported as `first_call_s`). GB/s is the weights read a step (embedding left out) times steps a second, to be
held against `read_gb_per_s`, what a matrix-vector product of numpy reads on the same machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, ratios, rounds, save, show, timed
from tqdm import tqdm

LIBRARIES = ("transformers", "jaxllm")
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}
PARTS = ("prefill", "decode", "total")
PAUSE_S = 0.3  # between turns: threads that spin while they wait for work come to rest


class Remote:
    """One side, and the pipe to it."""

    def __init__(self, library: str, python: str):
        self.library = library
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "sides" / "decode_workers.py"), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )

    def __call__(self, name: str, **arguments) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if answer and "error" in answer:
            raise SystemExit(f"decode.py: {self.library} failed in {name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the side."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def read_gb_per_s(side: int) -> float:
    """Bytes a second that a float32 matrix-vector product of numpy reads, best of 7."""
    matrix, vector = np.ones((side, side), np.float32), np.ones((side,), np.float32)
    best = min(timed(lambda: matrix @ vector)[1] for _ in range(7))
    return matrix.nbytes / best / 1e9


def setting(remotes: dict[str, Remote], vocab: int, batch: int, args, bar: tqdm) -> dict[str, Any]:
    """Seconds of each round, by library and part; seconds of the first call; the share of equal tokens."""
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in remotes}
    first: dict[str, float] = {}
    made: dict[str, list[Any]] = {name: [] for name in remotes}
    for turn, name in rounds(remotes, args.rounds):
        prompts = np.random.default_rng(turn).integers(3, vocab, (batch, args.prompt)).tolist()
        time.sleep(PAUSE_S)
        got = remotes[name]("run", prompts=prompts, new=args.new)
        made[name].append(got["ids"])
        bar.update(1)
        if turn == 0:
            first[name] = got["total"]
            continue
        seconds[name]["prefill"].append(got["prefill"])
        seconds[name]["decode"].append(got["total"] - got["prefill"])
        seconds[name]["total"].append(got["total"])
    same = np.mean(np.array(made[LIBRARIES[0]]) == np.array(made[LIBRARIES[1]]))
    return {"seconds": seconds, "first_call_s": first, "same_tokens": float(same)}


def measure(args: argparse.Namespace) -> Run:
    """Both libraries at each type and batch."""
    shape = TINY if args.tiny else SHAPE
    settings = {"model": shape, "prompt": args.prompt, "new": args.new, "rounds": args.rounds}
    run = begin(args, settings, ("transformers", "torch")) | {"results": []}
    run["read_gb_per_s"] = read_gb_per_s(1024 if args.tiny else 8192)
    pythons = {"transformers": sys.executable, "jaxllm": args.jaxllm_python}
    remotes = {name: Remote(name, pythons[name]) for name in LIBRARIES}
    count = len(args.dtype) * len(args.batch) * (args.rounds + 1) * len(remotes)
    try:
        with tempfile.TemporaryDirectory() as folder, tqdm(total=count, file=sys.stderr) as bar:
            remotes["transformers"]("make", shape=shape, directory=folder)
            run["versions"]["jax"] = remotes["jaxllm"]("version")
            for dtype in args.dtype:
                loaded = {
                    name: remote("load", directory=folder, dtype=dtype) for name, remote in remotes.items()
                }
                for batch in args.batch:
                    got = setting(remotes, shape["vocab_size"], batch, args, bar)
                    entry = {"dtype": dtype, "batch": batch, "step_bytes": loaded["jaxllm"]["step_bytes"]}
                    run["results"].append(entry | got)
                    save(args, run)
    finally:
        for remote in remotes.values():
            remote.close()
    return run


# -- the page


def page(run: Run) -> Page:
    """Ratios, and tokens a second."""
    settings = run["settings"]
    shape = settings["model"]
    text = (
        f"Greedy decoding of the same random Llama-shaped weights (width {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, vocabulary {shape['vocab_size']:,}) on a CPU; prompts of "
        f"{settings['prompt']} tokens, {settings['new']} new ones, {settings['rounds']} interleaved rounds; "
        "medians (least to most). numpy's matrix-vector product reads "
        f"{run['read_gb_per_s']:.1f} GB/s on this machine."
    )
    return Page("Decoding against transformers", text, [_ratios(run), _speeds(run)])


PARTS_ARE = {
    "prefill": "from the call to the first token of every request",
    "decode": "from the first token to the last",
    "total": "the whole call",
}


def _ratios(run: Run) -> Table:
    columns = {"type": "of weights and cache", "batch": "requests at once"} | PARTS_ARE
    columns["equal tokens"] = "share of tokens that both made alike"
    rows = []
    for r in run["results"]:
        theirs, ours = (r["seconds"][name] for name in LIBRARIES)
        faster = (show(ratios(theirs[part], ours[part]), 2) for part in PARTS)
        rows.append((r["dtype"], r["batch"], *faster, f"{r['same_tokens']:.1%}"))
    text = "How many times as many tokens a second jaxllm makes, within a round."
    return Table("jaxllm / transformers", columns, rows, text)


def _speeds(run: Run) -> Table:
    columns = {"type": "of weights and cache", "batch": "requests at once", "library": "who"} | PARTS_ARE
    columns["GB/s"] = "weights read while decoding, the embedding left out"
    columns["first call"] = "seconds of the first call, compilation included"
    settings, rows = run["settings"], []
    for r in run["results"]:
        batch = r["batch"]
        tokens = {"prefill": settings["prompt"], "decode": settings["new"] - 1, "total": settings["new"]}
        for name, seconds in r["seconds"].items():
            speeds = {part: [batch * tokens[part] / s for s in seconds[part]] for part in PARTS}
            read = statistics.median(speeds["decode"]) / batch * r["step_bytes"] / 1e9
            shown = (show(speeds[part], 1) for part in PARTS)
            rows.append((r["dtype"], batch, name, *shown, f"{read:.1f}", f"{r['first_call_s'][name]:.1f}"))
    return Table("Tokens a second", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("decode", __doc__)
    add = made.add_argument
    add("--rounds", type=int, default=7, help="timed rounds a setting")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--new", type=int, default=64, help="tokens to make")
    add("--dtype", nargs="+", default=["float32", "bfloat16"])
    add("--batch", nargs="+", type=int, default=[1, 8])
    add(
        "--jaxllm-python",
        default=sys.executable,
        help="another environment's python for jaxllm, such as one with a newer jax",
    )
    tiny = {"rounds": 1, "prompt": 16, "new": 8, "dtype": ["float32"], "batch": [2]}
    args = parse(made, argv, tiny=tiny)
    if min(args.rounds, args.prompt, args.new - 1, *args.batch) < 1:
        made.error("rounds, prompt and batch must be positive, new at least 2")
    common.main(args, measure, page)


if __name__ == "__main__":
    main()
