"""DP-LLM: every layer reads as many bits for a token as the token needs (arXiv:2508.06041). Lossy.

    model = quantize(model, AnyPrecision(parent_bits=6, seed_bits=3), tokens)
    model = attach_precision(model, DpLlm(targets=(3.5, 4.0), memory_bits=5.0), tokens)
    model = set_target(model, 3.5)                          # the same program, other numbers

1. `widths`: how many planes of each linear are held, within a budget of memory. 2. `averages`: how many bits
each reads on average, for each target. 3. Here: an estimate of what the next bit would change in a product,
and the threshold above which it is read. A threshold is a quantile of the *estimates* that calibration text
gives where all layers before have chosen already, so that on this text the bits that are read are the
target's by construction; the authors take it from exact errors of the model before it was quantized.

Layers of which the lowest width alone is held stay at it. Zero and what is no number: an estimate that is not
above its threshold reads the lower width.

Letters: n tokens of text, K inputs, N outputs, S targets, P pairs of neighbouring widths, k projection rows.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.models.linears import block_of, linear_weights, replace_weights
from jaxllm.models.stages import Batch, Stage, State
from jaxllm.precision.averages import Bounds, fit_averages
from jaxllm.precision.fitting import KINDS, Kind, fit_estimator, planes_of
from jaxllm.precision.widths import By, Costs, averages_within
from jaxllm.quant.methods.k_means import layer_key
from jaxllm.quant.stages import linears_by_block
from jaxllm.quant.text import Text
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, always
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.planes.dense_widths import DenseWidths

EARLY = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")  # what reads the residual stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpLlm:
    """Options of DP-LLM.

    targets: average bits a weight that the model can be set to. memory_bits: planes that are held, a weight,
    on average. estimator: `precision/fitting.py` has the list; a projection has up to `projection_rows`, a
    "published" one as many, where a line explains less than `linear_r2`. asynchronous: q, k, v, gate and up
    are estimated from what the residual stream was one addition before, so that the estimate need not be
    waited for (section 2.7; decoders of the Llama line). start: averages are trained from those that are best
    by what widths cost ("costs": static widths, but for averages between them), or from one everywhere
    ("target"). steps, learning_rate: of the training. fitting_tokens: that estimators are fitted on.
    """

    targets: tuple[float, ...] = (3.5, 4.0, 4.5)
    memory_bits: float = 5.0
    estimator: Kind = "auto"
    asynchronous: bool = False
    projection_rows: int = 64
    linear_r2: float = 0.9
    start: Literal["costs", "target"] = "costs"
    steps: int = 60
    learning_rate: float = 0.05
    fitting_tokens: int = 2048
    seed: int = 0

    @property
    def by(self) -> By:
        """What the planes that are held are chosen by."""
        return "fisher"

    def __post_init__(self):
        check_targets("DpLlm", self.targets)
        if self.estimator not in KINDS:
            raise ValueError(f"DpLlm: estimator must be one of {', '.join(KINDS)}, got {self.estimator!r}")
        least = {"projection_rows": 1, "steps": 0, "fitting_tokens": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"DpLlm: {name} must be at least {bound}, got {getattr(self, name)}")

    def choose(
        self,
        model,
        held: Mapping[str, BitPlanes],
        costs: Costs,
        sizes: Mapping[str, int],
        text: Text,
        *,
        progress: bool,
    ) -> dict[str, AdaptivePlanes]:
        """The weights that choose, of linears of which more than one width is held.

        model: with `held` in it, all planes being read. costs: of each width. sizes: weights of each linear.
        """
        averages = self.averages(model, held, costs, sizes, text, progress=progress)
        return self.widths(model, held, averages, text, progress=progress)

    def averages(
        self,
        model,
        held: Mapping[str, BitPlanes],
        costs: Costs,
        sizes: Mapping[str, int],
        text: Text,
        *,
        progress: bool,
    ) -> dict[str, np.ndarray]:
        """The second phase: of each linear that has a choice, its average bits at each target."""
        total = sum(sizes.values())
        free = {name: w for name, w in held.items() if w.parent_bits > w.seed_bits}
        fixed = sum(sizes[name] / total * w.parent_bits for name, w in held.items() if name not in free)
        bounds = Bounds(
            share=jnp.array([sizes[name] / total for name in free], jnp.float32),
            least=jnp.array([w.seed_bits for w in free.values()], jnp.float32),
            most=jnp.array([w.parent_bits for w in free.values()], jnp.float32),
            target=jnp.array(self.targets, jnp.float32) - fixed,
        )
        start = np.array([[float(w.seed_bits)] * len(self.targets) for w in free.values()], np.float32)
        if self.start == "costs":
            own = {
                name: {b: costs[name][b] for b in range(w.seed_bits, w.parent_bits + 1)}
                for name, w in free.items()
            }
            part = total / sum(sizes[name] for name in free)  # of all weights to these
            at = [averages_within(own, sizes, (t - fixed) * part) for t in self.targets]
            start = np.array([[one[name] for one in at] for name in free], np.float32)
        return fit_averages(
            model,
            free,
            text,
            bounds,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate,
            progress=progress,
        )

    def widths(
        self,
        model,
        held: Mapping[str, BitPlanes],
        averages: Mapping[str, np.ndarray],
        text: Text,
        *,
        progress: bool,
    ) -> dict[str, AdaptivePlanes]:
        """The third phase: weights that choose between the widths around these averages."""
        whole = {
            name: always(held[name], self.targets, early=self.asynchronous and name.endswith(EARLY))
            for name in averages
        }
        walk = Walk(replace_weights(model, whole), text, progress=progress)
        found = fit_estimators(self, walk, whole, averages)
        for i in range(len(self.targets)):
            found = fit_thresholds(walk, found, averages, i)
        return found


def check_targets(who: str, targets: Sequence[float]) -> None:
    """Raises ValueError unless targets ascend."""
    if not targets or list(targets) != sorted(set(targets)) or not np.isfinite(targets).all():
        raise ValueError(f"{who}: targets must be one or more numbers in ascending order, got {targets}")


def lower_width(average: np.ndarray | np.floating, w: BitPlanes) -> np.ndarray:
    """The lower one of the two widths that average so many bits."""
    return np.asarray(np.clip(np.floor(average), w.seed_bits, w.parent_bits - 1), np.int32)


class Walk:
    """The way of calibration text through a model's blocks, as often as wanted."""

    def __init__(self, model, text: Text, *, progress: bool):
        self.model, self.text = model, text
        self.linears = linears_by_block(model)
        self.bar = functools.partial(tqdm, disable=not progress, file=sys.stderr, unit="block")

    def real(self) -> list[np.ndarray]:
        """Which tokens of each batch are text: bool [B, T]."""
        return [batch.part["target"] != 0 for batch in self.text.batches()]

    def blocks(self, desc: str, visit: Callable[[Stage, list[State]], list[State]]) -> None:
        """`visit(stage, states)` of each block gives the states after it."""
        states = self.text.initial_states()
        for stage in self.bar(self.model.stages(), desc=desc):
            states = visit(stage, states) if stage.name else self.text.run(stage, states)


def fit_estimators(
    method: DpLlm, walk: Walk, weights: Mapping[str, AdaptivePlanes], averages: Mapping[str, np.ndarray]
) -> dict[str, AdaptivePlanes]:
    """The weights with their estimators, and no thresholds yet; inputs as all planes give them."""
    found: dict[str, AdaptivePlanes] = {}

    def visit(stage: Stage, states: list[State]) -> list[State]:
        own = {name: w for name, w in weights.items() if block_of(name) == stage.name}
        stage = with_weights(
            stage, {name: fitting_form(w, planes_of(w).parent_bits - 1) for name, w in own.items()}
        )
        after, inputs, seen = [], [], []
        for state, batch, real in zip(states, walk.text.batches(), walk.real(), strict=True):
            new, read, looked = _watch(stage.operand, stage.shared, state, batch, run=stage.run)
            after.append(state | _on_host(new))
            inputs.append({name: np.asarray(x)[real] for name, x in read.items()})
            seen.append({name: np.asarray(x)[real] for name, x in looked.items()})
        for name, w in own.items():
            inner = name.removeprefix(f"{stage.name}.")
            at = spread(sum(map(len, (one[inner] for one in inputs))), method.fitting_tokens)
            x, look = (np.concatenate([one[inner] for one in side])[at] for side in (inputs, seen))
            parts: dict[int, list[float]] = {}  # of a bit that targets ask for beyond a width
            for low, average in zip(lower_width(averages[name], planes_of(w)), averages[name], strict=True):
                parts.setdefault(int(low), []).append(float(average - low))
            found[name] = fit_estimator(
                w,
                jnp.asarray(x, jnp.float32),
                jnp.asarray(look, jnp.float32),
                parts,
                method.estimator,
                key=layer_key(method.seed, name),
                rows=method.projection_rows,
                r2=method.linear_r2,
            )
        return after

    walk.blocks("estimators", visit)
    return {name: found[name] for name in weights}


def spread(n: int, most: int) -> np.ndarray:
    """Up to `most` of n places, evenly."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def fitting_form(w: AdaptivePlanes, low: int) -> AdaptivePlanes:
    """The weight between two widths, as numbers: programs of it do not depend on which widths these are."""
    planes = planes_of(w)
    pair = slice(low - planes.seed_bits, low - planes.seed_bits + 1)
    rows = jnp.stack([planes.at(b).dequantize_rows(jnp.float16) for b in (low, low + 1)])
    return dataclasses.replace(
        w,
        held=DenseWidths(rows, w.dtype),
        low=jnp.zeros((1,), jnp.int32),
        threshold=w.threshold[w.target][None],
        slope=w.slope[pair],
        offset=w.offset[pair],
        projection=None if w.projection is None else w.projection[pair],
        target=jnp.zeros((), jnp.int32),
        targets=(),
        tokens="all",
    )


def with_weights(stage: Stage, weights: Mapping[str, AdaptivePlanes]) -> Stage:
    """The stage with other weights, named as in the whole model."""
    own = {name.removeprefix(f"{stage.name}."): w for name, w in weights.items()}
    return dataclasses.replace(stage, block=replace_weights(stage.loaded().block, own))


def _on_host(state: State) -> State:
    return {key: np.asarray(x) for key, x in state.items()}


@functools.partial(jax.jit, static_argnames="run")
def _watch(block, shared, state: State, batch: Batch, *, run) -> tuple[State, dict[str, Any], dict[str, Any]]:
    """The states after a block; of each linear that chooses, what it reads and what its estimate looks at."""
    read: dict[str, Any] = {}
    looked: dict[str, Any] = {}

    def tap(path: str, x: jax.Array) -> jax.Array:
        name, _, end = path.rpartition(".")
        if end == "in":
            read[name] = x
        elif end == "seen":
            looked[name] = x
        return x

    new = run(block, shared, state, batch, tap)
    return new, {name: read[name] for name in looked}, looked


def fit_thresholds(
    walk: Walk, weights: Mapping[str, AdaptivePlanes], averages: Mapping[str, np.ndarray], i: int
) -> dict[str, AdaptivePlanes]:
    """The weights with the widths and thresholds of target i.

    Linear after linear in the order in which they run, on what those before give where they have chosen: the
    share of tokens above each threshold is the part of a bit that the average asks for, to the nearest token.
    """
    new = dict(weights)

    def visit(stage: Stage, states: list[State]) -> list[State]:
        info = walk.linears[stage.name]
        lows, forms = {}, {}
        for inner in info:
            name = f"{stage.name}.{inner}"
            if name in weights:
                lows[name] = int(lower_width(averages[name][i], planes_of(weights[name])))
                forms[name] = fitting_form(weights[name], lows[name])
        groups: dict[str, list[str]] = {}  # linears that read the same input choose together
        for inner, one in info.items():
            if f"{stage.name}.{inner}" in forms:
                groups.setdefault(one.source, []).append(f"{stage.name}.{inner}")
        for names in groups.values():
            estimates = run(stage, states, forms)[1]
            for name in names:
                part = float(averages[name][i]) - lows[name]
                threshold = quantile_above(estimates[name.removeprefix(f"{stage.name}.")], part)
                forms[name] = dataclasses.replace(forms[name], threshold=jnp.array([threshold], jnp.float32))
        for name, low in lows.items():
            new[name] = dataclasses.replace(
                new[name],
                low=new[name].low.at[i].set(low),
                threshold=new[name].threshold.at[i].set(forms[name].threshold[0]),
            )
        return run(stage, states, forms)[0]

    def run(stage: Stage, states: list[State], forms: Mapping[str, AdaptivePlanes]):
        stage = with_weights(stage, forms)
        after: list[State] = []
        found: dict[str, list[np.ndarray]] = {}
        for state, batch, real in zip(states, walk.text.batches(), walk.real(), strict=True):
            changed, estimates = _estimate(stage.operand, stage.shared, state, batch, run=stage.run)
            after.append(state | _on_host(changed))
            for name, e in estimates.items():
                found.setdefault(name, []).append(np.asarray(e)[real])
        return after, {name: np.concatenate(parts) for name, parts in found.items()}

    walk.blocks(f"thresholds {i + 1}", visit)
    return new


@functools.partial(jax.jit, static_argnames="run")
def _estimate(block, shared, state: State, batch: Batch, *, run) -> tuple[State, dict[str, Any]]:
    """The states after a block, and each token's estimate at each linear that chooses."""
    weights, found = linear_weights(block), {}

    def tap(path: str, x: jax.Array) -> jax.Array:
        name, _, end = path.rpartition(".")
        if end == "seen":
            found[name] = weights[name].estimate(x, weights[name].low_bits)
        return x

    return run(block, shared, state, batch, tap), found


def quantile_above(estimates: np.ndarray, part: float) -> float:
    """The threshold that this part of the estimates lies above, to the nearest; infinite for none and all.

    In the middle between two estimates: another program's last bits make no other choice.
    """
    ordered = np.sort(np.nan_to_num(estimates, nan=-np.inf))[::-1]
    count = round(part * len(ordered))
    if count in (0, len(ordered)):
        return -np.inf if count else np.inf
    below, above = float(ordered[count]), float(ordered[count - 1])
    return (below + above) / 2 if np.isfinite(below) else below
