"""What a method sees of a forward pass, and may change, without the model knowing the method.

A tap is a function `tap(name, array) -> array` given to a forward pass, which calls it at every linear's
input and output and where a model says so, and goes on with what it returns. Names are paths:
"layers.3.attention.q.in". A tap leaves nothing behind once traced. There are four uses:

    read       layer_tap(reader, names)    what layers compute: scores of keys, inputs of gates
    measure    WidthTap(model)             the widths at which linears in planes are read
    measure    linear_io(inputs)           what each linear reads: the statistics of quantization
    change     linear_io(inputs, output)   what each linear gives: a zero added to it has its gradient

What is noted is traced: the function that is compiled returns it. Any function of name and array is a tap,
and may replace any array.
"""

import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.linears import linear_weights
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes
from jaxllm.weights.planes.bit_planes import BitPlanes

Tap = Callable[[str, jax.Array], jax.Array]


def probe(tap: Tap | None, name: str, x: jax.Array) -> jax.Array:
    """`x` as the tap leaves it."""
    return x if tap is None else tap(name, x)


def scoped(tap: Tap | None, prefix: str) -> Tap | None:
    """The tap as seen from inside `prefix`: names get it in front."""
    return None if tap is None else lambda name, x: tap(f"{prefix}.{name}", x)


def in_turn(first: Tap | None, second: Tap | None) -> Tap | None:
    """Both taps, the second on what the first leaves."""
    if first is None or second is None:
        return second if first is None else first
    return lambda name, x: second(name, first(name, x))


def layer_tap(
    reader: Callable[..., None], names: tuple[str, ...], layers: Collection[int] | None = None
) -> Tap:
    """A tap that calls `reader(layer, *arrays)` once a layer has shown all that is named; changes nothing.

    names: inside a layer, "attention.keys" for "layers.3.attention.keys"; the arrays come in this order.
    layers: the only ones to be read; None is all of them.
    """
    shown: dict[int, dict[str, jax.Array]] = {}

    def tap(path: str, x: jax.Array) -> jax.Array:
        stack, _, inner = path.partition(".")
        index, _, name = inner.partition(".")
        if stack == "layers" and name in names and (layers is None or int(index) in layers):
            arrays = shown.setdefault(int(index), {})
            arrays[name] = x
            if len(arrays) == len(names):
                reader(int(index), *(arrays[name] for name in names))
                del shown[int(index)]
        return x

    return tap


def linear_io(
    inputs: dict[str, jax.Array],
    output: Callable[[str, jax.Array], jax.Array] | None = None,
    assigned: dict[str, jax.Array] | None = None,
) -> Tap:
    """A tap that puts what each linear reads into `inputs`, by the linear's name.

    output: called with a linear's name and what it gives, returns what the model goes on with; None changes
      nothing.
    assigned: gets, by the linear's name, which expert each row that it reads is for, where it has experts.
    """

    def tap(path: str, x: jax.Array) -> jax.Array:
        name, _, end = path.rpartition(".")
        if end == "in":
            inputs[name] = x
        elif end == "assigned" and assigned is not None:
            assigned[name] = x
        elif end == "out" and name in inputs and output is not None:  # blocks have an "out", and no "in"
            return output(name, x)
        return x

    return tap


class WidthTap:
    """A tap that notes the width at which each token reads each linear in planes; it changes nothing.

    read = WidthTap(model)
    model(tokens, tap=read)
    read.widths["layers.3.mlp.up"], read.mean()

    Embeddings, heads, tables and estimators do not count, as in DP-LLM's effective bits (arXiv:2508.06041;
    section 2.1).
    """

    def __init__(self, model):
        self.weights = linear_weights(model)
        self.widths: dict[str, jax.Array] = {}  # float32, one a token

    def __call__(self, path: str, x: jax.Array) -> jax.Array:
        name, _, end = path.rpartition(".")
        w = self.weights.get(name)
        if end == "high" and isinstance(w, AdaptivePlanes):
            self.widths[name] = (w.low_bits + x.astype(jnp.int32)).astype(jnp.float32)
        elif end == "in" and isinstance(w, BitPlanes):
            self.widths[name] = jnp.full(x.shape[:-1], w.bits, jnp.float32)
        return x

    def mean(self) -> Float[Array, "*B"]:
        """Bits a weight that each token read; ValueError where no linear is in planes."""
        if not self.widths:
            raise ValueError("WidthTap: the model must have any-precision weights, got none")
        sizes = {name: math.prod(self.weights[name].shape) for name in self.widths}
        total = sum(sizes.values())
        parts = [bits * (sizes[name] / total) for name, bits in self.widths.items()]
        return sum(parts[1:], parts[0])
