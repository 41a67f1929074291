"""The same width for all tokens, layer by layer, within a budget: what a choice at run time is measured by.

One integer programme a target, exact, over what `widths.width_costs` says each width costs each linear. No
time is spent at run time and no token reads another width than its neighbour.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.precision.widths import By, Costs, widths_within
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, always
from jaxllm.weights.planes.bit_planes import BitPlanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticWidths:
    """Options: targets and memory_bits as of `DpLlm`; by: what a width costs (`widths.width_costs`)."""

    targets: tuple[float, ...] = (3.5, 4.0, 4.5)
    memory_bits: float = 5.0
    by: By = "fisher"

    def choose(
        self,
        model,
        held: Mapping[str, BitPlanes],
        costs: Costs,
        sizes: Mapping[str, int],
        text: Any,
        **how: Any,
    ) -> dict[str, AdaptivePlanes]:
        """The weights at the widths of each target; arguments as of `DpLlm.choose`."""
        at_most = {
            name: {b: cost for b, cost in costs[name].items() if b <= w.parent_bits}
            for name, w in held.items()
        }
        widths = [widths_within(at_most, sizes, target) for target in self.targets]
        return {
            name: read_at_widths(w, np.array([found[name] for found in widths]), self.targets)
            for name, w in held.items()
            if w.parent_bits > w.seed_bits
        }


def read_at_widths(w: BitPlanes, widths: np.ndarray, targets: tuple[float, ...]) -> AdaptivePlanes:
    """The weight read at one width a target, whatever the input."""
    low = np.clip(widths, w.seed_bits, w.parent_bits - 1)
    threshold = np.where(widths > low, -np.inf, np.inf)
    return dataclasses.replace(
        always(w, targets),
        low=jnp.asarray(low, jnp.int32),
        threshold=jnp.asarray(threshold, jnp.float32),
    )
