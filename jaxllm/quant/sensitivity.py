"""Which layer gets how many bits: what each method costs each layer, and the cheapest recipe in a budget.

    table = sensitivity(model, [DashQ(bits=2), DashQ(bits=3), DashQ(bits=4)], tokens)
    small = quantize(model, allocate_bits(table, bits=2.5), tokens)

A layer's cost is a second-order estimate of what its own error adds to the loss, other layers being exact:

    cost = sum_n d_n H d_n^T / tokens,   d = new rows - old rows [N, K]

H is the end-loss-guided Hessian with one group (arXiv:2505.07004, eq. 7) by default; any statistic of `COSTS`
can stand in its place. Costs of different layers compare only where H knows the loss ("guided_hessian",
"fisher"): "hessian" weighs an output's square the same everywhere. That costs add up is an assumption.

`allocate_bits` solves a multiple-choice knapsack exactly (scipy's HiGHS): one choice a layer, the least sum
of costs whose stored bits are at most `bits` a weight in all. A larger budget never costs more.

Letters: K inputs, N outputs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.linears import block_of, in_memory, linear_weights
from jaxllm.quant.source import CalibrationStream
from jaxllm.quant.statistics import Allocator, Method, Stats, output_groups_of
from jaxllm.weights.experts import Experts, members, parts
from jaxllm.weights.matmul import num_bytes

By = Literal["guided_hessian", "fisher", "hessian", "hessian_diag"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one method would do to one layer."""

    method: Method
    num_bits: int  # stored, all told
    weights: int  # K x N
    cost: float  # by which the loss is expected to grow, in nats a token for a form that knows the loss


Table = Mapping[str, Sequence[Choice]]


def sensitivity(
    model,
    methods: Sequence[Method],
    sequences: Any,
    *,
    by: By = "guided_hessian",
    layers: str = r"\.",
    batch: int = 8,
    progress: bool = True,
) -> dict[str, list[Choice]]:
    """What each of `methods` would cost each linear whose name `layers` is found in.

    sequences: as for `quantize`. by: the statistic that weighs errors.
    Every layer is quantized once a method, from the given model's statistics, and thrown away. A method whose
    bits are set by its own budget across layers (`allocate`) is refused.
    """
    if not methods:
        raise ValueError("sensitivity: methods must not be empty")
    if by not in COSTS:
        raise ValueError(f"sensitivity: by must be one of {', '.join(COSTS)}, got {by=}")
    spenders = [method for method in methods if isinstance(method, Allocator)]
    if spenders:
        raise ValueError(f"sensitivity: {type(spenders[0]).__name__} divides its bits itself")
    weights = {name: w for name, w in linear_weights(model).items() if re.search(layers, name)}
    if not weights:
        raise ValueError(f"sensitivity: layers must match a linear, got {layers!r}")
    want = frozenset({by}).union(*(method.required_stats for method in methods))
    source = CalibrationStream(
        model,
        {own: want for name, w in weights.items() for own in members(name, w)},
        sequences,
        output_groups=output_groups_of(*methods),
        batch=batch,
        progress=progress,
        desc="sensitivity",
    )
    table: dict[str, list[Choice]] = {}
    for block, stats in source.blocks():
        for name in (n for n in weights if block_of(n) == block):
            table[name] = [_choice(method, by, name, weights[name], stats, model) for method in methods]
        del stats
    return table


def _choice(method: Method, by: By, name: str, w: Any, stats: Mapping[str, Stats], model) -> Choice:
    """What a method does to a linear, or to all experts of one."""
    bits, cost, tokens = 0, 0.0, 0
    for own, one in zip(members(name, w), parts(w), strict=True):
        rows = in_memory(one).rows.astype(jnp.float32)
        made: Any = method.quantize(rows, stats[own], name=name, dtype=w.dtype)
        cost += float(COSTS[by](made.dequantize_rows(jnp.float32) - rows, stats[own]))
        bits, tokens = bits + 8 * num_bytes(made), tokens + stats[own].tokens
    per_token = model.config.experts_per_token if isinstance(w, Experts) else 1  # rows that a token gives
    return Choice(method, bits, math.prod(w.shape), cost * per_token / tokens)


@jax.jit
def _quadratic(d: jax.Array, hessians: jax.Array) -> jax.Array:
    """sum_n d_n H_g(n) d_n^T for rows in as many consecutive groups as there are Hessians [g, K, K]."""
    parts = d.reshape(hessians.shape[0], -1, d.shape[1])
    pulled = jnp.einsum("gnk,gkl->gnl", parts, hessians, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(pulled * parts)


COSTS = {
    "guided_hessian": lambda d, stats: _quadratic(d, stats.guided_hessian),
    "hessian": lambda d, stats: _quadratic(d, stats.hessian[None]),
    "fisher": lambda d, stats: jnp.sum(stats.fisher * d * d),
    "hessian_diag": lambda d, stats: jnp.sum(stats.hessian_diag[None] * d * d),
}


def allocate_bits(table: Table, *, bits: float) -> list[tuple[str, Method | None]]:
    """The recipe of least cost among those that store at most `bits` a weight of the table, for `quantize`.

    Where the table leaves linears out, append a rule for them, such as (r"\\.", None): they stay.
    Raises ValueError for a budget below the smallest.
    """
    if not table:
        raise ValueError("allocate_bits: the table must have a layer, got none")
    size = sum(several[0].weights for several in table.values())
    costs = [[choice.cost for choice in several] for several in table.values()]
    stored = [[choice.num_bits / size for choice in several] for several in table.values()]
    least = sum(map(min, stored))
    if bits < least:
        raise ValueError(
            f"allocate_bits: bits must be at least {least:.3f}, what the smallest choices need, got {bits=}"
        )
    taken = zip(table.items(), cheapest(costs, stored, bits), strict=True)
    return [(f"^{re.escape(name)}$", several[i].method) for (name, several), i in taken]


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], limit: float) -> list[int]:
    """One choice each of several lists, of least cost in all, whose sizes add up to at most `limit`.

    Exact: a multiple-choice knapsack by scipy's HiGHS. Raises ValueError where nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    owner = np.repeat(np.arange(len(costs)), [len(several) for several in costs])
    cost, size = np.concatenate(costs), np.concatenate(sizes).astype(np.float64)
    one_each = (owner[None] == np.arange(len(costs))[:, None]).astype(np.float64)
    found = milp(
        cost / max(np.abs(cost).max(), 1e-30),  # solvers compare with absolute tolerances
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], -np.inf, limit)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"cheapest: the solver found no choice within {limit=}: {found.message}")
    return [int(found.x[owner == i].argmax()) for i in range(len(costs))]
