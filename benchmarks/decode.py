"""Greedy decoding on a CPU: jaxllm against Hugging Face transformers on the same random weights.

    python benchmarks/decode.py --out results/    about 200 M parameters, some minutes
    python benchmarks/decode.py --tiny            checks that it runs; its times mean nothing

A random Llama-shaped model is written once by transformers and loaded by both. Each library lives
in one process of its own for the whole run and is told by a pipe when to work, so that the threads
of one do not disturb the other; within a round both get the same prompts, and who goes first
alternates. Medians over rounds, with the least and the greatest; ratios are taken within a round.

    prefill   from the call to each request's first token (all of the prompt, one row of logits)
    decode    from the first token to the last: (new - 1) x batch tokens
    total     the whole call: new x batch tokens

transformers is run as a user would: `generate`, its default attention and cache, torch's default
threads; times within a call are taken by a stopping criterion, which sees every token; jaxllm's
are `generate(..., timings=True)`. Compiling is left out (the first call of
each setting, reported as `first_call_s`). GB/s is the weights read a step (embedding left out)
times steps a second, to be held against `read_gb_per_s`, what a matrix-vector product of numpy
reads on the same machine.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
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


class TransformersWorker:
    """Hugging Face transformers on torch."""

    def make(self, shape: dict[str, int], directory: str) -> None:
        """Writes a random model."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **shape,
            max_position_embeddings=2048,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(directory)

    def load(self, directory: str, dtype: str) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = None  # the old one goes before the new one comes
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.model.eval()
        return {"threads": torch.get_num_threads()}

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import torch
        from transformers import StoppingCriteriaList

        times = []

        def note(ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note]),
        )
        end = time.perf_counter()
        made = out[:, ids.shape[1] :].tolist()
        return {"prefill": times[0] - start, "total": end - start, "ids": made}


class JaxllmWorker:
    """This library."""

    def version(self) -> str:
        """The jax that runs it."""
        return version("jax")

    def load(self, directory: str, dtype: str) -> dict[str, Any]:
        import jax.numpy as jnp

        from checkpoints_convert import huggingface
        from jaxllm.measure.report import report_bytes

        self.model = None
        self.model, _ = huggingface.load(directory, dtype=jnp.dtype(dtype))
        report = report_bytes(self.model)
        table = next(part.weight_bytes for part in report.layers if part.name == "embedding")
        return {"weight_bytes": report.weight_bytes, "step_bytes": report.weight_bytes - table}

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import jaxllm as jl

        start = time.perf_counter()
        outs = jl.generate(self.model, None, prompts, max_new_tokens=new, stop_tokens=(), timings=True)
        end = time.perf_counter()
        made = [out.token_ids for out in outs]
        return {"prefill": outs[0].timings.prefill_s, "total": end - start, "ids": made}


WORKERS = {"transformers": TransformersWorker, "jaxllm": JaxllmWorker}


def serve(library: str) -> None:
    """A worker's life: one JSON line in, the method's answer as one JSON line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    worker = WORKERS[library]()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = getattr(worker, name)(**arguments)
        except Exception as error:  # told to the parent, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Remote:
    """The parent's end of a worker."""

    def __init__(self, library: str, python: str):
        self.library = library
        self.process = subprocess.Popen(
            [python, __file__, "--worker", library],
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
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def read_gb_per_s(side: int = 8192) -> float:
    """Bytes a second that a float32 matrix-vector product of numpy reads, best of 7."""
    matrix, vector = np.ones((side, side), np.float32), np.ones((side,), np.float32)
    best = min(_seconds(lambda: matrix @ vector) for _ in range(7))
    return matrix.nbytes / best / 1e9


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    remotes: dict[str, Remote],
    directory: str,
    vocab: int,
    *,
    dtypes: list[str],
    batches: list[int],
    prompt: int,
    new: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """One entry a setting (dtype, batch)."""
    settings = []
    bar = tqdm(total=len(dtypes) * len(batches) * (rounds + 1) * len(remotes), file=sys.stderr)
    for dtype in dtypes:
        loaded = {name: remote("load", directory=directory, dtype=dtype) for name, remote in remotes.items()}
        step_bytes = loaded["jaxllm"]["step_bytes"]
        for batch in batches:
            times: dict[str, dict[str, list[float]]] = {
                name: {part: [] for part in PARTS} for name in remotes
            }
            first: dict[str, float] = {}
            same = []
            for turn in range(rounds + 1):
                rng = np.random.default_rng(turn)
                prompts = rng.integers(3, vocab, (batch, prompt)).tolist()
                made = {}
                order = list(remotes) if turn % 2 else list(remotes)[::-1]
                for name in order:
                    time.sleep(PAUSE_S)
                    got = remotes[name]("run", prompts=prompts, new=new)
                    made[name] = got["ids"]
                    bar.update(1)
                    if turn == 0:
                        first[name] = got["total"]
                        continue
                    times[name]["prefill"].append(got["prefill"])
                    times[name]["decode"].append(got["total"] - got["prefill"])
                    times[name]["total"].append(got["total"])
                a, b = (np.array(made[name]) for name in LIBRARIES)
                same.append(float((a == b).mean()))
            tokens = {"prefill": batch * prompt, "decode": batch * (new - 1), "total": batch * new}
            entry: dict[str, Any] = {
                "dtype": dtype,
                "batch": batch,
                "same_tokens": statistics.mean(same),
                "libraries": {},
            }
            for name in LIBRARIES:
                speeds = {part: spread([tokens[part] / s for s in times[name][part]]) for part in PARTS}
                steps_per_s = speeds["decode"]["median"] / batch
                entry["libraries"][name] = {
                    "tokens_per_s": speeds,
                    "first_call_s": first[name],
                    "gb_per_s": steps_per_s * step_bytes / 1e9,
                }
            entry["jaxllm_over_transformers"] = {
                part: spread(
                    [
                        theirs / ours
                        for ours, theirs in zip(
                            times["jaxllm"][part], times["transformers"][part], strict=True
                        )
                    ]
                )
                for part in PARTS
            }
            settings.append(entry)
    bar.close()
    return settings


def machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def show(got: dict[str, float], digits: int) -> str:
    """Median (least..greatest)."""
    median, least, most = (f"{got[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least}..{most})"


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    run = report["settings"]
    lines = [
        f"{report['date']}, {report['machine']}, Python {report['versions']['python']}, "
        + ", ".join(f"{name} {report['versions'][name]}" for name in PACKAGES)
        + f". Prompt {run['prompt']}, {run['new']} new tokens, {run['rounds']} interleaved rounds; "
        f"median (least..greatest), tokens/s. numpy reads {report['read_gb_per_s']:.1f} GB/s.",
        "",
        "| type | batch | library | prefill | decode | total | GB/s | first call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in report["results"]:
        kind = f"| {entry['dtype']} | {entry['batch']} |"
        for name, got in entry["libraries"].items():
            speeds = " | ".join(show(got["tokens_per_s"][part], 1) for part in PARTS)
            lines.append(f"{kind} {name} | {speeds} | {got['gb_per_s']:.1f} | {got['first_call_s']:.1f} s |")
        ratios = " | ".join(show(entry["jaxllm_over_transformers"][part], 2) for part in PARTS)
        lines.append(f"{kind} jaxllm / transformers | {ratios} | | |")
    lines.append("")
    lines.append(
        "Equal tokens: "
        + ", ".join(
            f"{entry['dtype']} x {entry['batch']}: {entry['same_tokens']:.1%}" for entry in report["results"]
        )
        + "."
    )
    return "\n".join(lines)


PACKAGES = ("jax", "transformers", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds a setting (default 7, tiny 2)")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (default 128, tiny 16)")
    parser.add_argument("--new", type=int, help="tokens to make (default 64, tiny 8)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--out", type=Path, help="folder for decode.json and decode.md")
    parser.add_argument(
        "--jaxllm-python",
        default=sys.executable,
        help="another environment's python for jaxllm, such as one with a newer jax",
    )
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker)
        return
    rounds = args.rounds or (2 if args.tiny else 7)
    prompt = args.prompt or (16 if args.tiny else 128)
    new = args.new or (8 if args.tiny else 64)
    if min(rounds, prompt, new - 1, *args.batch) < 1:
        parser.error("rounds, prompt and batch must be positive, new at least 2")
    shape = TINY if args.tiny else SHAPE
    before = read_gb_per_s(1024 if args.tiny else 8192)
    pythons = {"transformers": sys.executable, "jaxllm": args.jaxllm_python}
    remotes = {name: Remote(name, pythons[name]) for name in LIBRARIES}
    try:
        with tempfile.TemporaryDirectory() as directory:
            remotes["transformers"]("make", shape=shape, directory=directory)
            used_jax = remotes["jaxllm"]("version")
            results = measure(
                remotes,
                directory,
                shape["vocab_size"],
                dtypes=args.dtype,
                batches=args.batch,
                prompt=prompt,
                new=new,
                rounds=rounds,
            )
    finally:
        for remote in remotes.values():
            remote.close()
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in PACKAGES[1:]},
            "jax": used_jax,
        },
        "model": shape,
        "settings": {"prompt": prompt, "new": new, "rounds": rounds},
        "read_gb_per_s": before,
        "results": results,
    }
    text = markdown(report)
    print(text)
    print(json.dumps(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "decode.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
