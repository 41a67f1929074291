"""Statistics of a block's linears, summed over a text; linears that read one input share what depends on it.

A linear of experts has each statistic once for each, of the rows that are for it. An expert that no token of
the text went to has what all experts of the linear have together: the nearest there is to its own.

Letters: B sequences at once, T tokens, K inputs, N outputs, g groups of consecutive outputs, X experts.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.stages import Batch, Stage, State
from jaxllm.quant.gradients import OF_WEIGHTS, output_saliency, weight_gradients
from jaxllm.quant.stages import LinearInfo
from jaxllm.quant.statistics import Stats
from jaxllm.quant.text import Text

OF_OUTPUT = OF_WEIGHTS | {"guided_hessian"}

# Steps of magnitude that thresholds tell apart: 64 between powers of two, from 2**-24 to 2**24.
MANTISSA_BITS, LEAST, MOST = 6, -24, 24
DROPPED_BITS = 23 - MANTISSA_BITS  # of a float32
FIRST_STEP = (127 + LEAST) << MANTISSA_BITS  # the upper bits of 2**LEAST
STEPS = ((MOST - LEAST) << MANTISSA_BITS) + 1  # the first: what is smaller
UPPER_ENDS = np.append(
    np.float32(0), ((np.arange(1, STEPS) + FIRST_STEP) << DROPPED_BITS).astype(np.uint32).view(np.float32)
)
TOKENS_AT_ONCE, STEPS_PER_BLOCK = 256, 64
HIGHEST = jax.lax.Precision.HIGHEST


class StatsAccumulator:
    """The statistics of one block's linears, summed batch by batch."""

    def __init__(self, linears: dict[str, LinearInfo], want: frozenset[str], sample: int):
        self.linears, self.want, self.sample = linears, want, sample
        self.sides = {one.reader: one.side for one in linears.values()}
        self.readers = {one.stack_name(name): one.reader for name, one in linears.items()}
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
        state, inputs, assigned = stage.with_inputs(state, batch)
        parts = {}
        for name, x in inputs.items():
            part = batch.part[self.sides[name]]
            parts[name] = _by_expert(part, assigned[name]) if name in assigned else part
            self._add(name, _of_input(x, parts[name], want=self.want - OF_OUTPUT))
            if "sample" in self.want:
                self._keep(name, np.asarray(x), np.asarray(parts[name]) != 0)
        for name, s in saliency.items():
            reader = self.readers[name]
            self._add(name, {"guided_hessian": _guided(inputs[reader], s, parts[reader])})
        for side, part in batch.part.items():
            self.tokens[side] = self.tokens.get(side, 0) + int(np.count_nonzero(part))
        return state

    def _add(self, name: str, new: dict[str, jax.Array]) -> None:
        """Adds sums, keeps the greater of what is the greatest of all tokens."""
        sums = self.sums.setdefault(name, {})
        for key, x in new.items():
            join = jnp.maximum if key == "thresholds" else jnp.add
            sums[key] = join(sums[key], x) if key in sums else x

    def _keep(self, name: str, rows: np.ndarray, real: np.ndarray) -> None:
        """Keeps the first rows that count, of the linear or of each expert."""
        each = {name: real} if real.ndim == 2 else {f"{name}.{e}": own for e, own in enumerate(real)}
        for own, counts in each.items():
            have = sum(len(r) for r in self.rows.get(own, []))
            self.rows.setdefault(own, []).append(np.asarray(rows[counts][: self.sample - have], np.float32))

    def stats(self, block: str, folder: Path) -> dict[str, Stats]:
        """What was measured, by the linears' full names."""
        found = {}
        for name, linear in self.linears.items():
            full = f"{block}.{name}"
            arrays = (
                self.arrays(linear.source, linear)
                | self.arrays(name, linear)
                | weight_gradients(folder, full)
            )
            tokens = arrays.pop("tokens", self.tokens[linear.side])
            found[full] = Stats(**{key: jnp.asarray(x) for key, x in arrays.items()}, tokens=int(tokens))
        return found

    def arrays(self, name: str, linear: LinearInfo) -> dict[str, Any]:
        """What was measured under a linear's name, without what another speaks for; "tokens" of an expert."""
        found: dict[str, Any] = dict(self.sums.get(linear.stack_name(name), {}))
        if linear.expert is not None:
            found = self._of_expert(found, linear)
        if "thresholds" in found:
            found["thresholds"] = thresholds(np.asarray(found["thresholds"]), linear.K)
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

    def few(self) -> dict[str, tuple[int, int]]:
        """Experts that saw fewer tokens than they need, and both numbers, by the first linear that read them.

        A Hessian needs as many as it has columns, all else one.
        """
        hessian = bool(self.want & {"hessian", "guided_hessian"})
        first = {n: one for n, one in self.linears.items() if one.expert is not None and one.source == n}
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


@jax.jit
def _by_expert(part: Int[Array, "B T"], assigned: Bool[Array, "B T S X"]) -> Int[Array, "X B T S"]:
    """For what each expert's rows count (`Batch.part`), 0 for what is not its own."""
    return jnp.where(jnp.moveaxis(assigned, -1, 0), part[None, ..., None], 0)


def _each(measure: Callable[[jax.Array], Any], part: Int[Array, "..."]) -> Any:
    """What is measured of the rows that count, or of each expert's [X, ...]."""
    if part.ndim == 2:
        return measure(part.ravel())
    return jax.lax.map(measure, part.reshape(len(part), -1))


def _rows(x: Float[Array, "*B K"]) -> Float[Array, "n K"]:
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])


@partial(jax.jit, static_argnames="want")
def _of_input(
    x: Float[Array, "*B K"], part: Int[Array, "..."], *, want: frozenset[str]
) -> dict[str, jax.Array]:
    """A batch's part of what depends on a linear's inputs alone, "tokens" of each expert beside."""
    sums = _each(partial(_of_rows, _rows(x), want=want), part)
    return sums if part.ndim == 2 else sums | {"tokens": jnp.sum(part != 0, axis=(1, 2, 3))}


def _of_rows(x: Float[Array, "n K"], part: Int[Array, " n"], *, want: frozenset[str]) -> dict[str, jax.Array]:
    x = jnp.where(part[:, None] != 0, x, 0.0)
    kept = x if "held_out" not in want else jnp.where(part[:, None] > 0, x, 0.0)
    parts = {
        "hessian_diag": lambda: jnp.sum(x * x, axis=0),
        "mean": lambda: jnp.sum(jnp.abs(x), axis=0),
        "hessian": lambda: _gram(kept),
        "held_out": lambda: _gram(jnp.where(part[:, None] < 0, x, 0.0)),
        "thresholds": lambda: most_in_or_above(x),
    }
    return {name: make() for name, make in parts.items() if name in want}


def most_in_or_above(x: Float[Array, "n K"]) -> Float[Array, " steps"]:
    """Of each step but the first, how many of a token's |x| lie in it or above: the most of any token.

    A running sum in two products: within blocks of steps, and of the blocks above.
    """
    n, K = x.shape
    size = min(n, TOKENS_AT_ONCE)
    blocks = jnp.pad(jnp.abs(x), ((0, -n % size), (0, 0))).reshape(-1, size, K)  # zeros raise nothing
    row = jnp.arange(size, dtype=jnp.int32)[:, None] * STEPS
    at_or_above = jnp.tri(STEPS_PER_BLOCK)
    above = jnp.tri((STEPS - 1) // STEPS_PER_BLOCK, k=-1)

    def of_block(most, block):
        upper_bits = jax.lax.bitcast_convert_type(block, jnp.int32) >> DROPPED_BITS
        place = (row + jnp.clip(upper_bits - (FIRST_STEP - 1), 0, STEPS - 1)).ravel()
        counts = jnp.zeros(size * STEPS).at[place].add(1.0, mode="promise_in_bounds")
        counts = counts.reshape(size, STEPS)[:, 1:].reshape(size, -1, STEPS_PER_BLOCK)
        within = jnp.matmul(counts, at_or_above, precision=HIGHEST)
        whole = jnp.matmul(within[..., 0], above, precision=HIGHEST)
        return jnp.maximum(most, (within + whole[..., None]).max(0).ravel()), None

    return jax.lax.scan(of_block, jnp.zeros(STEPS - 1), blocks)[0]


def thresholds(most: Float[np.ndarray, " steps"], K: int) -> Float[np.ndarray, " K"]:
    """The least steps that no token's (r+1)-th largest |x| exceeds, r = 0 .. K-1: at most a 64th too high.

    most: as `most_in_or_above` counts it; counted, not sorted, for XLA sorts slowly on a CPU. Magnitudes
      below 2**-24 are 0, above 2**24 are that.
    """
    return UPPER_ENDS[np.searchsorted(-most, -np.arange(K, dtype=np.float32), side="left")]


@jax.jit
def _guided(
    x: Float[Array, "*B K"], s: Float[Array, "*B g"], part: Int[Array, "..."]
) -> Float[Array, "*X g K K"]:
    """sum_t s[t, j] x[t] x[t]^T of inputs and saliencies, a group at a time."""
    x, s = _rows(x), _rows(s)

    def of_rows(part):
        roots = jnp.sqrt(jnp.where(part[:, None] != 0, s, 0.0)).T
        return jax.lax.map(lambda root: _gram(x * root[:, None]), roots)

    return _each(of_rows, part)


def _gram(x: Float[Array, "n K"]) -> Float[Array, "K K"]:
    return jnp.matmul(x.T, x, precision=HIGHEST)
