"""Mosaic's kernels of decode attention in the interpreter: a head meets all its own rows, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_arrays import (
    assert_same_softmax,
    dense,
    exact_pages,
    exact_rows,
    nan_where_no_head_has_rows,
    paged,
)

from pallas_kernels import kernels, tiles
from pallas_kernels.decode_attention import attend_pages, attend_rows, divided, mosaic_gpu
from pallas_kernels.decode_attention.coded import Code
from pallas_kernels.decode_attention.mosaic_gpu import Tile

SINKS = jnp.asarray([0.5, -1.0, 2.0, 0.0])


def attended(arrays, *, code=None, tile: Tile | None = None, attend=attend_pages, **rule):
    """What the kernel gives, which races in the interpreter would stop."""
    coded = {} if code is None else {"bits": code.bits, "group_size": code.group_size}
    with kernels("mosaic_gpu", interpret=True):
        if tile is None:
            return attend(*arrays, scale=0.2, **rule, **coded)
        with tiles.trying("decode_attention mosaic_gpu", tile):
            return attend(*arrays, scale=0.2, **rule, **coded)


PAGES = [
    {"dtype": jnp.bfloat16, "contexts_of": (1, 0, 1)},
    pytest.param({"dtype": jnp.float16, "E": 128, "C": 7, "n": 9}, marks=pytest.mark.slow),
    pytest.param({"dtype": jnp.bfloat16, "counts": (0, 0, 0, 0)}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", PAGES, ids=str)
def test_pages_of_plain_rows(shape):
    arrays = nan_where_no_head_has_rows(paged(**shape))
    got = attended(arrays, max_readers=2)
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2), arrays[0].dtype)


# code, numbers of a row, type, queries of a head
CODES = [
    (Code(4, 128), 128, jnp.bfloat16, 4),
    pytest.param(Code(8, 128), 128, jnp.bfloat16, 9, marks=pytest.mark.slow),
    pytest.param(Code(2, 128), 128, jnp.bfloat16, 16, marks=pytest.mark.slow),
    pytest.param(Code(4, 128), 128, jnp.float16, 8, marks=pytest.mark.slow),
    pytest.param(Code(2, 128), 128, jnp.float16, 1, marks=pytest.mark.slow),
    pytest.param(Code(8, 128), 128, jnp.float16, 7, marks=pytest.mark.slow),
    pytest.param(Code(4, 64), 64, jnp.bfloat16, 4, marks=pytest.mark.slow),
    pytest.param(Code(4, 64), 64, jnp.float16, 16, marks=pytest.mark.slow),
    pytest.param(Code(8, 64), 64, jnp.bfloat16, 8, marks=pytest.mark.slow),
    pytest.param(Code(8, 64), 64, jnp.float16, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("code", "E", "dtype", "n"), CODES, ids=str)
def test_pages_of_codes(code, E, dtype, n):
    arrays = paged(code=code, E=E, dtype=dtype, counts=(20, 150), n=n, contexts_of=(0,))
    arrays, softcap = nan_where_no_head_has_rows(arrays), 5.0 if n == 9 else None
    got = attended(arrays, code=code, softcap=softcap)
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2, code=code, softcap=softcap), dtype)


RAGGED = [
    # heads begin at any row of the four that TMA sees as one, some have none, some are read by two requests
    {"C": 6, "counts": (13, 0, 150, 5), "contexts_of": (0, 1), "n": 2},
    pytest.param({"C": 6, "counts": (3, 0, 200, 5, 31, 1), "contexts_of": (2, 1, 2)}, marks=pytest.mark.slow),
    pytest.param({"C": 16, "counts": (0, 0, 0, 0), "contexts_of": (1, 0)}, marks=pytest.mark.slow),
    pytest.param({"C": 250, "counts": (250, 3, 249, 300), "contexts_of": (0, 1)}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_heads_of_different_lengths_in_codes(shape):
    code = Code(4, 64)
    arrays = nan_where_no_head_has_rows(paged(**shape, code=code, dtype=jnp.bfloat16))
    got = attended(arrays, code=code, max_readers=2, tile=Tile(rows=64, stages=2, programs=3))
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2, code=code), jnp.bfloat16)


SHARES = [
    (Code(4, 64), 4, Tile(rows=64, stages=2, programs=1)),
    pytest.param(Code(4, 64), 9, Tile(rows=128, stages=3, programs=2), marks=pytest.mark.slow),
    pytest.param(None, 4, Tile(rows=64, stages=2, programs=1), marks=pytest.mark.slow),
    pytest.param(None, 9, Tile(rows=64, stages=3, programs=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("code", "count", "tile"), SHARES, ids=str)
def test_a_share_of_more_tiles_than_are_under_way_at_once(code, count, tile):
    arrays = paged(code=code, dtype=jnp.bfloat16, counts=(count * tile.rows - 1, 10), contexts_of=(0,))
    arrays = nan_where_no_head_has_rows(arrays)
    got = attended(arrays, code=code, tile=tile)
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2, code=code), jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("code", [Code(4, 64), None], ids=str)
def test_a_tile_that_was_measured_with_more_rows_than_there_are(code):
    arrays = paged(C=4, counts=(30, 60), code=code, dtype=jnp.bfloat16, contexts_of=(0,))  # 112 rows in all
    arrays = nan_where_no_head_has_rows(arrays)
    got = attended(arrays, code=code, tile=Tile(rows=256, stages=2, programs=2))
    assert_same_softmax(got, exact_pages(*arrays, scale=0.2, code=code), jnp.bfloat16)


ROWS = [
    {"S": 164, "lengths": (93, 41)},
    {"S": 164, "lengths": (169, 140), "window": 17},  # a ring, and one that is not full
    {"S": 68, "lengths": (67, 300), "G": 8, "window": 50},
    {"S": 300, "lengths": (300, 2), "T": 1, "G": 7},
    {"S": 128, "lengths": (128, 64), "T": 5, "G": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("code", [Code(4, 64), None], ids=str)
def test_rows_of_a_dense_cache(code, shape):
    arrays = dense(dtype=jnp.bfloat16, E=64, code=code, **{k: v for k, v in shape.items() if k != "window"})
    rule = {"softcap": 3.0, "window": shape.get("window")}
    sinks = jnp.resize(SINKS, arrays[0].shape[2])
    got = attended([*arrays, sinks], code=code, attend=attend_rows, **rule)
    wanted = exact_rows(*arrays, sinks, scale=0.2, **rule, code=code)
    np.testing.assert_allclose(got, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.slow
def test_nan_and_infinity_reach_the_queries_that_meet_them_and_no_others():
    q, k, v, *rest = paged(dtype=jnp.bfloat16)
    q = q.at[0, 0, 1, 3].set(jnp.nan)
    v = v.at[rest[0][2], 0, 5].set(jnp.inf)  # the third head: context 1, key head 0
    out = np.asarray(divided(attended([q, k, v, *rest])))
    assert np.isnan(out[0, 0, 1]).all()
    assert np.isinf(out[1, 0, :, 5]).all()
    finite = np.isfinite(out)
    assert finite[0, 0, [0, 2, 3]].all() and finite[0, 1].all() and finite[1, 1].all()
    assert finite[1, 0].sum() == out[1, 0].size - 4


@pytest.mark.parametrize("where", ["query", pytest.param("value", marks=pytest.mark.slow)])
def test_nan_beside_codes_reaches_the_queries_that_meet_it_and_no_others(where):
    code = Code(4, 64)
    q, k, v, *rest = paged(code=code, dtype=jnp.bfloat16)
    met = np.zeros(q.shape[:-1], bool)
    if where == "query":
        q, met[0, 0, 1] = q.at[0, 0, 1, 3].set(jnp.nan), True
    else:  # the scale of a row of the third head: context 1, key head 0
        v, met[1, 0] = v.at[rest[0][2], 0, 0].set(0x7E00 << 16), True
    out = np.asarray(divided(attended([q, k, v, *rest], code=code)))
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(met[..., None], out.shape))


def test_what_is_not_taken_is_said_before_anything_runs():
    for code, E, C, n, message in [
        (Code(4, 32), 64, 64, 4, "one scale a row"),
        (Code(4, 64), 128, 64, 4, "one scale a row"),
        (Code(2, 64), 64, 64, 4, "of 64 and 4 or 8 bits"),
        (Code(4, 256), 256, 64, 4, "heads of 128 numbers, or of 64"),
        (Code(4, 64), 64, 65, 4, "64 rows together or more, by 4"),
        (Code(4, 64), 64, 4, 4, "64 rows together"),
        (Code(4, 64), 64, 64, 17, "up to 16 queries"),
        (None, 80, 64, 4, "heads of 64 or 128 numbers"),
        (None, 64, 64, 65, "up to 64 queries"),
        (None, 64, 4, 4, "64 rows together"),
    ]:
        arrays = paged(code=code, E=E, C=C, counts=(C, C, C, C), n=n, dtype=jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=message):
            attended(arrays, code=code)
    exact = paged(code=Code(4, 64), C=64)
    with pytest.raises(NotImplementedError, match="queries of 16 bits, got float32"):
        attended(exact, code=Code(4, 64))
    with pytest.raises(NotImplementedError, match="64 rows together or more, by 4"):
        attended(
            dense(E=64, S=127, code=Code(4, 64), dtype=jnp.bfloat16), code=Code(4, 64), attend=attend_rows
        )
    large = mosaic_gpu.why_not(4, 64, jnp.bfloat16, jnp.uint32, 2**31, 2**31, Code(4, 64))
    assert "less than 2^31" in large


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, Code(4, 64)], ids=str)
def test_vmap_over_queries(code):
    arrays = paged(counts=(20, 33, 5, 0), C=32, dtype=jnp.bfloat16, code=code)
    q = jnp.stack([arrays[0], 2 * arrays[0]])
    got = jax.vmap(lambda q: divided(attended([q, *arrays[1:]], code=code)))(q)
    for one, x in zip(got, q, strict=True):
        np.testing.assert_allclose(one, divided(attended([x, *arrays[1:]], code=code)), rtol=1e-6)
