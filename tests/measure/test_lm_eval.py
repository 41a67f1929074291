"""The harness's three requests against brute force, and a local task through the harness itself.

Where lm-evaluation-harness is not installed (it is the `eval` extra), the class is tested on a
stand-in for the one class of the harness that it extends, and only the run of the harness skips.
"""

import json
import sys
import types
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BEGIN = 1
HARNESS = find_spec("lm_eval") is not None


class Letters:
    """One token a character after a begin token."""

    bos_token, bos_token_id, eos_token_id, name_or_path = "\x01", BEGIN, 2, "made/letters"
    chat_template = "a template"

    def encode(self, text):
        return [BEGIN, *map(ord, text)]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def apply_chat_template(self, chat, *, tokenize, **_):
        assert not tokenize
        return "\x01" + "".join(message["content"] for message in chat)


class LM:
    """What `lm_eval.api.model.LM` documents."""

    def __init__(self):
        self._rank, self._world_size = 0, 1


@pytest.fixture(scope="module")
def harness_model():
    """The adapter's class; on a stand-in where the harness is absent."""
    before = dict(sys.modules)
    if not HARNESS:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["lm_eval.api.model"].LM = LM
    from jaxllm.measure.lm_eval import HarnessModel

    yield HarnessModel
    for name in set(sys.modules) - set(before):
        if name.startswith("lm_eval") or name == "jaxllm.measure.lm_eval":
            del sys.modules[name]


@pytest.fixture(scope="module")
def adapter(harness_model, model):
    return harness_model(model, Letters(), progress=False)


forward = jax.jit(lambda model, tokens: model(tokens)[0])


def table(model, ids):
    """Float64 log-probabilities after each token."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(model, jnp.asarray(padded))[0, : len(ids)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def test_loglikelihood_equals_one_forward_pass_a_pair(adapter, model):
    pairs = [("abc", " de"), ("", "fg"), ("hi ", "j"), ("k" * 14, "lm")]
    rows = [([BEGIN, *b"abc de"], 4), ([BEGIN, *b"fg"], 1), ([BEGIN, *b"hi j"], 3)]
    rows.append(([BEGIN, *b"k" * 14, *b"lm"], 15))
    got = adapter.loglikelihood(requests(*pairs))
    for (value, greedy), (ids, first) in zip(got, rows, strict=True):
        logprobs = table(model, ids[:-1])
        steps = range(first - 1, len(ids) - 1)
        assert value == pytest.approx(sum(logprobs[i, ids[i + 1]] for i in steps), rel=1e-5)
        assert greedy == all(logprobs[i].argmax() == ids[i + 1] for i in steps)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_rolling_predicts_each_token_once_and_the_last_window_reaches_back(adapter, model, n):
    text = "".join(np.random.default_rng(n).choice(list("abcdef"), n))
    ids = [BEGIN, *text.encode()]
    want = 0.0
    for i in range(1, len(ids)):
        begin = (i - 1) // 16 * 16  # the window side by side that predicts token i
        begin = begin if begin + 16 < len(ids) else max(0, len(ids) - 17)
        want += table(model, ids[begin:i])[-1, ids[i]]
    assert adapter.loglikelihood_rolling(requests((text,))) == [pytest.approx(want, rel=1e-5)]


def test_generate_until_writes_greedily_up_to_a_stop_string(adapter, model):
    ids = [BEGIN, *b"ab"]
    for _ in range(5):
        ids.append(int(table(model, ids)[-1].argmax()))
    text = "".join(map(chr, ids[3:]))
    settings = {"until": [], "max_gen_toks": 5, "temperature": 0.0, "do_sample": False}
    stopping = {"until": [text[2]], "max_gen_toks": 5}
    got = adapter.generate_until(requests(("ab", settings), ("ab", stopping)))
    assert got == [text, text[: text.index(text[2])]]


def test_unknown_settings_and_no_room_are_refused(adapter):
    with pytest.raises(ValueError, match="settings not known here, got {'num_beams': 4}"):
        adapter.generate_until(requests(("ab", {"num_beams": 4})))
    with pytest.raises(ValueError, match="got max_gen_toks=16, context=16"):
        adapter.generate_until(requests(("ab", {"max_gen_toks": 16})))


def test_chats_are_text_with_one_begin_token(adapter):
    chat = adapter.apply_chat_template([{"role": "user", "content": "ab"}])
    assert adapter.loglikelihood(requests((chat, "c"))) == adapter.loglikelihood(requests(("ab", "c")))
    assert adapter.tokenizer_name == "made__letters"
    assert adapter.chat_template(True) == "a template" and adapter.chat_template() == ""


@pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness (the `eval` extra) is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs_through_the_harness(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from jaxllm.measure.choices import score_choices

    rng = np.random.default_rng(0)

    def word():
        return "".join(rng.choice(list("abcdef"), 4))

    lines = [{"query": word(), "choices": [word(), word()], "gold": int(rng.integers(2))} for _ in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = {
        "choosing": CHOOSING,
        "rolling": "output_type: loglikelihood_rolling\nmetric_list: [{metric: bits_per_byte}]",
        "writing": WRITING,
    }
    for name, task in tasks.items():
        head = f"task: {name}\ntest_split: test\ndataset_path: json\ndoc_to_text: '{{{{query}}}}'\n"
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        target = "doc_to_target: '{{query}}'\n" if name == "rolling" else ""
        (tmp_path / f"{name}.yaml").write_text(head + files + target + task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    out = lm_eval.simple_evaluate(adapter, tasks=list(tasks), task_manager=manager)["results"]

    want = score_choices(adapter.model, adapter.tokenizer, "copa", data)
    assert out["choosing"]["acc,none"] == pytest.approx(want.accuracy)
    assert out["choosing"]["acc_norm,none"] == pytest.approx(want.acc_norm)
    texts = [line["query"] for line in lines]
    total = sum(adapter.loglikelihood_rolling(requests(*((text,) for text in texts))))
    want = -total / np.log(2) / sum(map(len, texts))
    assert out["rolling"]["bits_per_byte,none"] == pytest.approx(want)
    assert out["writing"]["exact_match,none"] == 0.0


CHOOSING = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
output_type: generate_until
doc_to_target: "never written"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""
