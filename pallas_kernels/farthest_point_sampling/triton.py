"""Farthest point sampling in Pallas-Triton: one program a cloud, whose threads keep the minima in registers.

A step is one pass over the points: the squared distance to the last pick, the minimum of that and what was,
the maximum of the minima; then the lowest index that has it. Up to 8k points the coordinates are in
registers too; larger clouds are read again in each step, from L1 as far as they fit (16k points are 192 KiB).
Minima are handled as the whole numbers that their bits are, in the same order: Hopper takes the maximum of
three whole numbers in one instruction, and that of a warp in another.

Checked: numbers in the interpreter and lowering (jax 0.10.2 and 0.12), compiled for sm_80, sm_89, sm_90a and
sm_100a without spills (0.12). Never run on a GPU.

Letters: N points, D coordinates, P points of a cloud with its padding, m picks.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import compat, tiles
from pallas_kernels.distance import runtime_zero, squared_distance, triton_square

MAX_POINTS = 32768  # 32 minima a thread; more spill
MAX_COORDINATES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """part: points that all threads together take at once, a power of two; warps: of a program;
    in_registers: whether coordinates are, which takes D registers a point of the thread's."""

    part: int
    warps: int
    in_registers: bool


@tiles.measured("farthest_point_sampling triton")
def default_tile(N: int, D: int) -> Tile:
    """Guesses: no GPU has measured them. More warps hide more latency, and leave each fewer registers."""
    warps = next((w for w in (4, 8) if N <= 512 * w), 16)
    return Tile(part=128 * warps, warps=warps, in_registers=N * (D + 1) <= 64 * 32 * warps)


def why_not(points: Float[Array, "B N D"], minimum: Float[Array, "B N"]) -> str | None:
    _, N, D = points.shape
    if N > MAX_POINTS:
        return f"takes at most {MAX_POINTS} points, got {N}"
    if D > MAX_COORDINATES:
        return f"takes at most {MAX_COORDINATES} coordinates, got {D}"
    return None


def sample(
    points: Float[Array, "B N D"],
    minimum: Float[Array, "B N"],
    m: int,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "B m"], Float[Array, "B m"], Float[Array, "B N"]]:
    """As `reference.sample`."""
    B, N, D = points.shape
    tile = default_tile(N, D) if tile is None else tile
    parts = -(-N // tile.part)
    P = parts * tile.part
    rows = jnp.pad(points.transpose(0, 2, 1), ((0, 0), (0, 0), (0, P - N)))  # [B, D, P]
    far = jnp.pad(minimum, ((0, 0), (0, P - N)), constant_values=-1)
    zero = runtime_zero(points)[None]
    indices, distances, far = pl.pallas_call(
        functools.partial(
            _kernel, m=m, part=tile.part, parts=parts, in_registers=tile.in_registers, interpret=interpret
        ),
        grid=(B,),  # a cloud
        in_specs=[
            pl.BlockSpec((None, D, P), lambda b: (b, 0, 0)),
            pl.BlockSpec((None, P), lambda b: (b, 0)),
            pl.BlockSpec((1,), lambda b: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((None, m), lambda b: (b, 0)),
            pl.BlockSpec((None, m), lambda b: (b, 0)),
            pl.BlockSpec((None, P), lambda b: (b, 0)),
        ],
        out_shape=[
            compat.output((B, m), jnp.int32, points, minimum),
            compat.output((B, m), jnp.float32, points, minimum),
            compat.output((B, P), jnp.float32, points, minimum),
        ],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="farthest_point_sampling",
    )(rows, far, zero)
    return indices, distances, far[:, :N]


def _kernel(
    x_ref,
    minimum_ref,
    zero_ref,
    indices_ref,
    distances_ref,
    far_ref,
    *,
    m,
    part,
    parts,
    in_registers,
    interpret,
):
    D = x_ref.shape[0]
    ids = lax.broadcasted_iota(jnp.int32, (part,), 0)
    distance = functools.partial(squared_distance, zero=zero_ref[0], square=triton_square(interpret))

    def coordinates(i):
        return [x_ref[d, pl.ds(i * part, part)] for d in range(D)]

    x = [coordinates(i) for i in range(parts)] if in_registers else None

    def pick(k, far):
        highest = jnp.max(functools.reduce(jnp.maximum, far))
        with_it = [jnp.where(d == highest, ids + i * part, parts * part) for i, d in enumerate(far)]
        index = jnp.min(functools.reduce(jnp.minimum, with_it))
        indices_ref[k] = index
        distances_ref[k] = _float(highest)
        last = [x_ref[d, index] for d in range(D)]
        return tuple(
            jnp.minimum(d, _bits(distance(coordinates(i) if x is None else x[i], last)))
            for i, d in enumerate(far)
        )

    far = lax.fori_loop(0, m, pick, tuple(_bits(minimum_ref[pl.ds(i * part, part)]) for i in range(parts)))
    for i, d in enumerate(far):
        far_ref[pl.ds(i * part, part)] = _float(d)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(x):
    return lax.bitcast_convert_type(x, jnp.float32)
