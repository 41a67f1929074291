"""How text goes through a model stage by stage: what calibration walks, forwards and backwards.

    decoder               embed | layers.0 | layers.1 | ...
    encoder and decoder   embed | encoder.layers.0 | ... | norm, embed targets | layers.0 | ...

Between stages stand the hidden states of each side, {"source": [B, S, D], "target": [B, T, D]}; a model that
is a decoder alone has targets only. What a linear reads belongs to its stage's side, but for keys and values
of the sources, which a decoder layer takes from "source" as it is.

Letters: B sequences at once, S and T tokens of sources and targets, D width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.linears import in_memory
from jaxllm.models.t5 import T5, Memory, both_ways
from jaxllm.models.taps import linear_io, scoped
from jaxllm.ops.attention import heads_first

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

    def loaded(self) -> "Stage":
        """The same with its block in memory, where it lay in a mapped file."""
        return dataclasses.replace(self, block=in_memory(self.block)) if self.name else self

    def __call__(self, state: State, batch: Batch) -> State:
        """The state after this stage, on the host."""
        new = _forward(self.block, self.shared, state, batch, run=self.run)
        return state | {side: np.asarray(x) for side, x in new.items()}


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
    seen, t = state["source"], scoped(tap, "cross")
    keys, values = heads_first(block.cross.keys(seen, t)), heads_first(block.cross.values(seen, t))
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

    def rows(shape: tuple[int, ...], dtype) -> dict[str, jax.ShapeDtypeStruct]:
        return {side: jax.ShapeDtypeStruct(shape, dtype) for side in sides}

    batch = Batch(rows((1, 2), jnp.int32), rows((1,), jnp.int32), rows((1, 2), jnp.int32))
    found: dict[str, LinearInfo] = {}

    def run(block, shared, state, batch):
        inputs: dict[str, jax.Array] = {}

        def describe(name, y):
            x = inputs[name]
            # subtle: while tracing, linears that read the same input read the same object
            first = next(other for other, same in inputs.items() if same is x)
            found[name] = LinearInfo(first, side_of(x, state, stage.side), x.shape[-1], y.shape[-1])
            return y

        return stage.run(block, shared, state, batch, linear_io(inputs, describe))

    jax.eval_shape(run, stage.block, stage.shared, rows((1, 2, model.config.width), model.dtype), batch)
    return found


def linears_by_name(model) -> dict[str, LinearInfo]:
    """The linears of all stages by their full names, in the order in which they run."""
    return {
        f"{stage.name}.{name}": linear.below(stage.name)
        for stage in stages(model)
        for name, linear in linears_of(model, stage).items()
    }
