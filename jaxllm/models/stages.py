"""The way of text through a model, stage by stage: what calibration walks, forwards and backwards.

    state = {}
    for stage in model.stages():                    # embed | layers.0 | layers.1 | ...
        state = stage(state, batch)

Between stages stand the hidden states of each side, {"source": [B, S, D], "target": [B, T, D]}; a model that
is a decoder alone has targets only. What a linear reads belongs to its stage's side, or else to "source" as
it is: keys and values of a layer that sees the sources.

Letters: B sequences at once, S and T tokens of sources and targets, D width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.models.linears import in_memory
from jaxllm.models.taps import linear_io
from jaxllm.weights.experts import MappedStack

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

    @property
    def operand(self) -> Any:
        """The block as a compiled function takes it."""
        return in_memory(self.block) if self.name else without_experts(self.block)

    def __call__(self, state: State, batch: Batch) -> State:
        """The state after this stage, on the host."""
        return self.with_inputs(state, batch)[0]

    def with_inputs(self, state: State, batch: Batch) -> tuple[State, dict[str, Any], dict[str, Any]]:
        """The same; what its linears read, by the first that reads it; and which expert each row is for."""
        new, inputs, assigned = _forward(self.operand, self.shared, state, batch, run=self.run)
        return state | {side: np.asarray(x) for side, x in new.items()}, inputs, assigned


def without_experts(model: Any) -> Any:
    """A model for what lies between its blocks, which reads no experts: those in mapped files stay there."""

    def one(x):  # NaN without memory: whoever read it would see
        return np.broadcast_to(np.array(np.nan, x.dtype), x.shape) if isinstance(x, MappedStack) else x

    return jax.tree.map(one, model)


# subtle: `run` is static, so a function of a module: stages that share one share its compilation. One program
# serves whether what linears read is asked for or not: compiling another takes longer than holding it.
@partial(jax.jit, static_argnames="run")
def _forward(block, shared, state, batch, *, run):
    inputs: dict[str, jax.Array] = {}
    assigned: dict[str, jax.Array] = {}
    new = run(block, shared, state, batch, linear_io(inputs, assigned=assigned))
    first = first_readers(inputs)
    return new, first, {name: rows for name, rows in assigned.items() if name in first}


def first_readers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Of what linears read, each array once, by the first that reads it; while tracing."""
    # subtle: linears that read the same input read the same object
    first: dict[str, Any] = {}
    for name, x in inputs.items():
        if not any(x is other for other in first.values()):
            first[name] = x
    return first
