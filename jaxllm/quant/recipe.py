"""Which linear gets which method: a recipe, a recipe's file, or a budget for the whole.

A recipe is a list of (pattern, method): the first pattern that is found (re.search) in a linear's name, such
as "layers.3.mlp.down", decides; None leaves it as it is; a name that no pattern matches is an error. One
method alone takes every linear of the blocks.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.quant.methods import make_method
from jaxllm.quant.statistics import Grouped, Method, output_groups_of
from jaxllm.storage import former_names
from jaxllm.weights.dense import Dense


@dataclasses.dataclass(frozen=True)
class Budget:
    """A wish instead of a recipe: the best choice of a method for each linear within bits a weight."""

    bits: float
    methods: tuple[Method, ...]


def read_recipe(path: Path) -> list[tuple[str, Method | None]] | Budget:
    """A recipe from a JSON file: a list of {"pattern": ..., "method": name or null, option: value, ...}.

    Or {"bits": 2.5, "methods": [{"method": name, option: value, ...}, ...]}, a budget for the whole.
    """

    def make(options: dict[str, Any]) -> Method | None:
        name = options.pop("method")
        return None if name is None else make_method(name, options)

    try:
        rules = json.loads(path.read_text("utf-8"), object_pairs_hook=former_names.options)
        if isinstance(rules, dict):
            chosen = [make(dict(rule)) for rule in rules.pop("methods")]
            if None in chosen or not isinstance(rules["bits"], int | float) or len(rules) > 1:
                raise TypeError('a budget has "bits", a number, and "methods", no more')
            return Budget(rules["bits"], tuple(method for method in chosen if method is not None))
        recipe: list[tuple[str, Method | None]] = []
        for rule in map(dict, rules):
            recipe.append((rule.pop("pattern"), make(rule)))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            'quantize: a recipe must be a JSON list of {"pattern", "method", options}, '
            f"got {str(path)!r}: {error}"
        ) from error
    return recipe


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
        if not isinstance(w, Dense):
            raise ValueError(f"quantize: {name} must be dense, got {type(w).__name__}")
        _check_sizes(name, chosen, *w.shape)
        plan[name] = chosen
    if not all(used):
        raise ValueError(f"quantize: every pattern must match a linear, got {recipe[used.index(False)][0]!r}")
    return plan


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
