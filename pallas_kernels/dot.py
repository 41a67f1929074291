"""What every format's product is made of: a dense dot, and weights that wait for their inputs."""

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def dot(x: jax.Array, rows: jax.Array, axis: int = 1) -> jax.Array:
    """Float32 product of `x` [*B, K] and rows [N, K] (axis 0: a weight [K, N]), multiplied in `x`'s type."""
    many = x
    # subtle: XLA:CPU has no fast path for one row of 16-bit numbers; two equal rows have one
    one = x.dtype.itemsize == 2 and x.size == x.shape[-1] and jax.default_backend() == "cpu"
    if one:
        many = jnp.concatenate([x.reshape(1, -1)] * 2)
    y = jax.lax.dot_general(
        many,
        rows.astype(x.dtype),
        (((many.ndim - 1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # float32 means float32: no TF32 on a GPU
        preferred_element_type=jnp.float32,
    )
    return y[:1].reshape(*x.shape[:-1], -1) if one else y


def depend_on(x: jax.Array, w: T) -> T:
    """`w`, but not before `x` is known.

    subtle: what depends on weights alone XLA takes out of a decoding loop, and the CPU scheduler of jax
      0.10.2 starts it for all layers at once: the whole model in float32, which is what the format was to
      save. The barrier hinders the first. Against the second the words get a bit that depends on x: no
      number is both NaN and infinite, so the bit is 0.
    """
    return tie(*jax.lax.optimization_barrier((x, w))) if x.size else w


def tie(x: jax.Array, w: T) -> T:
    """The second part of `depend_on`: whole numbers with a bit of x, which is 0 and which nobody foresees."""
    first = x.ravel()[0].astype(jnp.float32)
    never = jnp.isnan(first) & jnp.isinf(first)

    def tie_leaf(leaf):
        return leaf | never.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) else leaf

    return jax.tree.map(tie_leaf, w)
