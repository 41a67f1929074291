"""A model's linears by name: the weights that quantization replaces.

linear_weights(model)["layers.3.mlp.down"]              # a weight of any format
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.weights.experts import MappedStack
from jaxllm.weights.matmul import FORMATS


def linear_weights(model) -> dict[str, Any]:
    """The weight of every linear and embedding by its name: "layers.0.attention.q", "embedding"."""
    return {name: variable.get_value() for name, variable in linear_variables(model).items()}


def linear_variables(model) -> dict[str, nnx.Variable]:
    """The variable that holds each linear's weight."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if _is_weight(path, variable):
            found[".".join(map(str, path[:-1]))] = variable
    return found


def _is_weight(path: tuple[Any, ...], variable: nnx.Variable) -> bool:
    """Whether a variable is a linear's `w` or an embedding's table: biases and norms are plain arrays."""
    return path[-1] == "w" or isinstance(variable.get_value(), FORMATS)


def replace_weights(model, weights: dict[str, Any]):
    """The model, or a block, with other weights in the linears named; all else is shared."""
    graph, state = nnx.split(model)
    left = dict(weights)

    def one(path, variable):
        name = ".".join(map(str, path[:-1]))
        return variable.replace(left.pop(name)) if name in left and _is_weight(path, variable) else variable

    flat = [(path, one(path, variable)) for path, variable in nnx.to_flat_state(state)]
    if left:
        raise ValueError(f"replace_weights: names must be linears of the model, got {next(iter(left))!r}")
    return nnx.merge(graph, nnx.from_flat_state(flat))


def block_of(name: str) -> str:
    """The block that a linear belongs to: its name up to the first number, or else its first word."""
    found = re.match(r"(\w+\.)*?\d+(?=\.)|\w+", name)
    assert found is not None
    return found[0]


def in_memory(tree: Any, *, copy: bool = False) -> Any:
    """A tree with arrays in place of views of mapped files, itself if it has none.

    copy: the arrays must not share memory with the files.
    """
    if not any(isinstance(x, np.ndarray | MappedStack) for x in jax.tree.leaves(tree)):
        return tree

    def make(x):
        if isinstance(x, MappedStack):
            return jnp.asarray(np.asarray(x))
        return x if not isinstance(x, np.ndarray) else jnp.array(x) if copy else jnp.asarray(x)

    return jax.tree.map(make, tree)
