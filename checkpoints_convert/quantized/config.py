"""What the blocks of a config.json say, or the line that says why it cannot be read."""

import re
from collections.abc import Iterable
from typing import Any

from checkpoints_convert.json_fields import FLAG, check_fields, null_or
from jaxllm.storage.metadata import excerpt

SUPPORTED = (
    "gptq (2, 3, 4 or 8 bits), awq (gemm, 4 bits), compressed-tensors (pack-quantized, 4 or 8 bits), "
    "mxfp4, any-precision"
)


def unsupported(what: Any) -> ValueError:
    """The error for a scheme that is not supported."""
    return ValueError(
        f"huggingface.load: weights must be plain floats or of {SUPPORTED}, got a checkpoint quantized by "
        f"another tool: quantization_config names {excerpt(what)}"
    )


def json_object(value: Any, name: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"huggingface.load: {name} must be a JSON object, got {excerpt(value)}")
    return value


def check_flags(given: dict[str, Any], *names: str) -> None:
    """Raises ValueError unless each of these keys is true, false, null or absent."""
    check_fields("quantized weights", given, dict.fromkeys(names, null_or(FLAG)))


REPEATS = 5  # of a pattern: what a name of 60 letters can keep a search busy with grows with its power


def module_pattern(text: str) -> re.Pattern[str]:
    """The pattern of module names that a config gives; one that could search without end is refused."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "x", text, flags=re.DOTALL)  # escapes and classes are one letter
    if re.search(r"\)[*+{]", bare) or len(re.findall(r"[*+{]", bare)) > REPEATS:
        raise ValueError(
            f"huggingface.load: a pattern of modules must repeat no group, and at most {REPEATS} letters, "
            f"got {excerpt(text)}"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"huggingface.load: modules must be named by a regular expression, got {excerpt(text)}: {error}"
        ) from error


def whole_number(given: dict[str, Any], *names: str, allowed=None) -> int:
    """The whole number under one of several names; `allowed` None: a group, at least 1 or -1."""
    value = next((given[name] for name in names if given.get(name) is not None), None)
    good = type(value) is int and (value in allowed if allowed else value == -1 or value >= 1)
    if not good:
        must = ", ".join(map(str, allowed)) if allowed else "-1 or at least 1"
        raise ValueError(
            f"huggingface.load: {names[0]} of quantized weights must be {must}, got {excerpt(value)}"
        )
    assert isinstance(value, int)
    return value


def layers_by_linear(names: Iterable[str]) -> dict[str, set[str]]:
    """The layers that have each linear: "mlp.up_proj" to "model.layers.0", ...; "" has those of no layer."""
    found: dict[str, set[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+?\.\w+\.\d+)\.(.+)", name)
        layer, linear = match.groups() if match else (name, "")
        found.setdefault(linear, set()).add(layer)
    return found
