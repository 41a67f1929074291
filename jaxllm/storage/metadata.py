"""What a file says of itself, in JSON beside it: of which format and version it is, and what it needs to say.

write_meta(out / "heads.json", "jaxllm head scores", 1, {"scores": [[0.5]]})
read_meta("load_heads", path / "heads.json", "jaxllm head scores", 1)["scores"]
"""

import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_meta(file: Path, kind: str, version: int, meta: dict[str, Any], *, indent: int | None = 1) -> None:
    """Writes a JSON object with `kind` as its "format" and its "version" in front."""
    whole = {"format": kind, "version": version} | meta
    file.write_text(json.dumps(whole, indent=indent) + "\n", "utf-8")


def read_meta(
    who: str, file: Path, kind: str, *versions: int, older: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """What `write_meta` wrote, of one of the versions that the caller can read.

    who: whose errors these are. older: makes an object of today's form out of what was written before files
      of this kind said their format; given whatever JSON was read.

    Raises FileNotFoundError where there is none, ValueError for another format or version, in one line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{who}: {file.name} must be in the directory, got {str(file.parent)!r}")
    meta = parse_json(f"{who}: {str(file)!r}", file.read_bytes())
    meta = meta if older is None else older(meta)
    found, version = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else (None, None)
    if found != kind:
        raise ValueError(f"{who}: {file.name} must be of format {kind!r}, got format={excerpt(found)}")
    if type(version) is not int or version not in versions:
        known = " or ".join(map(str, versions))
        raise ValueError(f"{who}: {file.name} must be of version {known}, got version={excerpt(version)}")
    return meta


DEPTH = 64  # of lists and objects in each other: no file of ours or of others' has twenty


def parse_json(what: str, text: bytes, *, unique_names: bool = True) -> Any:
    """JSON in UTF-8, without numbers that JSON has not, and not nested without end.

    what: whose error it is, and of which file. unique_names: no name stands twice in an object; False: the
    last counts, as everywhere. Raises ValueError in one line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice")
        return found

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is no number of JSON")

    try:
        hook = unique if unique_names else None
        value = json.loads(text.decode("utf-8"), object_pairs_hook=hook, parse_constant=refuse)
        if _depth(value) <= DEPTH:
            return value
    except RecursionError:
        pass
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, got {one_line(error)}") from error
    raise ValueError(f"{what} must not be nested more than {DEPTH} deep")


def _depth(value: Any) -> int:
    """How many containers lie in each other, or one more than are allowed."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > DEPTH:
            break
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
    return depth


def one_line(error: BaseException) -> str:
    """An error's reason, without what follows its first line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def is_file_name(text: Any) -> bool:
    """Whether what a file says can be another file's name: no path, and not too long, an ending included."""
    return (
        isinstance(text, str)
        and Path(text).name == text
        and "\0" not in text
        and len(text.encode("utf-8", "replace")) <= 240
    )


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def excerpt(value: Any) -> str:
    """What was given, for an error: its `repr` in one line, of a long or deep one the beginning."""
    text = _SHORT.repr(value).replace("\n", " ")  # an array's has several
    return text if len(text) <= 160 else f"{text[:160]}..."
