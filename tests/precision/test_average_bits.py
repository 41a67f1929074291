"""Decoding held to an average of bits: in the compiled loop, and step by step on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm as jl
from jaxllm.decoding.loop import decode_until
from jaxllm.models.taps import WidthTap
from jaxllm.precision import BitsObjective, DpLlm, Load, attach_precision, bits_read, set_target

TARGETS = (3.5, 4.25)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def chosen(planes_model, text):
    method = DpLlm(targets=TARGETS, estimator="linear", steps=0)
    return attach_precision(planes_model, method, text[:4], progress=False)


def run(model, prompts, tokens, bits):
    return jl.generate(model, None, prompts, max_new_tokens=tokens, stop_tokens=(), average_bits=bits)


def test_what_is_decoded_reads_an_average_between_the_targets_in_one_program(chosen):
    compiled = None
    for bits in (3.6, 3.9, 4.2):
        (out,) = run(chosen, [PROMPT], 48, bits)
        assert len(out.token_ids) == 48
        np.testing.assert_allclose(out.bits, bits, atol=2 * (TARGETS[1] - TARGETS[0]) / 47)
        compiled = compiled or decode_until._cache_size()
        assert decode_until._cache_size() == compiled


def test_the_loop_does_what_the_policy_does_on_the_host(chosen):
    (out,) = run(chosen, [PROMPT], 24, 3.9)

    @jax.jit
    def step(model, token, cache, index):
        aimed = set_target(model, index)
        read = WidthTap(aimed)
        _, cache = aimed(token, cache, logits="none", tap=read)
        return cache, read.mean()[0, 0]

    policy = BitsObjective(bits=3.9, targets=TARGETS[::-1])
    cache = dataclasses.replace(jl.prefill(chosen, [PROMPT]), is_first_chunk=False)
    cache = jl.cache.with_capacity(cache, 48)
    state, bits, levels = policy.start(), [], []
    for token in out.token_ids[:-1]:
        level, state = policy.choose(state, Load(tokens=1, bits=bits[-1] if bits else None))
        cache, found = step(chosen, jnp.full((1, 1), token), cache, jnp.int32(len(TARGETS) - 1 - level))
        bits.append(float(found))
        levels.append(level)
    assert step._cache_size() == 1
    np.testing.assert_allclose(np.mean(bits), out.bits, atol=1e-4)
    assert set(levels) == {0, 1}  # both targets were taken


@pytest.mark.slow
def test_each_request_counts_its_own_tokens(chosen):
    """One ends early; the others pay what all owe."""
    limits = [2, 40, 40]
    outs = jl.generate(
        chosen, None, [[3], PROMPT, [9, 9]], max_new_tokens=limits, stop_tokens=(), average_bits=3.9
    )
    assert [len(out.token_ids) for out in outs] == limits
    assert all(3 <= out.bits <= 5 for out in outs)
    fed = np.array([n - 1 for n in limits])
    steps = np.array([out.bits for out in outs])
    np.testing.assert_allclose((steps * fed)[1:].sum() / fed[1:].sum(), 3.9, atol=0.06)
    ((alone,), streamed) = run(chosen, [PROMPT], 6, 3.9), []
    streamed = [t.token_id for t in jl.stream(
        chosen, None, PROMPT, max_new_tokens=6, stop_tokens=(), average_bits=3.9
    )]  # fmt: skip
    assert streamed == alone.token_ids


def test_widths_that_are_noted_are_those_that_are_counted(chosen, text):
    rows = text[4:6]
    read = WidthTap(chosen)
    chosen(jnp.asarray(rows[:, :1]), tap=read)
    np.testing.assert_allclose(
        read.mean()[:, 0], bits_read(chosen, rows[:, :1].ravel(), context=1).by_token[:, 0], atol=1e-5
    )


def test_without_an_average_nothing_is_counted(chosen):
    (out,) = run(chosen, [PROMPT], 4, None)
    assert out.bits is None
    (out,) = run(chosen, [PROMPT], 1, 3.9)
    assert out.bits is None  # the first token comes of the prompt


def test_bad_averages_are_refused(chosen, planes_model):
    with pytest.raises(
        ValueError, match=r"average_bits must lie within the model's targets, 3.5 to 4.25, got 3"
    ):
        run(chosen, [PROMPT], 4, 3.0)
    with pytest.raises(ValueError, match="average_bits is of a model that chooses its widths"):
        run(planes_model, [PROMPT], 4, 3.5)
    with pytest.raises(ValueError, match="the model must have any-precision weights, got none"):
        WidthTap(chosen).mean()


def test_an_average_and_drafts_exclude_each_other(chosen):
    spec = jl.Speculation(draft=jl.LookupDraft())
    with pytest.raises(ValueError, match="speculation and average_bits exclude each other"):
        jl.generate(chosen, None, [PROMPT], max_new_tokens=4, average_bits=3.9, speculation=spec)
