"""`jaxllm generate`: its JSON, its texts, and every way to hold it wrong."""

import json
import re
from pathlib import Path

import pytest
from command_line import assert_refused

import jaxllm as jl
from jaxllm.training.gates import new_gates


def test_generate_json_has_the_promised_fields(generate):
    done = generate("--prompt", "the man", "--prompt", "and", "--json")
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert set(done.json) == {"prompts", "tokens_per_s"}
    first, second = done.json["prompts"]
    assert set(first) == {"prompt", "text", "prompt_ids", "token_ids", "finish_reason"}
    assert (first["prompt"], second["prompt"]) == ("the man", "and")
    assert len(first["token_ids"]) == 5
    assert first["finish_reason"] == "length"
    assert done.json["tokens_per_s"] > 0


def test_generate_gives_what_the_library_gives(generate, tiny_checkpoint):
    model, tokenizer = jl.load(tiny_checkpoint)
    (out,) = jl.generate(model, tokenizer, ["the man"], max_new_tokens=5)
    (said,) = generate("--prompt", "the man", "--json").json["prompts"]
    assert said["token_ids"] == out.token_ids
    assert said["prompt_ids"] == out.prompt_ids
    assert said["text"] == out.text


def test_logprobs_come_on_request_one_a_token(generate):
    (said,) = generate("--prompt", "the man", "--logprobs", "--json").json["prompts"]
    assert len(said["logprobs"]) == len(said["token_ids"])
    assert all(value < 0 for value in said["logprobs"])


def test_same_seed_same_text_other_seed_other_text(generate):
    def tokens(seed):
        args = ("--temperature", 2, "--top-k", 50, "--top-p", 0.99, "--min-p", 0.001)
        done = generate("--prompt", "the man", "--seed", seed, *args, "--json")
        return done.json["prompts"][0]["token_ids"]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_prompt_file_is_one_prompt_without_its_last_newline(generate, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("the Ω man\nand\n".encode())
    (said,) = generate("--prompt-file", "prompt.txt", "--json").json["prompts"]
    assert said["prompt"] == "the Ω man\nand"


def test_stop_string_ends_the_text_before_it(generate):
    (whole,) = generate("--prompt", "the", "--json").json["prompts"]
    stop = whole["text"][2:4]
    (said,) = generate("--prompt", "the", "--stop", stop, "--json").json["prompts"]
    assert said["finish_reason"] == "stop"
    assert said["text"] == whole["text"][: whole["text"].index(stop)]


def test_stream_prints_the_text_of_generate(generate):
    (said,) = generate("--prompt", "the man", "--json").json["prompts"]
    done = generate("--prompt", "the man", "--stream")
    assert (done.status, done.out) == (0, said["text"] + "\n")


def test_without_json_the_prompt_goes_on_in_its_text(generate):
    (said,) = generate("--prompt", "the man", "--json").json["prompts"]
    done = generate("--prompt", "the man")
    assert done.out == "the man" + said["text"] + "\n"
    assert "tokens in" in done.err


def test_chat_lays_the_prompt_out_by_the_template(generate, tiny_checkpoint):
    _, tokenizer = jl.load(tiny_checkpoint)
    (said,) = generate("--prompt", "the man", "--chat", "--json").json["prompts"]
    expected = tokenizer.encode("<s>user: the man\nassistant:", add_special_tokens=False)
    assert said["prompt_ids"] == expected


def test_repetition_penalty_reaches_the_sampler(generate):
    (said,) = generate("--prompt", "the", "--repetition-penalty", 1e6, "--json").json["prompts"]
    assert len(set(said["token_ids"])) == len(said["token_ids"])


def test_golden_ids_of_stories260k_are_reproduced(jaxllm, shared_data):
    folder = shared_data / "models" / "stories260K"
    golden = json.loads((folder / "golden.json").read_text())
    new = len(golden["greedy_ids"]) - len(golden["prompt_ids"])
    done = jaxllm(
        "generate", "--model", folder / "stories260K.bin", "--dtype", "float32",
        "--prompt", golden["prompt"], "--max-new-tokens", new, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    (said,) = done.json["prompts"]
    assert said["prompt_ids"] + said["token_ids"] == golden["greedy_ids"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--prompt or --prompt-file"),
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--prompt", ""], "empty"),
        (["--prompt", "the man " * 100], "context"),
        (["--prompt", "x", "--temperature", "-1"], "temperature.*-1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature.*nan"),
        (["--prompt", "x", "--temperature", "inf"], "temperature.*inf"),
        (["--prompt", "x", "--temperature", "warm"], "temperature.*warm"),
        (["--prompt", "x", "--top-k", "0"], "top_k"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p"),
        (["--prompt", "x", "--min-p", "-0.1"], "min_p"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "x", "--dtype", "int8"], "dtype.*int8"),
        (["--prompt", "x", "--kv-bits", "3"], "bits must be 2, 4 or 8"),
        (["--prompt", "x", "--what"], "--what"),
        (["--prompt", "x", "--stream", "--json"], "--stream"),
        (["--prompt", "x", "--prompt", "y", "--stream"], "--stream"),
        (["--prompt-file", "absent.txt"], "absent.txt"),
    ],
)
def test_generate_refuses(generate, args, message):
    assert_refused(generate(*args), message)


def test_prompt_file_must_be_utf8(generate, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = generate("--prompt-file", "latin.txt")
    assert_refused(done, "UTF-8.*latin.txt", left=[Path("latin.txt")])


def test_missing_model_is_refused(jaxllm):
    done = jaxllm("generate", "--model", "no/such/model.bin", "--prompt", "x")
    assert_refused(done, "no/such/model.bin")


@pytest.mark.slow
def test_a_context_is_read_once_and_most_of_it_forgotten(generate, tiny_checkpoint, tmp_path):
    file = tmp_path.with_name("context.txt")
    file.write_text("Once upon a time there was a dog.")
    asked = ["--context", str(file), "--prompt", " It", "--prompt", " The", "--json"]
    asked += ["--max-new-tokens", "6"]
    whole, same, little = (
        generate(*asked, *more)
        for more in ((), ("--kv-ratio", "1"), ("--kv-ratio", "0.3", "--kv-method", "streaming"))
    )
    assert whole.status == same.status == little.status == 0, (whole, same, little)
    ids = [[c["token_ids"] for c in done.json["prompts"]] for done in (whole, same, little)]
    assert ids[0] == ids[1] and len(ids[2][0]) == 6
    told = re.search(r"([\d,]+) bytes of keys and values, ([\d,]+) after eviction", little.err)
    before, after = (int(number.replace(",", "")) for number in told.groups())
    assert after < before  # although the text is short: room for what follows is not counted
    assert_refused(generate("--kv-ratio", "0.3", "--prompt", "x"), "--kv-ratio is of a --context")
    held = generate(*asked, "--kv-budget", "40")
    assert_refused(held, "gates: layers without a window, width and key heads must be")  # they are pico's
    gates = tmp_path.with_name("gates")
    jl.eviction.save_gates(new_gates(jl.load(tiny_checkpoint)[0], "fast"), gates)
    own = ("--kv-gates", gates)
    for more in (("--kv-budget", "40"), ("--kv-ratio", "0.3", "--kv-method", "fast-kvzip")):
        done = generate(*asked, *more, *own)
        assert done.status == 0 and [len(c["token_ids"]) for c in done.json["prompts"]] == [6, 6], done.err
    assert_refused(
        generate(*asked, *own, "--kv-budget", "40", "--kv-method", "h2o"), "goes with kvzip and gates"
    )
    assert_refused(generate(*asked, "--kv-ratio", "2"), "ratio must lie above 0 and be at most 1, got 2.0")


@pytest.mark.parametrize("draft", ["lookup", "self", "itself"])
def test_drafts_change_no_token_and_are_counted(generate, tiny_checkpoint, draft):
    asked = str(tiny_checkpoint) if draft == "itself" else draft
    (plain,) = generate("--prompt", "the man", "--json").json["prompts"]
    done = generate("--prompt", "the man", "--json", "--draft", asked, "--draft-tokens", "2")
    assert done.status == 0, done.err
    (said,) = done.json["prompts"]
    assert said.pop("speculation").keys() == {"proposed", "stood", "steps"} and said == plain
    assert "drafted tokens stand" in generate("--prompt", "the man", "--draft", asked).err


def test_a_draft_that_is_not_there_is_one_line(generate):
    assert_refused(generate("--prompt", "the man", "--draft", "nowhere", "--json"), "nowhere")
