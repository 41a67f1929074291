"""How many residual rows a GPU has time to fetch: the search, its model of times, the recipe."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.quant import dec_dec_tuner
from jaxllm.quant.dec_dec_tuner import GPUS, tune


def tables(seed, modules=4, k_max=60):
    rng = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(modules)]
    sizes = {m: (1024 * int(rng.integers(1, 8)), 1024 * int(rng.integers(1, 8))) for m in names}
    base = {m: float(math.prod(sizes[m]) / 1e6) for m in names}
    times = {}
    for m in names:
        times[m] = {}
        for n in sorted(rng.choice(np.arange(1, 12), 4, replace=False).tolist()):
            knee, slope = rng.uniform(2, 30), rng.uniform(0.02, 0.3)
            rise = np.maximum(0, np.arange(k_max + 1) - knee) * slope + 0.01 * abs(n - 5)
            times[m][n] = (base[m] * (1 + rise)).tolist()
    return times, base, {m: math.prod(size) for m, size in sizes.items()}


def uniform_by_force(times, base, limit, included):
    rest = sum(t for m, t in base.items() if m not in included)
    best = 0
    for most in range(max(min(times[m]) for m in included), 12):
        n = {m: max(b for b in times[m] if b <= most) for m in included}
        fits = [rest + sum(times[m][n[m]][k] for m in included) <= limit for k in range(61)]
        best = max(best, next(k for k in itertools.count() if not fits[k]) - 1)
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", [0.0, 0.02, 0.1, 0.5])
def test_the_tuner_meets_its_target_and_no_single_step_more_would(seed, target):
    times, base, weights = tables(seed)
    got = tune(times, base, target, weights=weights)
    limit = sum(base.values()) * (1 + target) * (1 + dec_dec_tuner.ROUNDING)
    blocks = got.thread_blocks
    spent = {m: times[m][blocks[m]][got.k_chunk[m]] if blocks[m] else base[m] for m in times}
    assert sum(spent.values()) <= limit and got.time == pytest.approx(sum(spent.values()))
    by_size = sorted(times, key=lambda m: weights[m])
    included = [m for m in by_size if blocks[m]]
    assert included == by_size[len(by_size) - len(included) :]  # the smallest are left out
    for m in times:
        if m not in included:
            assert got.k_chunk[m] == 0
        else:
            more = times[m][blocks[m]][got.k_chunk[m] + 1] - spent[m]
            assert sum(spent.values()) + more > limit
    if included:
        assert got.uniform == uniform_by_force(times, base, limit, included) > 0
        assert all(got.k_chunk[m] >= got.uniform for m in included)
    for left in range(1, len(by_size) - len(included) + 1):  # what was tried before gave nothing
        assert uniform_by_force(times, base, limit, by_size[left - 1 :]) <= 0


def test_of_equal_modules_the_first_is_left_out():
    times, base = {m: {1: [1.0, 1.15, 9.0]} for m in "abc"}, dict.fromkeys("abc", 1.0)
    assert tune(times, base, 0.1, weights=dict.fromkeys("abc", 1024)).k_chunk == {"a": 0, "b": 1, "c": 1}


def test_a_target_out_of_reach_gives_zeros_and_a_short_table_is_an_error():
    weights = {"a": 1024 * 1024}
    got = tune({"a": {1: [1.5, 2.0]}}, {"a": 1.0}, 0.1, weights=weights)
    assert got.k_chunk == {"a": 0} and got.time == 1.0
    with pytest.raises(ValueError, match="tune: tables must go on until the slowdown is exceeded"):
        tune({"a": {1: [1.0, 1.0]}}, {"a": 1.0}, 0.1, weights=weights)
    with pytest.raises(ValueError, match="tune: tables must have the same modules"):
        tune({"a": {1: [1.0]}}, {"b": 1.0}, 0.1, weights=weights)


def test_candidates_for_thread_blocks_are_the_papers():
    assert dec_dec_tuner.thread_blocks(4096, 6144) == [1, 2, 3, 4, 5, 6, 8, 12, 24]
    assert dec_dec_tuner.thread_blocks(14336, 4096) == [*range(1, 15), 16]


def knee(bits, gpu):
    """The k_chunk up to which fetching hides behind reading the base: 1024 / R_bw * bits / 4."""
    memory, link = GPUS[gpu]
    return 1024 * link / memory * bits / 4


def test_the_model_hides_fetching_up_to_the_knee_of_each_gpu():
    sizes = {"qkv": (4096, 6144), "o": (4096, 4096), "gu": (4096, 28672), "d": (14336, 4096)}
    knees = {gpu: round(knee(3, gpu)) for gpu in GPUS}
    assert list(knees.values()) == [24, 33, 49, 48, 64]
    for gpu in GPUS:
        times = dec_dec_tuner.modelled_times(sizes, bits=3, gpu=gpu)
        base = {m: 1e-3 * math.prod(size) * 3 / 8 / GPUS[gpu][0] for m, size in sizes.items()}
        tables = {m: {1: table} for m, table in times.items()}
        got = tune(tables, base, 0.025, weights={m: math.prod(size) for m, size in sizes.items()})
        for m, k in got.k_chunk.items():
            flat = times[m][int(knee(3, gpu))]
            assert flat == pytest.approx(base[m]) and times[m][knees[gpu] + 1] > base[m]
            assert knee(3, gpu) - 1 <= k <= knee(3, gpu) * 1.15 + 1


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(TINY, width=1024, heads=8, kv_heads=2, head_dim=128, ffn=2048, layers=3)
    return Decoder(config, rngs=None)


KINDS = ["attention.k", "attention.o", "attention.q", "attention.v", "mlp.down", "mlp.gate", "mlp.up"]


def test_a_recipe_has_what_each_kind_of_linear_can_afford(model):
    method = jl.DecDec(base=jl.Rtn(bits=3), selector="exact")
    recipe = jl.tune_dec_dec(model, method, gpu="RTX 4050M", slowdown=0.025)
    assert sorted(pattern for pattern, _ in recipe) == [rf"\.{re.escape(kind)}$" for kind in KINDS]
    for _, tuned in recipe:
        assert dataclasses.replace(tuned, k_chunk=8) == method
        assert 63 <= tuned.k_chunk <= 75  # the knee, and a little
    more = jl.tune_dec_dec(model, method, gpu="192/16", slowdown=0.5)
    assert all(a.k_chunk < b.k_chunk for (_, a), (_, b) in zip(recipe, more, strict=True))
    wide = dataclasses.replace(method, residual_bits=8)
    (_, half), *_ = jl.tune_dec_dec(model, wide, gpu="RTX 4050M", slowdown=0.025)
    assert 31 <= half.k_chunk <= 38


def test_a_link_that_is_never_too_slow_fetches_all_and_one_that_always_is_leaves_the_base(model):
    method = jl.DecDec(base=jl.MixedTwoBit())
    everything = jl.tune_dec_dec(model, method, gpu="100/100", slowdown=2.0)
    assert {tuned.k_chunk for _, tuned in everything} == {1024}
    assert {tuned for _, tuned in jl.tune_dec_dec(model, method, gpu="1e6/1", slowdown=0.0)} == {method.base}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (jl.DecDec(base=jl.Rtn()), {"gpu": "H100"}, "gpu must be one of RTX 4090, .* as 1008/32, got 'H100'"),
        (jl.DecDec(base=jl.Rtn()), {"gpu": "1008/0"}, "got '1008/0'"),
        (jl.DecDec(base=jl.Rtn()), {"gpu": "RTX 4090", "slowdown": -0.1}, "slowdown must be at least 0"),
        (jl.DecDec(base=jl.NestedFp()), {"gpu": "RTX 4090"}, "must have a number of bits, got NestedFp"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_one_line(model, method, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        jl.tune_dec_dec(model, method, **options)
    assert "\n" not in str(caught.value)
