"""Eviction beside NVIDIA's kvpress on the same weights and texts: scores, kept sets, divergence, time, bytes.

    python3 -m venv kvpress && kvpress/bin/pip install torch kvpress
    python benchmarks/kv_kvpress.py --model stories260K.bin --text FILE --python kvpress/bin/python --out DIR

kvpress runs in its own environment; the two sides exchange token ids and arrays by files. Contexts of 224
tokens are repeated in one chunk, and followed by 96 more, over which the divergence from each side's own
full cache is counted (nats a token). kvpress forces the first four rows to stay, so here they stay as well,
and correlations leave them out. Its KVzip hides evicted rows and keeps their bytes; it looks for keys that no
query at hand sees and may find none for many queries, so it is asked one token at a time. Times are medians
for one context, of one process after the other.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.cache import repack
from jaxllm.decoding import prefill
from jaxllm.eviction import baselines, kvzip

CONTEXT, AFTER, SINKS, WINDOW, FUTURE = 224, 96, 4, 32, 128
EVICTED = (0.3, 0.5, 0.7)
METHODS = ("kvzip", "kvzip+", "snapkv", "expected", "tova", "streaming", "random")


def timed(times: list[float], do: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    out = do()
    times.append(time.perf_counter() - start)
    return out


# -- in kvpress's environment


def rival(folder: Path) -> None:
    """Reads windows.npy and the model, writes rival.npz and rival.json."""
    import kvpress
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    seen: dict[str, Any] = {}

    class Zip(kvpress.KVzipPress):
        def compress_post(self, model):
            seen["scores"] = self.score_val[:, 0].clone().numpy()
            super().compress_post(model)

    class Expected(kvpress.ExpectedAttentionPress):
        def score(self, *arguments, **named):
            scores = super().score(*arguments, **named)
            seen.setdefault("layers", []).append(scores[0].clone().numpy())
            return scores

    make: dict[str, Callable[[float], Any]] = {
        "kvzip": lambda c: Zip(c),
        "kvzip+": lambda c: Zip(c, kvzip_plus_normalization=True),
        "snapkv": lambda c: kvpress.SnapKVPress(c, window_size=WINDOW),
        "expected": lambda c: Expected(c, n_future_positions=FUTURE, n_sink=SINKS),
        "tova": lambda c: kvpress.TOVAPress(c),
        "streaming": lambda c: kvpress.StreamingLLMPress(c, n_sink=SINKS),
        "random": lambda c: kvpress.RandomPress(c),
    }
    model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa").eval()
    windows = torch.as_tensor(np.load(folder / "windows.npy"), dtype=torch.long)
    positions = torch.arange(CONTEXT, CONTEXT + AFTER)[None]
    arrays: dict[str, list[np.ndarray]] = {}
    times: dict[str, list[float]] = {}

    def read(row, press):
        cache = DynamicCache()
        if press is None:
            model.model(input_ids=row[None, :CONTEXT], past_key_values=cache)
        else:
            with press(model):
                model.model(input_ids=row[None, :CONTEXT], past_key_values=cache)
        return cache

    def after(row, cache, at_once=AFTER):
        logits = []
        for i in range(0, AFTER, at_once):
            piece = row[None, CONTEXT + i : CONTEXT + i + at_once]
            at = positions[:, i : i + at_once]
            logits.append(model(input_ids=piece, past_key_values=cache, position_ids=at).logits[0])
        return torch.log_softmax(torch.cat(logits).float(), dim=-1)

    def decode(row, cache):
        token = row[None, CONTEXT : CONTEXT + 1]
        for step in range(32):
            at = torch.tensor([[CONTEXT + step]])
            out = model(input_ids=token, past_key_values=cache, position_ids=at)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    with torch.no_grad():
        for row in windows:
            cache = timed(times.setdefault("full prefill", []), lambda row=row: read(row, None))
            full = after(row, cache)
            cache = read(row, None)
            timed(times.setdefault("full decode", []), lambda row=row, cache=cache: decode(row, cache))
            for name, press in make.items():
                for c in EVICTED:
                    seen.clear()
                    spent = times.setdefault(f"{name} prefill", [])
                    cache = timed(spent, lambda row=row, press=press, c=c: read(row, press(c)))
                    got = after(row, cache, 1 if name.startswith("kvzip") else AFTER)
                    kl = torch.sum(full.exp() * (full - got), dim=-1).mean()
                    arrays.setdefault(f"{name} kl {c}", []).append(kl.numpy())
                    if name.startswith("kvzip"):
                        kept = np.ones(seen["scores"].shape, bool)
                        for i, layer in enumerate(model.model.layers):
                            _, head, at = layer.self_attn.masked_key_indices
                            kept[i, head.numpy(), at.numpy()] = False
                        arrays.setdefault(f"{name} kept {c}", []).append(kept)
                if name.startswith("kvzip"):
                    arrays.setdefault(f"{name} scores", []).append(seen["scores"])
                    cache = read(row, press(EVICTED[-1]))
                    spent = times.setdefault(f"{name} decode", [])
                    timed(spent, lambda row=row, cache=cache: decode(row, cache))
                    held = sum(x.keys.numel() + x.values.numel() for x in cache.layers)
                    arrays.setdefault(f"{name} held", []).append(np.asarray(4 * held))
                elif name == "expected":
                    arrays.setdefault(f"{name} scores", []).append(np.stack(seen["layers"]))
    np.savez(folder / "rival.npz", **{name: np.stack(x) for name, x in arrays.items()})
    (folder / "rival.json").write_text(json.dumps({n: statistics.median(t) for n, t in times.items()}))


# -- here


def ours(model, tokenizer, windows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The same arrays and times, from jaxllm."""
    import jax
    import jax.numpy as jnp

    import jaxllm as jl
    from jaxllm import cache as kv
    from jaxllm.eviction.budget import evict

    rows = windows[:, :CONTEXT].tolist()
    following = jnp.asarray(windows[:, CONTEXT:])

    @jax.jit
    def after(cache):
        return jax.nn.log_softmax(model(following, cache)[0])

    zip_ = {"tokenizer": tokenizer, "chunk": CONTEXT}
    cache = prefill.prefill(model, rows)
    scores = {
        "kvzip": kvzip.kvzip_scores(model, cache, rows, **zip_),
        "kvzip+": kvzip.kvzip_scores(model, cache, rows, **zip_, output_aware=True),
        "snapkv": baselines.snapkv_scores(model, rows, window=WINDOW),
        "expected": baselines.expected_scores(model, rows, future=FUTURE, sinks=SINKS),
        "tova": baselines.tova_scores(model, rows),
        "streaming": baselines.streaming_scores(model, rows, sinks=SINKS),
        "random": baselines.random_scores(model, rows),
    }
    arrays = {f"{name} scores": np.asarray(x).swapaxes(0, 1) for name, x in scores.items()}
    arrays["expected scores"] = np.exp(arrays["expected scores"])  # kvpress's are no logarithms
    full = after(kv.grow(cache, CONTEXT + AFTER))
    for name, s in scores.items():
        spread = "pair" if name.startswith("kvzip") else "uniform"  # as kvpress's
        if name.startswith("kvzip"):
            s = s.at[..., :SINKS].set(s.max() + 1)
        for c in EVICTED:
            small = evict(cache, s, ratio=1 - c, budget=spread, rows=AFTER)
            kl = jnp.sum(jnp.exp(full) * (full - after(small)), axis=-1).mean(-1)
            arrays[f"{name} kl {c}"] = np.asarray(kl)
            arrays[f"{name} kept {c}"] = _mask(small)
            arrays[f"{name} official {c}"] = _mask(evict(cache, scores[name], ratio=1 - c, official=True))
        arrays[f"{name} held"] = np.asarray(kv.num_bytes(small) - kv.num_bytes(kv.split(small)[1])) / len(
            rows
        )
    times: dict[str, list[float]] = {}
    ready = jax.block_until_ready
    for row in [rows[0], *rows]:  # the first compiles
        spent = lambda name: times.setdefault(name, [])  # noqa: E731
        cache = timed(spent("full prefill"), lambda row=row: ready(prefill.prefill(model, [row])))
        score = lambda row=row, cache=cache: ready(kvzip.kvzip_scores(model, cache, [row], **zip_))  # noqa: E731
        s = timed(spent("kvzip scores"), score)
        keep = lambda cache=cache, s=s: ready(evict(cache, s, ratio=0.3, rows=AFTER))  # noqa: E731
        small = timed(spent("kvzip evict"), keep)
        for name, c in (("full", cache), ("kvzip", small)):
            ask = lambda c=c: jl.generate(model, None, [[5]], max_new_tokens=32, cache=c, stop_tokens=[])  # noqa: E731
            ask()
            timed(spent(f"{name} decode"), ask)
    return arrays, {name: statistics.median(t[1:]) for name, t in times.items()}


def _mask(cache) -> np.ndarray:
    """What is kept [B, L, K, T]."""

    kept = repack.kept_positions(cache)
    out = np.zeros((len(kept[0]), len(kept), len(kept[0][0]), CONTEXT), bool)
    for layer, requests in enumerate(kept):
        for b, heads in enumerate(requests):
            for head, at in enumerate(heads):
                out[b, layer, head, at] = True
    return out


def official(scores: np.ndarray, ratio: float) -> np.ndarray:
    """KVzip's threshold on scores [B, L, K, T]."""
    flat = -np.sort(-scores.reshape(len(scores), -1), axis=1)
    limit = flat[:, max(int(flat.shape[1] * ratio + 1e-9) - 1, 0)]
    return scores > limit[:, None, None, None]


def compared(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Correlations, differences and agreement of kept sets."""
    out: dict[str, Any] = {"kl": {}}
    for name in METHODS:
        for c in EVICTED:
            values = (mine[f"{name} kl {c}"], theirs[f"{name} kl {c}"])
            out["kl"][f"{name} {c}"] = [
                (float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))) for x in values
            ]
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
                rule = (mine[f"{name} official {c}"] == official(scores, 1 - c)).all((1, 2, 3))
                out[name][f"contexts with the same set, {c:.0%} evicted"] = [int(same.sum()), len(same)]
                out[name][f"the same by the official threshold, {c:.0%}"] = [int(rule.sum()), len(rule)]
    return out


def markdown(run: dict[str, Any]) -> str:
    from quantization_tables import table

    lines = [f"# Eviction beside kvpress {run['kvpress']}", "", f"{run['date']}, {run['machine']}.", ""]
    rows = []
    for name in METHODS:
        cells = [
            " / ".join(f"{mean:.5f} +- {error:.5f}" for mean, error in run["compared"]["kl"][f"{name} {c}"])
            for c in EVICTED
        ]
        rows.append((name, *cells))
    head = ("method", *(f"{c:.0%} evicted: ours / kvpress" for c in EVICTED))
    lines += ["## Divergence, nats a token", "", *table(head, rows), ""]
    for name in ("kvzip", "kvzip+", "expected"):
        lines += [f"- {name}: " + "; ".join(f"{k} {v}" for k, v in run["compared"][name].items())]
    for side in ("ours", "theirs"):
        lines += [f"- seconds, {side}: " + ", ".join(f"{k} {v:.4f}" for k, v in run[side].items())]
    lines += [f"- bytes held of one context, 70% evicted, ours and theirs: {run['bytes']}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a Llama, as `jl.load` takes it")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--python", help="interpreter of the environment with kvpress")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rival:
        return rival(args.rival)
    if None in (args.model, args.text, args.python, args.out):
        parser.error("--model, --text, --python and --out must be given")
    from decode import machine

    import jaxllm as jl

    model, tokenizer = jl.load(args.model, dtype="float32")
    ids = tokenizer.encode(args.text.read_text("utf-8"), add_special_tokens=False)
    size = CONTEXT + AFTER - 1
    starts = np.linspace(0, len(ids) - size, args.windows).astype(int)
    windows = np.asarray([[tokenizer.bos_token_id, *ids[at : at + size]] for at in starts], np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jl.save(model, folder / "model", tokenizer, to="huggingface")
        np.save(folder / "windows.npy", windows)
        subprocess.run([args.python, __file__, "--rival", folder], check=True, stdout=sys.stderr)
        theirs = dict(np.load(folder / "rival.npz"))
        seconds = json.loads((folder / "rival.json").read_text())
    ask = "from importlib.metadata import version; print(version('kvpress'))"
    told = subprocess.run([args.python, "-c", ask], check=True, capture_output=True, text=True)
    mine, own = ours(model, tokenizer, windows)
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "kvpress": told.stdout.strip(),
        "compared": compared(mine, theirs),
        "ours": own,
        "theirs": seconds,
        "bytes": [float(mine["kvzip held"]), float(theirs["kvzip held"].mean())],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kv_kvpress.json").write_text(json.dumps(run, indent=1) + "\n")
    (args.out / "kv_kvpress.md").write_text(markdown(run))
    print(markdown(run))


if __name__ == "__main__":
    main()
