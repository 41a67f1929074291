"""Multiple choice by log-likelihood: the choice that the model finds most likely after the query.

A task says how a line of its file (JSON lines) becomes an example; the file is the user's.

    score_choices(model, tokenizer, "piqa", "piqa.jsonl", limit=200)

    choices   {"query", "choices", "gold"}        query, joiner, choice; the choice is scored
    words     {"context", "continuation"}         right when each token of the word is the arg max
    pairs     {"sentence_good", "sentence_bad"}   right when the good sentence is the likelier one

An example is right when the gold choice scores strictly higher than each other one. Texts are
encoded as the tokenizer does by itself; a space at the seam belongs to the choice. Scored are the
tokens after those that the encoded context and all its encoded choices have in common, so that a
tokenizer which joins characters across the seam treats every choice the same. Where nothing would
come before them (pairs, with a tokenizer that adds no begin token), the begin token is put in
front, or the end token if there is none. What is longer than the model's context loses its first
tokens.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.measure.perplexity import Scores, score
from jaxllm.models.inputs import require_decoder_only


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and what may follow it, of which `gold` is the index of the right one."""

    context: str
    continuations: Sequence[str]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """How lines become examples."""

    fields: dict[str, type]  # what a line must hold
    read: Callable[[dict[str, Any]], Example]
    greedy: bool = False  # right when the gold continuation is the arg max at every token
    normalized: bool = False  # accuracy by log-probability per character is reported too


@dataclasses.dataclass(frozen=True)
class Choices:
    """How many of `examples` were right: the fraction and its standard error."""

    task: str
    accuracy: float
    stderr: float
    examples: int
    # Accuracy when each choice's log-probability is divided by its number of characters
    # (lm-evaluation-harness's acc_norm); None where choices are not compared, or are whole
    # sentences.
    acc_norm: float | None
    truncated: int  # examples that lost their first tokens


def _choices(joiner: str) -> Task:
    """query + joiner + choice."""

    def read(line: dict[str, Any]) -> Example:
        choices, gold = line["choices"], line["gold"]
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError("choices must be texts")
        if not 0 <= gold < len(choices):
            raise ValueError(f"gold must lie in [0, {len(choices)}), got {gold=}")
        asked = joiner.rstrip(" ")
        space = joiner[len(asked) :]
        return Example(line["query"] + asked, [space + choice for choice in choices], gold)

    return Task({"query": str, "choices": list, "gold": int}, read, normalized=True)


def _words() -> Task:
    """context + " " + continuation."""
    return Task(
        {"context": str, "continuation": str},
        lambda line: Example(line["context"], [" " + line["continuation"]], 0),
        greedy=True,
    )


def _pairs() -> Task:
    """Two sentences."""
    return Task(
        {"sentence_good": str, "sentence_bad": str},
        lambda line: Example("", [line["sentence_good"], line["sentence_bad"]], 0),
    )


TASKS: dict[str, Task] = {
    "piqa": _choices("\nAnswer: "),
    "arc_easy": _choices("\nAnswer: "),
    "arc_challenge": _choices("\nAnswer: "),
    "boolq": _choices("\nAnswer: "),
    "copa": _choices(" "),
    "lambada": _words(),
    "blimp": _pairs(),
}


def read_examples(task: Task, path: str | Path, limit: int | None = None) -> list[Example]:
    """The examples of the first `limit` lines of a file (all if None)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"choices: no such file, got path={str(path)!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"choices: limit must be positive, got {limit=}")
    examples: list[Example] = []
    # subtle: str.splitlines would also break at U+2028, which may stand inside a text
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if limit is not None and len(examples) == limit:
            break
        if not raw.strip():
            continue
        try:
            line = json.loads(raw.decode("utf-8"))
            for name, kind in task.fields.items():
                if not isinstance(line, dict) or not isinstance(line.get(name), kind):
                    raise ValueError(f"needs {name!r} ({kind.__name__})")
            examples.append(task.read(line))
        except ValueError as error:  # not UTF-8 and not JSON are ValueErrors as well
            raise ValueError(f"choices: line {number} of {path.name} is wrong: {error}") from None
    if not examples:
        raise ValueError(f"choices: needs at least one line, got an empty {path.name}")
    return examples


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text as the tokenizer encodes it; a begin token that a chat spells is not doubled."""
    ids = list(tokenizer.encode(text))
    begin = getattr(tokenizer, "bos_token", None)
    spelled = begin is not None and text.startswith(begin)
    return ids[1:] if spelled and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def front_token(tokenizer: Any) -> int:
    """What stands where a text has nothing before it: the begin token, or else the end token."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return token
    raise ValueError("measure: the tokenizer needs a begin or an end token to score a text's start")


def encode_example(tokenizer: Any, context: str, continuations: Sequence[str]) -> tuple[list[list[int]], int]:
    """The tokens of context + each continuation, and how many of them are context for all."""
    shared = encode(tokenizer, context)
    rows = [encode(tokenizer, context + continuation) for continuation in continuations]
    for row in rows:
        same = 0
        while same < min(len(shared), len(row) - 1) and shared[same] == row[same]:
            same += 1
        shared = shared[:same]
    if not shared:
        return [[front_token(tokenizer), *row] for row in rows], 1
    return rows, len(shared)


def fit(rows: list[list[int]], first: int, context: int) -> tuple[list[list[int]], list[int], bool]:
    """Rows cut at the front to fit a context, where each is scored from, whether any was cut."""
    cuts = [max(0, len(row) - (context + 1)) for row in rows]
    firsts = [first - cut for cut in cuts]
    if min(firsts) < 1:
        longest = max(len(row) - first for row in rows)
        raise ValueError(f"choices: a choice must fit the model's context, got {longest} tokens, {context=}")
    return [row[cut:] for row, cut in zip(rows, cuts, strict=True)], firsts, any(cuts)


def sum_after(scores: Scores, i: int, first: int) -> tuple[float, bool]:
    """Log-probability of sequence i from its token `first` on, and whether each was the arg max."""
    values, greedy = scores.logprobs[i][first - 1 :], scores.greedy[i][first - 1 :]
    return float(values.astype(np.float64).sum()), bool(greedy.all())


def score_choices(
    model: Any,
    tokenizer: Any,
    task: str,
    path: str | Path,
    *,
    limit: int | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> Choices:
    """Accuracy of a model on the first `limit` lines of a task's file.

    task: a name in TASKS. batch, progress: as in `score`.
    """
    if task not in TASKS:
        raise ValueError(f"choices: task must be one of {', '.join(TASKS)}, got {task=}")
    require_decoder_only("choices", model)
    how = TASKS[task]
    examples = read_examples(how, path, limit)
    rows, firsts, truncated = [], [], 0
    for example in examples:
        some, first = encode_example(tokenizer, example.context, example.continuations)
        some, starts, cut = fit(some, first, model.config.context)
        rows += some
        firsts += starts
        truncated += cut
    scores = score(model, rows, batch=batch, progress=progress)

    right, right_normalized, at = 0, 0, 0
    for example in examples:
        count = len(example.continuations)
        sums = [sum_after(scores, i, firsts[i]) for i in range(at, at + count)]
        at += count
        if how.greedy:
            right += sums[example.gold][1]
            continue
        values = [value for value, _ in sums]
        right += _is_best(values, example.gold)
        lengths = [len(text.strip()) for text in example.continuations]
        perchar = [value / max(n, 1) for value, n in zip(values, lengths, strict=True)]
        right_normalized += _is_best(perchar, example.gold)
    n = len(examples)
    accuracy = right / n
    return Choices(
        task=task,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        examples=n,
        acc_norm=right_normalized / n if how.normalized else None,
        truncated=truncated,
    )


def _is_best(values: Sequence[float], gold: int) -> bool:
    """Whether the gold value is strictly above all others."""
    return all(values[gold] > value for i, value in enumerate(values) if i != gold)
