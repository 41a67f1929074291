"""Which drafts stand, and what follows, have the model's law: by enumeration through the rules themselves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.decoding import loop
from jaxllm.decoding.acceptance import chance_of_beginning, joint_after, residual, stands
from jaxllm.decoding.drafts import ModelDraft
from jaxllm.decoding.sampling import draw, request_keys
from jaxllm.models.decoder import TINY, Decoder


def laws(rng, count: int, total: int = 24) -> np.ndarray:
    """Laws over five tokens, whole parts of `total`, none of which has more than 12; some have none."""
    found = []
    while len(found) < count:
        parts = rng.multinomial(total, rng.dirichlet(np.full(5, 0.7)))
        if parts.max() <= 12:
            found.append(parts / total)
    return np.array(found)


@pytest.mark.parametrize("has_law", [True, False])
def test_a_draft_that_stands_or_what_replaces_it_has_the_targets_law(has_law):
    """All drafts and all chances: u in steps of 1 / 27720, in which every ratio of parts is whole."""
    rng, steps = np.random.default_rng(0), 27720  # divided by 1 .. 12
    with jax.enable_x64(True):
        u = (jnp.arange(steps, dtype=float) + 0.5) / steps
        for p, q in zip(laws(rng, 12), laws(rng, 12), strict=True):
            law, rejected = np.zeros(5), np.zeros(5)
            for x in range(5):
                given = (jnp.array([p]), jnp.array([q]) if has_law else None, jnp.array([x]))
                many = [None if g is None else jnp.repeat(g, steps, axis=0) for g in given]
                kept = float(np.asarray(stands(*many, u)).mean())
                drafted = q[x] if has_law else float(x == 1)  # without a law: token 1 is named
                law[x] += drafted * kept
                rejected += drafted * (1 - kept) * np.asarray(residual(*given))[0]
            assert np.abs(law + rejected - p).sum() / 2 < 1e-12
            if has_law:
                assert law.sum() == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)  # no rule keeps more


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("has_law", [True, False])
def test_a_block_of_drafts_that_stands_and_what_follows_has_the_targets_law(has_law, ends):
    """All texts of four tokens out of three, by laws that depend on all before.

    ends: blocks end early behind some beginnings, as drafts do that doubt themselves.
    """
    V, G = 3, 3
    with jax.enable_x64(True):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            texts = [text for i in range(G + 1) for text in np.ndindex(*[V] * i)]
            p, q = ({text: rng.dirichlet(np.full(V, 0.6)) for text in texts} for _ in range(2))
            if not has_law:
                q = {text: np.eye(V)[rng.integers(V)] for text in texts}  # a token is named
            last = {text: len(text) == G or (ends and rng.random() < 0.3) for text in texts}
            found, kept, alone = np.zeros([V] * (G + 1)), 0.0, 0.0
            for block in texts:
                drawn = math.prod(q[block[:i]][block[i]] for i in range(len(block)))
                if not last[block] or any(last[block[:i]] for i in range(len(block))) or not drawn:
                    continue
                joint, joints, chances = jnp.ones(1), [], []
                for i in range(len(block) + 1):
                    at = block[:i]
                    if i == len(block):
                        chances.append(float(joint[0]))
                    else:
                        law = jnp.asarray(q[at])[None] if has_law else None
                        of = jnp.asarray(p[at])[None], law, jnp.array([block[i]])
                        chances.append(float(chance_of_beginning(joint, *of)[0]))
                    joints.append(joint)
                    if i < len(block):
                        joint = joint_after(joint, *of)
                for length in range(len(block) + 1):
                    chance = drawn * (chances[length] if length else 1.0)
                    chance *= math.prod(1 - chance for chance in chances[length + 1 :])
                    kept += length * chance
                    at, follows = block[:length], p[block[:length]]
                    if length < len(block):
                        law, token = jnp.asarray(q[at])[None] if has_law else None, jnp.array([block[length]])
                        follows = np.asarray(
                            residual(jnp.asarray(follows)[None], law, token, joints[length])
                        )[0]
                    for rest in np.ndindex(*[V] * (G + 1 - length)):
                        text = (*at, *rest)
                        after = (p[text[:i]][text[i]] for i in range(length + 1, G + 1))
                        found[text] += chance * follows[rest[0]] * math.prod(after)
                reached = drawn  # one after another: each stands with min(1, p / q)
                for i in range(len(block)):
                    reached *= min(1.0, p[block[:i]][block[i]] / q[block[:i]][block[i]])
                    alone += reached
            wanted = np.zeros_like(found)
            for text in np.ndindex(wanted.shape):
                wanted[text] = math.prod(p[text[:i]][text[i]] for i in range(G + 1))
            assert np.abs(found - wanted).sum() / 2 < 1e-12
            assert kept >= alone - 1e-12


def test_noise_of_a_step_that_was_judged_comes_not_again():
    """What a step draws and judges by for a place of the text says nothing of what the next does there."""
    N, V = 4096, 2
    requests = loop.Requests(
        limits=jnp.full((N,), 9),
        keys=request_keys(0, N),
        stop_tokens=jnp.zeros((0,), jnp.int32),
        sampling=jl.Sampler(temperature=1.0).params(),
        verification="block",
    )
    none, no = jnp.zeros((N,), jnp.int32), jnp.zeros((N,), bool)

    def after(count: int) -> loop.Written:
        return loop.Written(none, jnp.zeros((N, 8), jnp.int32), None, none + count, no, no, None)

    def coin(tokens, cache, **_):
        return jnp.zeros((N, V)), cache

    coins, nothing = ModelDraft(coin, 2, V), Decoder(TINY, rngs=nnx.Rngs(0)).make_cache(N, 1)
    earlier, later = (coins.propose(nothing, requests, after(c), none, ~no)[0].tokens for c in (3, 4))
    assert abs(float(np.mean(np.asarray(earlier[:, 1] == later[:, 0]))) - 0.5) < 0.04
    # Token 0 is half as likely as drafted, then laws are alike: the whole block stands with 1 / 2.
    even = jnp.zeros((N, V))
    p = jnp.stack([jnp.tile(jnp.log(jnp.array([0.25, 0.75])), (N, 1)), even, even])
    places = (jnp.arange(3), p, jnp.zeros((3, N), jnp.int32), jnp.zeros((3, N, V)))
    stand = [
        np.asarray(loop.beginning(requests, after(c), none + G, places).length) == G
        for c, G in ((3, 2), (4, 1))
    ]
    for share in (stand[0].mean(), stand[1].mean(), (stand[0] == stand[1]).mean()):
        assert abs(share - 0.5) < 0.04


def test_by_shared_noise_drafts_stand_as_often_as_is_proved_and_less_often_than_is_possible():
    rng, N = np.random.default_rng(3), 8192
    params, keys, steps = jl.Sampler(temperature=1.0).params(), request_keys(0, N), jnp.zeros(N, jnp.int32)
    for p, q in zip(laws(rng, 4), laws(rng, 4), strict=True):
        drawn = [
            draw(jnp.log(jnp.tile(jnp.asarray(x, jnp.float32), (N, 1))), params, keys, steps) for x in (p, q)
        ]
        alike, possible = float(np.mean(np.asarray(drawn[0]) == np.asarray(drawn[1]))), np.minimum(p, q).sum()
        assert possible / (2 - possible) - 0.025 <= alike <= possible + 0.025  # four deviations at least


def test_what_replaces_a_draft_is_a_law_also_where_both_laws_are_the_same():
    p = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    found = residual(p, p, jnp.array([0, 1]))
    np.testing.assert_array_equal(found, p)
    assert not bool(stands(p, None, jnp.array([2, 2]), jnp.zeros(2))[0])  # what cannot be drawn never stands
