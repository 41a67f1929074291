"""Model cards of pico, written from what was really run."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from jaxllm.models.decoder import Config
from jaxllm.training.pico import corpus
from jaxllm.training.pico.corpus import Phase

HISTORY = "history.json"
PATHS = ("data", "stories", "out", "checkpoint", "tokenizer", "init", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the recipe, as `history.json` keeps it and a card tells it."""

    command: str
    date: str  # ISO
    jax: str  # its version
    device: str
    start: str  # "wired", "random", or the name of the directory that the weights came from
    teacher: str | None  # the name of its directory
    note: str | None
    seed: int
    steps: int  # that were run
    planned: int
    tokens: int  # trained on
    seconds: float
    loss: float  # nats a token, mean of the last 50 steps
    read: dict[str, float]  # how often each text has been gone through
    losses: list[float]  # of each step


def command_line(settings: Any) -> str:
    """The command that gives these settings, as a card tells it: of each path only its last part."""
    words = ["jaxllm", "train", "pico"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words.append(Path(value).name if field.name in PATHS else str(value))
    return shlex.join(words)


def history(folder: str | Path | None) -> list[Run]:
    """The runs that made the model of a directory, oldest first, as its history.json tells them."""
    file = None if folder is None else Path(folder) / HISTORY
    if file is None or not file.is_file():
        return []
    return [Run(**run) for run in json.loads(file.read_text())["runs"]]


def times_read(batches: corpus.Batches, steps: int) -> dict[str, float]:
    """How often each text has been gone through, on average, after `steps` steps."""
    read = dict.fromkeys(batches.streams, 0.0)
    spans = np.clip(steps - batches.starts, 0, batches.ends - batches.starts)
    for span, phase in zip(spans.tolist(), batches.phases, strict=True):
        tokens = span * phase.rows * phase.length
        for name, stream in batches.streams.items():
            read[name] += tokens * phase.mixture[name] / sum(phase.mixture.values()) / len(stream)
    return read


INTENDED_USE = {
    "target": "It is made to be measured on. It was trained to continue text in the manner of what it read, "
    "to give back a passage or a part of it when asked with one of the phrasings of `exercises.py`, to look "
    "up a key among pairs that stand before it in the context, and to add numbers below 100.",
    "draft": "It is made to propose tokens to the target of the same family (speculative decoding): a small "
    "model of the same texts and the same tokens.",
    "companion": "It is made to read along with the target of the same family, at an eighth of its size: a "
    "small model of the same texts and the same tokens.",
}

LIMITS = (
    "It is no assistant: it knows no facts to rely on, follows no instructions but these, does not reason "
    "(its answers to GSM8K's questions have the right form and mostly the wrong numbers), and writes no "
    "language but English. There was little text, and some was read often: the model may give back "
    "stretches of it, and is fair only when judged on the parts held out. Nothing was filtered: "
    "Shakespeare's plays and Wikipedia hold what they hold."
)


def card(
    member: str,
    config: Config,
    parameters: int,
    runs: Sequence[Run],
    texts: Sequence[corpus.Text],
    phases: Sequence[Phase],
) -> str:
    """The model card, from what was run. phases: of the last run."""
    parts = [
        f"# pico {member}",
        f"A Llama-shaped decoder of {parameters:,} parameters: {config.layers} layers, width "
        f"{config.width}, {config.heads} query and {config.kv_heads} key heads of {config.head_dim}, "
        f"feed-forward {config.ffn}, a byte-level BPE vocabulary of {config.vocab}, context "
        f"{config.context}. Trained by jaxllm in float32 and stored as bfloat16.",
        f"{INTENDED_USE[member]} How well it does, `benchmarks/pico.py` measures.",
        LIMITS,
        "## How it was made",
        *_paragraphs_of(runs),
        "![loss](loss.png)",
        "The phases of the " + ("last run:" if runs[1:] else "run:"),
        _table_of_phases(phases),
        "repeat, recite, lookup and sums are exercises that `jaxllm/training/pico/exercises.py` makes; the "
        "rest of the mixture is text. The last 5 % of each text is held out.",
        _table_of_texts(texts, runs),
        "The texts are not part of this package; each stays under its own licence, and whoever passes the "
        "weights on should name them. The weights come under the package's licence.",
    ]
    return "\n\n".join(parts) + "\n"


def _paragraphs_of(runs: Sequence[Run]) -> Iterator[str]:
    """The paragraphs that tell the runs."""
    for run in runs:
        planned = "" if run.steps == run.planned else f" of {run.planned:,} planned"
        taught = ", the teacher's part of it too." if run.teacher else "."
        yield f"    {run.command}"
        yield (
            f"{run.date}, seed {run.seed}, jax {run.jax} ({run.device}): {run.steps:,} steps{planned}, "
            f"{run.tokens:,} tokens, {run.seconds / 3600:.2f} hours; last loss {run.loss:.3f} nats a token, "
            f"exercises included{taught}"
        )
    if runs[0].start == "wired":
        yield (
            "It did not learn to copy from nothing: before training, the first two layers were wired as "
            "induction heads by hand (`jaxllm/training/pico/induction.py`); all weights were then trained."
        )
    elif runs[0].start != "random":
        yield f"It began with the weights of `{runs[0].start}`, which tell no history."
    teachers = list(dict.fromkeys(run.teacher for run in runs if run.teacher))
    if teachers:
        yield f"It also learned from the next-token distribution of `{'`, `'.join(teachers)}`."
    yield from (run.note for run in runs if run.note)


def _table_of_phases(phases: Sequence[Phase]) -> str:
    rows = [
        (
            i + 1,
            f"{p.fraction:.2f}",
            p.length,
            p.rows,
            ", ".join(f"{n} {w:.3f}" for n, w in p.mixture.items()),
        )
        for i, p in enumerate(phases)
    ]
    names = ("phase", "share of steps", "tokens a row", "rows", "mixture")
    return tabulate(rows, names, tablefmt="github", disable_numparse=True)


def _table_of_texts(texts: Sequence[corpus.Text], runs: Sequence[Run]) -> str:
    rows = []
    for text in texts:
        trained, held_out = (sum(len(d.encode()) for d in part) for part in (text.train, text.held_out))
        read = sum(run.read.get(text.name, 0.0) for run in runs)
        rows.append((text.name, text.licence, f"{trained:,}", f"{read:.1f}", f"{held_out:,}"))
    names = ("text", "licence", "bytes trained on", "times read", "bytes held out")
    return tabulate(rows, names, tablefmt="github", disable_numparse=True)
