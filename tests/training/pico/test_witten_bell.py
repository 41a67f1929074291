"""The n-gram yardstick against the formula written out, byte by byte."""

import collections
import importlib.util
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def witten_bell():
    spec = importlib.util.spec_from_file_location("witten_bell", BENCHMARKS / "witten_bell.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(train: bytes, past: bytes, byte: int, order: int) -> float:
    """P(byte | past), by recursion over ever shorter contexts."""

    def p(k: int) -> float:
        if k < 0:
            return 1 / 256
        if k > len(past):
            return p(k - 1)
        h = past[len(past) - k :]
        follow = collections.Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == h)
        n, t = sum(follow.values()), len(follow)
        return p(k - 1) if n == 0 else (follow[byte] + t * p(k - 1)) / (n + t)

    return p(order)


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_probabilities_equal_the_formula_byte_by_byte(witten_bell, order):
    rng = np.random.default_rng(order)
    train = bytes(rng.choice([97, 98, 99], 200).tolist()) + b"\xff\x00abc"
    held_out = bytes(rng.choice([97, 98, 99, 100, 255], 60).tolist())
    got = witten_bell.probabilities(train, held_out, order)
    want = [by_hand(train, held_out[:i], held_out[i], order) for i in range(len(held_out))]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_probabilities_of_all_bytes_sum_to_one(witten_bell):
    train = b"to be or not to be that is the question"
    total = sum(witten_bell.probabilities(train, b"to b" + bytes([c]), 3)[4] for c in range(256))
    assert abs(total - 1) < 1e-12


def test_a_worked_example(witten_bell):
    # "aab": n() = 3, t() = 2; P(a) = (2 + 2/256) / 5; after a: n(a) = 2, t(a) = 2, n(a, b) = 1
    p0 = (1 + 2 / 256) / 5
    got = witten_bell.probabilities(b"aab", b"ab", 1)
    np.testing.assert_allclose(got, [(2 + 2 / 256) / 5, (1 + 2 * p0) / 4])


def test_an_empty_held_out_text_is_refused(witten_bell):
    with pytest.raises(ValueError, match="held_out must not be empty"):
        witten_bell.bits_per_byte(b"abc", b"", 2)
