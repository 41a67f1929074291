"""Which estimator a linear gets, and its fit to the errors that its inputs made (DP-LLM, section 2.5).

    auto         a line, or a projection of 4 .. `rows` rows, whichever saves most bits, less those it reads
    published    a line where it explains `r2` of the variance of errors, else a projection of `rows` rows
    linear, projection       the one or the other
    exact, random            to measure the others by: nothing is fitted

The authors' rule does not look at what a projection reads for every token, 64 rows of float16: a bit a weight
where there are 1,024 outputs, which is what it is to save. "auto" counts both in bits, on every fourth token,
apart from those that it fits on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxllm.precision import estimators
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes
from jaxllm.weights.planes.bit_planes import BitPlanes

Kind = Literal["auto", "published", "linear", "projection", "exact", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FEWEST_ROWS = 4  # of a projection; tried are powers of two


def planes_of(w: AdaptivePlanes) -> BitPlanes:
    """The planes of a weight that is not in its fitting form."""
    assert isinstance(w.held, BitPlanes)
    return w.held


def fit_estimator(
    w: AdaptivePlanes,
    x: Float[Array, "n K"],
    seen: Float[Array, "n K"],
    parts: Mapping[int, Sequence[float]],
    kind: Kind,
    *,
    key: Key[Array, ""],
    rows: int,
    r2: float,
) -> AdaptivePlanes:
    """The weight with an estimator for each lower width in `parts`.

    x: what the linear reads. seen: what the estimate looks at, for each of these tokens. parts: of a bit that
    each target asks for beyond a width. key: of random projections.
    """
    if kind in ("exact", "random"):
        return dataclasses.replace(w, estimator=kind)
    at = {b: planes_of(w).at(b).dequantize_rows(jnp.float32) for low in parts for b in (low, low + 1)}
    steps = {low: at[low + 1] - at[low] for low in parts}
    e = {low: estimators.errors(x, step) for low, step in steps.items()}
    apart = np.arange(len(x)) % 4 == 3 if kind == "auto" else np.zeros(len(x), bool)
    known = {low: one[~apart] for low, one in e.items()}
    lengths = estimators.norm(seen)
    lines = {low: estimators.fit_line(lengths[~apart], one) for low, one in known.items()}
    by_lines = _with_lines(w, lines)

    def projections(k: int) -> dict[int, jax.Array]:
        found = {}
        for low, step in steps.items():
            drawn = estimators.random_projection(jax.random.fold_in(key, low), step, k)
            found[low] = estimators.fit_projection(drawn, seen[~apart], known[low])
        return found

    if kind == "linear" or (kind == "published" and all(line.r2 >= r2 for line in lines.values())):
        return by_lines
    if kind != "auto":
        return _with_projections(w, projections(rows))

    def saved(estimates: Mapping[int, jax.Array]) -> float:
        """Bits a weight, on average over the targets."""
        total = sum(
            len(asked) * estimators.bits_saved(estimates[low][apart], e[low][apart], asked)
            for low, asked in parts.items()
        )
        return total / sum(map(len, parts.values()))

    best, most = by_lines, saved({low: line.slope * lengths for low, line in lines.items()})
    bound, k = saved(e), FEWEST_ROWS  # nothing saves more than exact errors
    while k <= rows and bound - estimators.bits_of_projection(k, w.shape[1]) > most:
        G = projections(k)
        net = saved({low: estimators.norm(seen @ one.T) for low, one in G.items()})
        net -= estimators.bits_of_projection(k, w.shape[1])
        if net > most:
            best, most = _with_projections(w, G), net
        k *= 2
    return best


def _with_lines(w: AdaptivePlanes, lines: Mapping[int, estimators.Fit]) -> AdaptivePlanes:
    slope, offset = np.ones(len(w.slope), np.float32), np.zeros(len(w.slope), np.float32)
    for low, line in lines.items():
        pair = low - planes_of(w).seed_bits
        slope[pair], offset[pair] = line.slope, line.offset
    return dataclasses.replace(w, slope=jnp.asarray(slope), offset=jnp.asarray(offset))


def _with_projections(w: AdaptivePlanes, found: Mapping[int, jax.Array]) -> AdaptivePlanes:
    k, K = next(iter(found.values())).shape
    slope, projection = np.ones(len(w.slope), np.float32), np.zeros((len(w.slope), k, K), np.float16)
    for low, G in found.items():
        pair = low - planes_of(w).seed_bits
        slope[pair] = max(float(jnp.abs(G).max()), 1e-30)  # float16 holds numbers up to 1 best
        projection[pair] = np.asarray(G) / slope[pair]
    return dataclasses.replace(
        w, estimator="projection", slope=jnp.asarray(slope), projection=jnp.asarray(projection)
    )
