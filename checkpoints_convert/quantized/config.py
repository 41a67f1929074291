"""What the blocks of a config.json say, or the line that says why it cannot be read."""

from typing import Any

SUPPORTED = (
    "gptq (2, 3, 4 or 8 bits), awq (gemm, 4 bits), compressed-tensors (pack-quantized, 4 or 8 bits), "
    "any-precision"
)


def unsupported(what: Any) -> ValueError:
    """The error for a scheme that is not supported."""
    return ValueError(
        f"huggingface.load: weights must be plain floats or of {SUPPORTED}, got a checkpoint quantized by "
        f"another tool: quantization_config names {what!r}"
    )


def json_object(value: Any, name: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"huggingface.load: {name} must be a JSON object, got {value!r}")
    return value


def whole_number(given: dict[str, Any], *names: str, allowed=None) -> int:
    """The whole number under one of several names; `allowed` None: a group, at least 1 or -1."""
    value = next((given[name] for name in names if given.get(name) is not None), None)
    good = type(value) is int and (value in allowed if allowed else value == -1 or value >= 1)
    if not good:
        must = ", ".join(map(str, allowed)) if allowed else "-1 or at least 1"
        raise ValueError(f"huggingface.load: {names[0]} of quantized weights must be {must}, got {value!r}")
    assert isinstance(value, int)
    return value
