"""The linears of a model's stages: whose input each shares, on which side that is, and its shape.

blocks = linears_by_block(model)
blocks["layers.3"]["mlp.up"].source                                         # "mlp.gate"
by_full_name(blocks)["layers.3.mlp.up"].source                              # "layers.3.mlp.gate"
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models.stages import Batch, Stage, State
from jaxllm.models.taps import linear_io


@dataclasses.dataclass(frozen=True)
class LinearInfo:
    """A linear of a block: whose input it shares, on which side that is, and its shape."""

    source: str  # the first linear that reads the same input
    side: str
    K: int
    N: int
    expert: int | None = None  # which of a linear's experts it is, "mlp.up.3" of "mlp.up"

    def stack_name(self, name: str) -> str:
        """The name of the linear whose expert this one, called `name`, is."""
        return name if self.expert is None else name.removesuffix(f".{self.expert}")

    @property
    def reader(self) -> str:
        """The name of the linear, or of the stack of experts, that reads its input first."""
        return self.stack_name(self.source)

    def scoped(self, prefix: str) -> "LinearInfo":
        """As seen from the whole model."""
        return dataclasses.replace(self, source=f"{prefix}.{self.source}")


def side_of(array: Any, state: State, side: str) -> str:
    """The side of what a linear reads in a stage that changes `side`."""
    # subtle: while tracing, what is read of the sources is the same object as in the state
    return "source" if array is state.get("source") else side


def linears_of(model, stage: Stage) -> dict[str, LinearInfo]:
    """The linears of a stage, by name in the order in which they run, each expert's; nothing is computed."""
    if not stage.name:
        return {}

    def rows(shape: tuple[int, ...], dtype) -> dict[str, jax.ShapeDtypeStruct]:
        return {side: jax.ShapeDtypeStruct(shape, dtype) for side in model.sides}

    batch = Batch(rows((1, 2), jnp.int32), rows((1,), jnp.int32), rows((1, 2), jnp.int32))
    found: dict[str, LinearInfo] = {}

    def run(block, shared, state, batch):
        inputs: dict[str, jax.Array] = {}
        assigned: dict[str, jax.Array] = {}

        def describe(name, y):
            x = inputs[name]
            # subtle: while tracing, linears that read the same input read the same object
            first = next(other for other, same in inputs.items() if same is x)
            one = LinearInfo(first, side_of(x, state, stage.side), x.shape[-1], y.shape[-1])
            if name not in assigned:
                found[name] = one
                return y
            for e in range(assigned[name].shape[-1]):
                found[f"{name}.{e}"] = dataclasses.replace(one, source=f"{first}.{e}", expert=e)
            return y

        return stage.run(block, shared, state, batch, linear_io(inputs, describe, assigned))

    jax.eval_shape(run, stage.block, stage.shared, rows((1, 2, model.config.width), model.dtype), batch)
    return found


def linears_by_block(model) -> dict[str, dict[str, LinearInfo]]:
    """The linears of each block by their names inside it, in the order in which they run."""
    return {stage.name: linears_of(model, stage) for stage in model.stages() if stage.name}


def by_full_name(blocks: dict[str, dict[str, LinearInfo]]) -> dict[str, LinearInfo]:
    """The linears of all blocks as seen from the whole model."""
    return {f"{block}.{n}": one.scoped(block) for block, own in blocks.items() for n, one in own.items()}
