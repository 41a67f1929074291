"""What farthest point sampling means: m times, the point that is farthest from those picked before.

Letters: N points, D coordinates, m picks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.distance import runtime_zero, squared_distance


def sample(
    points: Float[Array, "*B N D"], minimum: Float[Array, "*B N"], m: int
) -> tuple[Int32[Array, "*B m"], Float[Array, "*B m"], Float[Array, "*B N"]]:
    """Indices, their minimum when they were picked, and all minima after the last.

    minimum: squared distances to what was picked before; negative for points that may not be picked, which
      are finite all the same. Of equal ones the lowest index comes first. Once no minimum is positive, the
      picks mean nothing.
    """
    if points.ndim > 2:
        return jax.vmap(lambda p, d: sample(p, d, m))(points, minimum)
    N, _ = points.shape
    zero = runtime_zero(points)
    x = list(points.T)  # D times [N]
    ids = jnp.arange(N, dtype=jnp.int32)

    def pick(far, _):
        highest = jnp.max(far)
        # not argmax, which XLA:CPU computes one number at a time
        index = jnp.min(jnp.where(far == highest, ids, N))
        far = jnp.minimum(far, squared_distance(x, [v[index] for v in x], zero))
        return far, (index, highest)

    far, (indices, distances) = lax.scan(pick, minimum, length=m)
    return indices, distances, far


def complete(
    indices: Int32[Array, "B m"], distances: Float[Array, "B m"], allowed: Bool[Array, "B N"], has_start: bool
) -> tuple[Int32[Array, "B m"], Float[Array, "B m"]]:
    """Picks, where none with a positive distance was left: the other points by index at 0, then -1 at 0.

    has_start: the first pick is one at any distance.
    """
    m = indices.shape[1]
    place = jnp.arange(m, dtype=jnp.int32)
    meant = (distances > 0) | (has_start & (place == 0)[None] & allowed.any(1, keepdims=True))

    def fill(indices, meant, allowed):
        left = allowed.at[jnp.where(meant, indices, allowed.size)].set(False, mode="drop")
        others = jnp.nonzero(left, size=m, fill_value=-1)[0].astype(jnp.int32)
        return jnp.where(meant, indices, others[place - jnp.sum(meant, dtype=jnp.int32)])

    indices = lax.cond(meant.all(), lambda *_: indices, jax.vmap(fill), indices, meant, allowed)
    return indices, jnp.where(meant, distances, jnp.float32(0))
