"""Which planes are held, and static widths: exact, within the budget, monotone in it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxllm.precision.widths import averages_within, keep_planes, width_costs, widths_within
from tests.precision.conftest import nested


def random_case(seed: int):
    rng = np.random.default_rng(seed)
    names = [f"layers.{i}.w" for i in range(rng.integers(2, 6))]
    costs = {name: {b: float(rng.random() * 4.0**-b) for b in (3, 4, 5, 6)} for name in names}
    sizes = {name: int(rng.integers(1, 50)) for name in names}
    return costs, sizes


def brute_force(costs, sizes, bits):
    total = sum(sizes.values())
    best = np.inf
    for widths in itertools.product((3, 4, 5, 6), repeat=len(costs)):
        held = sum(b * sizes[name] for b, name in zip(widths, costs, strict=True))
        if held <= bits * total:
            best = min(best, sum(costs[name][b] for b, name in zip(widths, costs, strict=True)))
    return best


def cost_of(costs, widths):
    return sum(costs[name][b] for name, b in widths.items())


def test_no_other_widths_within_the_budget_cost_less():
    for seed in range(12):
        costs, sizes = random_case(seed)
        for bits in (3.0, 3.4, 4.2, 5.0, 5.9):
            widths = widths_within(costs, sizes, bits)
            held = sum(b * sizes[name] for name, b in widths.items())
            assert held <= bits * sum(sizes.values()) * (1 + 1e-9)
            np.testing.assert_allclose(cost_of(costs, widths), brute_force(costs, sizes, bits), rtol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_averages_between_widths_are_the_optimum_of_the_relaxed_programme(seed):
    """Against a linear programme over shares of each linear's widths; whole widths are never cheaper."""
    costs, sizes = random_case(seed)
    total, names = sum(sizes.values()), list(costs)
    for bits in (3.0, 3.3, 4.0, 5.21, 6.0):
        found = averages_within(costs, sizes, bits)
        assert sum(found[name] * sizes[name] for name in names) / total == pytest.approx(bits, abs=1e-9)
        cost = [[costs[name][b] for b in (3, 4, 5, 6)] for name in names]
        held = [[b * sizes[name] / total for b in (3, 4, 5, 6)] for name in names]
        one_each = np.kron(np.eye(len(names)), np.ones(4))
        best = linprog(
            np.ravel(cost), A_eq=np.vstack([one_each, np.ravel(held)]), b_eq=[*np.ones(len(names)), bits]
        )
        hull = [lower_hull(several) for several in costs.values()]
        own = sum(
            np.interp(found[name], *zip(*points, strict=True))
            for name, points in zip(names, hull, strict=True)
        )
        assert own == pytest.approx(best.fun, rel=1e-7, abs=1e-12)
    with pytest.raises(ValueError, match="precision: bits must be 3 to 6"):
        averages_within(costs, sizes, 6.1)


def lower_hull(several):
    """Points of a linear's widths and costs that no line between two others lies below."""
    return [
        (b, cost)
        for b, cost in several.items()
        if not any(
            several[low] + (several[high] - several[low]) * (b - low) / (high - low) < cost - 1e-15
            for low in several
            for high in several
            if low < b < high
        )
    ]


def test_a_larger_budget_never_costs_more():
    costs, sizes = random_case(99)
    found = [cost_of(costs, widths_within(costs, sizes, bits)) for bits in np.linspace(3, 6, 13)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found))


def test_a_budget_below_the_narrowest_widths_is_one_line():
    with pytest.raises(ValueError, match=r"^precision: bits must be at least 3, .* got 2\.5$"):
        widths_within(*random_case(0), 2.5)


def test_planes_above_those_held_change_nothing():
    """They can be filled with anything, for they are not there."""
    w = nested(np.random.default_rng(0).normal(size=(8, 40)))
    small = keep_planes(w, 4)
    garbage = w.planes.at[4:].set(jnp.uint32(0xDEADBEEF))
    assert small.planes.shape[0] == 4 and len(small.tables) == 2
    for b in (3, 4):
        np.testing.assert_array_equal(small.at(b).dequantize_rows(), w.at(b).dequantize_rows())
        spoilt = type(w)(garbage, w.tables, b, 3, 6, w.shape, w.dtype)
        np.testing.assert_array_equal(small.at(b).dequantize_rows(), spoilt.dequantize_rows())


def test_a_width_costs_what_its_error_costs_by_the_loss(planes_model, text):
    """Costs fall with the width, and are the sums that they are said to be."""
    from jaxllm.models.linears import linear_weights
    from jaxllm.quant.calibrate import calibrate

    weights = {name: w for name, w in linear_weights(planes_model).items() if "." in name}
    stats = calibrate(planes_model, text, want={"fisher", "gradient"}, progress=False)
    costs = width_costs(planes_model, weights, stats, progress=False)
    trace = width_costs(planes_model, weights, stats, by="trace", progress=False)
    first = width_costs(planes_model, weights, stats, by="gradient", progress=False)
    assert list(costs) == list(weights)
    for name, w in weights.items():
        assert list(costs[name]) == [3, 4, 5, 6] and costs[name][6] == 0
        assert costs[name][3] > costs[name][4] > costs[name][5] > 0
        change = np.asarray(w.dequantize_rows() - w.at(4).dequantize_rows(), np.float64)
        felt, pull = (
            np.asarray(x, np.float64) / stats[name].tokens for x in (stats[name].fisher, stats[name].gradient)
        )
        np.testing.assert_allclose(costs[name][4], (felt * change**2).sum(), rtol=1e-4)
        np.testing.assert_allclose(trace[name][4], felt.mean() * (change**2).sum(), rtol=1e-4)
        signed = pull * change  # signs cancel
        np.testing.assert_allclose(first[name][4], abs(signed.sum()), atol=1e-5 * np.abs(signed).sum())
