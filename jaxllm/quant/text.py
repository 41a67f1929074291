"""Calibration text: rows of token ids, or pairs of source and target, in batches of one shape."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm.models.inputs import check_token_ids
from jaxllm.models.stages import Batch, Stage, State

HELD_OUT_EVERY = 4


@dataclasses.dataclass(frozen=True)
class Text:
    """Calibration sequences, padded on the right to one length and to whole batches."""

    tokens: dict[str, np.ndarray]  # of each side int32 [S', T]
    lengths: dict[str, np.ndarray]  # int32 [S'], 1 for a row that only fills up the last batch
    real: np.ndarray  # bool [S']
    batch: int

    @classmethod
    def from_sequences(cls, model, sequences: Any, batch: int) -> "Text":
        """Checked against the model's vocabulary and context.

        sequences: rows of tokens; for a model that reads a source, pairs of a source's and a target's, the
          target without the token that every target begins with.
        """
        config = model.config
        if "source" in model.sides:
            pairs = [_pair(model, one) for one in sequences]
            given = {"source": [source for source, _ in pairs], "target": [target for _, target in pairs]}
        else:
            given = {"target": list(sequences)}
        rows = {
            side: [check_token_ids("calibrate", row, config.vocab) for row in several]
            for side, several in given.items()
        }
        if "source" in rows:
            start = np.asarray([config.decoder_start])
            rows["target"] = [np.concatenate([start, row]) for row in rows["target"]]
            if not all(map(len, rows["source"])):
                raise ValueError("calibrate: sources must have at least 1 token, got an empty one")
        sizes = [len(row) for row in rows["target"]]
        if not sizes or not 2 <= min(sizes) <= max(sizes) <= config.context:
            got = f"{min(sizes)} to {max(sizes)}" if sizes else "none"
            raise ValueError(f"calibrate: sequences must have 2 to {config.context} tokens, got {got}")
        if batch < 1:
            raise ValueError(f"calibrate: batch must be positive, got {batch=}")
        batch = min(batch, len(sizes))
        padded = {side: _padded(several, batch) for side, several in rows.items()}
        tokens, lengths = ({side: pair[i] for side, pair in padded.items()} for i in range(2))
        return cls(tokens, lengths, np.arange(len(tokens["target"])) < len(sizes), batch)

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens of each side are real."""
        return {side: int(n[self.real].sum()) for side, n in self.lengths.items()}

    def digest(self) -> str:
        """Tells this text from another."""
        digest = hashlib.sha256()
        for side, tokens in self.tokens.items():
            digest.update(tokens.tobytes() + self.lengths[side].tobytes())
        return digest.hexdigest()

    def batches(self) -> Iterator[Batch]:
        """The sequences, some at a time."""
        for i in range(0, len(self.real), self.batch):
            at = slice(i, i + self.batch)
            held = np.arange(at.start, at.stop) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            weight = np.where(held, -1, 1)[:, None].astype(np.int32) * self.real[at, None]
            tokens = {side: x[at] for side, x in self.tokens.items()}
            lengths = {side: n[at] for side, n in self.lengths.items()}
            part = {
                side: weight * (np.arange(x.shape[1])[None] < lengths[side][:, None])
                for side, x in tokens.items()
            }
            yield Batch(tokens, lengths, part)

    def run(self, stage: Stage, states: list[State]) -> list[State]:
        """The states of all batches after a stage."""
        return [stage(state, batch) for state, batch in zip(states, self.batches(), strict=True)]

    def initial_states(self) -> list[State]:
        """The states of all batches before the first stage."""
        return [{} for _ in range(0, len(self.real), self.batch)]


def _pair(model, one: Any) -> tuple[Any, Any]:
    if len(one) != 2:
        name = type(model).__name__
        raise ValueError(f"calibrate: a {name} needs pairs of source and target, got a row of {len(one)}")
    source, target = one
    return source, target


def _padded(rows: list[np.ndarray], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [S', T] and lengths [S'] of rows, filled up to whole batches."""
    S = -(-len(rows) // batch) * batch
    tokens, lengths = np.zeros((S, max(map(len, rows))), np.int32), np.ones((S,), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def text_sequences(
    model, tokenizer, text: str, *, length: int = 512, limit: int | None = None
) -> list[list[int]] | list[tuple[list[int], list[int]]]:
    """A text as calibration sequences: `length` tokens each, side by side, the shorter rest left out.

    Where the tokenizer begins texts with a token, so does every sequence. length is cut to the context. For a
    model that reads a source, each line is a pair: a source, a tab, a target, each cut to `length` tokens.
    """
    if tokenizer is None:
        raise ValueError("calibrate: text needs a tokenizer, this model has none: give token ids")
    if "source" in model.sides:
        lines = [line.split("\t") for line in text.splitlines() if line.strip()][:limit]
        wrong = next((line for line in lines if len(line) != 2 or not all(map(str.strip, line))), None)
        if wrong is not None:
            line = "\t".join(wrong)[:40]
            name = type(model).__name__
            raise ValueError(f"calibrate: each line must be source, a tab, target for a {name}, got {line!r}")
        most = min(length, model.config.context - 1)
        return [(tokenizer.encode(s)[:length], tokenizer.encode(t)[:most]) for s, t in lines]
    ids = tokenizer.encode(text)
    begin = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    ids, size = ids[len(begin) :], min(length, model.config.context) - len(begin)
    if size < 1 or len(ids) < size:
        raise ValueError(
            f"calibrate: the text must have at least one piece of {length=} tokens, got {len(ids)}"
        )
    rows = [begin + ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    return rows[:limit]
