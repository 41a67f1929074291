"""The command line, in process: its JSON, its texts, and every way to hold it wrong."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tiny_llama import TINY, tiny_weights, write_checkpoint

import jaxllm as jl
from jaxllm import cli, demo
from jaxllm.models import t5
from jaxllm.training.gates import new_gates

COMMANDS = ("demo", "generate", "eval", "convert", "quantize")


class Done(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def jaxllm(capfd, monkeypatch, tmp_path):
    """Runs the command line in an empty folder; file descriptors are watched, not sys.stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*args) -> Done:
        capfd.readouterr()
        status = cli.status([str(arg) for arg in args])
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def generate(jaxllm, tiny_checkpoint):
    """`jaxllm generate` with the tiny model, 5 new tokens unless told otherwise."""
    return lambda *args: jaxllm("generate", "--model", tiny_checkpoint, "--max-new-tokens", 5, *args)


def assert_refused(done: Done, message: str, *, left: list[Path] | None = None):
    """One line on stderr that matches, status 2, nothing on stdout, nothing left in the folder."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.status == 2, done
    assert done.out == ""
    assert len(lines) == 1, done.err
    assert lines[0].startswith("jaxllm: ")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(Path().iterdir()) == sorted(left or [])


# ---- what it says ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(jaxllm, command):
    done = jaxllm(command, "--help")
    assert done.status == 0
    assert "--json" in done.out


def test_help_lists_all_commands(jaxllm):
    done = jaxllm("--help")
    assert done.status == 0
    assert all(re.search(rf"^  {name} ", done.out, re.M) for name in COMMANDS)


def test_version_is_the_package_s(jaxllm):
    assert jl.__version__ in jaxllm("--version").out


# ---- generate --------------------------------------------------------------------------------


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


# ---- eval ------------------------------------------------------------------------------------

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


# ---- convert ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_convert_keeps_the_model(jaxllm, tiny_checkpoint, to):
    done = jaxllm("convert", tiny_checkpoint, "out", "--to", to, "--json")
    assert done.status == 0, done.err
    assert list(done.json) == ["out", "weight_bytes", "bits_per_weight", "seconds"]
    assert done.json["out"] == "out"
    said = [
        jaxllm("generate", "--model", model, "--prompt", "the man", "--max-new-tokens", 5, "--json")
        for model in (tiny_checkpoint, "out")
    ]
    assert said[0].json["prompts"] == said[1].json["prompts"]


def test_convert_to_another_dtype_halves_the_bytes(jaxllm, tiny_checkpoint):
    done = jaxllm("convert", tiny_checkpoint, "out", "--dtype", "bfloat16", "--json")
    assert done.json["bits_per_weight"] == 16


# ---- bad input: one line, status 2, nothing left ----------------------------------------------


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
    reads_a_source = nnx.eval_shape(lambda: t5.T5(t5.TINY, rngs=nnx.Rngs(0)))
    for loaded, message in (((model, None), "tokenizer"), ((reads_a_source, tokenizer), "T5")):
        monkeypatch.setattr(jl, "load", lambda *_, loaded=loaded, **__: loaded)
        for args in (["--text", "text.txt"], ["--task", "copa", "--data", "text.txt"]):
            assert_refused(jaxllm("eval", *args), message, left=[Path("text.txt")])


def test_eval_refuses_a_context_longer_than_the_model_s(jaxllm, tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = jaxllm("eval", "--model", tiny_checkpoint, "--text", "text.txt", "--context", 500)
    assert_refused(done, "context=500", left=[Path("text.txt")])


def test_missing_model_is_refused(jaxllm):
    done = jaxllm("generate", "--model", "no/such/model.bin", "--prompt", "x")
    assert_refused(done, "no/such/model.bin")


def broken_checkpoint(directory: Path, how: str) -> Path:
    """A tiny checkpoint with one thing wrong."""
    configs = {
        "unknown": {**TINY, "model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        "quantized": {**TINY, "quantization_config": {"quant_method": "hqq", "bits": 4}},
    }
    write_checkpoint(directory, config=configs.get(how, TINY))
    weights = directory / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "shape":
        tensors = tiny_weights()
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        save_file(tensors, weights)
    elif how == "missing":
        tensors = tiny_weights()
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif how == "pickled":
        weights.unlink()
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    return directory


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors"),
        ("shape", r"norm.*31"),
        ("missing", r"model\.norm\.weight"),
        ("unknown", "[Ll]lama"),
        ("quantized", "hqq"),
        ("pickled", "pickle"),
    ],
)
def test_broken_checkpoint_is_refused_and_nothing_is_left(jaxllm, tmp_path_factory, how, message):
    source = broken_checkpoint(tmp_path_factory.mktemp("broken") / how, how)
    assert_refused(jaxllm("convert", source, "out"), message)


def test_existing_output_directory_is_refused_and_kept(jaxllm, tiny_checkpoint):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    for to in ("native", "huggingface"):
        done = jaxllm("convert", tiny_checkpoint, "out", "--to", to)
        assert_refused(done, "out", left=[Path("out")])
    assert_refused(jaxllm("demo", "--out", "out"), "out", left=[Path("out")])
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_full_disk_is_one_line_and_leaves_nothing(jaxllm, tiny_checkpoint, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for to in ("native", "huggingface"):
        done = jaxllm("convert", tiny_checkpoint, "out", "--to", to)
        assert_refused(done, "disk must have room.*out")


# ---- the process -----------------------------------------------------------------------------


def test_error_of_the_process_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm", "generate", "--model", "absent", "--prompt", "x"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_ctrl_c_ends_with_130(jaxllm, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(jl, "load", interrupted)
    done = jaxllm("generate", "--prompt", "x")
    assert (done.status, done.out) == (130, "")
    assert "Traceback" not in done.err


def test_reader_that_goes_away_is_no_error(jaxllm, monkeypatch):
    def gone(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr(jl, "load", gone)
    monkeypatch.setattr(cli, "silence_stdout", lambda: None)
    assert jaxllm("generate", "--prompt", "x") == (141, "", "")


# ---- demo ------------------------------------------------------------------------------------


def test_demo_writes_report_and_figure_and_no_second_time(jaxllm, monkeypatch, tmp_path_factory):
    longer = {**TINY, "max_position_embeddings": 2048}
    tiny = write_checkpoint(tmp_path_factory.mktemp("demo") / "tiny", config=longer)
    loaded = jl.load(tiny)
    monkeypatch.setattr(jl, "load", lambda: loaded)
    few = [("RTN", "RTN, 4 bits", jl.Rtn()), ("NestedFP, fp8", "NestedFP, fp8 mode", jl.NestedFp(mode="fp8"))]
    monkeypatch.setattr(demo, "compared", lambda model: few)
    done = jaxllm("demo", "--out", "report", "--json")
    assert done.status == 0, done.err
    report = json.loads(Path("report/report.json").read_text("utf-8"))
    assert done.json == report
    names = [section["name"] for section in report["sections"]]
    assert names == ["generation", "perplexity", "repetition", "size", "speed", "quantization", "eviction"]
    for figure in ("repetition", "quantization"):
        assert Path(f"report/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "![A passage read twice](repetition.png)" in Path("report/report.md").read_text("utf-8")
    assert sorted(path.name for path in Path().iterdir()) == ["report"]
    assert_refused(jaxllm("demo", "--out", "report"), "report", left=[Path("report")])


def test_demo_that_fails_leaves_nothing(jaxllm, monkeypatch, tiny_checkpoint):
    loaded = jl.load(tiny_checkpoint)  # its context is too short for the demo's passage
    monkeypatch.setattr(jl, "load", lambda: loaded)
    done = jaxllm("demo", "--out", "report")
    assert done.status == 2
    assert list(Path().iterdir()) == []


# ---- quantize --------------------------------------------------------------------------------


def test_quantize_writes_a_model_that_eval_reads(jaxllm, tiny_checkpoint):
    text = Path("text.txt")
    text.write_text("Once upon a time there was a little dog. " * 40, "utf-8")
    options = ("--method", "rtn", "--bits", 4, "--group", 16, "--option", "clip=true")
    calibration = ("--calibration", text, "--length", 32, "--sequences", 4)
    done = jaxllm("quantize", "--model", tiny_checkpoint, *options, *calibration, "--out", "small", "--json")
    assert done.status == 0, done.err
    assert done.json.keys() == {"out", "weight_bytes", "bits_per_weight", "linear_bits_per_weight", "seconds"}
    assert 5 < done.json["linear_bits_per_weight"] < 6
    again = jaxllm("eval", "--model", "small", "--text", text, "--json")
    assert again.status == 0 and again.json["weight_bytes"] == done.json["weight_bytes"]


def test_keys_and_values_in_eight_bits_change_little(jaxllm, generate, tiny_checkpoint):
    text = Path("text.txt")
    text.write_text("the man in the field " * 8, "utf-8")
    evaluate = ("eval", "--model", tiny_checkpoint, "--text", text, "--json")
    exact, coded = jaxllm(*evaluate).json, jaxllm(*evaluate, "--kv-bits", 8).json
    assert 0 < abs(coded["nll_per_token"] / exact["nll_per_token"] - 1) < 1e-2
    assert generate("--prompt", "the man", "--kv-bits", 8).status == 0


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
    held = generate(*asked, "--kv-hold", "40")
    assert_refused(held, "gates: layers without a window, width and key heads must be")  # they are pico's
    gates = tmp_path.with_name("gates")
    jl.eviction.save_gates(new_gates(jl.load(tiny_checkpoint)[0], "fast"), gates)
    own = ("--kv-gates", gates)
    for more in (("--kv-hold", "40"), ("--kv-ratio", "0.3", "--kv-method", "fast-kvzip")):
        done = generate(*asked, *more, *own)
        assert done.status == 0 and [len(c["token_ids"]) for c in done.json["prompts"]] == [6, 6], done.err
    assert_refused(
        generate(*asked, *own, "--kv-hold", "40", "--kv-method", "h2o"), "goes with kvzip and gates"
    )
    assert_refused(generate(*asked, "--kv-ratio", "2"), "ratio must lie above 0 and be at most 1, got 2.0")


def test_quantize_spends_a_budget(jaxllm, tiny_checkpoint):
    Path("text.txt").write_text("Once upon a time there was a little dog. " * 40, "utf-8")
    choices = [{"method": "rtn", "bits": bits, "group": 16} for bits in (2, 6)]
    Path("budget.json").write_text(json.dumps({"bits": 5.5, "methods": choices}), "utf-8")
    options = ("--recipe", "budget.json", "--calibration", "text.txt", "--length", 32, "--sequences", 4)
    done = jaxllm("quantize", "--model", tiny_checkpoint, *options, "--out", "small", "--json")
    assert done.status == 0, done.err
    assert 4.5 < done.json["linear_bits_per_weight"] <= 5.5


def test_quantize_follows_a_recipe_and_lists_its_methods(jaxllm, tiny_checkpoint):
    rules = [
        {"pattern": r"mlp\.down", "method": None},
        {"pattern": "layers", "method": "dec-dec", "k_chunk": 0, "select": "exact",
         "base": {"method": "rtn", "bits": 8, "group": 8}},
    ]  # fmt: skip
    Path("recipe.json").write_text(json.dumps(rules), "utf-8")
    done = jaxllm("quantize", "--model", tiny_checkpoint, "--recipe", "recipe.json", "--out", "small")
    assert done.status == 0, done.err
    model, _ = jl.load("small")
    kinds = [type(w.get_value()).__name__ for w in (model.layers[0].mlp.down.w, model.layers[0].mlp.up.w)]
    assert kinds == ["Dense", "HostResidual"]
    assert {"rtn", "lnq", "nested-fp"} <= jaxllm("quantize", "--list", "--json").json.keys()


@pytest.mark.parametrize(
    "args, message",
    [
        (("--method", "nope", "--out", "o"), "method must be one of rtn, gptq, .*, got 'nope'"),
        (("--method", "rtn", "--option", "foo=3", "--out", "o"), "rtn has the options bits, .*, got 'foo'"),
        (("--method", "rtn", "--option", "foo", "--out", "o"), "--option must be NAME=JSON, got 'foo'"),
        (("--method", "gptq", "--out", "o"), "hessian need calibration text, got none"),
        (("--method", "rtn", "--bits", 9, "--out", "o"), "bits must be 1 to 8, got"),
        (("--method", "rtn"), "--out and exactly one of --method and --recipe"),
        (("--recipe", "missing.json", "--out", "o"), "No such file or directory: missing.json"),
    ],
)
def test_quantize_refuses_in_one_line_and_leaves_nothing(jaxllm, tiny_checkpoint, args, message):
    assert_refused(jaxllm("quantize", "--model", tiny_checkpoint, *args), message)
