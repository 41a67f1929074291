"""Model cards of pico, written from what was really run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.training.pico import corpus
from jaxllm.training.pico.corpus import Phase

HISTORY = "history.json"


PATHS = ("--data", "--stories", "--out", "--checkpoint", "--tokenizer", "--init", "--teacher")


def told(argv: Sequence[str]) -> str:
    """The command as a card tells it: of each path only its last part."""
    shown, path = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in PATHS:
            word = f"{name}={Path(value).name}"
        shown.append(Path(word).name if path else word)
        path = word in PATHS
    return shlex.join(["python", "-m", "jaxllm.training.pico", *shown])


def earlier(folder: str | Path | None) -> list[dict[str, Any]]:
    """The runs that made the model of a directory, oldest first, as its history.json tells them."""
    file = None if folder is None else Path(folder) / HISTORY
    return json.loads(file.read_text())["runs"] if file is not None and file.is_file() else []


def times_read(batches: corpus.Batches, steps: int) -> dict[str, float]:
    """How often each text has been gone through, on average, after `steps` steps."""
    read = dict.fromkeys(batches.streams, 0.0)
    spans = np.clip(steps - batches.starts, 0, batches.ends - batches.starts)
    for span, phase in zip(spans.tolist(), batches.phases, strict=True):
        tokens = span * phase.rows * phase.length
        for name, stream in batches.streams.items():
            read[name] += tokens * phase.mixture[name] / sum(phase.mixture.values()) / len(stream)
    return read


ABLE = {
    "target": "It is made to be measured on. It was trained to continue text in the manner of what it read, "
    "to give back a passage or a part of it when asked with one of the phrasings of `exercises.py`, to look "
    "up a key among pairs that stand before it in the context, and to add numbers below 100.",
    "draft": "It is made to propose tokens to the target of the same family (speculative decoding): a small "
    "model of the same texts and the same tokens.",
    "companion": "It is made to read along with the target of the same family, at an eighth of its size: a "
    "small model of the same texts and the same tokens.",
}


UNABLE = (
    "It is no assistant: it knows no facts to rely on, follows no instructions but these, does not reason "
    "(its answers to GSM8K's questions have the right form and mostly the wrong numbers), and writes no "
    "language but English. There was little text, and some was read often: the model may give back "
    "stretches of it, and is fair only when judged on the parts held out. Nothing was filtered: "
    "Shakespeare's plays and Wikipedia hold what they hold."
)


def card(facts: Mapping[str, Any], texts: Sequence[corpus.Text], parts: Sequence[Phase]) -> str:
    """The model card, from what was run."""
    config, member, runs = facts["config"], facts["member"], facts["runs"]
    lines = [
        f"# pico {member}",
        "",
        f"A Llama-shaped decoder of {facts['parameters']:,} parameters: {config.layers} layers, width "
        f"{config.width}, {config.heads} query and {config.kv_heads} key heads of {config.head_dim}, "
        f"feed-forward {config.ffn}, a byte-level BPE vocabulary of {config.vocab}, context "
        f"{config.context}. Trained by jaxllm in float32 and stored as bfloat16.",
        "",
        f"{ABLE[member]} How well it does, `benchmarks/pico.py` measures; the package's README has figures.",
        "",
        UNABLE,
        "",
        "## How it was made",
        "",
    ]
    for run in runs:
        planned = "" if run["steps"] == run["planned"] else f" of {run['planned']:,} planned"
        lines += [
            f"    {run['command']}",
            "",
            f"{run['date']}, seed {run['seed']}, jax {run['jax']} ({run['device']}): {run['steps']:,} "
            f"steps{planned}, {run['tokens']:,} tokens, {run['seconds'] / 3600:.2f} hours; last loss "
            f"{run['loss']:.3f} nats a token, exercises included"
            + (", the teacher's part of it too." if run["teacher"] else "."),
            "",
        ]
    if runs[0]["start"] == "wired":
        lines += [
            "It did not learn to copy from nothing: before training, the first two layers were wired as "
            "induction heads by hand (`jaxllm/training/pico/induction.py`); all weights were then trained.",
            "",
        ]
    elif runs[0]["start"] != "random":
        lines += [f"It began with the weights of `{runs[0]['start']}`, which tell no history.", ""]
    taught = list(dict.fromkeys(run["teacher"] for run in runs if run["teacher"]))
    if taught:
        lines += [f"It also learned from the next-token distribution of `{'`, `'.join(taught)}`.", ""]
    lines += [line for run in runs if run["note"] for line in (run["note"], "")]
    lines += ["![loss](loss.png)", "", "The phases of the " + ("last run:" if runs[1:] else "run:"), ""]
    lines += ["| phase | share of steps | tokens a row | rows | mixture |", "|---|---|---|---|---|"]
    for i, p in enumerate(parts):
        mix = ", ".join(f"{n} {w:.3f}" for n, w in p.mixture.items())
        lines.append(f"| {i + 1} | {p.fraction:.2f} | {p.length} | {p.rows} | {mix} |")
    lines += [
        "",
        "repeat, recite, lookup and sums are exercises that `jaxllm/training/pico/exercises.py` makes; the "
        "rest of the mixture is text. The last 5 % of each text is held out.",
        "",
        "| text | licence | bytes trained on | times read | bytes held out |",
        "|---|---|---|---|---|",
    ]
    for t in texts:
        sizes = [sum(len(d.encode()) for d in part) for part in (t.train, t.held_out)]
        read = sum(run["read"].get(t.name, 0.0) for run in runs)
        lines.append(f"| {t.name} | {t.licence} | {sizes[0]:,} | {read:.1f} | {sizes[1]:,} |")
    lines += [
        "",
        "The texts are not part of this package; each stays under its own licence, and whoever passes the "
        "weights on should name them. The weights come under the package's licence.",
        "",
    ]
    return "\n".join(lines)
