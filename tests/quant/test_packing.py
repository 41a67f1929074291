import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quant.packing import Packed, pack, parts, unpack


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


def test_widths_outside_one_to_eight_are_refused():
    with pytest.raises(ValueError, match="pack: bits must be 1 to 8, got bits=9"):
        pack(jnp.zeros((4,), jnp.int32), 9)
