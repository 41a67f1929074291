"""The n-gram yardstick against the formula written out, byte by byte."""

import collections

import numpy as np
import pytest
import witten_bell


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
def test_probabilities_equal_the_formula_byte_by_byte(order):
    rng = np.random.default_rng(order)
    train = bytes(rng.choice([97, 98, 99], 200).tolist()) + b"\xff\x00abc"
    held_out = bytes(rng.choice([97, 98, 99, 100, 255], 60).tolist())
    got = witten_bell.probabilities(train, held_out, order)
    want = [by_hand(train, held_out[:i], held_out[i], order) for i in range(len(held_out))]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_probabilities_of_all_bytes_sum_to_one():
    train = b"to be or not to be that is the question"
    total = sum(witten_bell.probabilities(train, b"to b" + bytes([c]), 3)[4] for c in range(256))
    assert abs(total - 1) < 1e-12


def test_a_worked_example():
    # "aab": n() = 3, t() = 2; P(a) = (2 + 2/256) / 5; after a: n(a) = 2, t(a) = 2, n(a, b) = 1
    p0 = (1 + 2 / 256) / 5
    got = witten_bell.probabilities(b"aab", b"ab", 1)
    np.testing.assert_allclose(got, [(2 + 2 / 256) / 5, (1 + 2 * p0) / 4])


def test_an_empty_held_out_text_is_refused():
    with pytest.raises(ValueError, match="held_out must not be empty"):
        witten_bell.bits_per_byte(b"abc", b"", 2)
