"""Exercises: what is asked can be known, what is answered is right, and the same seed gives the same."""

import numpy as np
import pytest

from jaxllm.training.pico import corpus, exercises
from jaxllm.training.pico.exercises import REPEAT_ALL, REPEAT_PART, SEED_IDS, Words


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(["12+7=19\nabc abc abd\n" * 40], vocab=264)


@pytest.fixture(scope="module")
def words(tokenizer):
    return Words.from_tokenizer(tokenizer)


def test_the_official_prompts_are_among_the_phrasings():
    assert "\n\nRepeat the previous context exactly." in REPEAT_ALL
    official = "\n\nRepeat the part of the previous context exactly, starting with "
    assert official in REPEAT_PART


def test_ordinary_words_are_all_but_the_special_ones(words):
    assert words.ordinary.tolist() == list(range(3, 264))


@pytest.mark.parametrize("prompt", REPEAT_ALL)
def test_repeating_all_gives_the_passage_and_its_end(words, prompt):
    one = exercises.repeat(np.random.default_rng(0), words, 20, prompt=prompt)
    assert one.answer.tolist() == [*one.tokens[1:21].tolist(), words.eos]
    assert one.tokens[one.prompt_length :].tolist() == one.answer.tolist()
    said = one.tokens[21 : one.prompt_length]
    assert said.tolist() == [*words.fixed[prompt].tolist(), words.newline]


@pytest.mark.parametrize("seed", range(20))
def test_repeating_a_part_goes_on_after_the_eight_ids(words, seed):
    prompt = REPEAT_PART[0]
    one = exercises.repeat(np.random.default_rng(seed), words, 40, prompt=prompt)
    passage = one.tokens[1:41].tolist()
    seed_ids = one.tokens[one.prompt_length - 1 - SEED_IDS : one.prompt_length - 1].tolist()
    start = next(i for i in range(8, 40) if passage[i : i + SEED_IDS] == seed_ids)
    rest = [*passage[start + SEED_IDS :], words.eos]
    assert one.answer.tolist() == rest[: len(one.answer)]
    assert one.tokens[one.prompt_length - 1] == words.newline


def test_only_answers_of_a_repetition_count_fully(words):
    passage = np.random.default_rng(1).choice(words.ordinary, 12)
    passage[5] = words.newline
    one = exercises.repeat(np.random.default_rng(1), words, 12, passage=passage)
    assert one.weights[one.prompt_length] == exercises.START
    assert one.weights[-1] == exercises.MARK and one.tokens[-1] == words.eos
    inside = one.tokens[one.prompt_length + 1 : -1]
    want = np.where(inside == words.newline, exercises.MARK, 1)
    assert (one.weights[one.prompt_length + 1 : -1] == want).all() and words.newline in inside
    assert (one.weights[: one.prompt_length] < 0.1).all()
    assert (one.weights[:13] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_of_a_lookup_follows_from_its_pairs(words, tokenizer, seed):
    one = exercises.lookup(np.random.default_rng(seed), words, 16)
    lines, line = [], []
    for id in one.tokens[1:-1].tolist():
        line.append(id)
        if id == words.newline:
            lines.append(line)
            line = []
    gap = lines.index([words.newline])
    pairs, asked = lines[:gap], lines[gap + 1 :]
    assert sorted(pairs) == sorted(asked) and pairs != asked
    keys = [p[0] for p in pairs]
    values = [v for p in pairs for v in p[2:-1]]
    assert len(set(keys)) == len(keys) == 16 and not set(keys) & set(values)
    assert all(p[1] == words.equals and 4 <= len(p) <= 5 for p in pairs)
    assert one.answer.tolist() == asked[-1][2:]
    at = one.prompt_length
    assert one.tokens[at : at + len(one.answer)].tolist() == one.answer.tolist()


def test_a_lookup_counts_values_asked_and_not_values_shown(words):
    one = exercises.lookup(np.random.default_rng(2), words, 8, questions=3, value_tokens=1)
    shown = 1 + 4 * 8 + 1
    assert (one.weights[:shown] < 0.1).all()
    per_question = one.weights[shown:-1].reshape(3, 4)
    assert (per_question[:, 2:] == 1).all() and (per_question[:, :2] < 0.1).all()


def test_64_pairs_fit_in_512_tokens_and_32_fully_asked_in_about_320(words):
    rng = np.random.default_rng(3)
    sizes = [len(exercises.lookup(rng, words, 64, questions=32).tokens) for _ in range(50)]
    assert max(sizes) <= 512
    sizes = [len(exercises.lookup(rng, words, 32).tokens) for _ in range(50)]
    assert max(sizes) <= 323


def test_sums_are_right(words, tokenizer):
    one = exercises.sums(np.random.default_rng(4), words, 30)
    text = tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True)
    assert len(text.splitlines()) == 30
    for line in text.splitlines():
        question, answer = line.split("=")
        a, b = question.split("+")
        assert int(a) + int(b) == int(answer)
    right = tokenizer.decode(one.tokens[one.weights == 1].tolist())
    assert right.split("\n")[:-1] == [line.split("=")[1] for line in text.splitlines()]


def test_the_same_seed_gives_the_same_exercise(words):
    for make in (exercises.repeat, exercises.lookup, exercises.sums):
        one, two = (make(np.random.default_rng(5), words, 20) for _ in range(2))
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.weights.tolist() == two.weights.tolist()


def test_a_prompt_that_is_none_of_ours_is_refused(words):
    with pytest.raises(ValueError, match="prompt must be one of"):
        exercises.repeat(np.random.default_rng(0), words, 20, prompt="Again")
    with pytest.raises(ValueError, match="questions=9, pairs=8"):
        exercises.lookup(np.random.default_rng(0), words, 8, questions=9)
