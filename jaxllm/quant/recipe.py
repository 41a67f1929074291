"""Which linear gets which method: a recipe, a recipe's file, or a budget for the whole.

A recipe is a list of (pattern, method): the first pattern that is found (re.search) in a linear's name, such
as "layers.3.mlp.down", decides; None leaves it as it is; a name that no pattern matches is an error. One
method alone takes every linear of the blocks.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.quant.method_options import check_method, make_method
from jaxllm.quant.methods.dec_dec import DecDec
from jaxllm.quant.statistics import Grouped, Method, output_groups_of
from jaxllm.storage import former_names
from jaxllm.weights.experts import Experts, is_dense


@dataclasses.dataclass(frozen=True)
class Budget:
    """A wish instead of a recipe: the best choice of a method for each linear within bits a weight."""

    bits: float
    methods: tuple[Method, ...]


def read_recipe(path: Path) -> list[tuple[str, Method | None]] | Budget:
    """A recipe from a JSON file: a list of {"pattern": ..., "method": name or null, option: value, ...}.

    Or {"bits": 2.5, "methods": [{"method": name, option: value, ...}, ...]}, a budget for the whole.
    Raises ValueError, in one line, for anything else.
    """
    try:
        rules = json.loads(path.read_bytes(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
        return _budget(rules) if isinstance(rules, dict) else _rules(rules)
    except _NotARecipe as error:
        raise ValueError(f"quantize: {str(path)!r} must be a recipe, {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"quantize: a recipe must be a JSON file, got {str(path)!r}: {error}") from error


class _NotARecipe(Exception):
    """What a recipe must have, and what the file has in its place."""


def _rules(rules: Any) -> list[tuple[str, Method | None]]:
    if not isinstance(rules, list) or not rules:
        raise _NotARecipe(f'a list of {{"pattern", "method", options}}, got {_brief(rules)}')
    recipe: list[tuple[str, Method | None]] = []
    for rule in rules:
        if not isinstance(rule, dict) or not {"pattern", "method"} <= rule.keys():
            raise _NotARecipe(f'where each rule has "pattern" and "method", got {_brief(rule)}')
        pattern = rule["pattern"]
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError) as error:
            raise _NotARecipe(f'where "pattern" is a regular expression, got {_brief(pattern)}') from error
        recipe.append((pattern, _method({key: rule[key] for key in rule if key != "pattern"})))
    return recipe


def _budget(wish: dict[str, Any]) -> Budget:
    if wish.keys() != {"bits", "methods"}:
        raise _NotARecipe(f'a list of rules or a budget of "bits" and "methods", got {_brief(wish)}')
    bits, methods = wish["bits"], wish["methods"]
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
        raise _NotARecipe(f'where "bits" is a number above 0, got {_brief(bits)}')
    if not isinstance(methods, list) or not methods:
        raise _NotARecipe(f'where "methods" is a list of some, got {_brief(methods)}')
    chosen = []
    for options in methods:
        method = _method(options)
        if method is None:
            raise _NotARecipe(f"where each method of a budget has a name, got {_brief(options)}")
        chosen.append(method)
    return Budget(bits, tuple(chosen))


def _method(options: Any) -> Method | None:
    """The method of {"method": name or null, option: value, ...}."""
    if not isinstance(options, dict) or "method" not in options:
        raise _NotARecipe(f'where each method is {{"method": name, ...}}, got {_brief(options)}')
    more = {key: options[key] for key in options if key != "method"}
    if options["method"] is not None:
        return make_method(options["method"], more)
    if more:
        raise _NotARecipe(f'where "method": null has no options, got {_brief(options)}')
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object by the names of now; one of two values of a name would be lost."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise _NotARecipe(f"where an object has each name once, got {twice[0]!r} twice")
    return former_names.options(pairs)


def _refuse_constant(name: str) -> Any:
    """Raises for NaN and the infinities, which Python reads and JSON does not have."""
    raise _NotARecipe(f"where numbers are finite, got {name}")


def _brief(value: Any) -> str:
    """What was given, as JSON; a long one is cut."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


Recipe = Method | Sequence[tuple[str, Method | None]]


def methods_by_linear(method: Recipe, weights: dict[str, Any]) -> dict[str, Method]:
    """What each linear is quantized by, in the model's order."""
    recipe = list(method) if isinstance(method, Sequence) else [(r"\.", method)]
    used = [False] * len(recipe)
    plan: dict[str, Method] = {}
    for name, w in weights.items():
        i = next((i for i, (pattern, _) in enumerate(recipe) if _is_of(pattern, name)), None)
        if i is None:
            if "." not in name:  # an embedding or the head, which nobody asked for
                continue
            raise ValueError(f"quantize: the recipe must match every linear, got none for {name}")
        used[i] = True
        chosen = recipe[i][1]
        if chosen is None:
            continue
        if not is_dense(w):
            raise ValueError(f"quantize: {name} must be dense, got {type(w).__name__}")
        check_method(chosen)
        if isinstance(w, Experts) and _fetches(chosen):
            raise ValueError(
                f"quantize: {name} must have a rule of its own, as experts cannot fetch residuals from host "
                f"memory (DecDec), got {chosen}"
            )
        _check_sizes(name, chosen, *w.shape[-2:])
        plan[name] = chosen
    if not all(used):
        raise ValueError(f"quantize: every pattern must match a linear, got {recipe[used.index(False)][0]!r}")
    return plan


def _fetches(method: Any) -> bool:
    """Whether a method, or the base of it, leaves residuals in host memory."""
    while method is not None and not isinstance(method, DecDec):
        method = getattr(method, "base", None)
    return method is not None


def _is_of(pattern: str, name: str) -> bool:
    """Whether a rule is about a linear; one outside of blocks must be called by its name."""
    return re.search(pattern, name) is not None and ("." in name or name in pattern)


def _check_sizes(name: str, method: Method, K: int, N: int) -> None:
    group_size = method.group_size if isinstance(method, Grouped) else None
    output_groups = output_groups_of(method)
    if group_size is not None and group_size > K:
        raise ValueError(f"quantize: group_size must be at most K of {name}, got {group_size=}, {K=}")
    if N % output_groups:
        raise ValueError(f"quantize: output_groups must divide N of {name}, got {output_groups=}, {N=}")
