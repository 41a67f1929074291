"""How text goes through a model stage by stage: what calibration walks, forwards and backwards.

    decoder               embed | layers.0 | layers.1 | ...
    encoder and decoder   embed | encoder.layers.0 | ... | norm, embed targets | layers.0 | ...

Between stages stand the hidden states of each side, {"source": [B, S, D], "target": [B, T, D]}; a model that
is a decoder alone has targets only. What a linear reads belongs to its stage's side, but for keys and values
of the sources, which a decoder layer takes from "source" as it is.

Letters: B sequences at once, S and T tokens of sources and targets, D width.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention import by_head
from jaxllm.measure.perplexity import as_tokens
from jaxllm.models.layers import below
from jaxllm.models.t5 import T5, Memory, both_ways

HELD_OUT_EVERY = 4

State = dict[str, Any]  # hidden states by side


class Batch(NamedTuple):
    """Some sequences, each field by side."""

    tokens: dict[str, Any]  # int32 [B, T]
    lengths: dict[str, Any]  # int32 [B]
    part: dict[str, Any]  # int32 [B, T]: 1 real, -1 held out, 0 none


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the way: a block of linears, or what lies between blocks."""

    name: str  # in front of its linears' names, as "layers.3"; "" if it has none
    block: Any  # the module they are in
    shared: Any  # what it reads beside; pytrees both
    side: str  # that it changes
    run: Callable[..., State]  # (block, shared, state, batch, tap): the hidden states that change

    def here(self) -> "Stage":
        """The same with its block in memory, where it lay in a mapped file."""
        return dataclasses.replace(self, block=in_memory(self.block)) if self.name else self

    def __call__(self, state: State, batch: Batch) -> State:
        """The state after this stage, on the host."""
        new = _forward(self.block, self.shared, state, batch, run=self.run)
        return state | {side: np.asarray(x) for side, x in new.items()}


def in_memory(tree: Any, *, copy: bool = False) -> Any:
    """A tree with arrays in place of views of mapped files, itself if it has none.

    copy: the arrays must not share memory with the files.
    """
    if not any(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree)):
        return tree
    make = jnp.array if copy else jnp.asarray
    return jax.tree.map(lambda x: make(x) if isinstance(x, np.ndarray) else x, tree)


@partial(jax.jit, static_argnames="run")
def _forward(block, shared, state, batch, *, run):
    return run(block, shared, state, batch, None)


def stages(model) -> list[Stage]:
    """The way of text through a model, from an empty state to what `model.unembed` reads."""
    layers = [(f"layers.{i}", block) for i, block in enumerate(model.layers)]
    if not isinstance(model, T5):
        first = Stage("", model, None, "target", _embed_target)
        return [first, *(Stage(name, block, None, "target", _decode) for name, block in layers)]
    encoder = [(f"encoder.layers.{i}", block) for i, block in enumerate(model.encoder.layers)]
    relative = model.encoder.relative
    return [
        Stage("", model, None, "source", _embed_source),
        *(Stage(name, block, relative, "source", _encode) for name, block in encoder),
        Stage("", model, model.encoder.norm, "target", _between),
        *(Stage(name, block, model.relative, "target", _decode_with_memory) for name, block in layers),
    ]


def _embed_target(model, shared, state, batch, tap) -> State:
    return {"target": model.embed(batch.tokens["target"])}


def _embed_source(model, shared, state, batch, tap) -> State:
    return {"source": model.embed(batch.tokens["source"])}


def _decode(block, shared, state, batch, tap) -> State:
    return {"target": block(state["target"], lengths=batch.lengths["target"], tap=tap)[0]}


def _encode(block, relative, state, batch, tap) -> State:
    x = state["source"]
    return {"source": block(x, *both_ways(relative, x.shape[1], batch.lengths["source"]), tap)}


def _between(model, norm, state, batch, tap) -> State:
    return {"source": norm(state["source"]), "target": model.embed(batch.tokens["target"])}


def _decode_with_memory(block, relative, state, batch, tap) -> State:
    seen, t = state["source"], below(tap, "cross")
    keys, values = by_head(block.cross.keys(seen, t)), by_head(block.cross.values(seen, t))
    memory = Memory((keys,), (values,), batch.lengths["source"])
    lengths = batch.lengths["target"]
    return {"target": block(state["target"], memory=memory, bias=relative, lengths=lengths, tap=tap)[0]}


@dataclasses.dataclass(frozen=True)
class LinearInfo:
    """A linear of a block: whose input it shares, on which side that is, and its shape."""

    source: str  # the first linear that reads the same input
    side: str
    K: int
    N: int

    def below(self, prefix: str) -> "LinearInfo":
        """As seen from the whole model."""
        return dataclasses.replace(self, source=f"{prefix}.{self.source}")


def side_of(array: Any, state: State, side: str) -> str:
    """The side of what a linear reads in a stage that changes `side`."""
    return "source" if array is state.get("source") else side


def linears_of(model, stage: Stage) -> dict[str, LinearInfo]:
    """The linears of a stage, by name in the order in which they run; nothing is computed."""
    if not stage.name:
        return {}
    sides = ("source", "target") if isinstance(model, T5) else ("target",)
    rows = lambda shape, dtype: {side: jax.ShapeDtypeStruct(shape, dtype) for side in sides}  # noqa: E731
    batch = Batch(rows((1, 2), jnp.int32), rows((1,), jnp.int32), rows((1, 2), jnp.int32))
    found: dict[str, LinearInfo] = {}

    def run(block, shared, state, batch):
        seen = {}

        def tap(name, array):
            own, _, end = name.rpartition(".")
            if end == "in":
                seen[own] = array
            elif end == "out" and own in seen:
                x = seen[own]
                first = next(other for other, y in seen.items() if y is x)
                found[own] = LinearInfo(first, side_of(x, state, stage.side), x.shape[-1], array.shape[-1])
            return array

        return stage.run(block, shared, state, batch, tap)

    jax.eval_shape(run, stage.block, stage.shared, rows((1, 2, model.config.width), model.dtype), batch)
    return found


def linears_by_name(model) -> dict[str, LinearInfo]:
    """The linears of all stages by their full names, in the order in which they run."""
    return {
        f"{stage.name}.{name}": linear.below(stage.name)
        for stage in stages(model)
        for name, linear in linears_of(model, stage).items()
    }


@dataclasses.dataclass(frozen=True)
class Text:
    """Calibration sequences, padded on the right to one length and to whole batches."""

    tokens: dict[str, np.ndarray]  # of each side int32 [S', T]
    lengths: dict[str, np.ndarray]  # int32 [S'], 1 for a row that only fills up the last batch
    real: np.ndarray  # bool [S']
    batch: int

    @classmethod
    def of(cls, model, sequences: Any, batch: int) -> "Text":
        """Checked against the model's vocabulary and context.

        sequences: rows of tokens; for a model that reads a source, pairs of a source's and a target's, the
          target without the token that every target begins with.
        """
        config = model.config
        if isinstance(model, T5):
            pairs = [_pair(one) for one in sequences]
            given = {"source": [source for source, _ in pairs], "target": [target for _, target in pairs]}
        else:
            given = {"target": list(sequences)}
        rows = {side: [as_tokens("calibrate", row, config.vocab) for row in given[side]] for side in given}
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

    def through(self, stage: Stage, states: list[State]) -> list[State]:
        """The states of all batches after a stage."""
        return [stage(state, batch) for state, batch in zip(states, self.batches(), strict=True)]

    def begun(self) -> list[State]:
        """The states of all batches before the first stage."""
        return [{} for _ in range(0, len(self.real), self.batch)]


def _pair(one: Any) -> tuple[Any, Any]:
    if len(one) != 2:
        raise ValueError(f"calibrate: a T5 needs pairs of source and target, got a row of {len(one)}")
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
    if isinstance(model, T5):
        lines = [line.split("\t") for line in text.splitlines() if line.strip()][:limit]
        wrong = next((line for line in lines if len(line) != 2 or not all(map(str.strip, line))), None)
        if wrong is not None:
            line = "\t".join(wrong)[:40]
            raise ValueError(f"calibrate: each line must be source, a tab, target for a T5, got {line!r}")
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
