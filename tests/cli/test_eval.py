"""`jaxllm eval`: its JSON, and every way to hold it wrong."""

import json
import math
from pathlib import Path

import pytest
from command_line import assert_refused

import jaxllm as jl
from jaxllm.models import t5

TEXT = "the man and the dog in the sun, " * 10


def test_eval_of_a_text_gives_the_promised_fields(jaxllm, tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = jaxllm("eval", "--model", tiny_checkpoint, "--text", "text.txt", "--context", 32, "--json")
    assert done.status == 0, done.err
    found = done.json
    assert list(found) == [
        "perplexity", "bits_per_byte", "nll_per_token", "tokens", "bits_per_weight", "weight_bytes",
    ]  # fmt: skip
    assert math.isclose(found["perplexity"], math.exp(found["nll_per_token"]), rel_tol=1e-6)
    assert found["bits_per_weight"] == 32
    model, tokenizer = jl.load(tiny_checkpoint)
    ids = tokenizer.encode(TEXT)
    expected = jl.perplexity(model, ids, context=32)
    assert math.isclose(found["nll_per_token"], expected.nll_per_token, rel_tol=1e-6)


def test_stride_predicts_more_tokens_than_windows_side_by_side(jaxllm, tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def tokens(*args):
        place = ("--model", tiny_checkpoint, "--text", "text.txt", "--context", 32)
        return jaxllm("eval", *place, *args, "--json").json["tokens"]

    assert tokens("--stride", 16) > tokens()


def test_eval_of_a_task_gives_the_promised_fields(jaxllm, tiny_checkpoint, tmp_path):
    rows = [{"query": "the man", "choices": ["in", "and the dog"], "gold": i % 2} for i in range(6)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = jaxllm(
        "eval", "--model", tiny_checkpoint, "--task", "copa", "--data", "task.jsonl",
        "--limit", 4, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert list(done.json) == ["task", "accuracy", "stderr", "examples"]
    assert (done.json["task"], done.json["accuracy"], done.json["examples"]) == ("copa", 0.5, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--text and --task"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--task", "copa"], "--data"),
        (["--text", __file__, "--data", __file__], "--data"),
        (["--text", __file__, "--task", "copa"], "--text and --task"),
        (["--task", "copa", "--data", "absent.jsonl"], "absent.jsonl"),
        (["--task", "chess", "--data", "absent.jsonl"], "chess"),
        (["--task", "copa", "--data", __file__, "--kv-bits", "4"], "--kv-bits goes with --text"),
    ],
)
def test_eval_refuses(jaxllm, tiny_checkpoint, args, message):
    assert_refused(jaxllm("eval", "--model", tiny_checkpoint, *args), message)


def test_eval_refuses_a_text_without_a_token_to_predict(jaxllm, tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("")
    done = jaxllm("eval", "--model", tiny_checkpoint, "--text", "text.txt")
    assert_refused(done, "token", left=[Path("text.txt")])


def test_eval_refuses_what_it_cannot_score(jaxllm, tiny_checkpoint, monkeypatch):
    model, tokenizer = jl.load(tiny_checkpoint)
    Path("text.txt").write_text(TEXT)
    reads_a_source = t5.T5(t5.TINY, rngs=None)
    for loaded, message in (((model, None), "tokenizer"), ((reads_a_source, tokenizer), "T5")):
        monkeypatch.setattr(jl, "load", lambda *_, loaded=loaded, **__: loaded)
        for args in (["--text", "text.txt"], ["--task", "copa", "--data", "text.txt"]):
            assert_refused(jaxllm("eval", *args), message, left=[Path("text.txt")])


def test_eval_refuses_a_context_longer_than_the_model_s(jaxllm, tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = jaxllm("eval", "--model", tiny_checkpoint, "--text", "text.txt", "--context", 500)
    assert_refused(done, "context=500", left=[Path("text.txt")])
    longer = ("--model-context", 500, "--context", 500, "--json")
    assert jaxllm("eval", "--model", tiny_checkpoint, "--text", "text.txt", *longer).json["perplexity"] > 1


@pytest.mark.slow
def test_keys_and_values_in_eight_bits_change_little(jaxllm, generate, tiny_checkpoint):
    text = Path("text.txt")
    text.write_text("the man in the field " * 8, "utf-8")
    evaluate = ("eval", "--model", tiny_checkpoint, "--text", text, "--json")
    exact, coded = jaxllm(*evaluate).json, jaxllm(*evaluate, "--kv-bits", 8).json
    assert 0 < abs(coded["nll_per_token"] / exact["nll_per_token"] - 1) < 1e-2
    assert generate("--prompt", "the man", "--kv-bits", 8).status == 0
