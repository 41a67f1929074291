"""Multiple choice against one forward pass a choice, small files written here, and stories260K."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.measure.choices import TASKS, encode_example, fit, read_examples, score_choices
from jaxllm.models.decoder import TINY, Config, Decoder
from jaxllm.pytree import pytree, static

BEGIN, END = 1, 2


@dataclasses.dataclass
class Letters:
    """One token a character; `begins` adds a begin token, `joined` are pairs that become one."""

    begins: bool = True
    joined: tuple[str, ...] = ()
    bos_token: str = "\x01"
    bos_token_id: int | None = BEGIN
    eos_token_id: int | None = END

    def encode(self, text):
        for i, pair in enumerate(self.joined):
            text = text.replace(pair, chr(3 + i))
        return [BEGIN] * self.begins + [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def model():
    return Decoder(dataclasses.replace(TINY, layers=1, context=32), rngs=nnx.Rngs(3))


forward = jax.jit(lambda model, tokens: model(tokens)[0])


def logprob(model, ids, first):
    """Log-probability of ids[first:] given ids[:first], and whether all are the arg max."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(forward(model, padded)[0], np.float64)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    steps = range(first - 1, len(ids) - 1)
    greedy = all(table[i].argmax() == ids[i + 1] for i in steps)
    return sum(table[i, ids[i + 1]] for i in steps), greedy


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def words(rng, n):
    return "".join(rng.choice(list("abcdefgh"), n))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    rng = np.random.default_rng(0)
    lines = [
        {
            "query": words(rng, int(rng.integers(2, 9))),
            "choices": [words(rng, int(rng.integers(1, 7))) for _ in range(3)],
            "gold": int(rng.integers(3)),
        }
        for _ in range(24)
    ]
    return write(tmp_path_factory.mktemp("tasks") / "queries.jsonl", lines), lines


@pytest.mark.parametrize(("task", "joiner"), [("copa", " "), ("piqa", "\nAnswer: ")])
def test_accuracy_equals_a_loop_over_choices(model, queries, task, joiner):
    path, lines = queries
    right = right_per_character = 0
    for line in lines:
        first = len(Letters().encode(line["query"] + joiner.rstrip(" ")))
        sums = [
            logprob(model, Letters().encode(line["query"] + joiner + choice), first)[0]
            for choice in line["choices"]
        ]
        per = [value / len(choice) for value, choice in zip(sums, line["choices"], strict=True)]
        right += int(np.argmax(sums)) == line["gold"]
        right_per_character += int(np.argmax(per)) == line["gold"]
    got = score_choices(model, Letters(), task, path, batch=5)
    p = right / len(lines)
    assert 0 < right < len(lines) and right != right_per_character
    assert (got.task, got.examples, got.truncated) == (task, len(lines), 0)
    assert got.accuracy == p and got.acc_norm == right_per_character / len(lines)
    assert got.stderr == pytest.approx(math.sqrt(p * (1 - p) / len(lines)))


def test_limit_takes_the_first_lines(model, queries):
    path, lines = queries
    few = write(path.parent / "few.jsonl", lines[:7])
    want = score_choices(model, Letters(), "copa", few)
    assert score_choices(model, Letters(), "copa", path, limit=7) == want


@pytree
class Counter:
    """A model that expects each token's successor: of no family, with the two functions that are needed."""

    scale: jax.Array
    config: Config = static()

    def __call__(self, tokens, *, lengths, logits):
        assert logits == "none"
        return jax.nn.one_hot((tokens + 1) % self.config.vocab, self.config.vocab), None

    def unembed(self, x):
        return self.scale * x


def test_the_last_word_is_right_when_each_of_its_tokens_is_the_arg_max(tmp_path):
    counter = Counter(jnp.float32(5.0), dataclasses.replace(TINY, context=32))
    before_space = "ab" + chr(ord(" ") - 1)
    lines = [{"context": before_space, "continuation": word} for word in ('!"#', '!"!', "!", "b")]
    lines.append({"context": "ab", "continuation": "!"})  # then the space is not expected
    got = score_choices(counter, Letters(), "lambada", write(tmp_path / "words.jsonl", lines))
    assert got.accuracy == 2 / 5 and got.acc_norm is None


def test_pairs_are_scored_from_the_begin_token_on(model, tmp_path):
    rng = np.random.default_rng(1)
    lines = [{"sentence_good": words(rng, 6), "sentence_bad": words(rng, 6)} for _ in range(20)]
    path = write(tmp_path / "pairs.jsonl", lines)

    def value(text):
        return logprob(model, Letters().encode(text), 1)[0]

    right = sum(value(line["sentence_good"]) > value(line["sentence_bad"]) for line in lines)
    got = score_choices(model, Letters(), "blimp", path)
    assert 0 < right < 20 and got.accuracy == right / 20
    # A tokenizer that adds nothing gets the begin token in front, so the result is the same.
    assert score_choices(model, Letters(begins=False), "blimp", path) == got


def test_equal_choices_are_never_right(model, tmp_path):
    path = write(tmp_path / "same.jsonl", [{"sentence_good": "abc", "sentence_bad": "abc"}])
    assert score_choices(model, Letters(), "blimp", path).accuracy == 0.0


def test_a_token_that_joins_context_and_choice_moves_the_seam_for_all_choices():
    rows, first = encode_example(Letters(joined=("bc",)), "ab", ["cd", "ee"])
    assert rows == [[BEGIN, 97, 3, 100], [BEGIN, 97, 98, 101, 101]]
    assert first == 2  # the second choice is scored on "bee" after "a", the first on "bc" "d"


def test_without_a_begin_token_the_end_token_stands_in_front():
    tokenizer = Letters(begins=False, bos_token_id=None)
    assert encode_example(tokenizer, "", ["ab", "b"]) == ([[END, 97, 98], [END, 98]], 1)
    assert encode_example(tokenizer, "x", ["a"]) == ([[120, 97]], 1)
    with pytest.raises(ValueError, match="needs a begin or an end token"):
        encode_example(Letters(begins=False, bos_token_id=None, eos_token_id=None), "", ["a"])


def test_a_begin_token_spelled_by_a_chat_is_not_doubled():
    assert encode_example(Letters(), "\x01a", ["b"]) == ([[BEGIN, 97, 98]], 2)


def test_a_long_context_loses_its_first_tokens():
    assert fit([[1, 2, 3, 4, 5], [1, 2, 3]], 2, context=4) == (
        [[1, 2, 3, 4, 5], [1, 2, 3]],
        [2, 2],
        False,
    )
    assert fit([[1, 2, 3, 4, 5], [1, 2, 3]], 2, context=3) == (
        [[2, 3, 4, 5], [1, 2, 3]],
        [1, 2],
        True,
    )
    with pytest.raises(ValueError, match="must fit the model's context, got 3 tokens, context=2"):
        fit([[1, 2, 3, 4, 5]], 2, context=2)


def test_truncated_examples_are_counted_and_scored_on_what_is_left(model, tmp_path):
    line = {"query": "abcdefgh" * 5, "choices": ["abc", "bcd"], "gold": 0}
    got = score_choices(model, Letters(), "copa", write(tmp_path / "long.jsonl", [line]))
    rows = [Letters().encode(line["query"] + " " + choice)[-33:] for choice in line["choices"]]
    sums = [logprob(model, row, 33 - 4)[0] for row in rows]
    assert got.truncated == 1 and got.accuracy == float(sums[0] > sums[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 of bad.jsonl is wrong: "),
        (b"\xff\xfe", "line 2 of bad.jsonl is wrong: .*utf-8"),
        (b"[1]", "needs 'query' .str."),
        (b'{"query": "a", "choices": ["b", "c"]}', "needs 'gold' .int."),
        (b'{"query": "a", "choices": ["b", "c"], "gold": 2}', "must lie in .0, 2., got gold=2"),
        (b'{"query": "a", "choices": ["b", 3], "gold": 0}', "choices must be texts"),
    ],
)
def test_a_wrong_line_is_named(model, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"query": "a", "choices": ["b", "c"], "gold": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        score_choices(model, Letters(), "copa", path)
    assert "\n" not in str(error.value)


def test_unknown_tasks_missing_and_empty_files_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="task must be one of piqa, .*, got task='nope'"):
        score_choices(model, Letters(), "nope", "x")
    with pytest.raises(FileNotFoundError, match="no such file"):
        score_choices(model, Letters(), "piqa", tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="got an empty empty.jsonl"):
        score_choices(model, Letters(), "piqa", tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="limit must be positive, got limit=0"):
        score_choices(model, Letters(), "piqa", tmp_path / "empty.jsonl", limit=0)


@pytest.fixture(scope="module")
def stories(shared_data):
    from checkpoints_convert import llama2c

    return llama2c.load(shared_data / "models" / "stories260K" / "stories260K.bin")


BLIMP = {
    "principle_A_case_1": 990,
    "superlative_quantifiers_1": 509,
    "wh_vs_that_with_gap": 239,
    "drop_argument": 706,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLIMP)
def test_stories260k_gets_its_golden_count_right(stories, shared_data, name):
    path = shared_data / "eval" / "blimp" / f"{name}.jsonl"
    got = score_choices(*stories, "blimp", path)
    assert (round(got.accuracy * 1000), got.examples) == (BLIMP[name], 1000)
    assert got.stderr <= 0.016


@pytest.mark.parametrize("task", [*TASKS])
def test_every_task_reads_the_file_that_it_names(shared_data, task):
    names = {
        "blimp": "blimp/drop_argument.jsonl",
        "lambada": "llm_foundry/lambada_openai.jsonl",
        "arc_challenge": "llm_foundry/arc_easy.jsonl",  # same layout
    }
    path = shared_data / "eval" / names.get(task, f"llm_foundry/{task}.jsonl")
    examples = read_examples(TASKS[task], path)
    assert len(examples) >= 100
    for example in examples:
        assert 0 <= example.gold < len(example.continuations)
        assert example.context[-1:] != " " and all(example.continuations)
