"""The command line as a program: help, exit statuses, interruption."""

import re
import subprocess
import sys

import pytest

import jaxllm as jl
from jaxllm import cli

COMMANDS = ("demo", "generate", "eval", "convert", "quantize", "train")


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "train pico", "train gates", "train stories"])
def test_every_command_explains_itself(jaxllm, command):
    done = jaxllm(*command.split(), "--help")
    assert done.status == 0
    assert "--json" in done.out


def test_help_lists_all_commands(jaxllm):
    done = jaxllm("--help")
    assert done.status == 0
    assert all(re.search(rf"^  {name} ", done.out, re.M) for name in COMMANDS)


def test_version_is_the_package_s(jaxllm):
    assert jl.__version__ in jaxllm("--version").out


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
