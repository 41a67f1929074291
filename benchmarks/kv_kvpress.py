"""Eviction beside NVIDIA's kvpress on the same weights and texts: scores, kept sets, divergence, time, bytes.

    python3 -m venv kvpress && kvpress/bin/pip install torch kvpress
    python benchmarks/kv_kvpress.py --model stories260K.bin --text FILE --python kvpress/bin/python \\
        --results docs/results

kvpress runs in its own environment; the two sides exchange token ids and arrays by files. Contexts of 224
tokens are repeated in one chunk, and followed by 96 more, over which the divergence from each side's own
full cache is counted (nats a token). kvpress forces the first four rows to stay, so here they stay as well,
and correlations leave them out. Its KVzip hides evicted rows and keeps their bytes; it looks for keys that no
query at hand sees and may find none for many queries, so it is asked one token at a time. Times are medians
for one context, of one process after the other. Without --python only our side is measured, and the page says
so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import Page, Run, Table, begin, load, model_name, parse, parser, texts, timed

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm import eviction
from jaxllm.cache import repack

SINKS, WINDOW, FUTURE = 4, 32, 128
EVICTED = (0.3, 0.5, 0.7)
METHODS = ("kvzip", "kvzip+", "snapkv", "expected", "tova", "streaming", "random")


def ours(
    model, tokenizer, windows: np.ndarray, context: int, evicted: Sequence[float]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The same arrays and times, from jaxllm."""
    rows, following = windows[:, :context].tolist(), jnp.asarray(windows[:, context:])
    later = following.shape[1]

    @jax.jit
    def after(cache):
        return jax.nn.log_softmax(model(following, cache)[0])

    options = {"tokenizer": tokenizer, "chunk": context}
    cache = jl.prefill(model, rows)
    more: dict[str, dict[str, Any]] = {
        "kvzip": options,
        "kvzip+": options,
        "snapkv": {"window": WINDOW},
        "expected": {"future": FUTURE, "sinks": SINKS},
        "streaming": {"sinks": SINKS},
    }
    scores = {n: eviction.METHODS[n].score(model, cache, rows, **more.get(n, {})) for n in METHODS}
    arrays = {f"{name} scores": np.asarray(x).swapaxes(0, 1) for name, x in scores.items()}
    arrays["expected scores"] = np.exp(arrays["expected scores"])  # kvpress's are no logarithms
    full = after(kv.with_capacity(cache, context + later))
    for name, s in scores.items():
        budget = "global" if name.startswith("kvzip") else "per_head"  # as kvpress's
        if name.startswith("kvzip"):
            s = s.at[..., :SINKS].set(s.max() + 1)
        for c in evicted:
            small = eviction.evict(cache, s, ratio=1 - c, budget=budget, capacity=later)
            kl = jnp.sum(jnp.exp(full) * (full - after(small)), axis=-1).mean(-1)
            arrays[f"{name} kl {c}"] = np.asarray(kl)
            arrays[f"{name} kept {c}"] = kept_mask(small, context)
            strict = eviction.evict(cache, scores[name], ratio=1 - c, strict_threshold=True)
            arrays[f"{name} strict {c}"] = kept_mask(strict, context)
        held = kv.num_bytes(small) - kv.num_bytes(kv.split_context(small)[1])
        arrays[f"{name} held"] = np.asarray(held) / len(rows)
    return arrays, _seconds(model, rows, options, later)


def _seconds(model, rows: list[list[int]], options: dict[str, Any], later: int) -> dict[str, float]:
    """Medians of what one context costs."""
    times: dict[str, list[float]] = {}

    def clock(name: str, function, *given, **more) -> Any:
        got, seconds = timed(partial(function, *given, **more))
        times.setdefault(name, []).append(seconds)
        return got

    for row in [rows[0], *rows]:  # the first compiles
        cache = clock("full prefill", jl.prefill, model, [row])
        scores = clock("kvzip scores", eviction.kvzip_scores, model, cache, [row], **options)
        small = clock("kvzip evict", eviction.evict, cache, scores, ratio=0.3, capacity=later)
        for name, held in (("full", cache), ("kvzip", small)):
            ask = partial(jl.generate, model, None, [[5]], max_new_tokens=32, cache=held, stop_tokens=[])
            ask()
            clock(f"{name} decode", ask)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def kept_mask(cache, context: int) -> np.ndarray:
    """What is kept [B, L, K, T]."""
    kept = repack.positions_by_head(cache)
    out = np.zeros((len(kept[0]), len(kept), len(kept[0][0]), context), bool)
    for layer, requests in enumerate(kept):
        for b, heads in enumerate(requests):
            for head, at in enumerate(heads):
                out[b, layer, head, at] = True
    return out


def strict_threshold(scores: np.ndarray, ratio: float) -> np.ndarray:
    """KVzip's threshold on scores [B, L, K, T]."""
    flat = -np.sort(-scores.reshape(len(scores), -1), axis=1)
    limit = flat[:, max(int(flat.shape[1] * ratio + 1e-9) - 1, 0)]
    return scores > limit[:, None, None, None]


# -- side by side


def divergences(sides: dict[str, dict[str, np.ndarray]], evicted: Sequence[float]) -> dict[str, Any]:
    """(mean, standard error) of each side, by method and part evicted."""

    def told(x: np.ndarray) -> list[float]:
        return [float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))]

    return {
        f"{name} {c}": {side: told(found[f"{name} kl {c}"]) for side, found in sides.items()}
        for name in METHODS
        for c in evicted
    }


def agreement(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Correlations, differences and agreement of kept sets, of methods whose scores kvpress shows."""
    out: dict[str, Any] = {}
    for name in METHODS:
        if f"{name} scores" not in theirs:
            continue
        a, b = (x[f"{name} scores"][..., SINKS:] for x in (mine, theirs))
        out[name] = {
            "correlation": float(np.corrcoef(a.ravel(), b.ravel())[0, 1]),
            "least of a context": min(
                float(np.corrcoef(x.ravel(), y.ravel())[0, 1]) for x, y in zip(a, b, strict=True)
            ),
            "greatest difference": float(np.abs(a - b).max()),
        }
        if name.startswith("kvzip"):
            for c in EVICTED:
                same = (mine[f"{name} kept {c}"] == theirs[f"{name} kept {c}"]).all((1, 2, 3))
                scores = theirs[f"{name} scores"].copy()
                scores[..., :SINKS] = mine[f"{name} scores"][..., :SINKS]  # theirs are replaced
                rule = (mine[f"{name} strict {c}"] == strict_threshold(scores, 1 - c)).all((1, 2, 3))
                out[name][f"contexts with the same set, {c:.0%} evicted"] = [int(same.sum()), len(same)]
                out[name][f"the same by the published threshold, {c:.0%}"] = [int(rule.sum()), len(rule)]
    return out


def measure(args: argparse.Namespace) -> Run:
    """Our side, and kvpress's where there is an interpreter for it."""
    model, tokenizer = load(args)
    ids = tokenizer.encode(_text(args), add_special_tokens=False)
    size = args.context + args.after - 1
    starts = np.linspace(0, len(ids) - size, args.windows).astype(int)
    windows = np.asarray([[tokenizer.bos_token_id, *ids[at : at + size]] for at in starts], np.int32)
    evicted = EVICTED[-1:] if args.tiny else EVICTED
    settings = {"model": model_name(args), "context": args.context, "after": args.after, "evicted": evicted}
    run = begin(args, settings | {"windows": args.windows})
    mine, seconds = ours(model, tokenizer, windows, args.context, evicted)
    sides = {"jaxllm": mine}
    run["seconds"] = {"jaxllm": seconds}
    if args.python is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            jl.save(model, folder / "model", tokenizer, to="huggingface")
            np.save(folder / "windows.npy", windows)
            side = Path(__file__).parent / "sides" / "kvpress_side.py"
            command = [args.python, str(side), str(folder), str(args.context)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            sides["kvpress"] = dict(np.load(folder / "side.npz"))
            run["seconds"]["kvpress"] = json.loads((folder / "side.json").read_text())
        ask = "from importlib.metadata import version; print(version('kvpress'))"
        told = subprocess.run([args.python, "-c", ask], check=True, capture_output=True, text=True)
        run["versions"]["kvpress"] = told.stdout.strip()
        run["agreement"] = agreement(mine, sides["kvpress"])
    run["divergence"] = divergences(sides, evicted)
    run["bytes"] = {side: float(np.mean(found["kvzip held"])) for side, found in sides.items()}
    return run


def _text(args) -> str:
    return "\n".join(texts(args)[0].train) if args.tiny else args.text.read_text("utf-8")


def page(run: Run) -> Page:
    """Divergences, agreement, seconds and bytes."""
    sides, evicted = list(run["seconds"]), run["settings"]["evicted"]
    columns = {"method": "whose scores choose"}
    columns |= {
        f"{c:.0%} evicted, {side}": "divergence from that side's own full cache, nats a token, +- its error"
        for c in evicted
        for side in sides
    }
    rows = [
        (
            name,
            *(
                "{:.5f} +- {:.5f}".format(*run["divergence"][f"{name} {c}"][side])
                for c in evicted
                for side in sides
            ),
        )
        for name in METHODS
    ]
    tables = [Table("Divergence", columns, rows)]
    if "agreement" in run:
        facts = [(n, what, str(x)) for n, found in run["agreement"].items() for what, x in found.items()]
        columns = {
            "method": "whose scores",
            "what": "of scores without the first rows, or of sets",
            "value": "is",
        }
        tables.append(Table("Agreement of scores and of what is kept", columns, facts))
    names = list(dict.fromkeys(name for side in sides for name in run["seconds"][side]))
    columns = {"step": "of one context"} | dict.fromkeys(sides, "median seconds")
    rows = [
        (name, *(f"{x:.4f}" if (x := run["seconds"][side].get(name)) else "" for side in sides))
        for name in names
    ]
    rows.append(("bytes held, 70% evicted", *(f"{run['bytes'][side]:,.0f}" for side in sides)))
    tables.append(Table("Time and bytes", columns, rows))
    settings = run["settings"]
    text = (
        f"Model {settings['model']}; {settings['windows']} contexts of {settings['context']} tokens repeated "
        f"in one chunk, {settings['after']} more judged."
    )
    if "kvpress" not in sides:
        text += " kvpress was left out: no --python of an environment with it was given."
    return Page("Eviction beside NVIDIA's kvpress", text, tables)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("kv_kvpress", __doc__)
    add = made.add_argument
    add("--model", help="a Llama, as `jl.load` takes it")
    add("--text", type=Path)
    add("--python", help="interpreter of an environment with kvpress; without, only our side is measured")
    add("--windows", type=int, default=32, help="contexts")
    add("--context", type=int, default=224, help="tokens")
    add("--after", type=int, default=96, help="tokens that are judged")
    tiny = {"windows": 2, "context": 48, "after": 16}
    common.main(parse(made, argv, tiny=tiny, needs=["model", "text"]), measure, page)


if __name__ == "__main__":
    main()
