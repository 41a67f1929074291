"""The JSON files of a checkpoint: read with care, and each key of the kind that it must be.

    raw = read_object(path / "config.json")
    check_fields("config.json", raw, {"hidden_size": SIZE, "sliding_window": null_or(SIZE)})

What a file says is checked once, here, before anything is computed from it; so nothing below asks again
whether a size is a number. Booleans are no numbers, and a number is finite.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.storage.metadata import excerpt, parse_json

LARGEST = 2**31 - 1  # positions and token ids are int32


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    must: str
    holds: Callable[[Any], bool]


def whole(least: int) -> Kind:
    """Whole numbers from `least` to 2**31 - 1."""
    return Kind(
        f"a whole number of at least {least} and below 2**31",
        lambda v: type(v) is int and least <= v <= LARGEST,
    )


def number(must: str, holds: Callable[[float], bool]) -> Kind:
    """Numbers that fit float32 and for which something more holds."""
    return Kind(must, lambda v: type(v) in (int, float) and abs(v) < 3e38 and holds(v))


def one_of(*names: str) -> Kind:
    """One of several words."""
    return Kind(" or ".join(names), lambda v: isinstance(v, str) and v in names)


def null_or(kind: Kind) -> Kind:
    """A kind, or null, which is also what a key means that is not there."""
    return Kind(f"{kind.must}, or null", lambda v: v is None or kind.holds(v))


def list_of(kind: Kind) -> Kind:
    """Lists of a kind."""
    return Kind(f"a list, each {kind.must}", lambda v: isinstance(v, list) and all(map(kind.holds, v)))


SIZE, COUNT = whole(1), whole(0)
POSITIVE = number("a number above 0", lambda v: v > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda v: v >= 0)
ABOVE_ONE = number("a number above 1", lambda v: v > 1)
FRACTION = number("a number above 0 and at most 1", lambda v: 0 < v <= 1)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("text", lambda v: isinstance(v, str))
OBJECT = Kind("a JSON object", lambda v: isinstance(v, dict))
TOKENS = Kind(
    "a token id, a list of them, or null",
    lambda v: v is None or COUNT.holds(v) or list_of(COUNT).holds(v),
)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError for what is none."""
    value = parse_json(f"huggingface.load: {file.name}", file.read_bytes(), unique_names=False)
    if not isinstance(value, dict):
        raise ValueError(f"huggingface.load: {file.name} must be a JSON object, got {excerpt(value)}")
    return value


def check_fields(where: str, given: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    """Raises ValueError, in one line, for the first key that is missing or not of its kind.

    where: the object that these are the keys of, for the error.
    """
    for name, kind in fields.items():
        if kind.holds(given.get(name)):
            continue
        if name not in given:
            raise ValueError(f"huggingface.load: {where} must have {name}: {kind.must}")
        raise ValueError(
            f"huggingface.load: {name} of {where} must be {kind.must}, got {excerpt(given[name])}"
        )
