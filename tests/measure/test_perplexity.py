"""Perplexity and scores against one uncompiled forward pass a window, and against golden values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.measure.perplexity import perplexity, score
from jaxllm.models.decoder import TINY, Decoder

CONTEXT = 16


@pytest.fixture(scope="module")
def forward(model):
    """Float64 log-probabilities of every token after a prefix, one sequence at a time."""
    run = jax.jit(lambda tokens: model(tokens)[0])

    def logprobs(row):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(row)] = row
        logits = np.asarray(run(jnp.asarray(padded)), np.float64)[0, : len(row)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return logprobs


def text(n, seed=0):
    return np.random.default_rng(seed).integers(1, TINY.vocab, n)


def losses(forward, tokens, context, stride, bos):
    """{index of a token: its loss}, by the rules of the docstring, a token at a time."""
    room = context - (bos is not None)
    found, start = {}, 0
    while True:
        window = list(range(start, min(start + room, len(tokens))))
        row = ([] if bos is None else [bos]) + [int(tokens[i]) for i in window]
        front = len(row) - len(window)
        for place, i in enumerate(window, start=front):
            if place > 0 and i not in found:
                found[i] = -forward(row[:place])[-1, row[place]]
        if start + room >= len(tokens):
            return found
        start += stride or room


@pytest.mark.parametrize("n", [CONTEXT - 5, 2 * CONTEXT, 3 * CONTEXT + 1, 3 * CONTEXT + 7])
@pytest.mark.parametrize(("context", "stride"), [(None, None), (12, None), (12, 5)])
@pytest.mark.parametrize("bos", [None, 0])
def test_perplexity_equals_a_loop_over_windows(model, forward, n, context, stride, bos):
    tokens = text(n)
    want = losses(forward, tokens, context or CONTEXT, stride, bos)
    got = perplexity(model, tokens, context=context, stride=stride, batch=3, bos=bos)
    mean = sum(want.values()) / len(want)
    assert got.tokens == len(want)
    assert got.nll_per_token == pytest.approx(mean, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(mean), rel=1e-4)


def test_every_token_but_the_stated_first_ones_is_predicted_once(model, forward):
    tokens = text(50)
    assert perplexity(model, tokens, bos=0).tokens == 50
    assert perplexity(model, tokens, stride=4, bos=0).tokens == 50
    assert perplexity(model, tokens, stride=4).tokens == 49
    assert perplexity(model, tokens).tokens == 50 - 4  # windows of 16, 16, 16, 2


def test_a_begin_token_that_is_there_already_is_not_doubled(model):
    tokens = text(40)
    with_begin = np.concatenate([[0], tokens])
    assert perplexity(model, with_begin, bos=0) == perplexity(model, tokens, bos=0)


def test_the_batch_size_does_not_matter(model):
    tokens = text(90)
    one = perplexity(model, tokens, batch=1).nll_per_token
    assert perplexity(model, tokens, batch=4).nll_per_token == pytest.approx(one, rel=1e-6)
    assert perplexity(model, tokens).nll_per_token == pytest.approx(one, rel=1e-6)


def test_bits_per_byte_spread_the_loss_over_the_bytes_of_the_text(model):
    got = perplexity(model, text(40), bos=0, num_bytes=100)
    assert got.bits_per_byte == pytest.approx(got.nll_per_token * 40 / math.log(2) / 100)
    assert perplexity(model, text(40), bos=0).bits_per_byte is None


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model):
    graph, state = nnx.split(model)
    ignorant = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    got = perplexity(ignorant, text(40))
    assert got.perplexity == pytest.approx(TINY.vocab, rel=1e-5)


def test_jax_arrays_and_lists_are_tokens_too(model):
    tokens = text(20)
    want = perplexity(model, tokens)
    assert perplexity(model, tokens.tolist()) == want
    assert perplexity(model, jnp.asarray(tokens.astype(np.int32))) == want
    assert perplexity(model, tokens.astype(np.uint16)) == want


def test_a_bfloat16_model_is_measured_in_float32():
    config = dataclasses.replace(TINY, layers=1, context=32)
    model = Decoder(config, rngs=nnx.Rngs(1), dtype=jnp.bfloat16)
    tokens = text(30)
    logits = np.asarray(jax.jit(model)(jnp.asarray(tokens[None, :], jnp.int32))[0][0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.mean([logprobs[i, tokens[i + 1]] for i in range(29)])
    assert perplexity(model, tokens).nll_per_token == pytest.approx(want, rel=2e-3)


def test_scores_of_ragged_sequences_equal_one_pass_each_in_the_order_given(model, forward):
    rows = [text(n, seed=n).tolist() for n in (9, 2, 17, 16, 3, 5)]
    scores = score(model, rows, batch=2)
    for row, logprobs, greedy in zip(rows, scores.logprobs, scores.greedy, strict=True):
        table = forward(row[:-1])
        want = table[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(logprobs, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(greedy, table.argmax(-1) == row[1:])


def test_progress_is_drawn_on_stderr_only(model, capsys):
    perplexity(model, text(40), progress=True)
    shown = capsys.readouterr()
    assert "perplexity" in shown.err and shown.out == ""
    perplexity(model, text(40))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 17}, "context must lie in .2, 16., got context=17"),
        ({"context": 1}, "got context=1"),
        ({"stride": 0}, "stride must lie in .1, 16.*got stride=0"),
        ({"stride": 16, "bos": 0}, "stride must lie in .1, 15."),
        ({"batch": 0}, "batch must be positive, got batch=0"),
        ({"bos": 128}, "got token=128"),
        ({"num_bytes": 0}, "num_bytes=0"),
        ({"tokens": [1]}, "needs a token to predict"),
        ({"tokens": [], "bos": 0}, "needs a token to predict"),
        ({"tokens": [1, 128]}, "must lie in .0, 128., got token=128"),
        ({"tokens": [1, -1]}, "got token=-1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(model, arguments, message):
    tokens = arguments.pop("tokens", [1, 2, 3])
    with pytest.raises(ValueError, match=message) as error:
        perplexity(model, tokens, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [1, CONTEXT + 2])
def test_a_sequence_that_does_not_fit_is_refused(model, n):
    with pytest.raises(ValueError, match=f"got {n} in sequence 1, context={CONTEXT}"):
        score(model, [[1, 2], [3] * n])


@pytest.mark.slow
def test_stories260k_has_its_golden_loss(shared_data):
    from checkpoints_convert import llama2c

    model, tokenizer = llama2c.load(shared_data / "models" / "stories260K" / "stories260K.bin")
    path = shared_data / "text" / "tinystories" / "TinyStories-valid-excerpt.txt"
    stories = [line.rstrip(b"\r").decode() for line in path.read_bytes().split(b"\n")]
    scores = score(model, [tokenizer.encode(story)[:512] for story in stories])
    loss = [-values.astype(np.float64).sum() for values in scores.logprobs]
    count = [len(values) for values in scores.logprobs]
    assert sum(count) == 9136
    assert sum(loss) / 9136 == pytest.approx(1.6438, abs=6e-5)
    first = {story.lower(): i for i, story in reversed(list(enumerate(stories)))}.values()
    assert len(first) == 16 and sum(count[i] for i in first) == 7707
    assert sum(loss[i] for i in first) / 7707 == pytest.approx(1.6551, abs=6e-5)
