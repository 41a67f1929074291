"""What commands read and write: results on stdout, notes on stderr, JSON alone."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import click

RESULTS = "jaxllm.results"  # of a context: where the one JSON object goes


def tell(result: dict[str, Any], as_json: bool) -> None:
    """A result: one JSON object, or a line a field."""
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        click.echo(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")


def read_text(path: Path, option: str) -> str:
    """A file's text; the error says which option named it."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: the file must be UTF-8, got {path} with a bad byte at {error.start}"
        ) from error


def note(text: str) -> None:
    """A line for people: stderr, never stdout."""
    click.echo(text, err=True)


def shows_progress() -> bool:
    """Whether progress is drawn: where stderr is a terminal, for a log has no use for it."""
    return sys.stderr.isatty()


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    results = click.get_current_context().meta[RESULTS]
    print(to_json(value), file=results, flush=True)


def to_json(value: dict[str, Any], **options: Any) -> str:
    """JSON as its standard has it; ValueError, which names the field, for a number that is none."""
    for name, number in _numbers(value, ""):
        if not math.isfinite(number):
            raise ValueError(f"--json: {name} must be a finite number, got {number}")
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every float within a value, by its path: "prompts.0.logprobs.3"."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))


def results_alone(context: click.Context, parameter: click.Parameter, wanted: bool) -> bool:
    """What `--json` does: keeps stdout for the one object; what libraries print there goes to stderr."""
    if wanted:
        context.meta[RESULTS] = context.with_resource(_stdout_as_stderr())
    return wanted


@contextmanager
def _stdout_as_stderr() -> Iterator[TextIO]:
    """The stream that was stdout, while descriptor 1, of C code and child processes too, is stderr's."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(stdout, "w", encoding="utf-8", closefd=False) as results, redirect_stdout(sys.stderr):
            yield results
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
