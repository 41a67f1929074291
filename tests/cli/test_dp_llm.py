"""`--method dp-llm` and `--target-bits`: a model that chooses its bits, made, measured and run."""

from pathlib import Path

import pytest
from command_line import assert_refused

import jaxllm as jl
from jaxllm.precision import targets_of

TEXT = "the man and the dog in the sun, a house of the woman. " * 40


@pytest.mark.slow
def test_a_model_that_chooses_is_made_measured_and_run(jaxllm, tiny_checkpoint):
    Path("text.txt").write_text(TEXT)
    done = jaxllm(
        "quantize", "--model", tiny_checkpoint, "--method", "dp-llm", "--target-bits", 3.5,
        "--target-bits", 4, "--memory-bits", 5, "--option", "steps=2", "--option", "estimator=projection",
        "--option", "base.restarts=1", "--calibration", "text.txt", "--length", 32, "--sequences", 8,
        "--out", "small", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert (done.json["target_bits"], done.json["memory_bits"]) == ([3.5, 4.0], 5.0)
    assert targets_of(jl.load("small")[0]) == (3.5, 4.0)
    read = []
    for bits in (3.5, 4.0):
        found = jaxllm(
            "eval", "--model", "small", "--text", "text.txt", "--context", 32, "--target-bits", bits, "--json"
        )
        assert found.status == 0, found.err
        read.append(found.json["realised_bits"])
    assert abs(read[0] - 3.5) < 0.1 and abs(read[1] - 4.0) < 0.1
    there = [Path("text.txt"), Path("small")]
    place = ("--model", "small", "--prompt", "the man", "--max-new-tokens", 3, "--json")
    assert jaxllm("generate", *place, "--target-bits", 4).json["prompts"][0]["token_ids"]
    assert_refused(
        jaxllm("generate", *place, "--target-bits", 3.7),
        "3.5, 4, got 3.7",
        left=there,
    )
    again = jaxllm(
        "quantize", "--model", "small", "--method", "dp-llm", "--calibration", "text.txt", "--out", "twice"
    )
    assert_refused(again, "got one that chooses already", left=there)
    idle = jaxllm(
        "quantize", "--model", "small", "--method", "dp-llm", "--option", "base.restarts=2",
        "--calibration", "text.txt", "--out", "twice",
    )  # fmt: skip
    assert_refused(idle, "the model has planes, of which none are made, got base.restarts", left=there)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--method", "rtn", "--bits", "4", "--target-bits", "3.5"],
            "--target-bits and --memory-bits apply to",
        ),
        (["--method", "dp-llm", "--option", "estimators=linear"], "did you mean 'estimator'"),
        (
            ["--method", "dp-llm", "--option", "estimator=best"],
            "must be one of 'auto', 'published'",
        ),
        (["--method", "dp-llm", "--option", "base.parent=6"], "did you mean 'parent_bits'"),
        (["--method", "dp-llm", "--option", "targets=3"], "must be a list of numbers, got 3"),
        (["--method", "dp-llm", "--target-bits", "4", "--target-bits", "3.5"], "ascending order"),
        (["--method", "dp-llm"], "need calibration text"),
    ],
)
def test_quantize_refuses(jaxllm, tiny_checkpoint, args, message):
    assert_refused(jaxllm("quantize", "--model", tiny_checkpoint, *args, "--out", "small"), message)


@pytest.mark.parametrize("command", [["eval", "--text", "text.txt"], ["generate", "--prompt", "the man"]])
def test_a_model_without_targets_is_refused_one(jaxllm, tiny_checkpoint, command):
    Path("text.txt").write_text(TEXT)
    done = jaxllm(*command, "--model", tiny_checkpoint, "--target-bits", 3.5)
    assert_refused(done, "must have weights that choose their width", left=[Path("text.txt")])


def test_its_options_are_listed(jaxllm):
    assert "dp-llm" in jaxllm("quantize", "--list", "--json").json
    listed = jaxllm("quantize", "--list", "--method", "dp-llm", "--json").json
    assert listed["targets"] == {"type": "a list of numbers", "default": [3.5, 4.0, 4.5]}
