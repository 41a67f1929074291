"""Timing and tuning, on a product small enough for a CPU, and what becomes of a tile that fails."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import measure, tiles
from pallas_kernels.case import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    n: int


@tiles.measured("toy")
def default_tile(M, K):
    return Tile(n=2)


def product(x, w, *, tile=None, interpret=False):
    tile = default_tile(*x.shape) if tile is None else tile
    if tile.n > 2:
        raise ValueError("the tile must fit\nand does not")
    return x @ w


SHAPES = ((2, 8), (8, 4))
TOY = Case(
    name="toy_gemm, 2 rows",
    run=product,
    reference=jnp.matmul,
    arrays=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES),
    num_bytes=measure.DISTINCT // 3,  # so that four of it are more than a cache holds
    operations=128,
    units=32,
    units_per_turn=1.0,
)


def test_a_case_is_timed_beside_its_meaning_and_a_dense_product():
    times = measure.measure(dataclasses.replace(TOY, num_bytes=measure.DISTINCT), rounds=2)
    assert list(times) == ["kernel", "xla", "bfloat16"]
    assert all(len(found) == 2 and min(found) > 0 for found in times.values())


def test_operands_in_rotation_are_all_different_and_enough_to_leave_a_cache():
    many = measure.rotation(TOY)
    assert len(many) * TOY.num_bytes >= measure.DISTINCT
    assert len({float(x[0, 0]) for x, _ in many}) == len(many)


def test_the_tuner_stores_the_fastest_tile_and_tells_of_those_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(measure, "require_gpu", lambda who: "cpu")
    monkeypatch.setattr(measure, "DISTINCT", TOY.num_bytes)
    tiles._table.cache_clear()
    found = measure.tune(TOY, rounds=1)
    assert found["tile"]["n"] in (1, 2) and found["seconds"] > 0
    assert found["failed"] == [{"tile": {"n": 4}, "error": "the tile must fit"}]
    assert default_tile(2, 8) == Tile(**found["tile"])
    tiles._table.cache_clear()


def test_a_case_without_a_tile_is_not_tuned(monkeypatch):
    monkeypatch.setattr(measure, "require_gpu", lambda who: "cpu")
    assert measure.tune(dataclasses.replace(TOY, run=jnp.matmul), rounds=1) is None


def test_where_no_tile_runs_the_tuner_says_so(monkeypatch):
    monkeypatch.setattr(measure, "require_gpu", lambda who: "cpu")

    def never(x, w):
        default_tile(*x.shape)
        if tiles._tried:  # not while it is asked which tile it takes
            raise ValueError("this GPU has no room")
        return x @ w

    with pytest.raises(RuntimeError, match="tune: some tile must run for toy_gemm"):
        measure.tune(dataclasses.replace(TOY, run=never), rounds=1)
