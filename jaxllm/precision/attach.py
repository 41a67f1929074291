"""Weights of several widths become weights that choose, and the target that holds is changed.

model = attach_precision(model, DpLlm(targets=(3.5, 4.0)), tokens)
model = set_target(model, 3.5)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.models.decoder import Decoder
from jaxllm.models.inputs import require_decoder_only
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.precision.widths import By, Costs, keep_planes, width_costs, widths_within
from jaxllm.quant.text import Text
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, is_adaptive
from jaxllm.weights.planes.bit_planes import BitPlanes


@runtime_checkable
class PrecisionMethod(Protocol):
    """What chooses widths: `DpLlm`, `StaticWidths`, or anything that has this."""

    @property
    def targets(self) -> tuple[float, ...]:
        """Average bits that the model can be set to, in ascending order."""
        ...

    @property
    def memory_bits(self) -> float:
        """Planes that are held, a weight, on average."""
        ...

    @property
    def by(self) -> By:
        """What the planes that are held are chosen by (`widths.width_costs`)."""
        ...

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
        ...


def attach_precision(
    model, method: PrecisionMethod, sequences: Any, *, batch: int = 8, progress: bool = True
):
    """The model with weights that choose their width for each token, at the lowest of the method's targets.

    model: quantized by `AnyPrecision`; linears of other formats stay as they are and do not count. Planes
      above what the budget of memory holds are left out.
    sequences: what the choice is calibrated on: token ids [S, T], or rows of different lengths.
    batch: sequences at once.

    The given model is not changed. Raises ValueError for a model without any-precision weights, targets or a
    budget outside what the planes hold, and bad text.
    """
    require_decoder_only("attach_precision", model)
    weights = any_precision_weights(model)
    if getattr(method, "asynchronous", False) and not isinstance(model, Decoder):
        raise ValueError(
            f"attach_precision: asynchronous must be of a Decoder's blocks, got {type(model).__name__}"
        )
    sizes = {name: math.prod(w.shape) for name, w in weights.items()}
    least, most = next(iter(weights.values())).seed_bits, next(iter(weights.values())).parent_bits
    if not least <= method.memory_bits:
        raise ValueError(f"attach_precision: memory_bits must be at least {least}, got {method.memory_bits}")
    bound = min(float(most), method.memory_bits)
    if not least <= method.targets[0] <= method.targets[-1] <= bound:
        raise ValueError(
            f"attach_precision: targets must lie in {least} to {bound:g}, what the planes hold, "
            f"got {method.targets}"
        )
    if sequences is None:
        raise ValueError("attach_precision: the choice needs calibration text, got none")
    text = Text.from_sequences(model, sequences, batch)
    costs = width_costs(model, weights, sequences, by=method.by, batch=batch, progress=progress)
    widths = dict.fromkeys(weights, most)
    if bound < most:
        widths = widths_within(costs, sizes, bound)
    held = {name: keep_planes(w, widths[name]) for name, w in weights.items()}
    total = sum(sizes.values())
    filled = sum(widths[name] * sizes[name] for name in sizes) / total
    if filled < method.targets[-1]:
        raise ValueError(
            f"attach_precision: targets must be at most {filled:.3f}, what whole planes hold within "
            f"memory_bits={method.memory_bits}, got {method.targets[-1]}"
        )
    narrow = replace_weights(model, held)
    chosen = method.choose(narrow, held, costs, sizes, text, progress=progress)
    return replace_weights(narrow, chosen)


def any_precision_weights(model) -> dict[str, BitPlanes]:
    """The linears of the blocks that are stored in planes, by name; ValueError where they do not fit."""
    linears = {name: w for name, w in linear_weights(model).items() if "." in name}
    found = {name: w for name, w in linears.items() if isinstance(w, BitPlanes)}
    if any(map(is_adaptive, linears.values())):
        raise ValueError("attach_precision: the model must be any-precision, got one that chooses already")
    if not found:
        kinds = ", ".join(sorted({type(w).__name__ for w in linears.values()}))
        raise ValueError(f"attach_precision: the model must have any-precision weights, got {kinds}")
    widths = {(w.seed_bits, w.parent_bits) for w in found.values()}
    if len(widths) > 1:
        raise ValueError(
            f"attach_precision: all linears must have the same widths, got {sorted(widths)} (seed, parent)"
        )
    return found


def adaptive_weights(model) -> dict[str, AdaptivePlanes]:
    """The weights that choose, by name; ValueError where there are none."""
    found = {name: w for name, w in linear_weights(model).items() if isinstance(w, AdaptivePlanes)}
    if not found:
        raise ValueError("precision: the model must have weights that choose their width, got none")
    return found


def targets_of(model) -> tuple[float, ...]:
    """The targets that a model can be set to, in bits a weight."""
    return next(iter(adaptive_weights(model).values())).targets


def set_target(model, bits: float | Int[Array, ""]):
    """The model at another target: the same arrays but for one number a linear, and the same program.

    bits: one of `targets_of(model)`; or, as an array that may be traced, which of them.
    """
    targets = targets_of(model)
    if not isinstance(bits, jax.Array):
        if bits not in targets:
            known = ", ".join(f"{target:g}" for target in targets)
            raise ValueError(f"set_target: bits must be one of the model's targets {known}, got {bits}")
        bits = jnp.asarray(targets.index(bits), jnp.int32)

    def one(w):
        return dataclasses.replace(w, target=bits) if is_adaptive(w) else w

    return jax.tree.map(one, model, is_leaf=is_adaptive)
