"""Squared distances that have the same bits everywhere: in NumPy, in XLA on any device, in every kernel.

A compiler may contract a * a + b * b to a fused multiply-add, which rounds once less; XLA:CPU and ptxas do,
NumPy does not, and which product is taken in is the compiler's choice. Here every square has a zero added to
it that no compiler knows to be one: fma(a, a, 0) is a * a rounded, so that both programs say the same, and
what has been added to is no product that could be contracted again. It costs nothing where there is a fused
multiply-add, and one addition elsewhere.

Letters: N points, D coordinates.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.assembly import assemble


def runtime_zero(points: Float[Array, "..."]) -> Float[Array, ""]:
    """0, in float32, as far as compilers know a number that depends on the points.

    subtle: of three whole numbers in a row one is a multiple of 3. LLVM finds out simpler ones, such as
      "not both NaN and infinite".
    """
    if not points.size:
        return jnp.zeros((), jnp.float32)
    bits = jax.lax.bitcast_convert_type(points.ravel()[0].astype(jnp.float32), jnp.int32)
    k = bits & 1023
    return ((k * k * k - k) % 3).astype(jnp.float32)


def squared_distance(
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
    zero: jax.Array,
    *,
    square: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Sum over coordinates, in their order, of (a - b)^2, each rounded.

    zero: of `runtime_zero`. square: a rounded square, where a kernel can say so.
    """
    total = None
    for u, v in zip(a, b, strict=True):
        d = u - v
        term = d * d + zero if square is None else square(d)
        total = term if total is None else total + term
    assert total is not None
    return total


def triton_square(interpret: bool) -> Callable[[jax.Array], jax.Array] | None:
    """The square of `squared_distance` in a Triton kernel: none in the interpreter, whose compiler is XLA."""
    return None if interpret else _rounded_square


def _rounded_square(x: jax.Array) -> jax.Array:
    """What names its rounding in PTX is never contracted; it saves the addition of the zero."""
    return assemble("mul.rn.f32 $0, $1, $1;", "=f,f", x, dtype=jnp.float32)
