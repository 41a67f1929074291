"""Single instructions that Triton does not choose by itself, and what they compute for the interpreter."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu


def assemble(asm: str, constraints: str, *args: jax.Array, dtype, pack: int = 1) -> jax.Array:
    """An instruction on `pack` elements of each argument at once; Triton wants whole numbers signed."""
    shape = jnp.broadcast_shapes(*(a.shape for a in args))
    signed = [lax.bitcast_convert_type(a, jnp.int32) if a.dtype == jnp.uint32 else a for a in args]
    [out] = plgpu.elementwise_inline_asm(
        asm,
        args=[jnp.broadcast_to(a, shape) for a in signed],
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
    )
    return out


def fma(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """float32 a b + c, rounded once; left to itself, Triton takes two instructions."""
    if interpret:
        return a * b + c
    return assemble("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c, dtype=jnp.float32)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """float32 2^x in one instruction: below 2^-126 it may be 0."""
    if interpret:
        return jnp.exp2(x)
    return assemble("ex2.approx.ftz.f32 $0, $1;", "=f,f", x, dtype=jnp.float32)
