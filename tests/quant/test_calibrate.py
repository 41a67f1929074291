"""What is measured block by block equals what one look at the whole model gives."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models import gpt
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights
from jaxllm.quant import sums
from jaxllm.quant.calibrate import Calibration, calibrate
from jaxllm.quant.gradients import LOSS_SCALE
from jaxllm.quant.statistics import STATISTICS
from jaxllm.storage import checksums

CONFIG = dataclasses.replace(TINY, qkv_bias=True, windows=(None, 6))
ROWS = [list(range(3, 46)), [5, 9, 2, 7], [8] * 16, [1, 2], [30, 60, 90, 120, 3, 3]]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def measured(model):
    return calibrate(model, ROWS, want=STATISTICS, output_groups=2, batch=2, sample=9, progress=False)


@pytest.fixture(scope="module")
def seen(model):
    """Every linear's inputs and output gradients [T, K], [T, N] of each sequence, from one whole pass."""

    T = max(map(len, ROWS))  # shorter rows are filled up: what comes later changes nothing before

    def loss(taps, tokens, length):
        keep = {}

        def tap(name, x):
            if name.endswith(".in"):
                keep[name.removesuffix(".in")] = x[0]
            return x + taps[name] if name in taps else x

        logits, _ = model(tokens, tap=tap)
        logp = jax.nn.log_softmax(logits[0, :-1])
        came = jnp.take_along_axis(logp, tokens[0, 1:, None], axis=1)[:, 0]
        return -jnp.where(jnp.arange(1, T) < length, came, 0.0).sum() / (length - 1).astype(jnp.float32), keep

    zeros = {}

    def note(name, x):
        if name.endswith(".out") and name.count(".") > 2:
            zeros[name] = np.zeros(x.shape, np.float32)
        return x

    jax.eval_shape(lambda tokens: model(tokens, tap=note), jnp.zeros((1, T), jnp.int32))
    one = jax.jit(jax.value_and_grad(loss, has_aux=True))
    sequences = []
    for row in ROWS:
        n = len(row)
        tokens = jnp.asarray([row + [0] * (T - n)])
        (_, inputs), gradients = one(zeros, tokens, jnp.int32(n))
        sequences.append(
            {
                name: (x[:n], gradients[f"{name}.out"][0, :n])
                for name, x in inputs.items()
                if f"{name}.out" in zeros
            }
        )
    return sequences


def test_every_linear_is_measured_and_those_that_read_the_same_share_a_file(measured, model):
    linears = [*(f"attention.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down"))]
    names = {f"layers.{i}.{name}" for i in range(2) for name in linears}
    assert set(measured) == names and len(measured) == 14
    assert len(list(measured.path.glob("*.in.npz"))) == 8
    assert measured["layers.1.mlp.down"].tokens == sum(map(len, ROWS))


@pytest.mark.parametrize("name", ["layers.0.attention.v", "layers.1.mlp.down"])
def test_sums_over_inputs_equal_a_pass_through_the_whole_model(measured, seen, name):
    got = measured[name]
    each = [np.asarray(s[name][0], np.float64) for s in seen]
    x = np.concatenate(each)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    close(got.hessian_diag, (x**2).sum(0))
    close(got.mean, np.abs(x).mean(0))
    held = each[3]  # every fourth sequence
    close(got.held_out, held.T @ held)
    close(got.hessian, x.T @ x - held.T @ held)
    exact = np.sort(np.abs(x), 1)[:, ::-1].max(0)
    assert (got.thresholds >= exact * (1 - 1e-5)).all() and (got.thresholds <= exact * (1 + 1 / 63)).all()
    close(got.sample, x[:9])


@pytest.mark.parametrize("name", ["layers.0.attention.q", "layers.0.mlp.gate", "layers.1.attention.o"])
def test_guided_hessians_square_each_tokens_gradient(measured, seen, name):
    want = 0
    for s in seen:
        x, g = (np.asarray(a, np.float64) for a in s[name])
        squares = (g.reshape(len(g), 2, -1) ** 2).mean(-1)  # [T, groups]
        want = want + np.einsum("tg,tk,tj->gkj", squares, x, x)
    scale = LOSS_SCALE**2
    np.testing.assert_allclose(
        measured[name].guided_hessian / scale, want, rtol=2e-3, atol=2e-6 * want.max() + 1e-12
    )
    turned = measured[name].guided_hessian.swapaxes(1, 2)
    np.testing.assert_allclose(measured[name].guided_hessian, turned, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["layers.0.mlp.up", "layers.1.attention.k"])
def test_the_fisher_squares_each_sequences_gradient_and_the_gradient_sums_them(measured, seen, name):
    grads = [np.einsum("tn,tk->nk", np.asarray(s[name][1]), np.asarray(s[name][0])) for s in seen]
    got = measured[name].fisher / LOSS_SCALE**2
    want = sum(g**2 for g in grads)
    np.testing.assert_allclose(got, want, rtol=5e-3, atol=1e-5 * want.max())
    assert np.abs(got - sum(grads) ** 2).max() > 0.1 * want.max()
    gradient = sum(grads)
    np.testing.assert_allclose(
        measured[name].gradient / LOSS_SCALE, gradient, rtol=5e-3, atol=1e-5 * np.abs(gradient).max()
    )


def test_the_sum_of_gradient_times_input_is_the_weights_gradient(model, seen):
    """Catches a shift of labels or tokens: checked against jax.grad by the weight itself."""
    graph, state = nnx.split(model)

    def loss(state):
        logits, _ = nnx.merge(graph, state)(jnp.asarray([ROWS[0]]))
        logp = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, jnp.asarray(ROWS[0][1:])[:, None], axis=1))

    want = jax.jit(jax.grad(loss))(state)["layers"][0]["mlp"]["down"]["w"].get_value().rows
    x, g = seen[0]["layers.0.mlp.down"]
    np.testing.assert_allclose(g.T @ x, want, rtol=1e-4, atol=1e-6)


def test_gpt_is_measured_too():
    model = gpt.Gpt(gpt.TINY, rngs=nnx.Rngs(0))
    got = calibrate(model, ROWS, want={"hessian_diag"}, progress=False)
    assert all(stats.hessian_diag is not None and stats.hessian is None for stats in got.values())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_after_the_last_block(model, tmp_path, monkeypatch):
    options = {
        "want": {"hessian", "guided_hessian"},
        "batch": 2,
        "path": tmp_path / "stats",
        "progress": False,
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        blocks = []

        def update(self, block, *rest, update=sums.StatsAccumulator.update):
            blocks.append(block)
            if len(blocks) == 2:
                raise KeyboardInterrupt
            return update(self, block, *rest)

        patch.setattr(sums.StatsAccumulator, "update", update)
        calibrate(model, ROWS, **options)
    with pytest.raises(FileNotFoundError, match=r"calibration\.json must be in the directory"):
        Calibration(tmp_path / "stats")
    begun = (tmp_path / "stats" / "layers.0.attention.q.in.npz").stat().st_mtime_ns
    saliency = tmp_path / "stats" / "gradients" / "layers.1.0.npz"
    whole_file = saliency.read_bytes()
    saliency.write_bytes(whole_file[:-9] + bytes([whole_file[-9] ^ 1]) + whole_file[-8:])
    with pytest.raises(ValueError, match=r"calibrate: .*layers\.1\.0\.npz' must have the checksum"):
        calibrate(model, ROWS, **options)
    saliency.write_bytes(whole_file)
    again = calibrate(model, ROWS, **options)
    assert (tmp_path / "stats" / "layers.0.attention.q.in.npz").stat().st_mtime_ns == begun
    whole = calibrate(model, ROWS, **(options | {"path": None}))
    for name in whole:
        np.testing.assert_array_equal(again[name].hessian, whole[name].hessian)
        np.testing.assert_array_equal(again[name].guided_hessian, whole[name].guided_hessian)
    with pytest.raises(ValueError, match="path must be new or hold the same model"):
        calibrate(model, ROWS[:4], **options)
    meta = json.loads((tmp_path / "stats" / "calibration.json").read_text("utf-8"))
    for name in ("../x", "x" * 3000):  # no names of files
        inputs = {"inputs": meta["inputs"] | {name: name}, "tokens": meta["tokens"] | {name: 1}}
        (tmp_path / "stats" / "calibration.json").write_text(json.dumps(meta | inputs), "utf-8")
        checksums.write(tmp_path / "stats", ["calibration.json"])
        with pytest.raises(ValueError, match="must say inputs and tokens, not so of '"):
            Calibration(tmp_path / "stats")
    shutil.rmtree(tmp_path / "stats")


def test_too_little_text_is_named_and_bad_wishes_are_refused(model):
    few = [[1, 2, 3]]
    with pytest.warns(UserWarning, match="got 3 for layers.0.attention.q, layers.0.attention.k"):
        calibrate(model, few, want={"hessian"}, progress=False)
    with pytest.raises(ValueError, match=r"want must name some of .*, got \['hesian'\]"):
        calibrate(model, few, want={"hesian"})
    with pytest.raises(
        ValueError, match="must divide the outputs of layers.0.attention.q, got output_groups=3, N=32"
    ):
        calibrate(model, few, want={"guided_hessian"}, output_groups=3)
    with pytest.raises(ValueError, match="sequences must have 2 to 64 tokens, got none"):
        calibrate(model, [], want={"hessian_diag"})
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 128\), got token=128"):
        calibrate(model, [[1, 128]], want={"hessian_diag"})


@pytest.mark.slow
def test_blocks_share_a_program_forwards_and_linears_of_one_shape_those_of_their_sums(compiled):
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    shapes = {w.shape for name, w in linear_weights(model).items() if name.startswith("layers.")}
    compiled.clear()
    calibrate(model, ROWS, want={"hessian", "guided_hessian", "fisher"}, batch=2, progress=False)
    count = {
        name: compiled.count(name)
        for name in ("_forward", "backward_block", "_sum_over_sequences", "_of_input")
    }
    inputs = {K for K, _ in shapes}
    assert count == {
        "_forward": 2,  # what embeds, and a block
        "backward_block": 1,
        "_sum_over_sequences": len(shapes),
        "_of_input": len(inputs),
    }
