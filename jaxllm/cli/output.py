"""What commands read and write: results on stdout, notes on stderr."""

import json
import math
from pathlib import Path
from typing import Any

import click


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


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command; null for a number that JSON has not, as a perplexity out of range."""
    click.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with None for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
