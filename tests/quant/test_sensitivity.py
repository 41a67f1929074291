"""Bits by layer: the table against its definition, the choice against every choice there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.measure.report import linear_bits
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights
from jaxllm.quant.calibrate import calibrate
from jaxllm.quant.sensitivity import COSTS, Choice, allocate_bits, sensitivity

ROWS = [list(range(3, 46)), [5, 9, 2, 7], [8] * 16, [30, 60, 90, 120, 3, 3]]
METHODS = [jl.Rtn(bits=bits, group_size=16) for bits in (2, 3, 5)]


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def stats(model):
    return calibrate(model, ROWS, want=frozenset(COSTS), progress=False)


@pytest.fixture(scope="module")
def table(model):
    return sensitivity(model, METHODS, ROWS, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("by", COSTS)
def test_a_cost_is_the_error_weighed_by_the_curvature(model, stats, by):
    name = "layers.1.mlp.down"
    w, known = linear_weights(model)[name], stats[name]
    table = sensitivity(model, METHODS[:1], stats, by=by, layers=name, progress=False)
    made = METHODS[0].quantize(w.rows, known, name=name, dtype=jnp.float32)
    d = np.asarray(made.dequantize_rows(jnp.float32) - w.rows, np.float64)
    if by in ("hessian", "guided_hessian"):
        H = np.asarray(known.hessian if by == "hessian" else known.guided_hessian[0], np.float64)
        want = np.einsum("nk,kl,nl->", d, H, d)
    else:
        want = (np.asarray(getattr(known, by), np.float64) * d**2).sum()
    (only,) = table[name]
    assert only.cost == pytest.approx(want / known.tokens, rel=1e-4)


def test_the_choice_is_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    for _ in range(8):
        table = {
            f"layers.{i}.mlp.up": [
                Choice(
                    METHODS[j], int(rng.integers(100, 900)), 100, float(rng.random()) * 10.0 ** -(6 * i % 5)
                )
                for j in range(3)
            ]
            for i in range(5)
        }
        for bits in (4.0, 5.5, 7.0):
            every = [
                (sum(c.cost for c in some), sum(c.num_bits for c in some))
                for some in itertools.product(*table.values())
            ]
            within = [cost for cost, stored in every if stored <= bits * 500]
            if not within:
                with pytest.raises(ValueError, match="allocate_bits: bits must be at least"):
                    allocate_bits(table, bits=bits)
                continue
            recipe = allocate_bits(table, bits=bits)
            taken = [
                next(c for c in several if c.method is method)
                for several, (_, method) in zip(table.values(), recipe, strict=True)
            ]
            assert sum(c.num_bits for c in taken) <= bits * 500
            assert sum(c.cost for c in taken) <= min(within) * (1 + 1e-6) + 1e-9


def test_the_recipe_keeps_the_budget_and_more_bits_cost_less(model, table):
    assert table.keys() == {name for name in linear_weights(model) if "." in name}
    costs = []
    for bits in (3.2, 3.9, 5.0, 6.5):
        recipe = allocate_bits(table, bits=bits)
        small = jl.quantize(model, recipe, progress=False)
        assert linear_bits(small) <= bits
        cost = {(f"^{name}$".replace(".", r"\."), c.method): c.cost for name, cs in table.items() for c in cs}
        costs.append(sum(cost[rule] for rule in recipe))
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": []}, "methods must not be empty"),
        ({"methods": [jl.MixedTwoBit()]}, "MixedTwoBit divides its bits itself"),
        ({"methods": METHODS, "layers": "nothing"}, "layers must match a linear, got 'nothing'"),
    ],
)
def test_what_makes_no_table_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(model, sequences=ROWS, progress=False, **options)


def test_a_budget_too_small_is_refused(table):
    with pytest.raises(ValueError, match=r"bits must be at least 3\.\d+, what the smallest choices need"):
        allocate_bits(table, bits=1.0)
