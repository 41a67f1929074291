"""The interleaved words of 2/4/16-bit weights, as the paper draws them (arXiv:2311.16442)."""

import jax
import numpy as np
import pytest
from mixed_columns_example import K, N, example, mask_of, solve, solve_for_words, values

from checkpoints_convert.quantized import two_bit_words
from checkpoints_convert.quantized.two_bit_words import from_interleaved, to_interleaved


@pytest.fixture(scope="module")
def layer():
    return example()


def test_every_word_of_the_papers_metadata_is_read_and_written_back():
    words = np.arange(2**16, dtype=np.uint16)
    zero_point, step = two_bit_words.unpack_words(words)
    assert (two_bit_words.pack_words(zero_point, step) == words).all()
    assert zero_point.max() == 3 and step[:, :2].max() == 7 and step[:, 2].max() == 15
    assert len(np.unique(np.concatenate([zero_point, step], 1), axis=0)) == 2**16


@pytest.mark.parametrize(
    "n, k, groups, p",
    [
        pytest.param(48, 192, (1, 4, 5), 0.02, marks=pytest.mark.slow),
        (20, 100, (0, 6), 0.01),
        pytest.param(16, 64, (), 0.0, marks=pytest.mark.slow),
        pytest.param(33, 64, (0, 1, 2, 3), 0.1, marks=pytest.mark.slow),
    ],
)
def test_the_papers_layout_is_a_lossless_round_trip(n, k, groups, p):
    rows, stats = example(n, k)
    w = solve_for_words(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p)
    layout = to_interleaved(w)
    C = -(-k // 16)
    assert layout.main.shape == (C, n) and layout.side.shape == (len(groups), n)
    assert layout.words.shape == (-(-(C - len(groups)) // 3), n)
    again = from_interleaved(layout)
    assert jax.tree.structure(again) == jax.tree.structure(w)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_the_papers_layout_reads_as_its_figure_says(layer):
    """A reference written from the figure: main and side words, 16-bit metadata, compressed rows."""
    w = solve_for_words(*layer, mask_of(1, 4, 5), outliers=0.02)
    p = to_interleaved(w)
    want = np.zeros((N, K), np.float32)
    at_two = 0
    for c in range(12):
        side = p.side_index[c]
        for n in range(N):
            if side < 0:
                codes = np.array([p.main[c, n] >> (2 * i) & 3 for i in range(16)], np.float32)
                word, zeros = int(p.words[at_two // 3, n]), int(p.zeros[at_two // 3, n // 16])
                place = at_two % 3
                zero_point = word >> (2 * place) & 3
                step = word >> (6, 9, 12)[place] & (7, 7, 15)[place]
                shared = zeros >> (4 * place) & (7, 7, 15)[place]
                scale = np.float32(step + shared) * np.float32(p.scales[at_two, n // 16])
            else:
                pair = int(p.main[c, n]) | int(p.side[side, n]) << 32
                codes = np.array([pair >> (4 * i) & 15 for i in range(16)], np.float32)
                group = side * 16 // p.group4
                zero_point, scale = p.four_zero_point[group, n], np.float32(p.four_scale[group, n])
            want[n, 16 * c : 16 * c + 16] = (codes - np.float32(zero_point)) * scale
        at_two += side < 0
    row = np.repeat(np.arange(N), np.diff(p.row_starts))
    want[row, p.columns] += p.values.astype(np.float32)
    assert (np.asarray(values(w)) == want).all()  # bit for bit


def test_metadata_that_does_not_fit_the_papers_words_is_refused(layer):
    wide = solve(*layer, mask_of())
    with pytest.raises(ValueError, match="to_interleaved: two of three steps must fit 3 bits.*got step=1"):
        to_interleaved(wide)
