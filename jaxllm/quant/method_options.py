"""The options of a method as people write them, for the command line and recipe files: a name and a value.

The table is the method itself: the fields of its dataclass, their types and defaults. A method that works on
another one's result has that one as `base`; its options are written behind a dot.

    make_method("gptq", {"bits": 3, "symmetric": True})
    make_method("dec-dec", {"base": "rtn", "base.bits": 3})
    make_method("dec-dec", {"base": {"method": "rtn", "bits": 3}})     # the same, as recipe files have it
    make_method("rotate", {"base.bits": 3})                            # its usual base, in 3 bits
"""

import dataclasses
import difflib
import numbers
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from jaxllm.quant.methods import METHODS
from jaxllm.quant.statistics import Method

LARGEST = sys.float_info.max
LARGEST_SEED = 2**32 - 1  # JAX cuts larger ones down, so that two seeds would be one


def make_method(name: Any, options: dict[str, Any]) -> Method:
    """The method called `name` with `options`, its defaults where none is given.

    Raises ValueError, in one line, for a name or an option that there is not, for a value of another type or
    beyond its range, and for a base that is needed and not given.
    """
    return fill_options(name, _class_of(name), options)


def fill_options(name: str, made: type, options: dict[str, Any]) -> Any:
    """The same of any dataclass of options: `made` with `options`, called `name` in errors."""
    known = option_types(made)
    given: dict[str, Any] = {}
    of_part: dict[str, dict[str, Any]] = {}  # what is written behind a dot
    for key, value in options.items():
        field, dot, rest = key.partition(".")
        if field not in known or (dot and known[field] is not Method):
            raise _unknown(name, made, key)
        if dot:
            of_part.setdefault(field, {})[rest] = value
        else:
            given[field] = value
    defaults = _defaults(made)
    for field, hint in known.items():
        if field not in given and field not in of_part and field in defaults:
            continue
        if hint is Method:
            part = given.get(field, defaults.get(field))
            given[field] = _part(f"{field} of {name}", part, of_part.get(field, {}))
        _check(f"{field} of {name}", field, given[field], hint)
        if float in _kinds(hint) and _is_of(given[field], int):
            given[field] = float(given[field])
        if typing.get_origin(hint) is tuple:
            given[field] = tuple(map(float, given[field]))
    return made(**given)


def describe_options(name: Any) -> dict[str, dict[str, Any]]:
    """What the method called `name` can be told: of each option its type in words, and any default.

    Options of a usual base come with it, behind a dot. Raises ValueError for a name that there is not.
    """
    return describe_fields(_class_of(name))


def describe_fields(made: type) -> dict[str, dict[str, Any]]:
    """The same of any dataclass of options."""
    defaults, found = _defaults(made), {}
    for field, hint in option_types(made).items():
        found[field] = {"type": _in_words(hint)}
        if field not in defaults:
            continue
        default = defaults[field]
        if hint is not Method:
            found[field]["default"] = default
            continue
        base = _name_of(default)
        found[field]["default"] = base
        for key, option in describe_options(base).items():
            found[f"{field}.{key}"] = option | {"default": getattr(default, key, option.get("default"))}
    return found


def check_method(method: Method) -> None:
    """Raises ValueError unless the fields of a method of this library have their types."""
    for name, entry in METHODS.items():
        if type(method) is entry.make:
            for field, hint in option_types(type(method)).items():
                value = getattr(method, field)
                _check(f"{field} of {name}", field, value, hint)
                if hint is Method:
                    check_method(value)


def option_types(method: type) -> dict[str, Any]:
    """The type of each option of a method."""
    hints = typing.get_type_hints(method)
    return {field.name: hints[field.name] for field in dataclasses.fields(method)}


def _class_of(name: Any) -> type:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"quantize: method must be one of {', '.join(METHODS)}, got {name!r}{_nearest(name, METHODS)}"
        )
    return METHODS[name].make


def _name_of(method: Method) -> str:
    return next(name for name, entry in METHODS.items() if type(method) is entry.make)


def _defaults(made: type) -> dict[str, Any]:
    fields = dataclasses.fields(made)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _part(what: str, value: Any, more: dict[str, Any]) -> Method:
    """A method within a method: by its name, by {"method": its name, option: value, ...}, or as it is."""
    if isinstance(value, str):
        value = {"method": value}
    elif isinstance(value, Method):
        value = {"method": _name_of(value)} | vars(value)
    if not isinstance(value, dict) or "method" not in value:
        got = "none" if value is None else repr(value)
        raise ValueError(
            f'quantize: {what} must be given, a method\'s name or {{"method": name, option: value}} '
            f"(--option base=rtn --option base.bits=3), got {got}"
        )
    return make_method(value["method"], {key: value[key] for key in value if key != "method"} | more)


def _unknown(name: str, made: type, key: str) -> ValueError:
    """The error for an option that a method does not have."""
    known = option_types(made)
    if "base" in known and key.partition(".")[0] not in known and _is_any_methods(key):
        nearest = f", did you mean 'base.{key}'?"
    else:
        nearest = _nearest(key, known)
    return ValueError(f"quantize: {name} has the options {', '.join(sorted(known))}, got {key!r}{nearest}")


def _is_any_methods(option: str) -> bool:
    return any(option in option_types(entry.make) for entry in METHODS.values())


def _nearest(got: Any, known: Iterable[str]) -> str:
    """A hint at the name that was probably meant: one that contains what was given, or looks like it."""
    word = str(got).lower()
    near = [name for name in known if len(word) > 2 and word in name]
    for spelling in (word, word.replace("_", "-")):
        near = near or difflib.get_close_matches(spelling, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _check(what: str, field: str, value: Any, hint: Any) -> None:
    """Raises ValueError unless a value is of the type that a field is declared with."""
    if not _is_of(value, hint):
        raise ValueError(f"quantize: {what} must be {_in_words(hint)}, got {value!r}")
    if field == "seed" and not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"quantize: {what} must be 0 to {LARGEST_SEED}, got {value}")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as strictly as JSON tells types apart: 1 is no bool and 1.0 no int."""
    return any(_is_of_kind(value, kind) for kind in _kinds(hint))


def _is_of_kind(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(
            _is_of_kind(x, typing.get_args(kind)[0]) for x in value
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and bool(abs(typing.cast(Any, value)) <= LARGEST)  # NaN is not
    return isinstance(value, kind)  # bool, None, a method


def _in_words(hint: Any) -> str:
    return " or ".join(map(_kind_in_words, _kinds(hint)))


def _kind_in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        names = typing.get_args(kind)
        return ("one of " if len(names) > 1 else "") + ", ".join(map(repr, names))
    if typing.get_origin(kind) is tuple:
        return "a list of numbers"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "null"}
    return words.get(kind, "a method")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of which a union is made; the type itself where it is none."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
