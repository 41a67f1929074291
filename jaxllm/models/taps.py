"""What a method sees of a forward pass, and may change, without the model knowing the method.

A tap is a function `tap(name, array) -> array` given to a forward pass, which calls it at every linear's
input and output and where a model says so, and goes on with what it returns. Names are paths:
"layers.3.attention.q.in". A tap leaves nothing behind once traced. There are three uses:

    read       layer_tap(reader, names)    what layers compute: scores of keys, inputs of gates
    measure    linear_io(inputs)           what each linear reads: the statistics of quantization
    change     linear_io(inputs, output)   what each linear gives: a zero added to it has its gradient

What is noted is traced: the function that is compiled returns it. Any function of name and array is a tap,
and may replace any array.
"""

from collections.abc import Callable, Collection

import jax

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
