"""How many bits each linear reads on average: the target holds at every step, gradients are right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.precision.averages import AVERAGES, Bounds, fit_averages, loss_by_target, projected_adam
from jaxllm.precision.dp_llm import DpLlm
from jaxllm.precision.widths import keep_planes
from jaxllm.quant.text import Text
from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import matmul
from jaxllm.weights.planes.dense_widths import BlendedWidths, all_widths
from tests.precision.conftest import nested


def bounds_of(L: int = 5, targets=(3.5, 4.5), seed: int = 0) -> Bounds:
    rng = np.random.default_rng(seed)
    share = rng.random(L) + 0.1
    return Bounds(
        share=jnp.asarray(share / share.sum(), jnp.float32),
        least=jnp.full((L,), 3.0),
        most=jnp.asarray(rng.integers(5, 7, L), jnp.float32),
        target=jnp.asarray(targets, jnp.float32),
    )


def cheapest(bounds: Bounds, s: int, cost):
    """The averages of least cost that hold target s, by another solver."""
    share, target = np.asarray(bounds.share, np.float64), float(bounds.target[s])
    return minimize(
        cost,
        np.full(len(share), target),
        bounds=[(3.0, float(m)) for m in bounds.most],
        constraints={"type": "eq", "fun": lambda x: share @ x - target},
        options={"ftol": 1e-14, "maxiter": 500},
    )


def test_the_nearest_averages_keep_target_and_bounds_and_none_that_do_are_nearer():
    bounds = bounds_of()
    p = jnp.asarray(np.random.default_rng(1).normal(4.5, 2.0, (5, 2)), jnp.float32)
    found = bounds.nearest(p)
    np.testing.assert_allclose(bounds.share @ found, bounds.target, atol=2e-6)
    assert (found >= 3).all() and (found <= bounds.most[:, None]).all()
    share = np.asarray(bounds.share, np.float64)
    for s in range(2):
        # in the metric of the shares a shift is along the constraint's normal
        q = np.asarray(p[:, s], np.float64)
        best = cheapest(bounds, s, lambda x, q=q: (share * (x - q) ** 2).sum())
        np.testing.assert_allclose(found[:, s], best.x, atol=2e-3)


def test_averages_that_hold_stay_as_they_are():
    bounds = bounds_of()
    p = bounds.nearest(jnp.full((5, 2), 4.0))
    np.testing.assert_allclose(bounds.nearest(p), p, atol=2e-6)


def test_projected_adam_finds_the_cheapest_averages_and_leaves_the_target_at_no_step():
    """A convex loss a_i exp(-p_i): its optimum by another solver."""
    bounds = bounds_of(6)
    scale = jnp.asarray(np.random.default_rng(2).random(6) * 3 + 0.1, jnp.float32)
    names = [f"l{i}" for i in range(6)]
    adam = projected_adam(bounds, names, learning_rate=optax.linear_schedule(0.1, 0.0, 400))
    start = bounds.nearest(jnp.full((6, 2), 4.0))
    params = {f"{AVERAGES}['{name}']": start[i] for i, name in enumerate(names)}

    def loss(params):
        return sum((scale[i] * jnp.exp(-p)).sum() for i, p in enumerate(params.values()))

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the trainer does
            updates, state = adam.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, bounds.share @ jnp.stack(list(params.values()))

    state = adam.init(params)
    for _ in range(400):
        params, state, total = step(params, state)
        np.testing.assert_allclose(total, bounds.target, atol=1e-5)
    for s in range(2):
        found = np.array([float(p[s]) for p in params.values()])
        best = cheapest(bounds, s, lambda x: float((np.asarray(scale) * np.exp(-x)).sum()))
        value = float((np.asarray(scale) * np.exp(-found)).sum())
        assert value <= best.fun * (1 + 1e-3)


def test_a_blend_is_continuous_and_at_whole_averages_that_width_alone():
    w = nested(np.random.default_rng(3).normal(size=(16, 32)))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 32)), jnp.float32)
    rows = all_widths(w)
    for i in range(4):
        y = matmul(x, BlendedWidths(rows, jnp.float32(i)))
        np.testing.assert_array_equal(y, matmul(x, Dense(w.at(3 + i).dequantize_rows())))
        for near in (i - 1e-4, i + 1e-4):
            if 0 <= near <= 3:
                np.testing.assert_allclose(matmul(x, BlendedWidths(rows, jnp.float32(near))), y, atol=1e-3)
    half = (matmul(x, w.at(4)) + matmul(x, w.at(5))) / 2
    np.testing.assert_allclose(matmul(x, BlendedWidths(rows, jnp.float32(1.5))), half, atol=1e-5)


def test_the_gradient_of_the_loss_is_that_of_central_differences(planes_model, text):
    weights = {name: w for name, w in linear_weights(planes_model).items() if "." in name}
    blended = {name: BlendedWidths(all_widths(w), jnp.float32(0)) for name, w in weights.items()}
    model = replace_weights(planes_model, blended)
    averages = {name: jnp.array([0.3, 1.6]) for name in weights}
    batch = {"tokens": jnp.asarray(text[:4]), "part": jnp.ones((4, text.shape[1]), jnp.int32)}

    @jax.jit
    def loss(averages):
        return loss_by_target({"averages": averages, "model": model}, batch)

    found = jax.grad(loss)(averages)
    for name in ("layers.0.mlp.down", "layers.1.attention.q"):
        for s in range(2):
            up, down = (
                averages | {name: averages[name].at[s].add(step)} for step in (jnp.float32(0.05), -0.05)
            )
            np.testing.assert_allclose(found[name][s], (loss(up) - loss(down)) / 0.1, rtol=0.05, atol=2e-5)


def test_fitting_lowers_the_loss_keeps_the_target_and_changes_no_weight(planes_model, text):
    weights = {name: w for name, w in linear_weights(planes_model).items() if "." in name}
    sizes = np.array([np.prod(w.shape) for w in weights.values()])
    L = len(weights)
    bounds = Bounds(
        share=jnp.asarray(sizes / sizes.sum(), jnp.float32),
        least=jnp.full((L,), 3.0),
        most=jnp.full((L,), 6.0),
        target=jnp.array([3.5, 4.25]),
    )
    read = Text.from_sequences(planes_model, text, 8)
    how = {"learning_rate": 0.1, "progress": False}
    low = np.full((L, 2), 3.0, np.float32)
    start = fit_averages(planes_model, weights, read, bounds, low, steps=0, **how)
    found = fit_averages(planes_model, weights, read, bounds, low, steps=12, **how)
    for name in weights:
        np.testing.assert_allclose(start[name], [3.5, 4.25], atol=1e-5)
    total = sum(share * found[name] for share, name in zip(sizes / sizes.sum(), weights, strict=True))
    np.testing.assert_allclose(total, [3.5, 4.25], atol=1e-5)
    blended = {name: BlendedWidths(all_widths(w), jnp.float32(0)) for name, w in weights.items()}
    model = replace_weights(planes_model, blended)
    batch = {"tokens": jnp.asarray(text), "part": jnp.ones(text.shape, jnp.int32)}

    def loss(averages):
        shifted = {name: jnp.asarray(p, jnp.float32) - 3 for name, p in averages.items()}
        return float(loss_by_target({"averages": shifted, "model": model}, batch))

    assert loss(found) < loss(start)


def test_a_target_outside_the_bounds_is_the_nearest_that_they_allow():
    bounds = bounds_of(targets=(9.0,))
    np.testing.assert_allclose(bounds.nearest(jnp.full((5, 1), 4.0))[:, 0], bounds.most, atol=1e-5)


@pytest.mark.parametrize("at", [3.0, 6.0])
def test_who_cannot_move_against_the_gradient_is_not_asked_to(at):
    bounds = Bounds(
        share=jnp.full((3,), 1 / 3),
        least=jnp.full((3,), 3.0),
        most=jnp.full((3,), 6.0),
        target=jnp.array([4.0]),
    )
    p = jnp.array([[at], [4.0], [4.0]])
    g = jnp.array([[100.0 if at == 3 else -100.0], [-1.0], [-2.0]])
    found = bounds.along(g, p)
    assert found[0, 0] == 0 and found[1, 0] > 0 > found[2, 0]


def test_averages_start_where_costs_say_or_alike_and_keep_the_target_beside_a_narrow_layer(
    planes_model, text
):
    held = {name: w for name, w in linear_weights(planes_model).items() if "." in name}
    narrow = next(iter(held))
    held[narrow] = keep_planes(held[narrow], 3)
    sizes = {name: math.prod(w.shape) for name, w in held.items()}
    rng, total = np.random.default_rng(0), sum(sizes.values())
    costs = {name: {b: float(rng.random() * 4.0**-b) for b in range(3, 7)} for name in held}
    found = {}
    for start in ("costs", "target"):
        method = DpLlm(targets=(3.5, 4.25), memory_bits=6.0, start=start, steps=0)
        read = Text.from_sequences(planes_model, text, 8)
        found[start] = method.averages(planes_model, held, costs, sizes, read, progress=False)
        assert narrow not in found[start]
        held_bits = sum(sizes[name] * found[start].get(name, np.float32(3.0)) for name in sizes) / total
        np.testing.assert_allclose(held_bits, [3.5, 4.25], atol=1e-5)
    assert len({tuple(p) for p in found["target"].values()}) == 1
    whole = np.array([np.isclose(p, p.round(), atol=1e-4) for p in found["costs"].values()])
    assert (~whole).sum(axis=0).max() <= 1  # all but one linear are at a width
