"""The table of methods: every entry scores what its function does, and says what it is."""

from functools import partial

import numpy as np
import pytest

import jaxllm as jl
from jaxllm import eviction
from jaxllm.eviction import METHODS

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]]
FUNCTIONS = {
    "kvzip": eviction.kvzip_scores,
    "kvzip+": partial(eviction.kvzip_scores, output_aware=True),
    "snapkv": eviction.snapkv_scores,
    "h2o": eviction.h2o_scores,
    "tova": eviction.tova_scores,
    "expected": eviction.expected_scores,
    "streaming": eviction.streaming_scores,
    "random": eviction.random_scores,
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return jl.load(tiny_checkpoint)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_entry_scores_as_its_function_does(model, name):
    cache = jl.prefill(model, ROWS, slack=64)
    got = METHODS[name].score(model, cache, ROWS, prefix=2)
    if METHODS[name].needs == "cache":
        want = FUNCTIONS[name](model, cache, [row[2:] for row in ROWS], prefix=2)
    else:
        want = FUNCTIONS[name](model, ROWS, prefix=2)
    np.testing.assert_array_equal(got, want)


def test_the_table_has_every_public_scorer_and_the_gates():
    public = {name for name in eviction.__all__ if name.endswith("_scores") and "head" not in name}
    assert {scorer.__name__ for scorer in FUNCTIONS.values() if not isinstance(scorer, partial)} == public
    assert METHODS.keys() == {*FUNCTIONS, "fast-kvzip", "kvzap"}


def test_gates_score_while_a_cache_is_filled(model):
    gated = {name for name, method in METHODS.items() if method.needs == "gates"}
    assert gated == {"fast-kvzip", "kvzap"}
    for name in gated:
        assert METHODS[name].scorer().sizes()
        with pytest.raises(ValueError, match="by prefill_with_scores"):
            METHODS[name].score(model, jl.prefill(model, ROWS), ROWS)


def test_every_entry_says_in_a_line_what_it_is_and_what_it_loses():
    for name, method in METHODS.items():
        for text in (method.title, method.help, method.lossy):
            assert text and "\n" not in text and len(text) < 80, name
