"""The texts the shipped models learn from, their tokenizer, and batches as a function of the step.

Texts are read from a data directory that is not part of the package; their licences are named
beside their paths and go into the model card. The last 5 % of each text, cut at a document or line
boundary, is never trained on.

A text is held as one uint16 stream: <bos> document <eos> <bos> document <eos> ... A row of a batch
is T + 1 tokens of it whose first is replaced by <bos>, so that position 0 always holds one.
Where rows start follows a golden-ratio sequence, which covers a text more evenly than drawing with
replacement. Rows of exercises are packed with whole exercises; see `exercises`.

`Batches(...)(step)` depends on its arguments alone, so a run that was killed resumes exactly.
Letters: B rows, T = tokens predicted in a row.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.training.pico import exercises
from jaxllm.training.pico.exercises import Words

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB = 1024
HELD_OUT = 0.05
GOLDEN = (5**0.5 - 1) / 2
KINDS = ("repeat", "recite", "lookup", "sums")
STORY_END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents of one source, split into what is trained on and what is not."""

    name: str
    licence: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _articles(text: str) -> list[str]:
    """Wikitext split before each top-level heading ` = Title = `."""
    documents: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.startswith(" = ") and not line.startswith(" = = "):
            documents.append([])
        documents[-1].append(line)
    return [d for d in ("".join(lines).strip("\n") for lines in documents) if d.strip()]


def _questions(text: str) -> list[str]:
    """GSM8K as "Question: ...\\nAnswer: ..." texts."""
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows]


def _stories(text: str) -> list[str]:
    """Stories, each followed by a line `<|endoftext|>`."""
    return [s for s in (part.strip("\n") for part in text.split(STORY_END)) if s.strip()]


SOURCES = {
    "tinyshakespeare": (
        "text/tinyshakespeare.txt",
        "public-domain text (karpathy/char-rnn)",
        lambda text: [text],
    ),
    "gsm8k": (
        "eval/gsm8k/train.jsonl",
        "MIT, Copyright (c) 2021 OpenAI (GSM8K, first 3,000 training rows)",
        _questions,
    ),
    "wikitext2": (
        "text/wikitext-2/valid.txt",
        "CC-BY-SA (WikiText-2, validation part)",
        _articles,
    ),
    "tinystories": (
        "text/tinystories/tinystories_sample.txt",
        "CDLA-Sharing-1.0 (TinyStories, five stories)",
        _stories,
    ),
}


def split(documents: Sequence[str], share: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """(train, held out): the last `share` of the bytes, cut after a document or, in a long one, a line."""
    sizes = np.asarray([len(d.encode()) for d in documents])
    cut = (1 - share) * sizes.sum()
    at = int(np.searchsorted(np.cumsum(sizes), cut))
    if sizes[at] <= share / 2 * sizes.sum():
        return list(documents[: at + 1]), list(documents[at + 1 :])
    inside = cut - sizes[:at].sum()
    head, size = [], 0
    lines = documents[at].splitlines(keepends=True)
    while lines and size < inside:
        head.append(lines.pop(0))
        size += len(head[-1].encode())
    if not lines and len(documents) > 1:  # the cut fell into the last line of all
        return list(documents[:-1]), list(documents[-1:])
    train = [*documents[:at], *(["".join(head)] if head else [])]
    held_out = [*(["".join(lines)] if lines else []), *documents[at + 1 :]]
    return train, held_out


def read(data: str | Path, stories: str | Path | None = None) -> list[Text]:
    """The allowed texts below `data`, and the stories sampled by us if a file of them is given."""
    texts = []
    for name, (path, licence, documents) in SOURCES.items():
        file = Path(data) / path
        if not file.is_file():
            raise FileNotFoundError(f"corpus.read: {name} must be a file, got path={file}")
        train, held_out = split(documents(file.read_text(encoding="utf-8")))
        texts.append(Text(name, licence, tuple(train), tuple(held_out)))
    if stories is not None:
        if not Path(stories).is_file():
            raise FileNotFoundError(f"corpus.read: stories must be a file, got path={stories}")
        train, held_out = split(_stories(Path(stories).read_text(encoding="utf-8")))
        licence = "sampled by us from stories260K (weights MIT)"
        texts.append(Text("stories", licence, tuple(train), tuple(held_out)))
    return texts


def train_tokenizer(documents: Sequence[str], *, vocab: int = VOCAB) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` of exactly `vocab` entries; any UTF-8 round-trips.

    Ids 0..2 are <|bos|>, <|eos|>, <|pad|>, then all 256 bytes, then merges. Digits stand alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            "train_tokenizer: the text must yield enough merges, got "
            f"entries={tokenizer.get_vocab_size()}, {vocab=}"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path, *, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Any, documents: Sequence[str]) -> np.ndarray:
    """One uint16 stream: <bos> document <eos> for each document."""
    eos = tokenizer.token_to_id(EOS)
    pieces = [np.asarray([*e.ids, eos], np.uint16) for e in tokenizer.encode_batch(list(documents))]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training: rows of `length` predicted tokens, mixed by weights.

    mixture: weight of each text (by name) and of each kind of exercise: "repeat" (random ids),
      "recite" (repeats text), "lookup", "sums".
    """

    fraction: float  # of all steps
    length: int
    rows: int
    mixture: Mapping[str, float]


class Batches:
    """`batches(step)` -> {"tokens": int32 [B, T + 1], "weights": float32 [B, T], "answers": bool [B, T]}.

    weights: average 1 in a batch; `weights[b, t]` belongs to the prediction of `tokens[b, t + 1]`.
    answers: which predictions are answers of exercises.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        words: Words,
        phases: Sequence[Phase],
        *,
        steps: int,
        seed: int,
        pad: int,
    ):
        total = sum(p.fraction for p in phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"Batches: the phases' fractions must sum to 1, got {total}")
        for phase in phases:
            for name in phase.mixture:
                if name not in streams and name not in KINDS:
                    known = ", ".join([*streams, *KINDS])
                    raise ValueError(f"Batches: a mixture may name {known}, got {name!r}")
                if name in streams and len(streams[name]) == 0:
                    raise ValueError(f"Batches: the text {name} must not be empty")
        longest = max(p.length for p in phases) + 1
        self.streams = {n: np.tile(s, -(-longest // len(s))) for n, s in streams.items() if len(s)}
        self.words, self.phases = words, tuple(phases)
        self.steps, self.seed, self.pad = steps, seed, pad
        ends = np.round(np.cumsum([p.fraction for p in phases]) * steps).astype(int)
        self.starts, self.ends = np.concatenate([[0], ends[:-1]]), ends
        # for each phase: the source of every row, and how many rows of that source came before it
        self._source, self._rank = [], []
        for i, (phase, start, end) in enumerate(zip(phases, self.starts, self.ends, strict=True)):
            rows = int(end - start) * phase.rows
            share = np.cumsum([0, *phase.mixture.values()]) / sum(phase.mixture.values())
            counts = np.diff(np.round(share * rows).astype(int))
            source = np.repeat(np.arange(len(counts)), counts)
            np.random.default_rng([seed, i]).shuffle(source)
            rank = np.zeros(rows, int)
            for s in range(len(counts)):
                rank[source == s] = np.arange(counts[s])
            self._source.append(source)
            self._rank.append(rank)
        ordinary = np.zeros(max(int(words.ordinary.max()), pad) + 1, bool)
        ordinary[words.ordinary] = True
        self._plain = {name: s[ordinary[s]] for name, s in self.streams.items()}

    def phase(self, step: int) -> int:
        """Index of the phase that `step` belongs to; the last phase also serves later steps."""
        return min(int(np.searchsorted(self.ends, step, side="right")), len(self.phases) - 1)

    def tokens_before(self, step: int) -> int:
        """Tokens predicted in all steps before `step`."""
        spans = np.clip(step - self.starts, 0, self.ends - self.starts)
        return int(sum(s * p.rows * p.length for s, p in zip(spans, self.phases, strict=True)))

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        if not 0 <= step < self.steps:
            raise ValueError(f"Batches: step must be in 0..{self.steps - 1}, got {step=}")
        i = self.phase(step)
        phase = self.phases[i]
        B, T = phase.rows, phase.length
        tokens = np.full((B, T + 1), self.pad, np.int32)
        weights = np.zeros((B, T + 1), np.float32)
        exercise = np.zeros((B, 1), bool)
        names = list(phase.mixture)
        for b in range(B):
            row = int(step - self.starts[i]) * B + b
            name = names[self._source[i][row]]
            if name in self.streams:
                stream = self.streams[name]
                offset = np.random.default_rng([self.seed, i, 1]).random()
                where = (offset + self._rank[i][row] * GOLDEN) % 1
                start = int(where * (len(stream) - T))
                tokens[b] = stream[start : start + T + 1]
                tokens[b, 0] = self.words.bos
                weights[b] = tokens[b] != self.words.bos
            else:
                rng = np.random.default_rng([self.seed, step, b, 2])
                self._fill(rng, name, tokens[b], weights[b])
                exercise[b] = True
        weights = weights[:, 1:]
        answers = exercise & (weights >= 1)
        total = weights.sum(dtype=np.float64)
        if total:
            weights = (weights * (B * T / total)).astype(np.float32)
        return {"tokens": tokens, "weights": weights, "answers": answers}

    def _fill(self, rng: np.random.Generator, kind: str, tokens: np.ndarray, weights: np.ndarray) -> None:
        """Packs whole exercises of one kind into a row, what is left with sums."""
        used = 0
        while used < len(tokens):
            one = self._draw(rng, kind, len(tokens) - used)
            if one is None:
                if kind == "sums":
                    return
                kind = "sums"
                continue
            size = len(one.tokens)
            tokens[used : used + size] = one.tokens
            weights[used : used + size] = one.weights
            used += size

    def _draw(self, rng: np.random.Generator, kind: str, room: int) -> exercises.Exercise | None:
        """An exercise of at most `room` tokens, or None when none fits."""
        words = self.words
        if kind in ("repeat", "recite"):
            most = (room - exercises.repeat_overhead(words)) // 2
            if most < 4:
                return None
            least = most // 2 if rng.random() < 0.5 else 4
            length = int(rng.integers(least, most + 1))
            if kind == "repeat":
                passage = rng.choice(words.ordinary, length)
                if rng.random() < 0.5:  # what ends a passage must not end it when it stands inside
                    passage[rng.integers(0, length, rng.integers(1, 5))] = words.newline
                return exercises.repeat(rng, words, length, passage=passage)
            name = list(self._plain)[rng.integers(len(self._plain))]
            text = self._plain[name]
            start = int(rng.integers(0, max(len(text) - length, 1)))
            return exercises.repeat(rng, words, length, passage=text[start : start + length])
        if kind == "lookup":
            lines = (room - 3) // 5  # a line takes at most 5 tokens
            if lines < 4:
                return None
            most = min(64, lines * 3 // 4)
            pairs = int(rng.integers(min(8, most), most + 1))
            return exercises.lookup(rng, words, pairs, questions=min(pairs, lines - pairs))
        count = (room - 2) // 10  # a sum takes at most 2 + 1 + 2 + 1 + 3 + 1 tokens
        return exercises.sums(rng, words, min(count, 12)) if count > 0 else None
