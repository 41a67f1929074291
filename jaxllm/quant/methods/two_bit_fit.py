"""The fit of one 2/4/16-bit weight: zeros, steps and scales of its columns at 2 and at 4 bits.

What the symbols mean: `weights/mixed_columns.py`. A fit minimizes the squared error weighted by the inputs'
second moments, over g, h and live:

    g     [N, C, 16]   the weights
    h     [C, 16]      second moments of the inputs, relative to their mean
    live  [N, C, 16]   where a weight counts

Letters: N outputs (a multiple of 16), C column groups of 16 inputs, B = N / 16 blocks of outputs.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.ops.search import better
from jaxllm.pytree import pytree
from jaxllm.weights.mixed_columns import INPUTS_PER_GROUP, OUTPUTS_PER_BLOCK

MIN_STEP_SCALE = 2.0**-24  # float16's least number: a step scale is never 0
SCALE_REFITS = 2  # times that the block's step scales are fitted again

Fit = Literal["search", "paper"]
Groups = Float[Array, "N C i"]  # i = 16 inputs, or those of a group at 4 bits
Moments = Float[Array, "1 C i"]
Live = Bool[Array, "N C i"]
PerGroup = Float[Array, "N C"]
PerBlock = Float[Array, "B C"]
StepLimits = Float[Array, "1 C"]


@pytree
class Steps:
    """Metadata of every column group as if it were at 2 bits."""

    step: PerGroup  # 0 .. 15
    zero_point: PerGroup  # 0 .. 3
    shared: PerBlock  # step_zero, 1 .. 15
    scale: PerBlock  # step_scale, a float16 in float32
    error: PerGroup  # weighted squared error


def group_scale(steps: Steps) -> PerGroup:
    """The scale of each group."""
    return (steps.step + over_outputs(steps.shared)) * over_outputs(steps.scale)


def over_outputs(v: Shaped[Array, "B C"]) -> Shaped[Array, "N C"]:
    """What a block has, for each of its 16 outputs."""
    return jnp.repeat(v, OUTPUTS_PER_BLOCK, axis=0)


def limits(g: Groups, live: Live) -> tuple[PerGroup, PerGroup]:
    """Least and greatest weight that counts, widened to hold 0."""
    some = jnp.where(live, g, 0.0)
    return some.min(axis=-1, initial=0.0), some.max(axis=-1, initial=0.0)


def _codes(g: Groups, scale: PerGroup, zero_point: PerGroup, qmax: int) -> Groups:
    """The nearest code 0 .. qmax of each weight."""
    return jnp.clip(jnp.round(g / scale[..., None]) + zero_point[..., None], 0, qmax)


def squared_error(
    g: Groups, h: Moments, live: Live, scale: PerGroup, zero_point: PerGroup, qmax: int
) -> PerGroup:
    """What rounding to codes 0 .. qmax costs each group."""
    off = g - (_codes(g, scale, zero_point, qmax) - zero_point[..., None]) * scale[..., None]
    return jnp.sum(jnp.where(live, h * jnp.square(off), 0.0), axis=-1)


def _search_scale(g: Groups, h: Moments, live: Live) -> PerGroup:
    """The scale of least error among 12 shares of the range for each of the 4 zeros."""
    low, high = limits(g, live)

    def closer(i, best):
        zero_point = (i % 4).astype(jnp.float32)
        # the least scale whose codes below and above the zero point reach the range's ends
        below = jnp.where(zero_point > 0, -low / jnp.maximum(zero_point, 1), 0.0)
        above = jnp.where(zero_point < 3, high / jnp.maximum(3 - zero_point, 1), 0.0)
        share = 1.0 - 0.06 * (i // 4).astype(jnp.float32)
        trial = jnp.maximum(jnp.maximum(below, above) * share, MIN_STEP_SCALE)
        return better(
            (squared_error(g, h, live, trial, jnp.broadcast_to(zero_point, trial.shape), 3), trial), best
        )

    start = jnp.full(low.shape, jnp.inf), jnp.zeros(low.shape)
    return jax.lax.fori_loop(0, 48, closer, start)[1]


def _second_order(scale: PerGroup, top: StepLimits) -> tuple[PerBlock, PerBlock]:
    """step_zero and step_scale of each block of 16 outputs.

    The scale is at least half of what the greatest step needs, so that step_zero never exceeds `top` (2.3);
    step_zero is at least 1, so that no group's scale is 0.
    """
    blocks = scale.reshape(-1, OUTPUTS_PER_BLOCK, scale.shape[1])
    least, most = blocks.min(axis=1), blocks.max(axis=1)
    second = _half(jnp.maximum((most - least) / top, most / (2 * top)))
    return jnp.clip(jnp.round(least / second), 1, top), second


def _half(scale: jax.Array) -> jax.Array:
    """The nearest float16 above 0, in float32."""
    return jnp.clip(scale, MIN_STEP_SCALE, 65504.0).astype(jnp.float16).astype(jnp.float32)


def _search_steps(
    g: Groups, h: Moments, live: Live, shared: PerBlock, second: PerBlock, top: StepLimits
) -> Steps:
    """The best of all steps and zeros under given step scales."""
    base, unit = over_outputs(shared), over_outputs(second)

    def closer(i, best):
        step, zero_point = (i // 4).astype(jnp.float32), (i % 4).astype(jnp.float32)
        here = squared_error(g, h, live, (step + base) * unit, jnp.broadcast_to(zero_point, base.shape), 3)
        return better((jnp.where(step <= top, here, jnp.inf), step, zero_point), best)

    start = jnp.full(base.shape, jnp.inf), jnp.zeros(base.shape), jnp.zeros(base.shape)
    error, step, zero_point = jax.lax.fori_loop(0, 64, closer, start)
    return Steps(step, zero_point, shared, second, error)


def _paper_steps(
    g: Groups,
    h: Moments,
    live: Live,
    scale: PerGroup,
    shared: PerBlock,
    second: PerBlock,
    top: StepLimits,
) -> Steps:
    """The step nearest to the range's scale, and the zero point that the range has under that step."""
    base, unit = over_outputs(shared), over_outputs(second)
    step = jnp.clip(jnp.round(scale / unit) - base, 0, top)
    used = (step + base) * unit
    zero_point = jnp.clip(jnp.round(-limits(g, live)[0] / used), 0, 3)
    return Steps(step, zero_point, shared, second, squared_error(g, h, live, used, zero_point, 3))


@jax.jit
def better_steps(new: Steps, old: Steps) -> Steps:
    """Of each block the steps with the lesser error."""
    pick = _block_sum(new.error) < _block_sum(old.error)

    def choose(a, b):
        return jnp.where(pick if a.shape == pick.shape else over_outputs(pick), a, b)

    return jax.tree.map(choose, new, old)


def _block_sum(v: PerGroup) -> PerBlock:
    return v.reshape(-1, OUTPUTS_PER_BLOCK, v.shape[1]).sum(axis=1)


@functools.partial(jax.jit, static_argnames="fit")
def fit_two(
    g: Float[Array, "N C 16"],
    h: Float[Array, "C 16"],
    live: Bool[Array, "N C 16"],
    top: Float[Array, " C"],
    *,
    fit: Fit,
) -> Steps:
    """Steps and zeros of every group at 2 bits; N a multiple of 16. top: greatest step, 15 or 7.

    "search": a scale each, from these the block's step scale; then the best step and zero point under it;
    then the step scale that least squares gives for those, kept where it helps. Holds about four arrays of
    [N, K].
    """
    h, top = h[None], top[None]
    if fit == "paper":
        low, high = limits(g, live)
        scale = (high - low) / 3
        shared, second = _second_order(scale, top)
        return _paper_steps(g, h, live, scale, shared, second, top)
    shared, second = _second_order(_search_scale(g, h, live), top)
    steps = _search_steps(g, h, live, shared, second, top)

    def again(_, steps: Steps) -> Steps:
        size = steps.step + over_outputs(steps.shared)
        scale = size * over_outputs(steps.scale)
        units = (_codes(g, scale, steps.zero_point, 3) - steps.zero_point[..., None]) * size[..., None]
        weight = jnp.where(live, h, 0.0)
        above = _block_sum((weight * units * g).sum(axis=-1))
        below = _block_sum((weight * units * units).sum(axis=-1))
        second = _half(jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), steps.scale))
        return better_steps(_search_steps(g, h, live, steps.shared, second, top), steps)

    return jax.lax.fori_loop(0, SCALE_REFITS, again, steps)


def step_limits(mask: Bool[np.ndarray, " C"], *, narrow: bool) -> Int[np.ndarray, " C"]:
    """The greatest step of each column group: 4 bits; narrow: 3 bits in two of three neighbours at 2 bits.

    mask: which groups are at 4 bits.
    """
    place = np.cumsum(~mask) - 1  # among the groups at 2 bits
    return np.where((place % 3 < 2) & ~mask & narrow, 7, 15)


def two_values(g: Float[Array, "N C 16"], steps: Steps) -> tuple[Array, Array]:
    """Codes and values of every group at 2 bits."""
    scale = group_scale(steps)
    codes = _codes(g, scale, steps.zero_point, 3)
    return codes, (codes - steps.zero_point[..., None]) * scale[..., None]


@functools.partial(jax.jit, static_argnames=("fit", "group4"))
def fit_four(
    g: Float[Array, "N C 16"], h: Float[Array, "C 16"], live: Bool[Array, "N C 16"], *, group4: int, fit: Fit
) -> tuple[Array, Array, Array, Array]:
    """Scale and zero point [N, G] of each `group4` inputs at 4 bits; codes and values [N, C, 16] under them.

    "search": the best of 16 shares of the range. Holds about four arrays of [N, K].
    """
    N, C, _ = g.shape
    G = -(-C * INPUTS_PER_GROUP // group4)

    def cut(v):  # [..., C, 16] -> [..., G, group4], zeros at the end
        v = v.reshape(*v.shape[:-2], -1)
        return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, G * group4 - C * INPUTS_PER_GROUP)]).reshape(
            *v.shape[:-1], G, group4
        )

    wide, weight, real = cut(g), cut(h)[None], cut(live)
    low, high = limits(wide, real)

    def closer(i, best):
        share = 1.0 - 0.03 * i.astype(jnp.float32)
        scale = _half((high - low) / 15 * share)
        zero_point = jnp.clip(jnp.round(-low * share / scale), 0, 15)
        return better((squared_error(wide, weight, real, scale, zero_point, 15), scale, zero_point), best)

    start = jnp.full(low.shape, jnp.inf), jnp.ones(low.shape), jnp.zeros(low.shape)
    _, scale, zero_point = jax.lax.fori_loop(0, 16 if fit == "search" else 1, closer, start)
    codes = _codes(wide, scale, zero_point, 15)
    values = (codes - zero_point[..., None]) * scale[..., None]

    def uncut(v):  # [N, G, group4] -> [N, C, 16]
        return v.reshape(N, -1)[:, : C * INPUTS_PER_GROUP].reshape(N, C, INPUTS_PER_GROUP)

    return scale, zero_point, uncut(codes), uncut(values)


@jax.jit
def column_groups(
    rows: Float[Array, "N K"], diagonal: Float[Array, " K"]
) -> tuple[Float[Array, "M C 16"], Float[Array, "C 16"], Bool[Array, "M C 16"]]:
    """g, h, live of rows [N, K]: outputs filled up by the last, inputs by weights that do not count."""
    N, K = rows.shape
    C = -(-K // INPUTS_PER_GROUP)
    wide = jnp.pad(rows.astype(jnp.float32), ((0, -N % OUTPUTS_PER_BLOCK), (0, 0)), mode="edge")
    g = jnp.pad(wide, ((0, 0), (0, C * INPUTS_PER_GROUP - K))).reshape(-1, C, INPUTS_PER_GROUP)
    live = jnp.broadcast_to((jnp.arange(C * INPUTS_PER_GROUP) < K).reshape(1, C, INPUTS_PER_GROUP), g.shape)
    # relative, with a little for inputs never seen, so that their weights are rounded to something near
    h = diagonal.astype(jnp.float32)
    mean = jnp.mean(h)
    h = jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1.0), 1.0) + 1e-4
    return g, jnp.pad(h, (0, C * INPUTS_PER_GROUP - K)).reshape(C, INPUTS_PER_GROUP), live
