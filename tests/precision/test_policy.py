"""Who says at how much precision a step runs: rules, objectives, and what they do to a trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.precision import (
    Always,
    BitsObjective,
    LatencyObjective,
    Load,
    Request,
    TokenThreshold,
    fp8_costs,
    replay,
    with_levels,
)
from jaxllm.precision.nested import levels
from jaxllm.precision.policy import Held
from jaxllm.weights.dense import Dense
from jaxllm.weights.nested_float import with_mode


def cost(level: int, load: Load) -> float:
    """A millisecond, and 10 or 6 microseconds a token."""
    return 1e-3 + (10e-6, 6e-6)[level] * load.tokens


def objective(**more) -> LatencyObjective:
    return LatencyObjective(**{"step": 0.011, "first": 1.0, "cost": cost} | more)


def run(policy, loads, slow: float = 1.0) -> list[int]:
    """The levels of steps whose loads are given, each taking `slow` times what it is said to."""
    state, found = policy.start(), []
    for load in loads:
        level, state = policy.choose(state, load)
        state = policy.observe(state, load, level, slow * cost(level, load))
        found.append(level)
    return found


def test_the_papers_rule_looks_at_the_tokens_of_the_step():
    loads = [Load(tokens=n) for n in (1, 1024, 1025, 5000, 1024)]
    assert run(TokenThreshold(), loads) == [0, 0, 1, 1, 0]
    assert run(Always(1), loads) == [1] * 5


def test_an_objective_is_kept_at_once_and_left_after_a_while():
    calm, busy = Load(tokens=800), Load(tokens=1200)
    found = run(objective(hold=3), [calm, busy, calm, calm, calm, calm, calm])
    assert found == [0, 1, 1, 1, 1, 0, 0]


def test_between_margin_and_objective_nothing_changes():
    """Hysteresis: what would just do is no reason to go back."""
    nearly = Load(tokens=950)  # 10.5 ms in level 0: within 11, not within 9.9
    assert run(objective(hold=0), [nearly] * 4) == [0] * 4
    assert run(objective(hold=0), [Load(tokens=1200), *[nearly] * 4]) == [1] * 5


def test_what_is_measured_corrects_what_is_expected():
    loads = [Load(tokens=800)] * 60  # 9 ms if costs were right, 13.5 as it is
    found = run(objective(hold=10**6), loads, slow=1.5)
    assert found[0] == 0 and found[-1] == 1


def test_a_queue_that_would_be_late_is_hurried():
    patient = Load(tokens=800, queued=8000, waited=0.0)
    assert run(objective(), [patient]) == [0]
    assert run(objective(first=0.05), [patient]) == [1]
    assert run(objective(), [dataclasses.replace(patient, waited=0.95)]) == [1]


@pytest.mark.parametrize("bits", [3.4, 3.6, 4.1, 4.7])
def test_bits_that_drift_are_paid_back(bits):
    policy = BitsObjective(bits=bits, targets=(4.75, 4.25, 3.75, 3.25))
    rng, state, read = np.random.default_rng(0), policy.start(), []
    for _ in range(2000):
        load = Load(tokens=1, bits=read[-1] if read else None)
        level, state = policy.choose(state, load)
        read.append(policy.targets[level] + 0.09 + rng.normal(0, 0.1))  # as far off as the official code's
    np.testing.assert_allclose(np.mean(read), bits, atol=0.01)
    assert abs(state.owed) < 2


REQUESTS = [Request(0.0, 300, 4), Request(0.0, 100, 1), Request(0.5, 50, 3)]


def test_a_trace_is_replayed_step_by_step():
    """By hand: 256 tokens a step; the third comes when the engine has been idle."""
    found = replay(REQUESTS, Always(0), cost, tokens=256, batch=2)
    full, rest = 1e-3 + 256 * 10e-6, 1e-3 + (44 + 100) * 10e-6
    single = 1e-3 + 10e-6
    np.testing.assert_allclose(found.first, [full + rest, full + rest, 1e-3 + 50 * 10e-6], rtol=1e-9)
    np.testing.assert_allclose(found.between, [single, 0, single], rtol=1e-9)
    assert found.levels.tolist() == [8, 0] and found.tokens.tolist() == [300 + 3 + 100 + 50 + 2, 0]
    assert found.within(first=0.1, step=1.0) == 1.0 and found.within(first=1e-6, step=1.0) == 0.0


def test_every_token_goes_through_once_whatever_the_policy():
    rng = np.random.default_rng(1)
    arrivals = np.sort(rng.random(200) * 2)
    requests = [Request(float(t), int(rng.integers(1, 900)), int(rng.integers(1, 60))) for t in arrivals]
    total = sum(r.prompt + r.new - 1 for r in requests)
    ends = []
    for policy in (Always(0), Always(1), TokenThreshold(500), objective()):
        found = replay(requests, policy, cost, tokens=1024, batch=32)
        assert found.tokens.sum() == total and (found.first > 0).all()
        ends.append(found.seconds)
    assert ends[1] <= min(ends) and ends[0] >= max(ends) - 1e-9


def test_an_objective_keeps_more_requests_within_it_than_full_precision_and_more_precision_than_none():
    rng = np.random.default_rng(2)
    bursts = np.sort(np.concatenate([rng.random(80) * 20, 8 + rng.random(150)]))
    requests = [Request(float(t), 600, 40) for t in bursts]
    limits = {"first": 0.5, "step": 0.011}
    found = {
        name: replay(requests, policy, cost, tokens=1024, batch=128)
        for name, policy in {"fp16": Always(0), "fp8": Always(1), "ours": objective(first=0.5)}.items()
    }
    kept = {name: one.within(**limits) for name, one in found.items()}
    assert kept["fp16"] < kept["ours"] <= kept["fp8"]
    assert found["ours"].levels[0] > found["ours"].levels[1]  # most steps are calm


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: objective(step=1e-3),
            r"LatencyObjective: some level must keep step=0\.001 s",
        ),
        (lambda: objective(margin=0.0), r"LatencyObjective: margin and smoothing must lie in \(0, 1\]"),
        (
            lambda: BitsObjective(bits=5.0, targets=(4.0, 3.0)),
            r"BitsObjective: bits must lie within 3 to 4, got",
        ),
        (lambda: BitsObjective(bits=3.5, targets=(3.0, 4.0)), r"BitsObjective: targets must descend"),
        (lambda: BitsObjective(bits=3.5, targets=(4.0, 3.0), gain=0.0), r"BitsObjective: gain must lie"),
        (lambda: replay([], Always(0), cost), r"replay: requests must be in the order of arrival"),
        (
            lambda: replay([Request(0.0, 0, 1)], Always(0), cost),
            r"replay: prompts and outputs must have a token",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# NestedFP layer by layer


@pytest.fixture(scope="module")
def nested():
    """Of one linear an output is an exception: one weight is too large, another forbids a shift."""
    model, name = Decoder(TINY, rngs=nnx.Rngs(0)), "layers.1.mlp.up"
    rows = linear_weights(model)[name].rows.at[3, 5].set(3.0).at[0, 0].set(2.0**-24)
    return jl.quantize(replace_weights(model, {name: Dense(rows)}), jl.NestedFp(), progress=False)


def test_the_most_tolerant_layers_read_eight_bits_first_in_one_program(nested, text):
    costs = fp8_costs(nested, text, progress=False)
    assert len(costs) == levels(nested) == 14 and min(costs.values()) > 0
    tokens = jnp.asarray(text[:2])

    @jax.jit
    def at(level):
        return with_levels(nested, costs, level)(tokens)[0]

    np.testing.assert_allclose(at(jnp.int32(0)), with_mode(nested, "fp16")(tokens)[0], atol=1e-5)
    np.testing.assert_allclose(at(jnp.int32(14)), with_mode(nested, "fp8")(tokens)[0], atol=1e-5)
    assert at._cache_size() == 1
    three = linear_weights(with_levels(nested, costs, jnp.int32(3)))
    on = {name for name, w in three.items() if getattr(w, "switch", None) is not None and int(w.switch)}
    assert on == set(sorted(costs, key=costs.get)[:3])


def test_costs_are_those_of_what_the_upper_byte_says(nested, text):
    stats = jl.calibrate(nested, text, want={"fisher"}, progress=False)
    costs = fp8_costs(nested, stats, progress=False)
    name = "layers.1.mlp.up"
    w = linear_weights(nested)[name]
    assert len(w.exceptions) == 1 and w.exception_of_output[3] == 0
    upper = np.asarray(jax.lax.bitcast_convert_type(w.upper, jnp.float8_e4m3fn)).astype(np.float64) / 256
    error = (upper * 2.0**w.shift - np.asarray(w.dequantize_rows(), np.float64)) ** 2
    assert error[3, 5] == 9.0  # against the zero that stands for it, which no mode reads
    error[3] = 0.0
    want = (np.asarray(stats[name].fisher, np.float64) * error).sum() / stats[name].tokens
    np.testing.assert_allclose(costs[name], want, rtol=1e-4)


def test_levels_of_another_model_are_refused_in_one_line(nested, planes_model, text):
    with pytest.raises(
        ValueError, match=r"^precision: the model must have weights stored by NestedFp, got none$"
    ):
        fp8_costs(planes_model, text, progress=False)
    with pytest.raises(
        ValueError, match=r"^with_levels: costs must be of the model's NestedFp linears, got 'x'$"
    ):
        with_levels(nested, {"x": 1.0}, jnp.int32(0))
    with pytest.raises(ValueError, match=r"^with_levels: level must be an int32 scalar, got "):
        with_levels(nested, {}, jnp.zeros(2, jnp.int32))


def test_the_state_says_what_it_remembers():
    assert objective().start() == Held(level=0, calm=0, drift=(1.0, 1.0))
