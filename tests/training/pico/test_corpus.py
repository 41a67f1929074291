"""The tokenizer, the split and the batches: exact, disjoint, and a function of the step."""

import json

import numpy as np
import pytest

from jaxllm.training.pico import corpus
from jaxllm.training.pico.corpus import Batches, Phase
from jaxllm.training.pico.exercises import Words

SAMPLE = ["the cat sat on the mat\n" * 30, "one two three four five\n" * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(SAMPLE, vocab=280)


def make(tokenizer, *, steps=40, seed=7, lengths=(96, 200)):
    words = Words.from_tokenizer(tokenizer)
    streams = {"a": corpus.encode(tokenizer, SAMPLE[:1]), "b": corpus.encode(tokenizer, SAMPLE[1:])}
    mixture = {"a": 1.0, "b": 0.5, "repeat": 1.0, "recite": 0.3, "lookup": 1.0, "sums": 0.3}
    phases = [Phase(0.5, lengths[0], 8, mixture), Phase(0.5, lengths[1], 4, mixture)]
    return Batches(streams, words, phases, steps=steps, seed=seed, pad=2)


def test_any_text_comes_back_exactly(tokenizer):
    everything = "".join(chr(c) for c in [*range(0x250), 0x4E2D, 0x1F600, 0x2028, 0xFFFD])
    for text in [everything, " a  b\r\n\t\n", "", "née 1234 \x00"]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_all_bytes_and_the_special_tokens_have_ids(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<|bos|>", "<|eos|>", "<|pad|>")] == [0, 1, 2]
    vocab = tokenizer.get_vocab()
    assert tokenizer.get_vocab_size() == len(vocab) == 280
    assert sum(len(token) == 1 for token in vocab) == 256


def test_transformers_reads_the_saved_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    corpus.save_tokenizer(tokenizer, tmp_path, context=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 280}))
    other = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "the cat 12 é\n\n  mat"
    assert other(text).input_ids == tokenizer.encode(text).ids
    assert other.decode(other(text).input_ids, skip_special_tokens=True) == text
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)
    assert Words.from_tokenizer(other).ordinary.tolist() == Words.from_tokenizer(tokenizer).ordinary.tolist()


def test_a_text_too_poor_for_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="entries=260, vocab=1024"):
        corpus.train_tokenizer(["aa"])


@pytest.mark.parametrize("documents", [["x" * 9 + "\n"] * 100, ["line\n" * 500], ["a", "b" * 9]])
def test_a_split_loses_nothing_and_holds_out_the_end(documents):
    train, held_out = corpus.split(documents)
    assert "".join(train + held_out) == "".join(documents)
    assert held_out and "".join(documents).endswith("".join(held_out))


def test_about_five_percent_are_held_out_at_a_line_boundary():
    text = "".join(f"line {i}\n" for i in range(1000))
    train, held_out = corpus.split([text])
    assert 0.045 < len(held_out[0]) / len(text) <= 0.05
    assert train[0].endswith("\n")


def test_a_batch_depends_on_seed_and_step_alone(tokenizer):
    one, two = make(tokenizer), make(tokenizer)
    for step in (39, 3, 20, 3):
        a, b = one(step), two(step)
        assert all((a[k] == b[k]).all() for k in a)
    assert (one(3)["tokens"] != one(4)["tokens"]).any()
    assert (one(3)["tokens"] != make(tokenizer, seed=8)(3)["tokens"]).any()


def test_every_row_starts_with_bos_and_weights_average_one(tokenizer):
    batches = make(tokenizer)
    for step in range(0, 40, 7):
        batch = batches(step)
        B, T = (8, 96) if step < 20 else (4, 200)
        assert batch["tokens"].shape == (B, T + 1) and batch["weights"].shape == (B, T)
        assert (batch["tokens"][:, 0] == 0).all()
        np.testing.assert_allclose(batch["weights"].mean(), 1, rtol=1e-5)
        assert (batch["weights"][batch["tokens"][:, 1:] == 2] == 0).all()  # padding


def test_exercises_in_a_row_are_whole(tokenizer):
    words = Words.from_tokenizer(tokenizer)
    phases = [Phase(1.0, 300, 4, {"lookup": 1.0, "repeat": 1.0})]
    batches = Batches({}, words, phases, steps=10, seed=0, pad=2)
    for step in range(10):
        for row in batches(step)["tokens"]:
            starts = np.flatnonzero(row == words.bos)
            pieces = np.split(row, starts[1:])
            for piece in pieces:
                real = piece[piece != 2]
                lookup = words.equals in real[1:4] and real[-1] == words.eos
                asked = [*real].count(words.newline)
                assert lookup or real[-1] == words.eos or asked  # a question came before any answer


def test_tokens_are_counted_over_phases(tokenizer):
    batches = make(tokenizer)
    assert batches.tokens_before(40) == 20 * 8 * 96 + 20 * 4 * 200
    assert batches.tokens_before(21) == 20 * 8 * 96 + 4 * 200
    assert [batches.phase(s) for s in (0, 19, 20, 39)] == [0, 0, 1, 1]


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tinyshakespeare must be a file"):
        corpus.read(tmp_path)


def test_the_allowed_texts_are_read_and_split(shared_data):
    texts = {t.name: t for t in corpus.read(shared_data)}
    assert set(texts) == {"tinyshakespeare", "gsm8k", "wikitext2", "tinystories"}
    assert texts["gsm8k"].train[0].startswith("Question: ")
    assert len(texts["gsm8k"].train) + len(texts["gsm8k"].held_out) == 3000
    assert all(t.held_out and not set(t.held_out) & set(t.train) for t in texts.values())
