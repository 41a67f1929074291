"""Fixtures of the command line: run in this process, in an empty folder."""

import pytest
from command_line import Done

from jaxllm import cli


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
