"""Precision that is chosen while a model runs.

attach         weights of several widths that choose for each token, by any of the methods here
dp_llm         estimators and thresholds by layer (DP-LLM)
static         the same widths for all tokens, by the same budget: what the choice is measured by
widths         how many planes of each linear are held
averages       how many bits each reads on average
fitting        which estimator a linear gets, by the bits it saves
estimators     what the next bit would change in a product, from its input
measure        the bits that a text really reads
policy         levels of precision by load, latency, or bits that were read
nested         NestedFP's modes as levels, layer by layer
simulation     a trace of requests through a simulated engine
"""

from jaxllm.precision.attach import attach_precision, set_target, targets_of
from jaxllm.precision.dp_llm import DpLlm
from jaxllm.precision.measure import BitsRead, bits_read
from jaxllm.precision.nested import fp8_costs, with_levels
from jaxllm.precision.policy import Always, BitsObjective, LatencyObjective, Load, TokenThreshold
from jaxllm.precision.simulation import Replayed, Request, replay
from jaxllm.precision.static import StaticWidths

__all__ = [
    "Always",
    "BitsObjective",
    "BitsRead",
    "DpLlm",
    "LatencyObjective",
    "Load",
    "Replayed",
    "Request",
    "StaticWidths",
    "TokenThreshold",
    "attach_precision",
    "bits_read",
    "fp8_costs",
    "replay",
    "set_target",
    "targets_of",
    "with_levels",
]
