"""The quantization methods by the names that the command line and recipes give them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxllm.quant.any_precision import AnyPrecision
from jaxllm.quant.awq import Awq
from jaxllm.quant.dash_q import DashQ
from jaxllm.quant.dec_dec import DecDec
from jaxllm.quant.gptq import Gptq
from jaxllm.quant.lnq import Lnq
from jaxllm.quant.mixed_two_bit import MixedTwoBit
from jaxllm.quant.nested_fp import NestedFp
from jaxllm.quant.rotate import Rotate
from jaxllm.quant.rtn import Rtn
from jaxllm.quant.squeeze_llm import SqueezeLlm
from jaxllm.quant.stats import Method


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method, and what is said of it in a list."""

    make: type
    bits: str
    exactness: str
    about: str


METHODS = {
    "rtn": Entry(Rtn, "1-8", "lossy", "round to nearest between each group's ends"),
    "gptq": Entry(Gptq, "1-8", "lossy", "column by column, errors made good in later columns"),
    "awq": Entry(Awq, "1-8", "lossy", "inputs scaled by their activations, then rounded"),
    "squeeze-llm": Entry(SqueezeLlm, "1-8", "lossy", "Fisher-weighted k-means, a table an output"),
    "any-precision": Entry(AnyPrecision, "2-8 nested", "lossy", "one weight to be read at several widths"),
    "lnq": Entry(Lnq, "1-8", "lossy, its objective monotone", "tables and codes in turns on a Hessian"),
    "dash-q": Entry(DashQ, "1-8", "lossy", "weighted least squares by group, few samples"),
    "mixed-two-bit": Entry(MixedTwoBit, "2 and 4 mixed", "lossy", "2/4-bit columns, 16-bit outliers"),
    "nested-fp": Entry(NestedFp, "8 in 16", "lossless (fp16 mode)", "FP8 and FP16 from the same 16 bits"),
    "dec-dec": Entry(DecDec, "its base's", "lossy", "a base, and residual rows fetched for large inputs"),
    "rotate": Entry(Rotate, "its base's", "lossy", "a base in a rotated basis, activations of 4 or 8 bits"),
}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method called `name` with `options`; raises ValueError for a name or an option it does not have."""
    if name not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {name!r}")
    made = METHODS[name].make
    known = {field.name for field in dataclasses.fields(made)}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"quantize: {name} has the options {', '.join(sorted(known))}, got {unknown[0]!r}")
    if isinstance(options.get("base"), dict):  # a method of a method: {"method": "rtn", "bits": 3}
        base = dict(options["base"])
        options = options | {"base": make_method(base.pop("method", None), base)}
    return made(**options)


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
        rules = json.loads(path.read_text("utf-8"))
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
