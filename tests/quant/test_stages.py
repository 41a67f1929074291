"""A model that reads a source is measured stage by stage as one look at the whole model measures it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import generate
from jaxllm.models import t5
from jaxllm.models.linears import linear_weights
from jaxllm.quant.calibrate import calibrate
from jaxllm.quant.gradients import LOSS_SCALE
from jaxllm.quant.methods.rtn import Rtn
from jaxllm.quant.quantize import quantize
from jaxllm.quant.statistics import STATISTICS
from jaxllm.quant.text import text_sequences

CONFIG = dataclasses.replace(t5.TINY, gated=True, activation="gelu_tanh", tied=False)
# the longest source is as long as the longest target with its first token: only what it is tells them apart
PAIRS = [
    (list(range(3, 46)), [8] * 20 + [3]),
    ([4, 1], list(range(70, 112))),
    (list(range(20, 28)), [2]),
    ([7] * 9, [9, 10, 11, 12]),
    ([3, 5], [5, 4]),
]
PLACES = ["encoder.layers.0.attention.v", "encoder.layers.1.mlp.down", "layers.0.attention.o",
          "layers.0.cross.k", "layers.1.cross.v", "layers.1.cross.q", "layers.1.mlp.gate"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return t5.T5(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def measured(model):
    return calibrate(model, PAIRS, want=STATISTICS, output_groups=2, batch=2, sample=9, progress=False)


@pytest.fixture(scope="module")
def seen(model):
    """Inputs and output gradients [T, K], [T, N] of PLACES for each pair, from one pass through the whole."""
    most = 1 + max(len(row) for pair in PAIRS for row in pair)

    def loss(taps, source, S, target, T):
        keep = {}

        def tap(name, x):
            if name.endswith(".in"):
                keep[name.removesuffix(".in")] = x[0]
            return x + taps[name] if name in taps else x

        logits, _ = model(target, memory=model.encode(source, S, tap=tap), tap=tap)
        logp = jax.nn.log_softmax(logits[0, :-1])
        came = jnp.take_along_axis(logp, target[0, 1:, None], axis=1)[:, 0]
        return -jnp.where(jnp.arange(1, most) < T, came, 0.0).sum() / (T - 1), {n: keep[n] for n in PLACES}

    N = {name: w.shape[1] for name, w in linear_weights(model).items()}
    zeros = {f"{name}.out": np.zeros((1, most, N[name]), np.float32) for name in PLACES}
    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def filled(row):
        return jnp.asarray([row + [0] * (most - len(row))])

    sequences = []
    for source, target in PAIRS:
        target = [CONFIG.decoder_start, *target]
        g, x = gradient(zeros, filled(source), jnp.asarray([len(source)]), filled(target), len(target))
        of_source = [name.startswith("encoder") or name.endswith(("cross.k", "cross.v")) for name in PLACES]
        size = {n: len(source if mine else target) for n, mine in zip(PLACES, of_source, strict=True)}
        sequences.append({n: (x[n][: size[n]], g[f"{n}.out"][0, : size[n]]) for n in PLACES})
    return sequences


@pytest.mark.slow
def test_every_linear_of_both_sides_is_measured_with_its_own_tokens(measured, model):
    assert set(measured) == set(linear_weights(model)) - {"head", "embedding"}
    sources, targets = sum(len(s) for s, _ in PAIRS), sum(1 + len(t) for _, t in PAIRS)
    assert measured["encoder.layers.1.mlp.up"].tokens == measured["layers.0.cross.k"].tokens == sources
    assert measured["layers.0.cross.q"].tokens == measured["layers.1.mlp.up"].tokens == targets


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_statistics_equal_a_pass_through_the_whole_model(measured, seen, name):
    got = measured[name]
    each = [np.asarray(s[name][0], np.float64) for s in seen]
    gradients = [np.asarray(s[name][1], np.float64) for s in seen]
    x = np.concatenate(each)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())

    close(got.hessian_diag, (x**2).sum(0))
    close(got.mean, np.abs(x).mean(0))
    close(got.held_out, each[3].T @ each[3])
    close(got.hessian, x.T @ x - each[3].T @ each[3])
    exact = np.sort(np.abs(x), 1)[:, ::-1].max(0)
    assert (got.thresholds >= exact * (1 - 1e-5)).all() and (got.thresholds <= exact * (1 + 1 / 63)).all()
    close(got.sample, x[:9])
    close(got.fisher / LOSS_SCALE**2, sum((g.T @ x) ** 2 for x, g in zip(each, gradients, strict=True)))
    guided = sum(
        np.einsum("tg,tk,tj->gkj", (g.reshape(len(g), 2, -1) ** 2).mean(-1), x, x)
        for x, g in zip(each, gradients, strict=True)
    )
    close(got.guided_hessian / LOSS_SCALE**2, guided)


@pytest.mark.slow
def test_a_quantized_t5_still_answers_and_feeds_its_own_outputs_forward(model):
    one = quantize(
        model, Rtn(bits=8, group_size=16, clip=True), PAIRS, batch=2, sequential=True, progress=False
    )
    sources = [source for source, _ in PAIRS]
    assert len(generate(one, None, sources, max_new_tokens=4)) == 5
    source, target = jnp.asarray([[5, 9, 2]]), jnp.asarray([[0, 8, 8]])
    forward = jax.jit(lambda model: model(target, memory=model.encode(source))[0])
    both = [np.asarray(forward(m)) for m in (model, one)]
    assert 0 < np.abs(both[0] - both[1]).max() < 0.05 * np.abs(both[0]).max()


def test_rows_without_a_source_and_lines_without_a_tab_are_refused(model):
    with pytest.raises(ValueError, match="needs pairs of source and target, got a row of 3"):
        calibrate(model, [[1, 2, 3]], want={"hessian_diag"})
    with pytest.raises(ValueError, match="sources must have at least 1 token"):
        calibrate(model, [([], [1, 2])], want={"hessian_diag"})

    class Words:
        def encode(self, text):
            return [ord(c) % 100 for c in text]

    got = text_sequences(model, Words(), "ab\tcd\n\nefgh\ti\n", length=3)
    assert got == [([97, 98], [99, 0]), ([1, 2, 3], [5])]
    with pytest.raises(ValueError, match="each line must be source, a tab, target for a T5, got 'one line'"):
        text_sequences(model, Words(), "a\tb\none line\n")
