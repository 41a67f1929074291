"""Tiles that were measured go before a kernel's default, and a broken file counts as none."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from pallas_kernels import measure, tiles
from pallas_kernels.cases import all_cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    n: int
    k: int
    fast: bool = True


DEFAULT = Tile(n=1, k=2)


@tiles.measured("product")
def default_tile(M, K, dtype, capability=(9, 0)):
    return DEFAULT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "user_cache_path", lambda name: tmp_path / name)
    tiles._table.cache_clear()
    yield tmp_path
    tiles._table.cache_clear()


def product(x, tile=None):
    tile = default_tile(len(x), x.shape[1], x.dtype) if tile is None else tile
    return x * tile.n


def test_a_stored_tile_is_found_for_its_sizes_alone(cache):
    assert default_tile(5, 64, jnp.float32) == DEFAULT
    asked = tiles.asked_by(product, jnp.ones((8, 64)))
    assert asked == tiles.Asked("product", "K=64 M=8 dtype=float32", DEFAULT)
    tiles.store("cpu", asked, Tile(n=32, k=16))
    assert default_tile(5, 64, jnp.float32) == Tile(n=32, k=16)  # 5 rows are up to 8
    assert default_tile(9, 64, jnp.float32) == default_tile(5, 64, jnp.float16) == DEFAULT


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"product": 3}', '{"product": {"K=64 M=8 dtype=float32": {"a": 1}}}']
)
def test_a_broken_file_counts_as_none(cache, text):
    path = tiles.user_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert default_tile(8, 64, jnp.float32) == DEFAULT


def test_the_tuner_tries_a_tile_in_place_of_all_others():
    with tiles.trying("product", Tile(n=3, k=4)):
        assert default_tile(5, 64, jnp.float32) == Tile(n=3, k=4)
    assert default_tile(5, 64, jnp.float32) == DEFAULT
    run = measure.without_tile(functools.partial(product, tile=Tile(n=7, k=7)))
    with tiles.trying("product", Tile(n=3, k=4)):
        assert run(jnp.ones((8, 64)))[0, 0] == 3


def test_variations_change_one_number_at_a_time():
    found = tiles.variations(Tile(n=1, k=4))
    assert found == [Tile(n=1, k=4), Tile(n=2, k=4), Tile(n=1, k=2), Tile(n=1, k=8)]


def test_every_case_asks_for_a_tile():
    for name in ("codebook_gemm", "attend_rows", "mixed_two_bit_gemm"):
        case = next(case for text, case in all_cases().items() if text.startswith(name) and "triton" in text)
        asked = tiles.asked_by(measure.without_tile(case.run), *case.arrays)
        assert asked is not None and asked.kernel.endswith("triton"), name


def test_products_stand_beside_a_dense_one_of_their_sizes():
    cases = all_cases()
    product = cases["dequant_gemm, llama-3-8b up, 256 rows, triton"]
    assert measure.product_sizes(product) == (256, 4096, 14336)
    assert measure.product_sizes(cases["farthest_point_sampling 8 x 4k triton"]) is None


def test_files_are_named_for_the_kind_of_gpu():
    assert tiles.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_timing_without_a_gpu_is_refused():
    with pytest.raises(NotImplementedError, match="tune: needs an NVIDIA GPU and jax with CUDA, got cpu"):
        measure.require_gpu("tune")
