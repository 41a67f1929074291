"""Codes in int32 words, as the published layouts pack them."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops import packing
from jaxllm.ops.packing import Packed

FLOATS = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, in each field of a word

T = TypeVar("T")
Tensors = dict[str, np.ndarray]  # of one linear, by the last part of their names
Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # what they must be: shape, types


def groups_of(K: int, group_size: int) -> tuple[int, int]:
    """Inputs a group and the number of groups; -1 is one group."""
    group_size = K if group_size == -1 else min(group_size, K)
    return group_size, -(-K // group_size)


def words_of(n: int, bits: int) -> int:
    """Words of 32 bits that n codes fill."""
    if n * bits % 32:
        raise ValueError(f"codes must fill words of 32 bits, got {n} codes of {bits} bits")
    return n * bits // 32


def on_host(cls: type[T], **fields) -> T:
    """A format around numpy arrays, made as JAX makes one around anything: without its checks."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def pack(codes: np.ndarray, bits: int) -> Packed:
    """Codes as our format packs them, on the host."""
    return jax.tree.map(np.asarray, packing.pack(jnp.asarray(codes), bits))


def unsigned(words: np.ndarray) -> np.ndarray:
    """int32 words as uint32, so that shifts bring in zeros."""
    return words.view(np.uint32)


def in_blocks(words: np.ndarray, bits: int) -> np.ndarray:
    """Words [R, w] as blocks of 32 codes [R, n, bits], filled up with zeros."""
    R, w = words.shape
    return np.pad(words, ((0, 0), (0, -w % bits))).reshape(R, -1, bits)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes uint8 [R, 32 n] of words [R, w]: code i begins at bit i * bits, counted over all words."""
    blocks = in_blocks(words, bits)
    codes = np.empty((*blocks.shape[:2], 32), np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        field = blocks[..., word] >> shift
        if shift + bits > 32:  # only at 3 bits
            field = field | (blocks[..., word + 1] << (32 - shift))
        codes[..., i] = field & (2**bits - 1)
    return codes.reshape(len(words), -1)


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, n] as int32 words [R, ceil(n bits / 32)]: the inverse of `unpacked`."""
    R, n = codes.shape
    wide = np.pad(codes.astype(np.uint32), ((0, 0), (0, -n % 32))).reshape(R, -1, 32)
    blocks = np.zeros((*wide.shape[:2], bits), np.uint32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        blocks[..., word] |= wide[..., i] << shift
        if shift + bits > 32:
            blocks[..., word + 1] |= wide[..., i] >> (32 - shift)
    return blocks.reshape(R, -1)[:, : -(-n * bits // 32)].view(np.int32)


def codes_of(packed: Packed) -> np.ndarray:
    """The codes uint8 [R, n] of our format, on the host."""
    if 8 % packed.bits:
        return np.asarray(packing.unpack(jax.tree.map(jnp.asarray, packed)))
    words = np.asarray(packed.words)  # the same bits at the same places
    return unpacked(words.reshape(len(words), -1), packed.bits)[:, : packed.size]


def packed(words: np.ndarray, bits: int, K: int, order: np.ndarray | None) -> Packed:
    """Codes [N, K] of words [N, w] as our format packs them, the inputs sorted."""
    if order is None and bits != 3:  # the same bits at the same places
        return on_host(Packed, words=in_blocks(words, bits), bits=bits, size=K)
    codes = unpacked(words, bits)[:, :K]
    return pack(codes if order is None else codes[:, order], bits)


def sorted_inputs(g_idx: np.ndarray, group_size: int, G: int) -> np.ndarray | None:
    """The inputs sorted by group, None where they are."""
    K = len(g_idx)
    sizes = np.full(G, group_size)
    sizes[-1] = K - group_size * (G - 1)
    inside = g_idx.min() >= 0 and g_idx.max() < G
    if not inside or not np.array_equal(np.bincount(g_idx, minlength=G), sizes):
        raise ValueError(f"g_idx must put {group_size} inputs in each of {G} groups")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(K)).all() else order
