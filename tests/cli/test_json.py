"""`--json`: one object alone on stdout whatever libraries print, without NaN, and no bars in a log."""

import json
import os
import types
from functools import wraps
from pathlib import Path

import click
import pytest

import jaxllm as jl
from jaxllm import files
from jaxllm.cli import demo
from jaxllm.cli.commands import cli
from jaxllm.cli.output import to_json
from jaxllm.training.pico import corpus, gates, recipe, stories
from pallas_kernels import measure

NOISE = "a library speaks\n"
TEXT = ("--text", "text.txt")
CALIBRATION = ("--calibration", "text.txt", "--length", 32, "--sequences", 4)
DATA = ("--data", ".", "--out", "new")

# A command's arguments; the function below it that gets noisy; what it gives in place of long work.
LOADED = (jl, "load", None)
CASE = ("--case", "dequant_gemm, llama-3-8b q, 1 row, triton")
RUN = types.SimpleNamespace(steps=1, tokens=2, loss=3.0)
TRAINED = types.SimpleNamespace(losses=[0.5], seconds=1.0)
COMMANDS = {
    "demo": ((), (demo, "run", {"out": "report"})),
    "generate": (("--prompt", "the", "--max-new-tokens", 2), LOADED),
    "eval": (TEXT, LOADED),
    "convert": (("new",), (files, "convert", None)),
    "quantize": (("--method", "rtn", "--option", "clip=true", *CALIBRATION, "--out", "new"), LOADED),
    "train pico": ((*DATA, "--steps", 1), (recipe, "train_member", RUN)),
    "train gates": (DATA, (gates, "train_pico_gates", (None, TRAINED))),
    "train stories": (("--out", "new"), (stories, "write_stories", 5)),
    "bench kernels": (CASE, (measure, "require_gpu", "a GPU")),
    "bench tune": (CASE, (measure, "require_gpu", "a GPU")),
}


def all_commands(group: click.Group, before: str = "") -> list[str]:
    """Names of the commands of a group, of groups within it too."""
    names = []
    for name, command in group.commands.items():
        inner = isinstance(command, click.Group)
        names += all_commands(command, f"{before}{name} ") if inner else [before + name]
    return names


def strict(text: str) -> dict:
    """JSON as its standard has it."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", all_commands(cli))
def test_stdout_has_one_json_object_alone(jaxllm, monkeypatch, tiny_checkpoint, name):
    args, (place, function, given) = COMMANDS[name]
    work = getattr(place, function)

    @wraps(work)
    def noisy(*args, **options):
        print(NOISE, end="")
        os.write(1, NOISE.encode())  # as C code does
        return work(*args, **options) if given is None else given

    monkeypatch.setattr(place, function, noisy)
    monkeypatch.setattr(corpus, "read", lambda data, stories: [])
    monkeypatch.setattr(gates, "save_pico_gates", lambda *args, **options: None)
    monkeypatch.setattr(measure, "measure", lambda case, rounds: {"kernel": [2e-6]})
    monkeypatch.setattr(measure, "rates", lambda: {"bytes_per_s": 1e12})
    monkeypatch.setattr(measure, "tune", lambda case, rounds: {"case": case.name})
    Path("text.txt").write_text("the man and the dog in the sun, " * 10, "utf-8")
    source = (tiny_checkpoint,) if name == "convert" else ("--model", tiny_checkpoint)
    if name in ("demo", "train pico", "train gates") or name.startswith("bench"):
        source = ()
    done = jaxllm(*name.split(), *source, *args, "--json")
    assert done.status == 0, done.err
    assert done.out.count("\n") == 1 and isinstance(strict(done.out), dict)
    rest = done.err.replace(NOISE, "", 2)
    assert len(rest) == len(done.err) - 2 * len(NOISE)
    assert rest == ""  # no progress: stderr is no terminal


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_does_not_have_is_one_line_that_names_the_field(jaxllm, monkeypatch, number):
    with pytest.raises(ValueError, match=r"--json: prompts.0.logprobs.1 must be a finite number, got"):
        to_json({"prompts": [{"logprobs": [-1.0, number]}]})
    monkeypatch.setattr(demo, "run", lambda *args, **options: {"seconds": number})
    done = jaxllm("demo", "--json")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"jaxllm: --json: seconds must be a finite number, got {number}\n"
