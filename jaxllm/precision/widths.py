"""DP-LLM's first phase: how many planes of each linear are held, within a budget of memory (section 2.3).

    "fisher"   cost[b] = sum over the weight's numbers of F (W_widest - W_b)^2
    "trace"      cost[b] = mean F of the weight times ||W_widest - W_b||^2      HAWQ-V2 (arXiv:1911.03852)
    "gradient"   cost[b] = |sum G (W_widest - W_b)|                             LLM-MQ (Li et al., 2023)

F are sums of squared gradients of the loss, G of gradients, a sequence each; DP-LLM takes the first. The last
is of first order, and its signs cancel.

One width a linear, of least cost in all, whose planes take at most the budget: a multiple-choice knapsack,
solved exactly. A larger budget never costs more. The authors compare with the weight before it was quantized
and force the solution near the budget from below as well, which fails where sizes are coarse.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxllm.quant.sensitivity import cheapest
from jaxllm.quant.source import CalibrationStream
from jaxllm.weights.planes.bit_planes import BitPlanes

By = Literal["fisher", "trace", "gradient"]
Costs = Mapping[str, Mapping[int, float]]  # of each linear, at each width


def width_costs(
    model,
    weights: Mapping[str, BitPlanes],
    sequences: Any,
    *,
    by: By = "fisher",
    batch: int = 8,
    progress: bool = True,
) -> dict[str, dict[int, float]]:
    """What each width costs each linear, in proportion to what it adds to the loss.

    sequences: as for `quantize`: rows of token ids, or a `Calibration` of this model with "fisher" or, for
      costs by "gradient", with that.
    """
    wanted = {name: frozenset({"gradient" if by == "gradient" else "fisher"}) for name in weights}
    source = CalibrationStream(model, wanted, sequences, batch=batch, progress=progress, desc="widths")
    found: dict[str, dict[int, float]] = {}
    for _, stats in source.blocks():
        for name, own in stats.items():
            w = weights[name]
            widest = w.at(w.parent_bits).dequantize_rows(jnp.float32)
            felt = own.gradient if by == "gradient" else own.fisher
            assert felt is not None
            if by == "trace":
                felt = jnp.full_like(felt, felt.mean())
            cost = _first_order if by == "gradient" else _second_order
            found[name] = {
                b: float(cost(felt, w.at(b).dequantize_rows(jnp.float32) - widest)) / own.tokens
                for b in range(w.seed_bits, w.parent_bits + 1)
            }
    return {name: found[name] for name in weights}


@jax.jit
def _second_order(fisher: jax.Array, change: jax.Array) -> jax.Array:
    return jnp.sum(fisher * change**2)


@jax.jit
def _first_order(gradient: jax.Array, change: jax.Array) -> jax.Array:
    return jnp.abs(jnp.sum(gradient * change))


def widths_within(costs: Costs, sizes: Mapping[str, int], bits: float) -> dict[str, int]:
    """The width of each linear, of least cost in all, that take at most `bits` a weight together.

    sizes: weights of each linear. Raises ValueError for fewer bits than the narrowest widths take.
    """
    total = sum(sizes[name] for name in costs)
    least = sum(min(several) * sizes[name] for name, several in costs.items()) / total
    if bits < least:
        raise ValueError(f"precision: bits must be at least {least:g}, the narrowest widths, got {bits}")
    taken = cheapest(
        [list(several.values()) for several in costs.values()],
        [[b * sizes[name] / total for b in several] for name, several in costs.items()],
        bits,
    )
    return {name: list(several)[i] for (name, several), i in zip(costs.items(), taken, strict=True)}


def averages_within(costs: Costs, sizes: Mapping[str, int], bits: float) -> dict[str, float]:
    """`widths_within` where averages between widths may be read as well: exactly `bits` a weight.

    Costs lie on the lines between widths that save most (the convex hull), so taking what saves most a bit
    first is optimal (Dantzig, 1957), and all averages but one are widths where no width is skipped.
    Raises ValueError for bits below the narrowest widths or above the widest.
    """
    total = sum(sizes[name] for name in costs)
    found = {name: float(min(several)) for name, several in costs.items()}
    missing = bits - sum(found[name] * sizes[name] for name in found) / total
    most = sum(max(several) * sizes[name] for name, several in costs.items()) / total
    if not -1e-6 <= missing <= most - bits + missing + 1e-6:
        raise ValueError(
            f"precision: bits must be {bits - missing:g} to {most:g}, what the widths are, got {bits}"
        )
    steps = []  # what a bit of the whole saves, and which linear takes it up to which width
    for name, several in costs.items():
        at = min(several)
        while at < max(several):
            saved, to = max(((several[at] - several[b]) / (b - at), b) for b in several if b > at)
            steps.append((saved / sizes[name], name, to))
            at = to
    for _, name, to in sorted(steps, key=lambda step: -step[0]):  # stable: a linear's own stay in order
        taken = min(to - found[name], max(missing, 0.0) * total / sizes[name])
        found[name] += taken
        missing -= taken * sizes[name] / total
    return found


def keep_planes(w: BitPlanes, bits: int) -> BitPlanes:
    """The weight with its first `bits` planes alone, and the tables of these widths."""
    tables = w.tables[: bits - w.seed_bits + 1]
    return BitPlanes(jnp.array(w.planes[:bits]), tables, bits, w.seed_bits, bits, w.shape, w.dtype)
