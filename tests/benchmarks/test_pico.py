"""How pico's benchmark reads a text, draws and judges exercises."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pico
import pytest
from made_texts import write_texts
from parts import common

import jaxllm as jl
from jaxllm.training.pico import exercises


@pytest.fixture(scope="module")
def tiny():
    """A random model and pico's tokenizer."""
    return common.load(common.parse(common.parser("pico", ""), ["--tiny"]))


@pytest.mark.parametrize("length", [2, 9, 10, 23, 40])
@pytest.mark.parametrize("stride", [4, 8])
def test_windows_predict_every_token_of_a_document_once(length, stride):
    ids = np.arange(100, 100 + length)
    found = [
        row[1 + known :]
        for row, known in pico.windows(ids, 8, stride)
        if len(row) <= 9 and row[0] == 100 and known <= 8 - stride
    ]
    assert np.concatenate(found).tolist() == ids[1:].tolist()


def test_the_benchmark_draws_what_training_cannot():
    ours = pico.generator(0, 0).integers(0, 2**62)
    seeds = [[pico.SEED, 0, 0, 2], [pico.SEED, 0, 0, 0], [1, 0, 0, 2], [pico.SEED, 0]]
    assert all(np.random.default_rng(seed).integers(0, 2**62) != ours for seed in seeds)


@pytest.mark.slow
def test_a_document_is_scored_as_the_model_scores_it(tiny):
    model, _ = tiny
    ids = np.random.default_rng(1).integers(3, 1024, 30)
    ids[0] = 0
    rows = list(pico.windows(ids, 20, 10))
    logp, best = pico.read_through(model, rows, pico.tqdm(disable=True))
    logits, _ = jax.jit(model)(jnp.asarray(ids[None, :20], jnp.int32))
    want = np.asarray(jax.nn.log_softmax(logits[0]))
    np.testing.assert_allclose(logp[:20], want[np.arange(20), ids[1:21]], rtol=1e-4, atol=1e-4)
    assert (best[:20] == want.argmax(-1)).all() and len(logp) == len(best) == 29


def test_a_model_that_copies_is_judged_perfect_and_one_that_errs_is_not(tiny, monkeypatch):
    words = exercises.Words.from_tokenizer(tiny[1])
    known = {}

    def generate(model, tokenizer, prompts, *, max_new_tokens, stop_tokens):
        return [type("Out", (), {"token_ids": known[tuple(p)][:n]})
                for p, n in zip(prompts, max_new_tokens, strict=True)]  # fmt: skip

    monkeypatch.setattr(pico.jl, "generate", generate)
    cases = [
        exercises.repeat(pico.generator(0, i), words, 20, prompt=exercises.REPEAT_ALL[0]) for i in range(3)
    ]
    for one in cases:
        known[tuple(one.tokens[: one.prompt_length].tolist())] = one.answer.tolist()
    bar = pico.tqdm(disable=True)
    assert pico.repeats(None, words, cases, bar, 2)["tokens_right"] == 1
    first = known[tuple(cases[0].tokens[: cases[0].prompt_length].tolist())]
    del first[5]  # all that follows is out of step
    found = pico.repeats(None, words, cases, bar, 2)
    assert found["whole_right"] == pytest.approx(2 / 3) and found["tokens_right"] < 49 / 63


@pytest.mark.slow
def test_the_benchmark_reads_texts_and_models_of_a_directory_and_judges_the_goals(tiny, tmp_path):
    data, models, out = write_texts(tmp_path / "data"), tmp_path / "models", tmp_path / "out"
    for name in pico.MEMBERS:
        jl.save(*tiny[:1], models / name, tokenizer=tiny[1])
    few = ["--cases", "2", "--natural", "1", "--batch", "2"]
    texts = ["--data", str(data), "--stories", str(data / "stories.txt")]
    pico.main(["--models", str(models), *texts, *few, "--results", str(out)])
    run = json.loads((out / "pico.json").read_text())
    assert run["agreement"]["draft"]["mean"] == 1 and len(pico.goals(run)) == 2 + 5
    assert {"32", "32, 8 questions"} <= set(run["exercises"]["target"]["lookup"])
    for entry in run["text"].values():
        assert {"target", "witten_bell_2", "witten_bell_5_all", "gzip"} <= set(entry["bits_per_byte"])
    assert re.search(r"^\| draft +\|", (out / "pico.md").read_text(), re.M)
