"""kvpress's side of `kv_kvpress.py`, run in an environment that has kvpress and no jaxllm.

    python benchmarks/sides/kvpress_side.py FOLDER CONTEXT

Reads the model and windows.npy [contexts, tokens] of the folder, of which CONTEXT tokens are compressed and
the rest is judged; writes side.npz and side.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

SINKS, WINDOW, FUTURE, EVICTED = 4, 32, 128, (0.3, 0.5, 0.7)  # as in kv_kvpress.py


def clocked(times: list[float], work: Callable[[], Any]) -> Any:
    """What `work` gives; its seconds go to `times`."""
    start = time.perf_counter()
    out = work()
    times.append(time.perf_counter() - start)
    return out


def measure(folder: Path, context: int) -> None:
    """What the file's docstring says."""
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
    judged = windows.shape[1] - context
    positions = torch.arange(context, context + judged)[None]
    arrays: dict[str, list[np.ndarray]] = {}
    times: dict[str, list[float]] = {}

    def read(row, press):
        cache = DynamicCache()
        if press is None:
            model.model(input_ids=row[None, :context], past_key_values=cache)
        else:
            with press(model):
                model.model(input_ids=row[None, :context], past_key_values=cache)
        return cache

    def after(row, cache, at_once=judged):
        logits = []
        for i in range(0, judged, at_once):
            piece = row[None, context + i : context + i + at_once]
            at = positions[:, i : i + at_once]
            logits.append(model(input_ids=piece, past_key_values=cache, position_ids=at).logits[0])
        return torch.log_softmax(torch.cat(logits).float(), dim=-1)

    def decode(row, cache):
        token = row[None, context : context + 1]
        for step in range(32):
            at = torch.tensor([[context + step]])
            out = model(input_ids=token, past_key_values=cache, position_ids=at)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    with torch.no_grad():
        for row in windows:
            cache = clocked(times.setdefault("full prefill", []), lambda row=row: read(row, None))
            full = after(row, cache)
            cache = read(row, None)
            clocked(times.setdefault("full decode", []), lambda row=row, cache=cache: decode(row, cache))
            for name, press in make.items():
                for c in EVICTED:
                    seen.clear()
                    spent = times.setdefault(f"{name} prefill", [])
                    cache = clocked(spent, lambda row=row, press=press, c=c: read(row, press(c)))
                    got = after(row, cache, 1 if name.startswith("kvzip") else judged)
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
                    clocked(spent, lambda row=row, cache=cache: decode(row, cache))
                    held = sum(x.keys.numel() + x.values.numel() for x in cache.layers)
                    arrays.setdefault(f"{name} held", []).append(np.asarray(4 * held))
                elif name == "expected":
                    arrays.setdefault(f"{name} scores", []).append(np.stack(seen["layers"]))
    np.savez(folder / "side.npz", **{name: np.stack(x) for name, x in arrays.items()})
    (folder / "side.json").write_text(json.dumps({n: statistics.median(t) for n, t in times.items()}))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]))
