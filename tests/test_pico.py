"""The models that ship are small, whole and what their cards say."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm as jl
from jaxllm.training.pico import exercises
from jaxllm.training.pico import recipe as pico

SHIPPED = Path(jl.__file__).parent / "pico"
MEMBERS = sorted(pico.MEMBERS)


@pytest.fixture(scope="module")
def shipped():
    return {member: jl.load(SHIPPED / member, dtype="float32") for member in MEMBERS}


def test_weights_stay_within_eleven_megabytes_in_shards_of_three_and_a_half():
    sizes = [file.stat().st_size for file in SHIPPED.rglob("*.safetensors")]
    assert sum(sizes) <= 11_000_000
    assert max(sizes) <= 3_500_000 + 50_000  # a shard and its header


@pytest.mark.parametrize("member", MEMBERS)
def test_each_member_has_its_config_and_a_card_with_its_command(shipped, member):
    model, tokenizer = shipped[member]
    config = pico.MEMBERS[member]
    assert (model.config.layers, model.config.width, model.config.vocab) == (
        config.layers,
        config.width,
        config.vocab,
    )
    assert model.config.stop_tokens == (tokenizer.eos_token_id,)
    card = (SHIPPED / member / "README.md").read_text("utf-8")
    assert "python -m jaxllm.training.pico" in card and "seed" in card
    parameters = sum(x.size for x in jax.tree.leaves(model))
    assert f"{parameters:,}" in card
    assert all(np.isfinite(run["losses"]).all() for run in _history(member))


def _history(member):
    return json.loads((SHIPPED / member / "history.json").read_text("utf-8"))["runs"]


def test_all_members_share_one_tokenizer_that_keeps_any_text(shipped):
    tokenizers = [tokenizer for _, tokenizer in shipped.values()]
    text = "naïve – 数 \x00\n\t tail "
    ids = [tokenizer.encode(text) for tokenizer in tokenizers]
    assert all(one == ids[0] for one in ids)
    assert ids[0][0] == tokenizers[0].bos_token_id
    assert tokenizers[0].decode(ids[0], skip_special_tokens=True) == text


def test_the_target_repeats_and_looks_up_what_it_was_never_trained_on(shipped):
    """A small share of `benchmarks/pico.py`, as a guard: 40 tokens, 16 pairs."""
    model, tokenizer = shipped["target"]
    words = exercises.Words.from_tokenizer(tokenizer)
    rng = np.random.default_rng([2026, 11, 21])
    tasks = [exercises.repeat(rng, words, 40, prompt=exercises.REPEAT_ALL[0]) for _ in range(8)]
    tasks += [exercises.lookup(rng, words, 16, questions=1) for _ in range(8)]
    prompts = [one.tokens[: one.prompt_length].tolist() for one in tasks]
    outs = jl.generate(model, tokenizer, prompts, max_new_tokens=41, stop_tokens=())
    right = [
        float(np.mean(np.asarray(out.token_ids)[: len(one.answer)] == one.answer))
        for one, out in zip(tasks, outs, strict=True)
    ]
    assert np.mean(right[:8]) > 0.9 and np.mean(right[8:]) > 0.9


@pytest.mark.slow
def test_eval_begins_every_window_with_the_begin_token(shipped, tmp_path):
    model, tokenizer = shipped["draft"]
    text = "The old man sat by the sea and looked at the boats. " * 12
    (tmp_path / "text.txt").write_text(text)
    command = [sys.executable, "-m", "jaxllm", "eval", "--model", str(SHIPPED / "draft")]
    command += ["--dtype", "float32", "--text", "text.txt", "--context", "64", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    got, ids = json.loads(done.stdout), tokenizer.encode(text)
    want = jl.perplexity(model, ids, context=64, bos=tokenizer.bos_token_id)
    assert got["tokens"] == want.tokens == len(ids) - 1  # every token of the text
    assert got["nll_per_token"] == pytest.approx(want.nll_per_token, rel=1e-5)
