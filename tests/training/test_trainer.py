"""The trainer: it learns, freezes, accumulates exactly, and resumes bit for bit after SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxllm.models.decoder import TINY, Decoder
from jaxllm.training import trainer
from jaxllm.training.trainer import train

TRUE = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]], np.float32)


def squares(params, batch):
    error = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
    return jnp.mean(error * error)


def batches(step):
    x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x @ TRUE, "tokens": np.zeros((8, 5), np.int32)}


def start():
    return {"w": jnp.zeros((3, 2)), "b": jnp.ones((2,)), "names": jnp.arange(3)}


def equal(a, b):
    return all(
        (np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_a_line_is_learned_and_whole_numbers_stay():
    params = start()
    out = train(squares, params, batches, optimizer=optax.adam(0.1), steps=150, progress=False)
    np.testing.assert_allclose(out.params["w"], TRUE, atol=0.05)
    assert out.params["names"].tolist() == [0, 1, 2]
    assert out.losses.shape == (150,) and out.losses[-1] < 1e-2 * out.losses[0]
    assert out.tokens == 150 * 40
    assert params["w"].tolist() == np.zeros((3, 2)).tolist()  # what was given is not donated


def test_accumulating_microbatches_equals_one_batch():
    whole = train(squares, start(), batches, optimizer=optax.sgd(0.1), steps=5, progress=False)
    parts = train(squares, start(), batches, optimizer=optax.sgd(0.1), steps=5, accumulate=4, progress=False)
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-5)


def test_what_is_not_trainable_stays():
    out = train(
        squares,
        start(),
        batches,
        optimizer=optax.adam(0.1),
        steps=3,
        progress=False,
        trainable=lambda path, leaf: path == "['w']",
    )
    assert out.params["b"].tolist() == [1, 1]
    assert (out.params["w"] != 0).any()
    assert len(jax.tree.leaves(out.opt_state)) == 3  # adam's count, mean and square of one leaf


def test_a_loss_may_report_more_than_its_value():
    def loss(params, batch):
        value = squares(params, batch)
        return value, {"root": jnp.sqrt(value)}

    out = train(loss, start(), batches, optimizer=optax.sgd(0.1), steps=2, accumulate=1, progress=False)
    np.testing.assert_allclose(out.aux["root"] ** 2, out.losses[-1], rtol=1e-5)


def test_stopping_and_going_on_equals_one_run(tmp_path):
    optimizer = optax.contrib.muon(0.05)

    def run(steps, folder):
        return train(
            squares,
            start(),
            batches,
            optimizer=optimizer,
            steps=steps,
            accumulate=2,
            checkpoint=folder,
            save_every=4,
            progress=False,
        )

    whole = run(20, None)
    run(9, tmp_path / "run")
    resumed = run(20, tmp_path / "run")
    assert equal(whole.params, resumed.params)
    assert equal(whole.opt_state, resumed.opt_state)
    assert whole.losses.tolist() == resumed.losses.tolist()
    kept = sorted(int(p.name) for p in (tmp_path / "run").iterdir())
    assert kept == [16, 20]
    again = run(20, tmp_path / "run")  # nothing left to do
    assert equal(whole.params, again.params)


KILLED = """
import sys, time
sys.path[:0] = [{here!r}, {root!r}]
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
import test_trainer as t

def slow(step):
    time.sleep(0.3 if step > 6 else 0.0)
    return t.tokens(step)

t.language_run(slow, {folder!r})
"""


def tokens(step):
    rng = np.random.default_rng(step)
    return {"tokens": rng.integers(0, TINY.vocab, (4, 9)).astype(np.int32)}


def language_run(batches, folder):
    def loss(model, batch):
        logits, _ = model(batch["tokens"][:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return jnp.mean(nll)

    return train(
        loss,
        Decoder(TINY, rngs=nnx.Rngs(0)),
        batches,
        optimizer=optax.adam(1e-2),
        steps=40,
        checkpoint=folder,
        save_every=4,
        progress=False,
    )


@pytest.mark.slow
def test_a_killed_run_gives_the_same_weights_bit_for_bit(tmp_path):
    here = Path(__file__).parent
    folder = tmp_path / "killed"
    code = KILLED.format(here=str(here), root=str(here.parents[1]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "8").exists():  # steps are slow from here
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    reached = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    assert 8 <= reached < 40
    resumed = language_run(tokens, folder)
    whole = language_run(tokens, None)
    assert equal(whole.params, resumed.params)
    assert whole.losses.tolist() == resumed.losses.tolist()


def test_a_module_trains_and_its_paths_name_layers():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    assert any("layers[0].attention.q.w" in path for path in trainer.paths(model))


def test_a_loss_that_is_not_finite_stops_the_run():
    def loss(params, batch):
        return squares(params, batch) / 0.0

    with pytest.raises(FloatingPointError, match="the loss must be finite"):
        train(loss, start(), batches, optimizer=optax.sgd(0.1), steps=2, progress=False)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="accumulate=3"):
        train(
            squares,
            start(),
            batches,
            optimizer=optax.sgd(0.1),
            steps=2,
            accumulate=3,
            progress=False,
        )


def test_losses_are_drawn(tmp_path):
    trainer.plot_losses({"a": np.linspace(3, 1, 80), "b": np.ones(3)}, tmp_path / "x" / "loss.png")
    assert (tmp_path / "x" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", [lambda x: x, lambda x: jax.device_put(x, jax.devices()[0])])
def test_the_step_is_compiled_once_wherever_the_weights_come_from(monkeypatch, place):
    """Those of a file are committed to their device, new ones are not."""
    made, make_step = [], trainer.make_step

    def spy(*args):
        made.append(make_step(*args))
        return made[-1]

    monkeypatch.setattr(trainer, "make_step", spy)
    params = jax.tree.map(place, start())
    train(squares, params, batches, optimizer=optax.adam(0.1), steps=3, progress=False)
    assert made[0]._cache_size() == 1
