"""Float32 activations as three rows of float16, which tensor cores multiply by float16 levels exactly.

    x = power (a + b / 2^11 + c / 2^22)        power: of two, by row; a, b, c float16

to 2^-36 of the row's greatest number. An infinite one stays in `a`, a NaN too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

STEP = 2.0**11  # of float16's digits
LEAST_POWER = 2.0**-100


def by_pieces(product: Callable[[jax.Array], jax.Array], x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
    """`product` of float32 numbers, where it takes float16 and any leading axes."""
    greatest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), axis=-1, keepdims=True)
    exponent = lax.bitcast_convert_type(greatest, jnp.int32) & jnp.int32(0x7F800000)
    power = jnp.maximum(lax.bitcast_convert_type(exponent, jnp.float32), LEAST_POWER)
    rest, pieces = x / power, []
    for _ in range(3):
        pieces.append(rest.astype(jnp.float16))
        rest = jnp.where(jnp.isfinite(rest), rest - pieces[-1].astype(jnp.float32), 0) * STEP
    a, b, c = product(jnp.stack(pieces))
    return (a + (b + c / STEP) / STEP) * power
