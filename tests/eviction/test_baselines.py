"""Scores of the rivals are what their papers say, computed here from whole attention matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.eviction.baselines import (
    expected_scores,
    h2o_scores,
    random_scores,
    snapkv_scores,
    streaming_scores,
    tova_scores,
)
from jaxllm.models import t5
from jaxllm.models.decoder import TINY, Decoder

CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None))
ROWS = [list(range(3, 33)), [5, 9, 2, 7] * 5]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def shown(model, row):
    """What taps see of a row, filled up to 32 tokens: later ones change nothing before."""
    return {
        name: np.asarray(x, np.float64) for name, x in one_pass(model, row + [0] * (32 - len(row))).items()
    }


@jax.jit
def one_pass(model, row):
    seen = {}

    def tap(name, x):
        seen[name] = x[0]
        return x

    model(jnp.asarray([row]), tap=tap)
    return seen


@pytest.fixture(scope="module")
def weights(model):
    """Attention [2 layers, K, G, T, T] of each row, from one pass."""

    found = []
    for row in ROWS:
        seen = {name: x[: len(row)] for name, x in shown(model, row).items()}
        layers = []
        for layer in (0, 2):
            q, k = (seen[f"layers.{layer}.attention.{what}"] for what in ("queries", "keys"))
            scores = np.einsum("tkgd,skd->kgts", q.reshape(len(row), 2, 2, -1), k) * CONFIG.head_dim**-0.5
            scores = np.where(np.tri(len(row), dtype=bool), scores, -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            layers.append(e / e.sum(-1, keepdims=True))
        found.append(np.stack(layers))
    return found


def test_h2o_is_the_sum_or_the_greatest_of_each_column(model, weights):
    for reduce, of in (("sum", np.sum), ("max", np.max)):
        got = np.asarray(h2o_scores(model, ROWS, reduce=reduce, prefix=2))
        assert got.shape == (2, 2, 2, 28)
        for b, w in enumerate(weights):
            n = len(ROWS[b])
            np.testing.assert_allclose(got[:, b, :, : n - 2], of(w, axis=3).mean(2)[..., 2:], rtol=1e-4)
            assert (got[:, b, :, n - 2 :] == 0).all()
    kept = np.asarray(h2o_scores(model, ROWS, recent=3))
    assert (kept[:, 1, :, 17:20] > kept[:, 1, :, :17].max()).all()


def test_snapkv_smooths_what_the_last_queries_see_and_keeps_them(model, weights):
    got = np.asarray(snapkv_scores(model, ROWS, window=4, kernel=3))
    for b, w in enumerate(weights):
        n = len(ROWS[b])
        plain = np.pad(w[..., n - 4 :, :].mean((2, 3)), ((0, 0), (0, 0), (1, 1)))
        want = (plain[..., :-2] + plain[..., 1:-1] + plain[..., 2:]) / 3
        np.testing.assert_allclose(got[:, b, :, : n - 4], want[..., : n - 4], rtol=1e-4, atol=1e-7)
        assert (got[:, b, :, n - 4 : n] > got[:, b, :, : n - 4].max()).all()


def test_tova_asks_the_last_query_for_all_heads(model, weights):
    got = np.asarray(tova_scores(model, ROWS))
    for b, w in enumerate(weights):
        n = len(ROWS[b])
        want = w[..., -1, :].mean((1, 2))[:, None]
        np.testing.assert_allclose(
            got[:, b, :, : n - 1], np.broadcast_to(want, (2, 2, n))[..., :-1], rtol=1e-4
        )


@pytest.mark.parametrize(
    "features, epsilon",
    [
        ({}, 0.01),
        pytest.param({"qk_norm": True, "attention_scale": 0.5}, 0.0, marks=pytest.mark.slow),
    ],
)
def test_expected_attention_weighs_keys_by_a_normal_query_turned_to_later_positions(features, epsilon):
    config = dataclasses.replace(CONFIG, **features)
    model = Decoder(config, rngs=nnx.Rngs(3))
    got = np.asarray(expected_scores(model, ROWS, future=7, sinks=2, epsilon=epsilon, prefix=1))
    scale = features.get("attention_scale", config.head_dim**-0.5)
    for b, row in enumerate(ROWS):
        n = len(row)
        seen = {name: x[:n] for name, x in shown(model, row).items()}
        for i, layer in enumerate((0, 2)):
            k, v = (seen[f"layers.{layer}.attention.{what}"] for what in ("keys", "values"))
            q = seen[
                f"layers.{layer}.attention.queries"
            ]  # turned: back to position 0, then to the later ones
            half, D = config.head_dim // 2, config.head_dim
            theta = config.rope.theta ** (-np.arange(half) / half)

            def turning(at, theta=theta, half=half):
                c, s = np.diag(np.cos(at * theta)), np.diag(np.sin(at * theta))
                return np.block([[c, -s], [s, c]])

            q = np.stack([q[t] @ turning(-t).T for t in range(n)])[2:]  # [n - 2, H, D]
            R = np.mean([turning(n + t) for t in range(7)], axis=0)
            want = np.zeros((2, n))
            for head in range(4):
                mean = R @ q[:, head].mean(0)
                cov = R @ np.cov(q[:, head].T, bias=True).reshape(D, D) @ R.T
                keys = k[2:, head // 2]
                logits = keys @ mean * scale + np.einsum("td,de,te->t", keys, cov, keys) * scale**2 / 2
                e = np.exp(logits - logits.max())
                want[head // 2, 2:] += e / e.sum() / 2
            want = (want + epsilon) * np.linalg.norm(v, axis=-1).T
            np.testing.assert_allclose(np.exp(got[i, b, :, 1 : n - 1]), want[:, 2:], rtol=2e-4)
            assert (got[i, b, :, :1] > np.log(want.max())).all()


def test_streaming_prefers_sinks_then_the_recent_and_random_depends_on_the_seed_alone(model):
    got = np.asarray(streaming_scores(model, ROWS, sinks=2))
    order = np.argsort(-got[0, 1, 0, :20], kind="stable")
    np.testing.assert_array_equal(order, [0, 1, *range(19, 1, -1)])
    one, two, three = (np.asarray(random_scores(model, ROWS, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any() and one.shape == got.shape


def test_wrong_rows_and_models_are_one_line(model):
    with pytest.raises(
        ValueError, match=r"h2o: each row must have more than the prefix=20 tokens, got \[30, 20\]"
    ):
        h2o_scores(model, ROWS, prefix=20)
    with pytest.raises(ValueError, match=r"tova: rows must have 1 to 64 tokens, got \[70\]"):
        tova_scores(model, [[1] * 70])
    with pytest.raises(ValueError, match="kernel odd, got window=32, kernel=4"):
        snapkv_scores(model, ROWS, kernel=4)
    windows = Decoder(dataclasses.replace(CONFIG, windows=(8, 8, 8)), rngs=nnx.Rngs(0))
    for score in (h2o_scores, expected_scores, random_scores):
        with pytest.raises(ValueError, match="a layer must see all of the text, got a model of windows only"):
            score(windows, ROWS)
    with pytest.raises(ValueError, match="random: the model must be a decoder alone"):
        random_scores(t5.T5(t5.TINY, rngs=nnx.Rngs(0)), ROWS)
