import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.quantized import two_bit_words
from jaxllm.ops.packing import Packed, pack, unpack, unpack_at
from jaxllm.weights.planes import bit_planes
from pallas_kernels.words import from_words, parts, to_words

# Few lengths, so that little is compiled; any codes.
widths = st.integers(1, 8)
lengths = st.sampled_from([1, 31, 33, 64])


def codes(bits: int, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


@pytest.mark.parametrize("bits", range(1, 9))
def test_what_was_packed_comes_back_whatever_the_length(bits):
    for n in (1, 31, 32, 33, 100):
        want = codes(bits, (3, 2, n), n)
        packed = pack(jnp.asarray(want), bits)
        assert packed.words.shape == (3, 2, -(-n // 32), bits) and packed.words.dtype == jnp.uint32
        assert packed.shape == want.shape
        np.testing.assert_array_equal(unpack(packed), want)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_laid_out_as_the_docstring_says(bits):
    want = codes(bits, (32,))
    words = np.asarray(pack(jnp.asarray(want), bits).words)[0]
    at, below = 0, bits
    for p in parts(bits):
        below -= p
        for i, code in enumerate(want):
            word = int(words[at + i // (32 // p)])
            assert word >> p * (i % (32 // p)) & (2**p - 1) == code >> below & (2**p - 1)
        at += p


def test_every_code_of_every_width_survives_next_to_every_other():
    for bits in range(1, 9):
        pairs = np.stack(np.meshgrid(*[np.arange(2**bits)] * 2), -1).reshape(-1)
        np.testing.assert_array_equal(unpack(pack(jnp.asarray(pairs), bits)), pairs)


def test_packed_codes_go_through_jit_vmap_and_tree_map():
    want = codes(3, (4, 40))
    packed = jax.jit(lambda c: pack(c, 3))(jnp.asarray(want))
    np.testing.assert_array_equal(jax.vmap(unpack)(packed), want)
    same = jax.tree.map(lambda x: x, packed)
    assert isinstance(same, Packed) and (same.bits, same.size) == (3, 40)


def test_packing_is_one_program_alone_and_no_call_in_another():
    want = jnp.asarray(codes(3, (4, 40)))
    for function, argument in ((functools.partial(pack, bits=3), want), (unpack, pack(want, 3))):
        inner = getattr(function, "func", function)
        assert hasattr(inner, "lower")  # jitted: an eager call compiles once
        # the lowered program, since jax 0.12 inlines only there and 0.10 in the jaxpr already
        assert f"call @{inner.__name__}" not in jax.jit(lambda x, f=function: f(x)).lower(argument).as_text()


def drawn(data, bits: int, n: int) -> np.ndarray:
    raw = data.draw(st.binary(min_size=n, max_size=n))
    return np.frombuffer(raw, np.uint8) & (2**bits - 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=widths, n=lengths)
def test_packing_is_a_bijection_of_codes_and_words(data, bits, n):
    codes = drawn(data, bits, n)
    packed = pack(jnp.asarray(codes[None]), bits)
    np.testing.assert_array_equal(unpack(packed)[0], codes)
    again = pack(unpack(packed), bits)
    np.testing.assert_array_equal(again.words, packed.words)
    flipped = data.draw(st.integers(0, n - 1))
    other = codes.copy()
    other[flipped] ^= 1
    assert (np.asarray(pack(jnp.asarray(other[None]), bits).words) != np.asarray(packed.words)).sum() == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8]))
def test_any_words_are_those_of_their_codes(data, bits):
    words = np.frombuffer(data.draw(st.binary(min_size=12, max_size=12)), np.uint32)
    np.testing.assert_array_equal(to_words(from_words(jnp.asarray(words), bits), bits), words)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=widths, n=lengths)
def test_planes_are_a_bijection_too(data, bits, n):
    codes = drawn(data, bits, n)[None]
    planes = bit_planes.pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(bit_planes.unpack(planes, n), codes)


@settings(max_examples=60, deadline=None)
@given(
    zero=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    step=st.tuples(*map(st.integers, [0] * 3, [7, 7, 15])),
)
def test_metadata_words_of_three_groups_are_a_bijection(zero, step):
    word = two_bit_words.pack_words(np.asarray([zero]), np.asarray([step]))
    got = two_bit_words.unpack_words(word)
    assert got[0].tolist() == [zero] and got[1].tolist() == [list(step)]


def test_widths_outside_one_to_eight_are_refused():
    with pytest.raises(ValueError, match="pack: bits must be 1 to 8, got bits=9"):
        pack(jnp.zeros((4,), jnp.int32), 9)


def test_codes_at_some_places_are_those_of_the_whole():
    index = jnp.asarray([69, 0, 31, 32, 33, 69])
    for bits in range(1, 9):
        want = jnp.asarray(codes(bits, (3, 70)))
        np.testing.assert_array_equal(unpack_at(pack(want, bits), index), want[:, index])
