"""What files of earlier versions call things, and what these are called now. Read, never written.

former_names.FIELDS["Affine"]["zero"]                       # "zero_point": of a class in a manifest
former_names.options([("group", 32)])                       # {"group_size": 32}: of a method or a calibration
"""

import re
from collections.abc import Iterable
from typing import Any

# By class: a field's name in 0.1.0, and now.
FIELDS = {
    "Affine": {"zero": "zero_point", "group": "group_size"},
    "MixedColumns": {"zero": "zero_point", "four_zero": "four_zero_point"},
    "QuantizedRows": {"group": "group_size", "size": "head_dim"},
    "DenseCache": {"rows": "capacity", "base": "start", "empty": "is_first_chunk"},
    "Context": {
        "head": "page_head",
        "filled": "page_lengths",
        "first": "page_offsets",
        "sizes": "context_lengths",
        "slot": "context_of_request",
        "readers": "max_readers",
    },
    "HostResidual": {"hint": "selector_state", "select": "selector"},
}

# By class: fields that came later, and the field of which they are a copy where a file has none.
LATER = {"DenseCache": {"extents": "lengths"}}

# By class: fields that hold bytes now, and what these were called the bits of.
BYTES = {"NestedFloat": {"upper": "float8_e4m3fn"}}

# Options of methods and of calibrations: in recipes, calibration.json and run.json.
OPTIONS = {
    "group": "group_size",
    "groups": "output_groups",
    "zero_code": "integer_zero_point",
    "select": "selector",
}

# Options that one version has and another has not, at the value that means the same as none.
IDLE = {
    "selection": "gain",
    "metadata": "4",
    "per_block": False,
    "narrow_steps": False,
    "outliers": None,
    "max_exceptions": 1 / 16,
}


def options(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The options of a JSON object, by what they are called now."""
    named = {OPTIONS.get(name, name): value for name, value in pairs}
    if named.get("metadata") == "334":
        named["narrow_steps"] = bool(named.pop("metadata"))
    return {name: value for name, value in named.items() if name not in IDLE or value != IDLE[name]}


def method(text: str) -> str:
    """A method's `repr`, then or now, in the names of now and without options that change nothing."""
    text = re.sub(r"\w+(?==)", lambda match: OPTIONS.get(match[0], match[0]), text)
    text = text.replace("metadata='334'", "narrow_steps=True")
    idle = "|".join(re.escape(f"{name}={value!r}") for name, value in IDLE.items())
    return re.sub(rf", (?:{idle})(?=[,)])", "", text)


def type_in_0_1_0(path: str, dtype: Any) -> str:
    """The type of a weight's array as version 0.1.0 had it, by the array's path."""
    former = {field: was for fields in BYTES.values() for field, was in fields.items()}
    return former.get(re.findall(r"\w+", path)[-1], str(dtype))


def path_in_0_1_0(path: str) -> str:
    """The path of a weight's array as version 0.1.0 had it."""
    former = {new: old for fields in FIELDS.values() for old, new in fields.items()}
    return re.sub(r"\w+", lambda match: former.get(match[0], match[0]), path)
