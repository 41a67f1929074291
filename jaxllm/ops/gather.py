"""Reading some slices of an array, and of packed codes, without touching the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxllm.ops.packing import Packed


def gather(x: Shaped[Array, "..."], index: Int[Array, " n"], axis: int = 0) -> Shaped[Array, "..."]:
    """`x` at some places of an axis."""
    before = (slice(None),) * axis
    if x.dtype.itemsize != 2:
        return x[*before, index]
    # subtle: XLA:CPU gathers 16-bit floats by first turning all of them into float32, and would take even
    # their bits out of a decoding loop as a copy
    x, index = jax.lax.optimization_barrier((x, index))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint16)[*before, index], x.dtype)


def gather_codes(packed: Packed, index: Int[Array, " n"]) -> Packed:
    """The codes [n, ..., size] at some places of their first axis."""
    return Packed(gather(packed.words, index), packed.bits, packed.size)
