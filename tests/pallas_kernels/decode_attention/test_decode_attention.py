"""Attention of a few tokens to pages and to a dense cache: every implementation gives the same softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_arrays import (
    TOLERANCE,
    assert_same_softmax,
    dense,
    exact_pages,
    exact_rows,
    nan_where_no_head_has_rows,
    paged,
)
from jax.sharding import PartitionSpec
from targets import lowered_text

from pallas_kernels import kernels
from pallas_kernels.decode_attention import attend_pages, attend_rows, divided, merge, reference
from pallas_kernels.decode_attention.cases import CASES
from pallas_kernels.decode_attention.coded import Code
from pallas_kernels.decode_attention.digits import digits, fields_of_half, offset_of_field
from pallas_kernels.decode_attention.work import Shares, of_pages, of_rows

# --- what it means


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_walk_and_definition_equal_a_softmax_over_gathered_rows(softcap):
    arrays = paged()
    wanted = exact_pages(*arrays, scale=0.2, softcap=softcap)
    rule = {"scale": 0.2, "softcap": softcap}
    assert_same_softmax(attend_pages(*arrays, **rule), wanted)
    assert_same_softmax(reference.pages_definition(*arrays, max_readers=1, code=None, **rule), wanted)


def test_rows_equal_a_softmax_over_the_rows_that_are_seen():
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    arrays = dense(lengths=(45, 9))
    rule = {"scale": 0.2, "softcap": 3.0, "window": 20}
    np.testing.assert_allclose(
        attend_rows(*arrays, sinks, **rule), exact_rows(*arrays, sinks, **rule), rtol=1e-5, atol=1e-5
    )


def test_two_halves_merge_into_the_whole():
    arrays = paged(counts=(40, 32, 17, 100), seed=1)
    whole = attend_pages(*arrays, scale=0.2)
    offsets = arrays[3]
    middle = jnp.minimum(offsets[:-1] + 1, offsets[1:])
    halves = []
    for first, end in ((offsets[:-1], middle), (middle, offsets[1:])):
        lengths = jnp.where(
            (jnp.arange(len(arrays[4]))[None] >= first[:, None])
            & (jnp.arange(len(arrays[4]))[None] < end[:, None]),
            arrays[4][None],
            0,
        ).sum(0)
        halves.append(attend_pages(*arrays[:4], lengths, *arrays[5:], scale=0.2))
    np.testing.assert_allclose(divided(merge(*halves)), divided(whole), rtol=2e-5, atol=1e-6)


# --- how work is divided


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_shares_cover_every_row_once_and_pieces_have_slots_of_their_own(programs):
    _, _, _, offsets, lengths, _, _ = paged(counts=(40, 0, 17, 100))
    work, shares = of_pages(offsets, lengths, 16), Shares(programs, 16, 2)
    units, first, end = (np.asarray(x) for x in work)
    np.testing.assert_array_equal(end - first, (40, 0, 17, 100))
    size = int(shares.size(units[0], units[-1]))
    assert size * programs >= units[-1] - units[0] and size % 2 == 0
    slots = set()
    for program in range(programs):
        start, stop = units[0] + program * size, min(units[0] + (program + 1) * size, units[-1])
        for head in range(len(first)):
            if max(start, units[head]) < min(stop, units[head + 1]):
                slot = program + head
                assert slot not in slots and slot < shares.slots(len(first))
                slots.add(slot)


def test_a_dense_share_ends_where_no_query_sees_further():
    _, _, _, positions, key_positions = dense(lengths=(37, 9))
    work = of_rows(positions, key_positions, K=2, window=12, unit=4)
    # the first of two queries stands at length - 2 and sees 12 positions
    np.testing.assert_array_equal(work.first, [24, 64, 80, 120])
    np.testing.assert_array_equal(work.end, [37, 77, 89, 129])
    np.testing.assert_array_equal(work.units, [0, 4, 8, 11, 14])


# --- kernels in the interpreter


PAGED = [
    {},
    {"dtype": jnp.bfloat16, "E": 80, "n": 3},
    {"dtype": jnp.float16, "C": 7, "n": 9},
    {"contexts_of": (1, 0, 1), "dtype": jnp.bfloat16},
    {"counts": (0, 0, 0, 0)},
]


@pytest.mark.parametrize("shape", PAGED, ids=str)
def test_triton_equals_the_reference_on_pages(shape):
    arrays = paged(**shape)
    rule = {"scale": 0.2, "softcap": 5.0 if not shape else None, "max_readers": 2}
    with kernels("triton", interpret=True):
        got = attend_pages(*arrays, **rule)
    assert_same_softmax(got, attend_pages(*arrays, **rule, implementation="xla"), arrays[0].dtype)


CODES = [
    (Code(4, 128), 128, jnp.bfloat16),
    (Code(8, 32), 32, jnp.bfloat16),
    (Code(2, 128), 128, jnp.float16),
    pytest.param(Code(8, 40), 40, jnp.float16, marks=pytest.mark.slow),
    pytest.param(Code(4, 32), 80, jnp.bfloat16, marks=pytest.mark.slow),  # the last group is shorter
    pytest.param(Code(2, 64), 64, jnp.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_digits_of_every_half_of_a_word_are_exact_floats(bits, dtype):
    halves = np.arange(2**16)
    found = np.zeros((fields_of_half(bits), len(halves)))
    for d in digits(bits, dtype):
        read = ((halves >> d.shift) & d.mask | d.exponent).astype(np.uint16)
        floats = jax.lax.bitcast_convert_type(jnp.asarray(read), dtype)
        found[d.field] += np.asarray(floats, np.float64)
    for i, numbers in enumerate(found):
        wanted = (halves >> (bits * i)) & (2**bits - 1)
        np.testing.assert_array_equal(numbers - offset_of_field(digits(bits, dtype), i), wanted)


# a head of 4 queries has two rows side by side, a greater one has not
@pytest.mark.parametrize("n", [4, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("code", "E", "dtype"), CODES, ids=str)
def test_triton_equals_the_reference_on_codes(code, E, dtype, n):
    arrays = paged(code=code, E=E, dtype=dtype, counts=(20, 33), n=n, contexts_of=(0,))
    arrays = nan_where_no_head_has_rows(arrays)
    rule = {"scale": 0.2, "bits": code.bits, "group_size": code.group_size}
    with kernels("triton", interpret=True):
        got = attend_pages(*arrays, **rule)
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2, code=code), dtype)


@pytest.mark.parametrize(
    "shape", [{}, {"lengths": (93, 41), "T": 1}, {"code": Code(4, 32), "dtype": jnp.bfloat16}], ids=str
)
@pytest.mark.parametrize("window", [None, 17])
def test_triton_equals_the_reference_on_rows(shape, window):
    arrays, code = dense(**shape), shape.get("code")
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    rule = {"scale": 0.2, "softcap": 3.0, "window": window}
    coded = {} if code is None else {"bits": code.bits}
    with kernels("triton", interpret=True):
        got = attend_rows(*arrays, sinks, **rule, **coded)
    wanted, tolerance = exact_rows(*arrays, sinks, **rule, code=code), TOLERANCE[arrays[0].dtype.name]
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def test_nan_and_infinity_reach_the_queries_that_meet_them_and_no_others():
    q, k, v, *rest = paged(dtype=jnp.bfloat16)
    q = q.at[0, 0, 1, 3].set(jnp.nan)
    v = v.at[rest[0][2], 0, 5].set(jnp.inf)  # the third head: context 1, key head 0
    with kernels("triton", interpret=True):
        out = np.asarray(divided(attend_pages(q, k, v, *rest, scale=0.2)))
    assert np.isnan(out[0, 0, 1]).all()
    assert np.isinf(out[1, 0, :, 5]).all()
    finite = np.isfinite(out)
    assert finite[0, 0, [0, 2, 3]].all() and finite[0, 1].all() and finite[1, 1].all()
    assert finite[1, 0].sum() == out[1, 0].size - 4


# --- transformations


@pytest.mark.slow
def test_vmap_and_gradient_follow_the_reference():
    arrays = paged(counts=(20, 33, 5, 0))
    q = jnp.stack([arrays[0], 2 * arrays[0]])

    def out(q):
        return divided(attend_pages(q, *arrays[1:], scale=0.2))

    wanted = jnp.stack([out(x) for x in q])
    slope = jax.grad(lambda q: (out(q) ** 2).sum())(arrays[0])
    assert np.isfinite(np.asarray(slope)).all() and np.abs(np.asarray(slope)).max() > 0.1
    with kernels("triton", interpret=True):
        np.testing.assert_allclose(jax.vmap(out)(q), wanted, rtol=2e-5, atol=1e-5)
        got = jax.grad(lambda q: (out(q) ** 2).sum())(arrays[0])
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)


def test_key_heads_on_8_devices_give_what_one_gives():
    arrays = dense(K=8, B=1, G=2, lengths=(30,), S=32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, all_of = PartitionSpec("x"), PartitionSpec()
    by_query = PartitionSpec(None, None, "x")
    spread = jax.shard_map(
        functools.partial(attend_rows, scale=0.2),
        mesh=mesh,
        in_specs=(by_query, heads, heads, all_of, all_of),
        out_specs=by_query,
        check_vma=False,
    )
    wanted = attend_rows(*arrays, scale=0.2)
    with kernels("triton", interpret=True):
        np.testing.assert_allclose(jax.jit(spread)(*arrays), wanted, rtol=2e-5, atol=1e-5)


# --- which implementation runs


def test_errors_say_what_must_hold():
    q, k, v, offsets, lengths, head, of = paged()
    with pytest.raises(ValueError, match="attend_pages: page_offsets must have"):
        attend_pages(q, k, v, offsets[:-1], lengths, head, of, scale=1.0)
    with pytest.raises(ValueError, match="attend_pages: keys and values must be alike, 64 numbers a row"):
        attend_pages(q, k[..., :-1], v[..., :-1], offsets, lengths, head, of, scale=1.0)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        attend_pages(q, k, v, offsets, lengths, head, of, scale=1.0, bits=3)
    q, k, v, positions, key_positions = dense()
    with pytest.raises(ValueError, match="must serve H heads, got B=2, J=4, H=3"):
        attend_rows(q[:, :, :3], k, v, positions, key_positions, scale=1.0)


def test_a_named_kernel_never_falls_back():
    arrays = paged(n=300, counts=(5, 5, 5, 5))
    for name in ("triton", "pallas"):
        with pytest.raises(NotImplementedError, match="NVIDIA"):
            attend_pages(*arrays, scale=1.0, implementation=name)
    with kernels("triton", interpret=True), pytest.raises(NotImplementedError, match="256 queries"):
        attend_pages(*arrays, scale=1.0)
    coded = paged(code=Code(4, 64))
    with kernels("triton", interpret=True), pytest.raises(NotImplementedError, match="16 bits only"):
        attend_pages(*coded, scale=1.0, bits=4)


def test_auto_on_a_cpu_takes_the_reference():
    arrays = paged()
    text = jax.jit(functools.partial(attend_pages, scale=1.0)).lower(*arrays).as_text()
    assert "while" in text and "custom_call" not in text


# --- programs for GPUs


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_real_shapes_lower_for_cuda(case):
    text = lowered_text(case.run, *case.arrays)
    assert "decode_attention" in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_real_gpu_gives_what_the_reference_gives(case):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    arrays = case.operands()
    assert_same_softmax(jax.jit(case.run)(*arrays), jax.jit(case.reference)(*arrays), jnp.bfloat16)
