"""`jaxllm quantize`: by a method, a recipe, a budget; refusals."""

import json
import re
from pathlib import Path

import pytest
from command_line import assert_refused

import jaxllm as jl
from jaxllm.models.linears import linear_weights
from jaxllm.quant.methods import METHODS
from jaxllm.weights.dense import Dense
from jaxllm.weights.host_residual import bytes_fetched

RTN = 'base={"method": "rtn", "bits": 3}'


def test_quantize_writes_a_model_that_eval_reads(jaxllm, tiny_checkpoint):
    text = Path("text.txt")
    text.write_text("Once upon a time there was a little dog. " * 40, "utf-8")
    options = ("--method", "rtn", "--bits", 4, "--group-size", 16, "--option", "clip=true")
    calibration = ("--calibration", text, "--length", 32, "--sequences", 4)
    done = jaxllm("quantize", "--model", tiny_checkpoint, *options, *calibration, "--out", "small", "--json")
    assert done.status == 0, done.err
    assert done.json.keys() == {"out", "weight_bytes", "bits_per_weight", "linear_bits_per_weight", "seconds"}
    assert 5 < done.json["linear_bits_per_weight"] < 6
    again = jaxllm("eval", "--model", "small", "--text", text, "--json")
    assert again.status == 0 and again.json["weight_bytes"] == done.json["weight_bytes"]


SLOW = [name for name in METHODS if name not in ("rtn", "nested-fp")]  # the others compile long


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS]
)
def test_every_listed_method_runs_with_its_defaults(jaxllm, tiny_checkpoint, method):
    Path("text.txt").write_text("Once upon a time there was a little dog. " * 40, "utf-8")
    needed = ("--option", "base=rtn") if method == "dec-dec" else ()
    calibration = ("--calibration", "text.txt", "--length", 32, "--sequences", 8)
    model = ("--model", tiny_checkpoint, "--method", method, *needed)
    done = jaxllm("quantize", *model, *calibration, "--out", "small", "--json")
    assert done.status == 0, done.err
    assert {type(w) for w in linear_weights(jl.load("small")[0]).values()} != {Dense}
    listed = jaxllm("quantize", "--list", "--json").json
    assert method in listed and jaxllm("quantize", "--list").out.count("\n") == len(listed)


@pytest.mark.slow
def test_quantize_spends_a_budget(jaxllm, tiny_checkpoint):
    Path("text.txt").write_text("Once upon a time there was a little dog. " * 40, "utf-8")
    choices = [{"method": "rtn", "bits": bits, "group_size": 16} for bits in (2, 6)]
    Path("budget.json").write_text(json.dumps({"bits": 5.5, "methods": choices}), "utf-8")
    options = ("--recipe", "budget.json", "--calibration", "text.txt", "--length", 32, "--sequences", 4)
    done = jaxllm("quantize", "--model", tiny_checkpoint, *options, "--out", "small", "--json")
    assert done.status == 0, done.err
    assert 4.5 < done.json["linear_bits_per_weight"] <= 5.5


def test_quantize_follows_a_recipe_and_lists_its_methods(jaxllm, tiny_checkpoint):
    rules = [
        {"pattern": r"mlp\.down", "method": None},
        {"pattern": "layers", "method": "dec-dec", "k_chunk": 0, "selector": "exact",
         "base": {"method": "rtn", "bits": 8, "group_size": 8}},
    ]  # fmt: skip
    Path("recipe.json").write_text(json.dumps(rules), "utf-8")
    done = jaxllm("quantize", "--model", tiny_checkpoint, "--recipe", "recipe.json", "--out", "small")
    assert done.status == 0, done.err
    model, _ = jl.load("small")
    kinds = [type(w.get_value()).__name__ for w in (model.layers[0].mlp.down.w, model.layers[0].mlp.up.w)]
    assert kinds == ["Dense", "HostResidual"]
    assert {"rtn", "lnq", "nested-fp"} <= jaxllm("quantize", "--list", "--json").json.keys()


@pytest.mark.slow
def test_quantize_tunes_what_is_fetched_for_a_gpu_and_says_so(jaxllm, tiny_checkpoint):
    base = 'base={"method": "rtn", "bits": 3, "group_size": 32}'
    options = ("--method", "dec-dec", "--option", base, "--option", "selector=exact")
    tune = ("--tune", "RTX 4050M", "--slowdown", 0.1)
    done = jaxllm("quantize", "--model", tiny_checkpoint, *options, *tune, "--out", "small", "--json")
    assert done.status == 0, done.err
    kinds = {"attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"}
    assert done.json["k_chunk"].keys() == kinds
    model, _ = jl.load("small")
    for block in model.layers:
        w = block.mlp.gate.w.get_value()
        assert w.k_chunk == done.json["k_chunk"]["mlp.gate"] >= 60
    assert done.json["bytes_fetched_per_token"] == bytes_fetched(model, 1) > 0
    lines = jaxllm("quantize", "--model", tiny_checkpoint, *options, *tune, "--out", "again").out
    assert re.search(r"^k_chunk .*attention.q \d+, ", lines, re.M)


@pytest.mark.parametrize(
    "args, message",
    [
        (("--method", "nope", "--out", "o"), "method must be one of rtn, gptq, .*, got 'nope'"),
        (("--method", "rtn", "--option", "foo=3", "--out", "o"), "rtn has the options bits, .*, got 'foo'"),
        (("--method", "rtn", "--option", "foo", "--out", "o"), "--option must be NAME=VALUE, got 'foo'"),
        (("--method", "gptq", "--out", "o"), "hessian need calibration text, got none"),
        (("--method", "rtn", "--bits", 9, "--out", "o"), "bits must be 1 to 8, got"),
        (("--method", "rtn"), "--out and exactly one of --method and --recipe"),
        (
            ("--method", "rtn", "--option", 'group_size="64"', "--out", "o"),
            "be a whole number, got '64'",
        ),
        (
            ("--method", "rtn", "--option", "symmetric=maybe", "--out", "o"),
            "must be true or false, got 'maybe'",
        ),
        (("--method", "rtn", "--bits", 3, "--option", "bits=4", "--out", "o"), "once, got bits twice"),
        (("--method", "dec-dec", "--out", "o"), "base of dec-dec must be given, .*--option base=rtn"),
        (
            ("--method", "rtn", "--tune", "RTX 4090", "--out", "o"),
            "--tune applies to --method dec-dec, got rtn",
        ),
        (("--method", "rtn", "--slowdown", 0.1, "--out", "o"), "--slowdown applies with --tune, got 0.1"),
        (
            ("--method", "dec-dec", "--option", RTN, "--tune", "H100", "--out", "o"),
            "gpu must be one of RTX 4090, .*, got 'H100'",
        ),
        (("--recipe", "missing.json", "--out", "o"), "No such file or directory: missing.json"),
    ],
)
def test_quantize_refuses_in_one_line_and_leaves_nothing(jaxllm, tiny_checkpoint, args, message):
    assert_refused(jaxllm("quantize", "--model", tiny_checkpoint, *args), message)
