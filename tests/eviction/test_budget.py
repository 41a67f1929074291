"""Budgets check themselves; how they choose, `tests/cache/test_paged.py` asks."""

import jaxtyping
import pytest

from jaxllm.eviction.budget import ContextBudget


def test_a_rule_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match="must be one of global, per_head, whole_heads, got 'head'"):
        ContextBudget(ratio=0.5, rule="head")
