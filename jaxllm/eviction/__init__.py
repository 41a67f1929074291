"""Which rows of a cache stay when it must get smaller: scores by any method, one rule that spends a budget.

    cache = jl.prefill(model, [ids])
    small = evict(cache, kvzip_scores(model, cache, [ids], tokenizer=tokenizer), ratio=0.3)

The files:

    budget              from scores to what stays: ratios, tokens, thresholds; ties; evicting again
    running_budget      a budget that holds while a text grows
    kvzip               KVzip's scores: attention while the context is repeated
    baselines           H2O, SnapKV, TOVA, expected attention, StreamingLLM, random
    gates               Fast KVzip's and KVzap's gates: scores from the pass that reads a text
    heads               scores of whole heads, kept in a file
    methods             the table of all that score, by name
"""

from jaxllm.eviction.baselines import (
    expected_scores,
    h2o_scores,
    random_scores,
    snapkv_scores,
    streaming_scores,
    tova_scores,
)
from jaxllm.eviction.budget import evict
from jaxllm.eviction.gates import FastGate, Gate, ZapGate, load_gates, pico_gates, save_gates
from jaxllm.eviction.heads import broadcast_head_scores, head_scores, load_heads, save_heads
from jaxllm.eviction.kvzip import RepeatPrompt, kvzip_scores
from jaxllm.eviction.methods import METHODS, EvictionMethod
from jaxllm.eviction.running_budget import CacheBudget, evict_to_budget

__all__ = [
    "METHODS",
    "CacheBudget",
    "EvictionMethod",
    "FastGate",
    "Gate",
    "RepeatPrompt",
    "ZapGate",
    "evict",
    "evict_to_budget",
    "expected_scores",
    "h2o_scores",
    "head_scores",
    "kvzip_scores",
    "load_gates",
    "load_heads",
    "pico_gates",
    "random_scores",
    "save_gates",
    "save_heads",
    "snapkv_scores",
    "broadcast_head_scores",
    "streaming_scores",
    "tova_scores",
]
