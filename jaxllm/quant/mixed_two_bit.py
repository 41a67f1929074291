"""Weights at 2 bits, a few columns of them at 4, a few single weights at 16. Lossy.

Paper: J. Li et al., "Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight Matrix with
Asynchronous Dequantization" (ICCAD 2024, arXiv:2311.16442v4). No official code and no formula for the choice
of columns was found; what follows is a reconstruction from its figures, checked against its bit counts.

A weight [K, N] is cut into C = ceil(K / 16) column groups: 16 inputs, all outputs. With i an input of one:

    2 bits   w[n, i] = (code - zero[n]) * (step[n] + step_zero[b]) * step_scale[b]
             zero 2 bits, step 4 bits; step_zero 4 bits and step_scale float16 a block b of 16 outputs
    4 bits   w[n, i] = (code - zero[n, g]) * scale[n, g]
             zero 4 bits, scale float16, for each `group4` inputs g
    16 bits  a residual added to one weight: float16 and a place of 16 bits

Ours differs. Columns get 4 bits by what that gains: the fall of the squared error, weighted by the inputs'
second moments, over all layers of a model (`gains`, `allocate`). Zero and step are searched, given the
block's step scale, not derived from the range (`fit="paper"` does that). Outliers are stored as residuals,
the same number for every block of outputs, so that the format splits evenly over N. And the columns lie in a
permuted order, those at 2 bits first, so that both parts are plain arrays; the paper's interleaved words are
an import and export.

Layout, with B = ceil(N / 16) blocks of outputs and n2 + n4 = C; code j of a word at bit 2 j or 4 j; None for
what does not occur:

    two [N, n2]        four [N, n4, 2]      order [C]: the column group at each place, both parts ascending
    step [B, n2, 2]    zero [B, n2]         step_zero [B, ceil(n2 / 2)]      step_scale [B, n2]
    four_scale [N, G]  four_zero [B, G, 2]  with G = ceil(16 n4 / group4)
    outlier [O, m]     place [O, m]         m for R rows: row in block * 16 C + permuted input; unused: 0 at 0

`stored_bits` gives the exact size, fillings included; with r = n4 / C and p outliers a weight it is about
2 (1 - r) + 4 r + (1 - r) (6 / 16 + 20 / 256) + r * 20 / group4 + 32 p.

    w = MixedTwoBit(target_bits=2.91).solve(rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
    y = matmul(x, w)

Letters: K inputs, N outputs, C column groups, n2 and n4 of them at 2 and 4 bits, *B any leading axes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxllm.pytree import pytree, static
from jaxllm.quant.packing import from_words, to_words
from jaxllm.quant.product import after, dot
from jaxllm.quant.stats import Stats, check_rows, need

COLUMNS = 16  # inputs of a column group
BLOCK = 16  # outputs that share a step scale
LEAST = 2.0**-24  # float16's least number: a step scale is never 0
ROUNDS = 2  # times that the step scales are fitted again

Selection = Literal["gain", "weight_hessian", "range", "random"]
Outliers = Literal["exclusive", "anywhere", "none"]
Fit = Literal["search", "paper"]
Metadata = Literal["4", "334"]


@pytree
class MixedColumns:
    """A [K, N] weight in columns of 2 and of 4 bits, and sparse residuals."""

    two: jax.Array | None  # uint32 [N, n2]
    four: jax.Array | None  # uint32 [N, n4, 2]
    step: jax.Array | None  # uint32 [B, n2, 2]: 16 codes of 4 bits, one an output
    zero: jax.Array | None  # uint32 [B, n2]: 16 codes of 2 bits
    step_zero: jax.Array | None  # uint8 [B, ceil(n2 / 2)]: two of 4 bits
    step_scale: jax.Array | None  # float16 [B, n2]
    four_scale: jax.Array | None  # float16 [N, G]
    four_zero: jax.Array | None  # uint32 [B, G, 2]: 16 codes of 4 bits, one an output
    order: jax.Array  # int16 (int32 where C > 32767) [C]
    outlier: jax.Array | None  # float16 [O, m]
    place: jax.Array | None  # uint16 [O, m]
    group4: int = static()  # inputs of a 4-bit group, in the permuted order
    shape: tuple[int, int] = static()  # (K, N)
    dtype: object = static()  # numpy dtype: what it was quantized from

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def as_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        K, N = self.shape
        groups = permuted_rows(self).reshape(N, -1, COLUMNS)
        return groups[:, jnp.argsort(self.order)].reshape(N, -1)[:, :K].astype(dtype)

    def specs(self, spec: P) -> "MixedColumns":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        Always cut along N, in multiples of 16 outputs; where the weight is cut along K instead, N is cut over
        those devices: the permuted columns of a shard would not be the shard of the inputs.
        """
        K, N = spec
        axis = K if N is None else N

        def place(path, leaf):
            return P(None if path[0].name == "order" else axis, *[None] * (leaf.ndim - 1))

        return jax.tree.map_with_path(place, self)


def _by_output(codes, N: int):
    """What blocks of 16 outputs hold, [B, n, 16], an output a row [N, n]."""
    return jnp.swapaxes(codes, 1, 2).reshape(-1, codes.shape[1])[:N]


@functools.partial(jax.jit, inline=True)
def two_bit_steps(w: MixedColumns) -> tuple[Float[Array, "N n2"], Float[Array, "N n2"]]:
    """The scale and the zero of each 2-bit group: exact in float32, and known without the codes."""
    assert w.two is not None and w.step is not None and w.zero is not None and w.step_scale is not None
    N, n2 = w.two.shape
    step = _by_output(from_words(w.step, 4), N).astype(jnp.float32)
    zero = _by_output(from_words(w.zero[..., None], 2), N).astype(jnp.float32)
    shared = _halves(w.step_zero, n2).astype(jnp.float32)  # [B, n2]
    of_block = lambda v: jnp.repeat(v, BLOCK, axis=0)[:N]  # noqa: E731
    return (step + of_block(shared)) * of_block(w.step_scale.astype(jnp.float32)), zero


def _halves(pairs, n: int):
    """Two codes of 4 bits a byte, the first lower."""
    return jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)[:, :n]


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def permuted_rows(w: MixedColumns, dtype=jnp.float32) -> Float[Array, "N W"]:
    """The rows as they are stored, W = 16 C inputs in the order of `permute`."""
    N, parts = w.shape[1], []
    if w.two is not None:
        scale, zero = two_bit_steps(w)
        codes = from_words(w.two[..., None], 2).astype(jnp.float32)  # [N, n2, 16]
        parts.append(((codes - zero[..., None]) * scale[..., None]).reshape(N, -1))
    if w.four is not None and w.four_zero is not None and w.four_scale is not None:
        codes = from_words(w.four, 4).astype(jnp.float32).reshape(N, -1)  # [N, 16 n4]
        spread = lambda v: jnp.repeat(v, w.group4, axis=1)[:, : codes.shape[1]]  # noqa: E731
        four_zero = _by_output(from_words(w.four_zero, 4), N).astype(jnp.float32)
        scale = w.four_scale.astype(jnp.float32)
        parts.append((codes - spread(four_zero)) * spread(scale))
    rows = jnp.concatenate(parts, axis=1)
    if w.outlier is not None:
        rows = _in_blocks(rows, lambda flat: _add(flat, w.place, w.outlier))
    return rows.astype(dtype)


def _in_blocks(rows, change):
    """`change` on the rows as [O, R * W], one line an outlier block."""
    N, W = rows.shape
    R = block_rows(W)
    flat = jnp.pad(rows, ((0, -N % R), (0, 0))).reshape(-1, R * W)
    return change(flat).reshape(-1, W)[:N]


def _add(flat, place, values):
    one = lambda line, at, v: line.at[at.astype(jnp.int32)].add(v.astype(jnp.float32))  # noqa: E731
    return jax.vmap(one)(flat, place, values)


def permute(x: Float[Array, "*B K"], w: MixedColumns) -> Float[Array, "*B W"]:
    """The inputs in the order in which the weight stores them, zeros where a last column group is short."""
    C = w.order.shape[0]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, C * COLUMNS - x.shape[-1])])
    return x.reshape(*x.shape[:-1], C, COLUMNS)[..., w.order, :].reshape(*x.shape[:-1], -1)


def matmul(x: Float[Array, "*B K"], w: MixedColumns) -> Float[Array, "*B N"]:
    """`x @ w` in float32: one permutation of x instead of one of the weight."""
    return dot(permute(x, w), permuted_rows(after(x, w), x.dtype))


# -- what it costs (2.6)


def block_rows(W: int) -> int:
    """Rows of a block of outliers: 16, or as many as 16 bits can address a place in."""
    if W > 2**16:
        raise ValueError(f"mixed_two_bit: outliers need at most 65536 inputs, got {W=}")
    return min(BLOCK, 2 ** ((2**16 // W).bit_length() - 1))


def slots(K: int, N: int, four: int, *, outliers: float, where: Outliers) -> int:
    """Places for outliers in each block: floor(outliers * R * K), no more than there are weights for them."""
    if not outliers or where == "none":
        return 0
    C = -(-K // COLUMNS)
    R = min(block_rows(C * COLUMNS), N)
    free = C - four if where == "exclusive" else C
    return min(int(outliers * R * K + 1e-9), R * free * COLUMNS)


def stored_bits(
    K: int, N: int, four: int, *, group4: int = 128, outliers: float = 0.0, where: Outliers = "exclusive"
) -> int:
    """Bits of a [K, N] weight with `four` column groups at 4 bits: all arrays, with what fills them up."""
    C = -(-K // COLUMNS)
    two, B, G = C - four, -(-N // BLOCK), -(-four * COLUMNS // group4)
    bits = (32 * two + 64 * four) * N  # codes
    bits += B * (two * (64 + 32 + 16) + 8 * -(-two // 2))  # step, zero, step_scale, step_zero
    bits += G * (16 * N + 64 * B)  # four_scale, four_zero
    bits += C * (16 if C < 2**15 else 32)  # order
    m = slots(K, N, four, outliers=outliers, where=where)
    return bits + (m * 32 * -(-N // block_rows(C * COLUMNS)) if m else 0)


def allocate(
    gains: Mapping[str, tuple[np.ndarray, float]],
    sizes: Mapping[str, tuple[int, int]],
    *,
    target_bits: float,
    group4: int = 128,
    outliers: float = 0.0,
    where: Outliers = "exclusive",
) -> dict[str, np.ndarray]:
    """For each weight which column groups get 4 bits, with `target_bits` a weight in all at most.

    gains: a gain for each column group and what 4 bits cost there, in bits. The best gain a bit first (of
    equals the first layer, the lowest column), passing over those that no longer fit.
    sizes: (K, N) by the same names.
    """
    size = functools.partial(stored_bits, group4=group4, outliers=outliers, where=where)
    masks = {name: np.zeros(-(-K // COLUMNS), bool) for name, (K, _) in sizes.items()}
    budget = int(target_bits * sum(K * N for K, N in sizes.values()))
    spent = sum(size(K, N, 0) for K, N in sizes.values())
    if spent > budget:
        weights = sum(K * N for K, N in sizes.values())
        raise ValueError(
            f"MixedTwoBit: target_bits must be at least {spent / weights:.4f}, got {target_bits=}"
        )
    ranked = [
        (-float(gain) / cost, i, c, name)
        for i, (name, (values, cost)) in enumerate(gains.items())
        for c, gain in enumerate(np.asarray(values))
    ]
    counts = dict.fromkeys(sizes, 0)
    for _, _, c, name in sorted(ranked):
        K, N = sizes[name]
        more = size(K, N, counts[name] + 1) - size(K, N, counts[name])
        if spent + more <= budget:
            spent += more
            counts[name] += 1
            masks[name][c] = True
    return masks


# -- fitting: g [N, C, 16] weights, h [C, 16] second moments, live [N, C, 16] where a weight counts


@pytree
class Steps:
    """Metadata of every column group as if it were at 2 bits."""

    step: jax.Array  # [N, C]: 0 .. 15
    zero: jax.Array  # [N, C]: 0 .. 3
    shared: jax.Array  # [B, C]: step_zero, 1 .. 15
    scale: jax.Array  # [B, C]: step_scale, a float16 in float32
    error: jax.Array  # [N, C]: weighted squared error


def _of_block(v):
    return jnp.repeat(v, BLOCK, axis=0)


def _limits(g, live):
    """Least and greatest weight that counts, widened to hold 0."""
    some = jnp.where(live, g, 0.0)
    return some.min(axis=-1, initial=0.0), some.max(axis=-1, initial=0.0)


def _codes(g, scale, zero, top):
    return jnp.clip(jnp.round(g / scale[..., None]) + zero[..., None], 0, top)


def _error(g, h, live, scale, zero, top):
    off = g - (_codes(g, scale, zero, top) - zero[..., None]) * scale[..., None]
    return jnp.sum(jnp.where(live, h * jnp.square(off), 0.0), axis=-1)


def _search_scale(g, h, live):
    """The scale of least error among 12 shares of the range for each of the 4 zeros."""
    low, high = _limits(g, live)

    def closer(i, best):
        error, scale = best
        zero = (i % 4).astype(jnp.float32)
        # the least scale whose codes below and above the zero reach the range's ends
        below = jnp.where(zero > 0, -low / jnp.maximum(zero, 1), 0.0)
        above = jnp.where(zero < 3, high / jnp.maximum(3 - zero, 1), 0.0)
        share = 1.0 - 0.06 * (i // 4).astype(jnp.float32)
        trial = jnp.maximum(jnp.maximum(below, above) * share, LEAST)
        here = _error(g, h, live, trial, jnp.broadcast_to(zero, trial.shape), 3)
        return jnp.minimum(error, here), jnp.where(here < error, trial, scale)

    start = jnp.full(low.shape, jnp.inf), jnp.zeros(low.shape)
    return jax.lax.fori_loop(0, 48, closer, start)[1]


def _second_order(scale, top):
    """step_zero and step_scale of each block of 16 outputs.

    The scale is at least half of what the greatest step needs, so that step_zero never exceeds `top` (2.3);
    step_zero is at least 1, so that no group's scale is 0.
    """
    blocks = scale.reshape(-1, BLOCK, scale.shape[1])
    least, most = blocks.min(axis=1), blocks.max(axis=1)
    second = _half(jnp.maximum((most - least) / top, most / (2 * top)))
    return jnp.clip(jnp.round(least / second), 1, top), second


def _half(scale):
    return jnp.clip(scale, LEAST, 65504.0).astype(jnp.float16).astype(jnp.float32)


def _search_steps(g, h, live, shared, second, top) -> Steps:
    """The best of all steps and zeros under given step scales."""
    base, unit = _of_block(shared), _of_block(second)

    def closer(i, best):
        step, zero = (i // 4).astype(jnp.float32), (i % 4).astype(jnp.float32)
        here = _error(g, h, live, (step + base) * unit, jnp.broadcast_to(zero, base.shape), 3)
        better = (here < best[0]) & (step <= top)
        return tuple(jnp.where(better, new, old) for new, old in zip((here, step, zero), best, strict=True))

    start = jnp.full(base.shape, jnp.inf), jnp.zeros(base.shape), jnp.zeros(base.shape)
    error, step, zero = jax.lax.fori_loop(0, 64, closer, start)
    return Steps(step, zero, shared, second, error)


def _paper_steps(g, h, live, scale, shared, second, top) -> Steps:
    """The step nearest to the range's scale, and the zero that the range has under that step."""
    base, unit = _of_block(shared), _of_block(second)
    step = jnp.clip(jnp.round(scale / unit) - base, 0, top)
    used = (step + base) * unit
    zero = jnp.clip(jnp.round(-_limits(g, live)[0] / used), 0, 3)
    return Steps(step, zero, shared, second, _error(g, h, live, used, zero, 3))


@jax.jit
def _better(new: Steps, old: Steps) -> Steps:
    """Of each block the steps with the lesser error."""
    total = lambda s: s.error.reshape(-1, BLOCK, s.error.shape[1]).sum(axis=1)  # noqa: E731
    pick = total(new) < total(old)
    choose = lambda a, b: jnp.where(pick if a.shape == pick.shape else _of_block(pick), a, b)  # noqa: E731
    return jax.tree.map(choose, new, old)


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

    "search": a scale each, from these the block's step scale; then the best step and zero under it; then the
    step scale that least squares gives for those, kept where it helps. Holds about four arrays of [N, K].
    """
    h, top = h[None], top[None]
    if fit == "paper":
        low, high = _limits(g, live)
        scale = (high - low) / 3
        shared, second = _second_order(scale, top)
        return _paper_steps(g, h, live, scale, shared, second, top)
    shared, second = _second_order(_search_scale(g, h, live), top)
    steps = _search_steps(g, h, live, shared, second, top)

    def again(_, steps: Steps) -> Steps:
        size = steps.step + _of_block(steps.shared)
        scale = size * _of_block(steps.scale)
        units = (_codes(g, scale, steps.zero, 3) - steps.zero[..., None]) * size[..., None]
        weight = jnp.where(live, h, 0.0)
        blocks = lambda v: v.sum(axis=-1).reshape(-1, BLOCK, v.shape[1]).sum(axis=1)  # noqa: E731
        above, below = blocks(weight * units * g), blocks(weight * units * units)
        second = _half(jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), steps.scale))
        return _better(_search_steps(g, h, live, steps.shared, second, top), steps)

    return jax.lax.fori_loop(0, ROUNDS, again, steps)


def two_values(g: Float[Array, "N C 16"], steps: Steps) -> tuple[Array, Array]:
    """Codes and values of every group at 2 bits."""
    scale = (steps.step + _of_block(steps.shared)) * _of_block(steps.scale)
    codes = _codes(g, scale, steps.zero, 3)
    return codes, (codes - steps.zero[..., None]) * scale[..., None]


@functools.partial(jax.jit, static_argnames=("fit", "group4"))
def fit_four(
    g: Float[Array, "N C 16"], h: Float[Array, "C 16"], live: Bool[Array, "N C 16"], *, group4: int, fit: Fit
) -> tuple[Array, Array, Array, Array]:
    """Scale and zero [N, G] of each `group4` inputs at 4 bits; codes and values [N, C, 16] under them.

    "search": the best of 16 shares of the range. Holds about four arrays of [N, K].
    """
    N, C, _ = g.shape
    G = -(-C * COLUMNS // group4)

    def cut(v):  # [..., C, 16] -> [..., G, group4], zeros at the end
        v = v.reshape(*v.shape[:-2], -1)
        return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, G * group4 - C * COLUMNS)]).reshape(
            *v.shape[:-1], G, group4
        )

    wide, weight, real = cut(g), cut(h)[None], cut(live)
    low, high = _limits(wide, real)

    def closer(i, best):
        share = 1.0 - 0.03 * i.astype(jnp.float32)
        scale = _half((high - low) / 15 * share)
        zero = jnp.clip(jnp.round(-low * share / scale), 0, 15)
        here = _error(wide, weight, real, scale, zero, 15)
        better = here < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip((here, scale, zero), best, strict=True))

    start = jnp.full(low.shape, jnp.inf), jnp.ones(low.shape), jnp.zeros(low.shape)
    _, scale, zero = jax.lax.fori_loop(0, 16 if fit == "search" else 1, closer, start)
    codes = _codes(wide, scale, zero, 15)
    values = (codes - zero[..., None]) * scale[..., None]
    uncut = lambda v: v.reshape(N, -1)[:, : C * COLUMNS].reshape(N, C, COLUMNS)  # noqa: E731
    return scale, zero, uncut(codes), uncut(values)


@jax.jit
def _grouped(rows, diagonal):
    """g, h, live of rows [N, K]: outputs filled up by the last, inputs by weights that do not count."""
    N, K = rows.shape
    C = -(-K // COLUMNS)
    wide = jnp.pad(rows.astype(jnp.float32), ((0, -N % BLOCK), (0, 0)), mode="edge")
    g = jnp.pad(wide, ((0, 0), (0, C * COLUMNS - K))).reshape(-1, C, COLUMNS)
    live = jnp.broadcast_to((jnp.arange(C * COLUMNS) < K).reshape(1, C, COLUMNS), g.shape)
    # relative, with a little for inputs never seen, so that their weights are rounded to something near
    h = diagonal.astype(jnp.float32)
    mean = jnp.mean(h)
    h = jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1.0), 1.0) + 1e-4
    return g, jnp.pad(h, (0, C * COLUMNS - K)).reshape(C, COLUMNS), live


# -- the method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedTwoBit:
    """2 bits, 4 for the columns that gain most, single weights at 16; `target_bits` a weight, all counted.

    outliers: their share of all weights, where: "exclusive" (of the weights at 2 bits), "anywhere", "none".
    per_block: the best one of every four consecutive column groups, whatever the target (the paper's figure).
    metadata: "334" keeps two of three steps within 3 bits, as the paper's words need (`to_interleaved`).
    """

    target_bits: float = 2.91
    outliers: float = 0.002
    where: Outliers = "exclusive"
    selection: Selection = "gain"
    fit: Fit = "search"
    metadata: Metadata = "4"
    per_block: bool = False
    group4: int = 128
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.outliers <= 1:
            raise ValueError(f"MixedTwoBit: outliers must be 0 to 1, got {self.outliers=}")
        if self.group4 < COLUMNS or self.group4 % COLUMNS:
            raise ValueError(f"MixedTwoBit: group4 must be a multiple of {COLUMNS}, got {self.group4=}")
        choices = {
            "where": ("exclusive", "anywhere", "none"),
            "selection": ("gain", "weight_hessian", "range", "random"),
            "fit": ("search", "paper"),
            "metadata": ("4", "334"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"MixedTwoBit: {field} must be one of {allowed}, got {getattr(self, field)!r}"
                )

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({"hessian_diag"})

    @property
    def _size(self) -> dict[str, Any]:
        return {"group4": self.group4, "outliers": self.outliers, "where": self.where}

    def gains(self, rows: Float[Array, "N K"], stats: Stats, *, name: str = "") -> tuple[np.ndarray, float]:
        """What 4 bits gain in each column group [C], and what they cost there, in bits.

        "gain": the fall of the weighted squared error, as a share of the layer's weighted squared weights, so
        that layers compare. At 4 bits groups are neighbours in the matrix, not yet in the permuted order.
        """
        N, K = rows.shape
        C = -(-K // COLUMNS)
        g, h, live = self._check(rows, stats)
        cost = (stored_bits(K, N, C, **self._size) - stored_bits(K, N, 0, **self._size)) / C
        energy = jnp.sum(h[None] * jnp.square(g[:N]), axis=(0, 2))
        match self.selection:
            case "range":
                low, high = _limits(g[:N], live[:N])
                gain = (high - low).sum(axis=0)
            case "random":
                key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
                gain = jax.random.uniform(key, (C,))
            case "weight_hessian":
                gain = energy / jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)
            case _:
                two = fit_two(g, h, live, jnp.full(C, 15.0), fit=self.fit).error[:N].sum(axis=0)
                values = fit_four(g, h, live, group4=self.group4, fit=self.fit)[3]
                off = jnp.where(live, h[None] * jnp.square(g - values), 0.0)[:N]
                gain = (two - off.sum(axis=(0, 2))) / jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)
        return np.asarray(gain), cost

    def allocate(
        self, gains: Mapping[str, tuple[np.ndarray, float]], sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """For each weight which column groups get 4 bits: `target_bits` over all of them. sizes: (K, N)."""
        if self.per_block:
            return {name: _one_of_four(np.asarray(values)) for name, (values, _) in gains.items()}
        return allocate(gains, sizes, target_bits=self.target_bits, **self._size)

    def solve(
        self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype, mask: np.ndarray | None = None
    ) -> MixedColumns:
        """The weight with 4 bits where `mask` [C] says; by itself at `target_bits` if None.

        Holds about eight arrays of [N, K].
        """
        N, K = rows.shape
        if mask is None:
            mask = self.allocate({name: self.gains(rows, stats, name=name)}, {name: (K, N)})[name]
        mask = np.asarray(mask, bool)
        if mask.shape != (-(-K // COLUMNS),):
            raise ValueError(f"MixedTwoBit: mask must be [{-(-K // COLUMNS)}] for {K=}, got {mask.shape=}")
        g, h, live = self._check(rows, stats)
        four = int(mask.sum())
        spare = slots(K, N, four, outliers=self.outliers, where=self.where)
        # the last block of outliers may be short of rows, and takes its share
        short = int(self.outliers * (N % block_rows(mask.size * COLUMNS)) * K + 1e-9) if spare else 0
        top = jnp.asarray(np.where(_narrow(mask, self.metadata), 7.0, 15.0), jnp.float32)
        columns = jnp.asarray(mask)
        fits = functools.partial(_fits, g, h, top=top, mask=columns, fit=self.fit, group4=self.group4)
        steps, wide = fits(live=live)
        out = None
        if spare:
            out = _outliers(
                g, h, live, columns, steps, wide, short, spare=spare, N=N, within=self.where == "exclusive"
            )
            again, wide_again = fits(live=live & ~out)
            steps = _better(again, _measured(g, h, live & ~out, steps))
            wide = wide_again if self.where == "anywhere" else wide
        return _store(
            g,
            steps,
            wide,
            out,
            columns,
            four=four,
            spare=spare,
            group4=self.group4,
            shape=(K, N),
            dtype=jnp.dtype(dtype),
        )

    def _check(self, rows, stats: Stats):
        need(stats, "MixedTwoBit", "hessian_diag")
        assert stats.hessian_diag is not None
        if stats.hessian_diag.shape != (rows.shape[1],):
            raise ValueError(
                f"MixedTwoBit: hessian_diag must be [K], got {stats.hessian_diag.shape=}, {rows.shape=}"
            )
        check_rows("MixedTwoBit", rows)
        return _grouped(rows, stats.hessian_diag)


def _narrow(mask: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Column groups whose step has 3 bits: two of every three at 2 bits."""
    place = np.cumsum(~mask) - 1
    return (place % 3 < 2) & ~mask & (metadata == "334")


def _one_of_four(gain: np.ndarray) -> np.ndarray:
    """The best of every four consecutive column groups; none of fewer than four at the end."""
    mask = np.zeros(gain.size, bool)
    best = gain[: gain.size // 4 * 4].reshape(-1, 4).argmax(axis=1)
    mask[np.arange(best.size) * 4 + best] = True
    return mask


@functools.partial(jax.jit, static_argnames=("fit", "group4"))
def _fits(g, h, live, top, mask, *, fit: Fit, group4: int):
    """Every column group at 2 bits, and at 4 bits those of `mask` first, where they are cut into groups."""
    first = jnp.argsort(~mask, stable=True)
    only = (live & mask[None, :, None])[:, first]
    return fit_two(g, h, live, top, fit=fit), fit_four(g[:, first], h[first], only, group4=group4, fit=fit)


def _values(g, mask, steps: Steps, wide):
    back = jnp.argsort(jnp.argsort(~mask, stable=True))
    return jnp.where(mask[None, :, None], wide[3][:, back], two_values(g, steps)[1])


@functools.partial(jax.jit, static_argnames=("spare", "N", "within"))
def _outliers(g, h, live, mask, steps: Steps, wide, short, *, spare: int, N: int, within: bool):
    """Where the weights of greatest weighted error are. short: how many of a last block with fewer rows."""
    may = live & ~mask[None, :, None] if within else live
    score = jnp.where(may, h[None] * jnp.square(g - _values(g, mask, steps, wide)), 0.0)
    return jnp.pad(_highest(score[:N], spare, short), ((0, g.shape[0] - N), (0, 0), (0, 0)))


@functools.partial(jax.jit, static_argnames=("four", "spare", "group4", "shape", "dtype"))
def _store(g, steps: Steps, wide, out, mask, *, four: int, spare: int, group4: int, shape, dtype):
    """The format of what was fitted: the one part that is compiled for each number of columns at 4 bits."""
    N, order = shape[1], jnp.argsort(mask, stable=True)
    two = _two(g, steps, order[: mask.size - four], N) if four < mask.size else dict.fromkeys(TWO)
    wider = _four(wide, four, group4, N) if four else dict.fromkeys(FOUR)
    outlier, place = None, None
    if spare:
        rest = jnp.where(out, g - _values(g, mask, steps, wide), 0.0)
        outlier, place = _sparse(rest[:N, order], spare)
    order = order.astype(jnp.int16 if mask.size < 2**15 else jnp.int32)
    return MixedColumns(
        **two, **wider, order=order, outlier=outlier, place=place, group4=group4, shape=shape, dtype=dtype
    )


TWO = ("two", "step", "zero", "step_zero", "step_scale")
FOUR = ("four", "four_scale", "four_zero")


@jax.jit
def _measured(g, h, live, steps: Steps) -> Steps:
    """The same steps with the error that they have where `live`."""
    scale = (steps.step + _of_block(steps.shared)) * _of_block(steps.scale)
    return dataclasses.replace(steps, error=_error(g, h[None], live, scale, steps.zero, 3))


def _highest(score, spare: int, short):
    """Where the `spare` highest scores above 0 of each outlier block are; of a short last block `short`."""
    N, C, _ = score.shape
    whole = N // block_rows(C * COLUMNS)

    def mark(flat):
        best, at = jax.lax.top_k(flat, spare)
        rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
        block = jax.lax.broadcasted_iota(jnp.int32, best.shape, 0)
        taken = (best > 0) & (rank < jnp.where(block < whole, spare, short))
        return jax.vmap(lambda line, i, t: line.at[i].set(t))(jnp.zeros(flat.shape, bool), at, taken)

    return _in_blocks(score.reshape(N, -1), mark).reshape(score.shape)


def _two(g, steps: Steps, order, N: int) -> dict[str, jax.Array]:
    real = (jnp.arange(g.shape[0]) < N)[:, None]  # what fills up the last block is stored as 0

    def by_block(v):  # [16 B, n2] -> [B, n2, 16]
        v = jnp.where(real, v[:, order], 0.0).astype(jnp.uint32)
        return jnp.swapaxes(v.reshape(-1, BLOCK, order.size), 1, 2)

    codes = two_values(g, steps)[0][:N, order]
    shared = jnp.pad(steps.shared[:, order].astype(jnp.uint8), ((0, 0), (0, order.size % 2)))
    return {
        "two": to_words(codes, 2)[..., 0],
        "step": to_words(by_block(steps.step), 4),
        "zero": to_words(by_block(steps.zero), 2)[..., 0],
        "step_zero": shared[:, ::2] | (shared[:, 1::2] << 4),
        "step_scale": steps.scale[:, order].astype(jnp.float16),
    }


def _four(wide, four: int, group4: int, N: int) -> dict[str, jax.Array]:
    scale, zero, codes, _ = wide
    G = -(-four * COLUMNS // group4)
    real = (jnp.arange(zero.shape[0]) < N)[:, None]
    zero = jnp.where(real, zero[:, :G], 0.0).astype(jnp.uint32).reshape(-1, BLOCK, G)
    return {
        "four": to_words(codes[:N, :four], 4),
        "four_scale": scale[:N, :G].astype(jnp.float16),
        "four_zero": to_words(jnp.swapaxes(zero, 1, 2), 4),
    }


def _sparse(rest, spare: int) -> tuple[jax.Array, jax.Array]:
    """Values and places of what is not 0, by place; zeros at place 0 fill up each block."""
    N, C, _ = rest.shape
    W = C * COLUMNS
    flat = jnp.pad(rest.reshape(N, W).astype(jnp.float16), ((0, -N % block_rows(W)), (0, 0)))
    flat = flat.reshape(-1, block_rows(W) * W)
    used, at = jax.lax.top_k((flat != 0).astype(jnp.float32), spare)
    return jnp.take_along_axis(flat, at, axis=1), jnp.where(used > 0, at, 0).astype(jnp.uint16)


# -- the paper's layout (3.1)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """A weight as the paper's figure draws it, column groups in their natural order, on the host.

    Three neighbouring groups at 2 bits share a word of 16 bits an output, and one a block of 16 outputs:

        words   zero 2 | 2 | 2    step 3 | 3 | 4                                bits 0-5, 6-15
        zeros   step_zero 3 | - | 3 | - | 4 | 4 unused                          bits 0-2, 4-6, 8-11
    """

    main: np.ndarray  # uint32 [C, N]: 16 codes of 2 bits, or the first 8 of 4 bits
    side: np.ndarray  # uint32 [n4, N]: the other 8
    side_index: np.ndarray  # int32 [C]: row of `side`, -1 at 2 bits
    words: np.ndarray  # uint16 [ceil(n2 / 3), N]
    zeros: np.ndarray  # uint16 [ceil(n2 / 3), B]
    scales: np.ndarray  # float16 [n2, B]
    four_scale: np.ndarray  # float16 [G, N]
    four_zero: np.ndarray  # uint8 [G, N]
    values: np.ndarray  # float16 [nonzeros]: residuals by output, then by input
    columns: np.ndarray  # uint16 [nonzeros]
    row_starts: np.ndarray  # int32 [N + 1]
    spare: int  # places for outliers in a block
    group4: int
    shape: tuple[int, int]
    dtype: object


def pack_words(zero: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Words of 16 bits from zeros and steps [..., 3]; the first two steps below 8."""
    z, s = zero.astype(np.uint16), step.astype(np.uint16)
    fields = [z[..., 0], z[..., 1] << 2, z[..., 2] << 4, s[..., 0] << 6, s[..., 1] << 9, s[..., 2] << 12]
    return functools.reduce(np.bitwise_or, fields)


def unpack_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and steps [..., 3] of the words."""
    zero = np.stack([words >> at & 3 for at in (0, 2, 4)], axis=-1)
    step = np.stack([words >> 6 & 7, words >> 9 & 7, words >> 12 & 15], axis=-1)
    return zero, step


def to_interleaved(w: MixedColumns) -> Interleaved:
    """The paper's layout of a weight. Raises ValueError where a step does not fit the 3 bits it has there."""
    N, C = w.shape[1], w.order.shape[0]
    order = np.asarray(w.order).astype(np.int64)
    n2, n4 = (0 if part is None else part.shape[1] for part in (w.two, w.four))
    side_index = np.full(C, -1, np.int32)
    side_index[order[n2:]] = np.arange(n4)
    main = np.zeros((C, N), np.uint32)
    side = np.zeros((n4, N), np.uint32)
    words, zeros = np.zeros((-(-n2 // 3), N), np.uint16), np.zeros((-(-n2 // 3), -(-N // BLOCK)), np.uint16)
    scales = np.zeros((0, zeros.shape[1]), np.float16)
    if w.two is not None:
        assert w.step is not None and w.zero is not None
        main[order[:n2]] = np.asarray(w.two).T
        step = np.asarray(_by_output(from_words(w.step, 4), N))
        zero = np.asarray(_by_output(from_words(w.zero[..., None], 2), N))
        shared = np.asarray(_halves(w.step_zero, n2))
        narrow = np.arange(n2) % 3 < 2
        worst = max(step[:, narrow].max(initial=0), shared[:, narrow].max(initial=0))
        if worst > 7:
            raise ValueError(
                f"to_interleaved: two of three steps must fit 3 bits (metadata='334'), got step={worst}"
            )
        words = pack_words(_threes(zero), _threes(step)).T
        three = _threes(shared).astype(np.uint16)
        zeros[:] = (three[..., 0] | three[..., 1] << 4 | three[..., 2] << 8).T
        scales = np.asarray(w.step_scale).T
    four_scale, four_zero = np.zeros((0, N), np.float16), np.zeros((0, N), np.uint8)
    if w.four is not None:
        assert w.four_zero is not None
        main[order[n2:]], side[:] = np.moveaxis(np.asarray(w.four), 2, 0).swapaxes(1, 2)
        four_scale = np.asarray(w.four_scale).T
        four_zero = np.asarray(_by_output(from_words(w.four_zero, 4), N)).T.astype(np.uint8)
    values, columns, row_starts, spare = _to_rows(w, order, N)
    return Interleaved(
        main=main,
        side=side,
        side_index=side_index,
        words=words,
        zeros=zeros,
        scales=scales,
        four_scale=four_scale,
        four_zero=four_zero,
        values=values,
        columns=columns,
        row_starts=row_starts,
        spare=spare,
        group4=w.group4,
        shape=w.shape,
        dtype=w.dtype,
    )


def from_interleaved(layout: Interleaved) -> MixedColumns:
    """The weight of a paper's layout: the inverse of `to_interleaved`."""
    N, C = layout.shape[1], layout.main.shape[0]
    wide = layout.side_index >= 0
    order = np.argsort(wide, kind="stable")
    n4 = int(wide.sum())
    n2, B = C - n4, -(-N // BLOCK)
    fields: dict[str, Any] = dict.fromkeys((*TWO, *FOUR, "outlier", "place"))
    by_block = lambda v: np.pad(v, ((0, B * BLOCK - N), (0, 0))).reshape(B, BLOCK, -1).swapaxes(1, 2)  # noqa: E731
    if n2:
        zero, step = (v.swapaxes(0, 1).reshape(N, -1)[:, :n2] for v in unpack_words(layout.words))
        three = np.stack([layout.zeros & 7, layout.zeros >> 4 & 7, layout.zeros >> 8 & 15], axis=-1)
        shared = three.swapaxes(0, 1).reshape(B, -1)[:, :n2].astype(np.uint8)
        shared = np.pad(shared, ((0, 0), (0, n2 % 2)))
        fields |= {
            "two": layout.main[order[:n2]].T,
            "step": to_words(jnp.asarray(by_block(step)), 4),
            "zero": to_words(jnp.asarray(by_block(zero)), 2)[..., 0],
            "step_zero": shared[:, ::2] | shared[:, 1::2] << 4,
            "step_scale": layout.scales.T,
        }
    if n4:
        fields |= {
            "four": np.stack([layout.main[order[n2:]], layout.side], axis=-1).swapaxes(0, 1),
            "four_scale": layout.four_scale.T,
            "four_zero": to_words(jnp.asarray(by_block(layout.four_zero.T)), 4),
        }
    if layout.spare:
        fields["outlier"], fields["place"] = _from_rows(layout, order, N)
    fields["order"] = order.astype(np.int16 if C < 2**15 else np.int32)
    arrays: dict[str, Any] = {name: None if v is None else jnp.asarray(v) for name, v in fields.items()}
    return MixedColumns(**arrays, group4=layout.group4, shape=layout.shape, dtype=layout.dtype)


def _threes(v: np.ndarray) -> np.ndarray:
    """[..., n] as [..., ceil(n / 3), 3], zeros at the end."""
    return np.pad(v, ((0, 0), (0, -v.shape[1] % 3))).reshape(v.shape[0], -1, 3)


def _to_rows(w: MixedColumns, order: np.ndarray, N: int):
    """Outliers in compressed rows, and the places of a block."""
    if w.outlier is None:
        return np.zeros(0, np.float16), np.zeros(0, np.uint16), np.zeros(N + 1, np.int32), 0
    W = order.size * COLUMNS
    value, place = np.asarray(w.outlier), np.asarray(w.place).astype(np.int64)
    block, slot = np.nonzero(value)
    at = place[block, slot]
    row, inside = block * block_rows(W) + at // W, at % W
    column = order[inside // COLUMNS] * COLUMNS + inside % COLUMNS
    by_row = np.lexsort((column, row))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=N))]).astype(np.int32)
    return value[block, slot][by_row], column[by_row].astype(np.uint16), starts, value.shape[1]


def _from_rows(layout: Interleaved, order: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    W = order.size * COLUMNS
    R = block_rows(W)
    row = np.repeat(np.arange(N), np.diff(layout.row_starts))
    column = layout.columns.astype(np.int64)
    at = row % R * W + np.argsort(order)[column // COLUMNS] * COLUMNS + column % COLUMNS
    by_place = np.lexsort((at, row // R))
    block = (row // R)[by_place]
    slot = np.arange(block.size) - np.searchsorted(block, block)
    value = np.zeros((-(-N // R), layout.spare), np.float16)
    place = np.zeros(value.shape, np.uint16)
    value[block, slot], place[block, slot] = layout.values[by_place], at[by_place]
    return value, place
