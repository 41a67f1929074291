"""An orthogonal matrix that spreads every vector evenly over its places and multiplies fast. Lossless.

With n = 2**a m, m odd, and random signs s:

    rotate(x) = (x * s) M        M = C_m (x) C_2 (x) ... (x) C_2   (a times)
    C_m[j, k] = (cos(2 pi j k / m) + sin(2 pi j k / m)) / sqrt(m)

C is the discrete Hartley transform: real, symmetric and its own inverse for every m, and C_2 is Hadamard's
matrix, so M is Hadamard's where n is a power of two (QuaRot, arXiv:2404.00456, section 2, takes stored
Hadamard matrices for other n, which not every n has). No number of M exceeds sqrt(2 / n), so that one great
number of x becomes n small ones; without s, a vector like a row of M would become one great number.

    y = rotate(x, seed=0)                   # float32 [..., n]
    unrotate(y, seed=0)                     # x again, to rounding

The seed alone makes s, by a hash written out here: saved files do not depend on a library's generator.
Work: n (m + 64 a / 6) multiplications at most, as products with matrices of at most 64 (and m) columns, which
a matrix unit likes better than log2 n additions. Letters: n numbers of a vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK_BITS = 6  # powers of two that one product takes in


def rotate(x: Float[Array, "*B n"], seed: int) -> Float[Array, "*B n"]:
    """`(x * s) M`, in float32."""
    return mix(x.astype(jnp.float32) * _signs_like(x, seed))


def unrotate(x: Float[Array, "*B n"], seed: int) -> Float[Array, "*B n"]:
    """What `rotate` was given, in float32."""
    return mix(x.astype(jnp.float32)) * _signs_like(x, seed)


def mix(x: Float[Array, "*B n"]) -> Float[Array, "*B n"]:
    """`x M`; M is symmetric and its own inverse."""
    y, rest = x, x.shape[-1]
    for size in factors(rest):
        rest //= size
        block = jnp.asarray(hartley(size), x.dtype)
        y = jnp.einsum("arb,rs->asb", y.reshape(-1, size, rest), block, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape)


def factors(n: int) -> list[int]:
    """The sizes of the blocks of M: the odd part of n, then powers of two of about equal size."""
    a = (n & -n).bit_length() - 1
    parts = -(-a // BLOCK_BITS)
    powers = [2 ** (a // parts + (i < a % parts)) for i in range(parts)]
    odd = n >> a
    return ([odd] if odd > 1 else []) + powers


@functools.lru_cache(maxsize=64)
def hartley(size: int) -> np.ndarray:
    """C_2 (x) ... (x) C_2 for a power of two, C_size for an odd number; float64 [size, size]."""
    if size & (size - 1):
        angle = 2 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
        return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@functools.lru_cache(maxsize=64)
def signs(n: int, seed: int) -> np.ndarray:
    """n numbers +1 or -1, float32: a bit each of a hash (MurmurHash3's last step) of seed and place."""
    h = np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(seed * 0x7F4A7C15 + 1 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return np.where(h >> np.uint32(31), -1, 1).astype(np.float32)


def _signs_like(x, seed: int) -> jax.Array:
    return jnp.expand_dims(jnp.asarray(signs(x.shape[-1], seed)), range(x.ndim - 1))
