"""Weights at 2 bits, a few columns of them at 4, a few single weights at 16. Lossy.

Paper: J. Li et al., "Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight Matrix with
Asynchronous Dequantization" (ICCAD 2024, arXiv:2311.16442v4). No official code and no formula for the choice
of columns was found; what follows is a reconstruction from its figures, checked against its bit counts.

The format, its layout and letters: `weights/mixed_columns.py`.

Ours differs. Columns get 4 bits by what that gains: the fall of the squared error, weighted by the inputs'
second moments, over all layers of a model (`gains`, `allocate`). Zero and step are searched, given the
block's step scale, not derived from the range (`fit="paper"` does that). Outliers are stored as residuals,
the same number for every block of outputs, so that the format splits evenly over N. And the columns lie in a
permuted order, those at 2 bits first, so that both parts are plain arrays; the paper's interleaved words are
an import and export (`checkpoints_convert/quantized/two_bit_words.py`).

`stored_bits` gives the exact size, fillings included; with r = n4 / C and p outliers a weight it is about
2 (1 - r) + 4 r + (1 - r) (6 / 16 + 20 / 256) + r * 20 / group4 + 32 p.

    w = MixedTwoBit(target_bits=2.91).quantize(rows, stats, name="layers.0.mlp.up", dtype=jnp.float32)
    y = matmul(x, w)

Letters: K inputs, N outputs, C column groups, n2 and n4 of them at 2 and 4 bits, *B any leading axes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.quant.methods.two_bit_fit import (
    Fit,
    Groups,
    Live,
    Steps,
    better_steps,
    column_groups,
    fit_four,
    fit_two,
    group_scale,
    squared_error,
    step_limits,
    two_values,
)
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights import sparse
from jaxllm.weights.affine import check_rows
from jaxllm.weights.mixed_columns import (
    FOUR_BIT_FIELDS,
    INPUTS_PER_GROUP,
    OUTPUTS_PER_BLOCK,
    TWO_BIT_FIELDS,
    MixedColumns,
    Outliers,
    slots,
    stored_bits,
)
from pallas_kernels.mixed_two_bit_gemm.reference import block_rows
from pallas_kernels.words import to_words

Mask = Bool[Array, " C"]  # which column groups are at 4 bits
Columns = Float[Array, "C i"]
Wide = tuple[Array, Array, Array, Array]  # what `fit_four` gives, groups of `mask` first

# -- what it costs (2.6)


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
    masks = {name: np.zeros(-(-K // INPUTS_PER_GROUP), bool) for name, (K, _) in sizes.items()}
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


# -- the method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedTwoBit:
    """2 bits, 4 for the columns that gain most, single weights at 16; `target_bits` a weight, all counted.

    outliers: their share of all weights, where: "exclusive" (of the weights at 2 bits), "anywhere", "none".
    fit: "search" the zeros and steps of least error, or derive them from the range as the "paper" does.
    narrow_steps: steps in 3, 3 and 4 bits by turns, as the paper's words hold them (`to_interleaved`), not 4.
    """

    target_bits: float = 2.91
    outliers: float = 0.002
    where: Outliers = "exclusive"
    fit: Fit = "search"
    narrow_steps: bool = False
    group4: int = 128
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.outliers <= 1:
            raise ValueError(f"MixedTwoBit: outliers must be 0 to 1, got {self.outliers=}")
        if self.group4 < INPUTS_PER_GROUP or self.group4 % INPUTS_PER_GROUP:
            raise ValueError(
                f"MixedTwoBit: group4 must be a multiple of {INPUTS_PER_GROUP}, got {self.group4=}"
            )
        choices = {
            "where": ("exclusive", "anywhere", "none"),
            "fit": ("search", "paper"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"MixedTwoBit: {field} must be one of {allowed}, got {getattr(self, field)!r}"
                )

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"hessian_diag"})

    @property
    def _size(self) -> dict[str, Any]:
        return {"group4": self.group4, "outliers": self.outliers, "where": self.where}

    def gains(self, rows: Float[Array, "N K"], stats: Stats, *, name: str = "") -> tuple[np.ndarray, float]:
        """What 4 bits gain in each column group [C], and what they cost there, in bits.

        A gain is the fall of the weighted squared error as a share of the layer's weighted squared weights,
        so that layers compare. At 4 bits groups are neighbours in the matrix, not yet in the permuted order.
        """
        N, K = rows.shape
        C = -(-K // INPUTS_PER_GROUP)
        g, h, live = self._check(rows, stats)
        cost = (stored_bits(K, N, C, **self._size) - stored_bits(K, N, 0, **self._size)) / C
        energy = jnp.sum(h[None] * jnp.square(g[:N]), axis=(0, 2))
        two = fit_two(g, h, live, jnp.full(C, 15.0), fit=self.fit).error[:N].sum(axis=0)
        values = fit_four(g, h, live, group4=self.group4, fit=self.fit)[3]
        off = jnp.where(live, h[None] * jnp.square(g - values), 0.0)[:N]
        gain = (two - off.sum(axis=(0, 2))) / jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)
        return np.asarray(gain), cost

    def allocate(
        self, gains: Mapping[str, tuple[np.ndarray, float]], sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """For each weight which column groups get 4 bits: `target_bits` over all of them. sizes: (K, N)."""
        return allocate(gains, sizes, target_bits=self.target_bits, **self._size)

    def quantize(
        self,
        rows: Float[Array, "N K"],
        stats: Stats,
        *,
        name: str,
        dtype,
        mask: np.ndarray | None = None,
    ) -> MixedColumns:
        """The weight with 4 bits where `mask` [C] says; by itself at `target_bits` if None.

        Holds about eight arrays of [N, K].
        """
        N, K = rows.shape
        C = -(-K // INPUTS_PER_GROUP)
        if mask is None:
            mask = self.allocate({name: self.gains(rows, stats, name=name)}, {name: (K, N)})[name]
        mask = np.asarray(mask, bool)
        if mask.shape != (C,):
            raise ValueError(f"MixedTwoBit: mask must be [{C}] for {K=}, got {mask.shape=}")
        g, h, live = self._check(rows, stats)
        four = int(mask.sum())
        spare = slots(K, N, four, outliers=self.outliers, where=self.where)
        # the last block of outliers may be short of rows, and takes its share
        short = int(self.outliers * (N % block_rows(mask.size * INPUTS_PER_GROUP)) * K + 1e-9) if spare else 0
        top = jnp.asarray(step_limits(mask, narrow=self.narrow_steps), jnp.float32)
        columns = jnp.asarray(mask)
        fits = functools.partial(_fits, g, h, top=top, mask=columns, fit=self.fit, group4=self.group4)
        steps, wide = fits(live=live)
        out = None
        if spare:
            out = _outliers(
                g, h, live, columns, steps, wide, short, spare=spare, N=N, within=self.where == "exclusive"
            )
            again, wide_again = fits(live=live & ~out)
            steps = better_steps(again, _measured(g, h, live & ~out, steps))
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
        return column_groups(rows, stats.hessian_diag)


@functools.partial(jax.jit, static_argnames=("fit", "group4"))
def _fits(
    g: Groups, h: Columns, live: Live, top: Float[Array, " C"], mask: Mask, *, fit: Fit, group4: int
) -> tuple[Steps, Wide]:
    """Every column group at 2 bits, and at 4 bits those of `mask` first, where they are cut into groups."""
    first = jnp.argsort(~mask, stable=True)
    only = (live & mask[None, :, None])[:, first]
    return fit_two(g, h, live, top, fit=fit), fit_four(g[:, first], h[first], only, group4=group4, fit=fit)


def _values(g: Groups, mask: Mask, steps: Steps, wide: Wide) -> Groups:
    """Every weight as its column group will have it."""
    back = jnp.argsort(jnp.argsort(~mask, stable=True))
    return jnp.where(mask[None, :, None], wide[3][:, back], two_values(g, steps)[1])


@functools.partial(jax.jit, static_argnames=("spare", "N", "within"))
def _outliers(
    g: Groups,
    h: Columns,
    live: Live,
    mask: Mask,
    steps: Steps,
    wide: Wide,
    short: int | jax.Array,
    *,
    spare: int,
    N: int,
    within: bool,
) -> Live:
    """Where the weights of greatest weighted error are. short: how many of a last block with fewer rows."""
    may = live & ~mask[None, :, None] if within else live
    score = jnp.where(may, h[None] * jnp.square(g - _values(g, mask, steps, wide)), 0.0)
    kept = sparse.highest(score[:N].reshape(N, -1), spare, short).reshape(score[:N].shape)
    return jnp.pad(kept, ((0, g.shape[0] - N), (0, 0), (0, 0)))


@functools.partial(jax.jit, static_argnames=("four", "spare", "group4", "shape", "dtype"))
def _store(
    g: Groups,
    steps: Steps,
    wide: Wide,
    out: Live | None,
    mask: Mask,
    *,
    four: int,
    spare: int,
    group4: int,
    shape: tuple[int, int],
    dtype,
) -> MixedColumns:
    """The format of what was fitted: the one part that is compiled for each number of columns at 4 bits."""
    N, order = shape[1], jnp.argsort(mask, stable=True)
    two = _two(g, steps, order[: mask.size - four], N) if four < mask.size else dict.fromkeys(TWO_BIT_FIELDS)
    wider = _four(wide, four, group4, N) if four else dict.fromkeys(FOUR_BIT_FIELDS)
    outlier, place = None, None
    if out is not None:
        rest = jnp.where(out, g - _values(g, mask, steps, wide), 0.0)
        outlier, place = sparse.pack(rest[:N, order].reshape(N, -1), spare)
    order = order.astype(jnp.int16 if mask.size < 2**15 else jnp.int32)
    return MixedColumns(
        **two, **wider, order=order, outlier=outlier, place=place, group4=group4, shape=shape, dtype=dtype
    )


@jax.jit
def _measured(g: Groups, h: Columns, live: Live, steps: Steps) -> Steps:
    """The same steps with the error that they have where `live`."""
    return dataclasses.replace(
        steps, error=squared_error(g, h[None], live, group_scale(steps), steps.zero_point, 3)
    )


def _two(g: Groups, steps: Steps, order: Int[Array, " n2"], N: int) -> dict[str, jax.Array]:
    """The fields of the part at 2 bits."""
    real = (jnp.arange(g.shape[0]) < N)[:, None]  # what fills up the last block is stored as 0

    def by_block(v):  # [16 B, n2] -> [B, n2, 16]
        v = jnp.where(real, v[:, order], 0.0).astype(jnp.uint32)
        return jnp.swapaxes(v.reshape(-1, OUTPUTS_PER_BLOCK, order.size), 1, 2)

    codes = two_values(g, steps)[0][:N, order]
    shared = jnp.pad(steps.shared[:, order].astype(jnp.uint8), ((0, 0), (0, order.size % 2)))
    return {
        "two": to_words(codes, 2)[..., 0],
        "step": to_words(by_block(steps.step), 4),
        "zero_point": to_words(by_block(steps.zero_point), 2)[..., 0],
        "step_zero": shared[:, ::2] | (shared[:, 1::2] << 4),
        "step_scale": steps.scale[:, order].astype(jnp.float16),
    }


def _four(wide: Wide, four: int, group4: int, N: int) -> dict[str, jax.Array]:
    """The fields of the part at 4 bits."""
    scale, zero_point, codes, _ = wide
    G = -(-four * INPUTS_PER_GROUP // group4)
    real = (jnp.arange(zero_point.shape[0]) < N)[:, None]
    zero_point = jnp.where(real, zero_point[:, :G], 0.0).astype(jnp.uint32).reshape(-1, OUTPUTS_PER_BLOCK, G)
    return {
        "four": to_words(codes[:N, :four], 4),
        "four_scale": scale[:N, :G].astype(jnp.float16),
        "four_zero_point": to_words(jnp.swapaxes(zero_point, 1, 2), 4),
    }
