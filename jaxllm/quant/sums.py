"""Statistics of a block's linears, summed over a text; linears that read one input share what depends on it.

A linear of experts has each statistic once for each, of the rows that are for it. An expert that no token of
the text went to has what all experts of the linear have together: the nearest there is to its own.

Letters: B sequences at once, T tokens, K inputs, N outputs, g groups of consecutive outputs, X experts.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.models.stages import Batch, Stage, State
from jaxllm.models.taps import linear_io
from jaxllm.quant.gradients import output_saliency, squared_gradients
from jaxllm.quant.stages import LinearInfo, linears_of, side_of
from jaxllm.quant.statistics import Stats
from jaxllm.quant.text import Text

OF_OUTPUT = frozenset({"guided_hessian", "fisher"})

# Steps of magnitude that `token_thresholds` tells apart: 64 between powers of two, from 2**-24 to 2**24.
MANTISSA_BITS, LEAST, MOST = 6, -24, 24
DROPPED_BITS = 23 - MANTISSA_BITS  # of a float32
FIRST_STEP = (127 + LEAST) << MANTISSA_BITS  # the upper bits of 2**LEAST
STEPS = ((MOST - LEAST) << MANTISSA_BITS) + 1  # step 0: what is smaller
UPPER_ENDS = np.append(
    np.float32(0), ((np.arange(1, STEPS) + FIRST_STEP) << DROPPED_BITS).astype(np.uint32).view(np.float32)
)
TOKENS_AT_ONCE = 256


class StatsAccumulator:
    """The statistics of one block, summed batch by batch."""

    def __init__(self, want: frozenset[str], sample: int):
        self.want, self.sample = want, sample
        self.sums: dict[str, dict[str, jax.Array]] = {}
        self.rows: dict[str, list[np.ndarray]] = {}
        self.tokens: dict[str, int] = {}  # by side

    def update(self, stage: Stage, text: Text, states: list[State], folder: Path) -> list[State]:
        """Takes in all batches that a block reads; gives what it leaves for the next."""
        batches = enumerate(zip(states, text.batches(), strict=True))
        return [
            self.add(stage, state, batch, output_saliency(folder, stage.name, i))
            for i, (state, batch) in batches
        ]

    def add(self, stage: Stage, state: State, batch: Batch, saliency: dict[str, np.ndarray]) -> State:
        """Takes in one batch; gives what the next block reads."""
        y, new, inputs = _measure(
            stage.block, stage.shared, state, batch, saliency, run=stage.run, side=stage.side, want=self.want
        )
        for name, stats in new.items():
            old = self.sums.get(name)
            self.sums[name] = stats if old is None else _add(old, stats)
        for name, (rows, part) in inputs.items():
            for own, real in _by_expert(name, np.asarray(rows), np.asarray(part) != 0):
                have = sum(len(r) for r in self.rows.get(own, []))
                self.rows.setdefault(own, []).append(np.asarray(real[: self.sample - have], np.float32))
        for side, part in batch.part.items():
            self.tokens[side] = self.tokens.get(side, 0) + int(np.count_nonzero(part))
        return state | {side: np.asarray(x) for side, x in y.items()}

    def stats(self, model, stage: Stage, folder: Path) -> dict[str, Stats]:
        """What was measured, by the linears' full names."""
        found = {}
        for name, linear in linears_of(model, stage).items():
            full = f"{stage.name}.{name}"
            arrays = (
                self.arrays(linear.source, linear)
                | self.arrays(name, linear)
                | squared_gradients(folder, full)
            )
            tokens = arrays.pop("tokens", self.tokens[linear.side])
            found[full] = Stats(**{key: jnp.asarray(x) for key, x in arrays.items()}, tokens=int(tokens))
        return found

    def arrays(self, name: str, linear: LinearInfo) -> dict[str, Any]:
        """What was measured under a linear's name, without what another speaks for; "tokens" of an expert."""
        found: dict[str, Any] = dict(self.sums.get(linear.stack_name(name), {}))
        if linear.expert is not None:
            found = self._of_expert(found, linear)
        if "mean" in found:
            found["mean"] = found["mean"] / int(found.get("tokens", self.tokens[linear.side]))
        if name in self.rows:
            found["sample"] = np.concatenate(self.rows[name])
        return found

    def _of_expert(self, found: dict[str, Any], linear: LinearInfo) -> dict[str, Any]:
        found = {key: np.asarray(x) for key, x in found.items()}
        if self._seen(linear)[linear.expert]:
            return {key: x[linear.expert] for key, x in found.items()}
        return {key: x.max(0) if key == "thresholds" else x.sum(0) for key, x in found.items()}

    def _seen(self, linear: LinearInfo) -> np.ndarray:
        """How many rows each expert of an expert's linear saw."""
        return np.asarray(self.sums[linear.stack_name(linear.source)]["tokens"])

    def few(self, linears: dict[str, LinearInfo]) -> dict[str, tuple[int, int]]:
        """Experts that saw fewer tokens than they need, and both numbers, by the first linear that read them.

        A Hessian needs as many as it has columns, all else one.
        """
        hessian = bool(self.want & {"hessian", "guided_hessian"})
        first = {n: one for n, one in linears.items() if one.expert is not None and one.source == n}
        counts = {n: (int(self._seen(one)[one.expert]), one.K if hessian else 1) for n, one in first.items()}
        return {name: count for name, count in counts.items() if count[0] < count[1]}


def warn_of_few(few: dict[str, tuple[int, int]]) -> None:
    """Warns of experts that saw too few tokens, by name."""
    if few:
        named = [f"{name} ({seen} of {need})" for name, (seen, need) in few.items()]
        rest = f" and {len(named) - 8} more" if len(named) > 8 else ""
        warnings.warn(
            "calibrate: each expert should see as many tokens as its Hessian has columns, at least one, got "
            f"fewer for {', '.join(named[:8])}{rest}",
            stacklevel=3,
        )


def _add(old, new):
    sums = {key: old[key] + new[key] for key in old if key != "thresholds"}
    return sums | {key: jnp.maximum(old[key], new[key]) for key in old if key == "thresholds"}


@partial(jax.jit, static_argnames=("run", "side", "want"))
def _measure(
    block,
    shared,
    state: State,
    batch: Batch,
    saliency: dict[str, Array],
    *,
    run: Callable[..., State],
    side: str,
    want: frozenset[str],
):
    """A batch's part of each statistic, by linear; and what linears read, for the sample."""
    seen: dict[str, jax.Array] = {}
    assigned: dict[str, jax.Array] = {}
    y = run(block, shared, state, batch, linear_io(seen, assigned=assigned))
    sums: dict[str, dict[str, jax.Array]] = {}
    inputs: dict[str, tuple[jax.Array, jax.Array]] = {}
    for name, array in seen.items():
        part = batch.part[side_of(array, state, side)]
        if name in assigned:
            part = jnp.where(jnp.moveaxis(assigned[name], -1, 0), part[None, ..., None], 0)  # [X, B, T, S]
        flat = array.astype(jnp.float32).reshape(-1, array.shape[-1])
        if not any(array is seen[other] for other in inputs):  # the first that reads it speaks for the others
            inputs[name] = array, part
            sums[name] = _each(partial(_of_input, flat, want=want), part)
            if name in assigned:
                sums[name]["tokens"] = jnp.sum(part != 0, axis=(1, 2, 3))
        if name in saliency:
            s = saliency[name].astype(jnp.float32).reshape(len(flat), -1)
            guided = _each(partial(_guided, flat, s), part)
            sums[name] = sums.get(name, {}) | {"guided_hessian": guided}
    return y, sums, inputs if "sample" in want else {}


def _each(measure: Callable[[jax.Array], Any], part: Int[Array, "..."]) -> Any:
    """What is measured of the rows that count, or of each expert's [X, ...]."""
    if part.ndim == 2:
        return measure(part.ravel())
    return jax.lax.map(measure, part.reshape(len(part), -1))


def _by_expert(name: str, rows: np.ndarray, real: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The rows that count, by the name of the linear, or of each expert."""
    if real.ndim == 2:
        yield name, rows[real]
    else:
        yield from ((f"{name}.{e}", rows[own]) for e, own in enumerate(real))


def _of_input(
    x: Float[Array, "n K"], part: Int[Array, " n"], *, want: frozenset[str]
) -> dict[str, jax.Array]:
    """What depends on a linear's inputs [n, K] alone."""
    x = jnp.where(part[:, None] != 0, x, 0.0)
    kept = x if "held_out" not in want else jnp.where(part[:, None] > 0, x, 0.0)
    parts = {
        "hessian_diag": lambda: jnp.sum(x * x, axis=0),
        "mean": lambda: jnp.sum(jnp.abs(x), axis=0),
        "hessian": lambda: _gram(kept),
        "held_out": lambda: _gram(jnp.where(part[:, None] < 0, x, 0.0)),
        "thresholds": lambda: token_thresholds(x),
    }
    return {name: make() for name, make in parts.items() if name in want}


def token_thresholds(x: Float[Array, "n K"]) -> Float[Array, " K"]:
    """The least steps that no token's (r+1)-th largest |x| exceeds, r = 0 .. K-1: at most a 64th too high.

    Counted, not sorted, for XLA sorts slowly on a CPU: how many of a token's magnitudes lie in or above each
    step, and the most of any token. Magnitudes below 2**-24 are 0, above 2**24 are that.
    """
    n, K = x.shape
    size = min(n, TOKENS_AT_ONCE)
    blocks = jnp.pad(jnp.abs(x), ((0, -n % size), (0, 0))).reshape(-1, size, K)  # zeros raise nothing
    token = jnp.arange(size, dtype=jnp.int32)[:, None]

    def most_in_or_above(block):
        upper_bits = jax.lax.bitcast_convert_type(block, jnp.int32) >> DROPPED_BITS
        step = jnp.clip(upper_bits - (FIRST_STEP - 1), 0, STEPS - 1)
        counts = jnp.zeros((size, STEPS), jnp.int32).at[token, step].add(1, mode="promise_in_bounds")
        return jnp.cumsum(counts[:, ::-1], axis=1)[:, ::-1].max(0)

    most = jax.lax.map(most_in_or_above, blocks).max(0)  # falls from K on
    steps = jnp.searchsorted(-most, -1 - jnp.arange(K, dtype=jnp.int32), side="right") - 1
    return jnp.asarray(UPPER_ENDS)[steps]


def _guided(x: Float[Array, "n K"], s: Float[Array, "n g"], part: Int[Array, " n"]) -> Float[Array, "g K K"]:
    """sum_t s[t, j] x[t] x[t]^T of inputs [n, K] and saliencies [n, g], a group at a time."""
    s = jnp.where(part[:, None] != 0, s, 0.0)
    return jax.lax.map(lambda root: _gram(x * root[:, None]), jnp.sqrt(s).T)


def _gram(x: Float[Array, "n K"]) -> Float[Array, "K K"]:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
