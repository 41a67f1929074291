"""Options of methods as text and recipe files give them: right values arrive, wrong ones are one line."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import jaxllm as jl
from jaxllm.quant.method_options import describe_options, make_method
from jaxllm.quant.methods import METHODS
from jaxllm.quant.recipe import Budget, methods_by_linear, read_recipe
from jaxllm.weights.dense import Dense

BASE = {"dec-dec": {"base": "rtn"}}  # what must be given

# Values by what they are, to try each option with: none is of two types that an option may have.
VALUES = {
    "a whole number": [2**70, -1, 0, 2],
    "a finite number": [0.25, -1e9],
    "true or false": [True, False],
    "null": [None],
    "": ["64", "maybe", float("nan"), float("inf"), [], [1], {}, {"bits": 3}],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_option_takes_its_type_alone_and_says_so_in_one_line(name):
    for option, about in describe_options(name).items():
        for kind, values in VALUES.items():
            for value in values:
                fits = kind in about["type"] if kind else False
                fits |= kind == "a whole number" and "a finite number" in about["type"]
                try:
                    made = make_method(name, BASE.get(name, {}) | {option: value})
                except ValueError as error:
                    assert "\n" not in str(error)
                    continue
                assert fits, (option, value)
                for field in option.split("."):
                    made = getattr(made, field)
                assert made is value or made == value


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_options_is_the_methods_own_fields_and_defaults(name):
    entry, options = METHODS[name].make, describe_options(name)
    own = {key for key in options if "." not in key}
    assert own == {field.name for field in dataclasses.fields(entry)}
    given = {key: about["default"] for key, about in options.items() if "default" in about}
    assert make_method(name, BASE.get(name, {}) | given) == make_method(name, BASE.get(name, {}))


def test_options_of_the_base_are_written_behind_a_dot_or_as_an_object():
    want = jl.DecDec(base=jl.Rtn(bits=3, group_size=16), k_chunk=4)
    behind = {"base": "rtn", "base.bits": 3, "base.group_size": 16, "k_chunk": 4}
    inside = {"base": {"method": "rtn", "bits": 3, "group_size": 16}, "k_chunk": 4}
    assert make_method("dec-dec", behind) == make_method("dec-dec", inside) == want
    usual = jl.Rotate().base  # keeps what is not named
    assert make_method("rotate", {"base.bits": 3}) == jl.Rotate(base=dataclasses.replace(usual, bits=3))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("DashQ", {}, "method must be one of rtn, .*, got 'DashQ', did you mean 'dash-q'?"),
        (None, {}, "method must be one of rtn, .*, got None"),
        ("rtn", {"group": 8}, "rtn has the options bits, .*, got 'group', did you mean 'group_size'?"),
        ("rtn", {"bits.x": 8}, "got 'bits.x', did you mean 'bits'?"),
        ("mixed-two-bit", {"bits": 3}, "got 'bits', did you mean 'target_bits'?"),
        ("dec-dec", {"bits": 3}, "got 'bits', did you mean 'base.bits'?"),
        ("dec-dec", {}, r"base of dec-dec must be given, .*--option base=rtn .*, got none"),
        ("dec-dec", {"base": "rtn", "base.bitz": 3}, "rtn has the options .*, got 'bitz'"),
        ("rtn", {"group_size": "64"}, "group_size of rtn must be a whole number, got '64'"),
        ("gptq", {"bits": 3.5}, "bits of gptq must be a whole number, got 3.5"),
        ("gptq", {"symmetric": "maybe"}, "symmetric of gptq must be true or false, got 'maybe'"),
        ("rtn", {"group_size": -3}, "group_size must be at least 1, got group_size=-3"),
        ("gptq", {"damping": float("nan")}, "damping of gptq must be a finite number, got nan"),
        ("lnq", {"seed": 2**32}, f"seed of lnq must be 0 to {2**32 - 1}, got {2**32}"),
        ("dash-q", {"mode": "fast"}, "mode of dash-q must be one of 'search', 'paper', got 'fast'"),
    ],
)
def test_wrong_names_and_values_are_named_with_what_must_hold(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, options)


def test_a_method_made_in_python_is_held_to_the_same_table():
    weights = {"layers.0.mlp.up": Dense(jnp.ones((32, 32)))}
    for field, value, message in (
        ("bits", 3.5, "bits of rtn must be a whole number, got 3.5"),
        ("symmetric", "no", "symmetric of rtn must be true or false, got 'no'"),
        ("scale_bits", "8", "scale_bits of rtn must be a whole number or null, got '8'"),
    ):
        base = jl.Rtn()
        object.__setattr__(base, field, value)  # beartype, which runs with tests, lets no other way
        method = jl.DecDec(base=base)
        with pytest.raises(ValueError, match=message):
            methods_by_linear(method, weights)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be a JSON file"),
        ("[{", "must be a JSON file"),
        ("[" * 100_000, "must be a JSON file"),
        ("3", 'a list of {"pattern", "method", options}, got 3'),
        ("[]", "a list of"),
        ("[3]", 'each rule has "pattern" and "method", got 3'),
        ('[{"method": "rtn"}]', 'each rule has "pattern" and "method", got'),
        ('[{"pattern": "(", "method": "rtn"}]', '"pattern" is a regular expression, got "[(]"'),
        ('[{"pattern": 1, "method": "rtn"}]', '"pattern" is a regular expression, got 1'),
        ('[{"pattern": ".", "method": null, "bits": 3}]', '"method": null has no options'),
        ('[{"pattern": ".", "method": "rtn", "bits": NaN}]', "numbers are finite, got NaN"),
        (
            '[{"pattern": ".", "method": "rtn", "bits": 3, "bits": 4}]',
            "an object has each name once, got 'bits' twice",
        ),
        ('[{"pattern": ".", "method": "rtn", "bits": "3"}]', "bits of rtn must be a whole number, got '3'"),
        ('[{"pattern": ".", "method": ["rtn"]}]', r"method must be one of .*, got \['rtn'\]"),
        ('{"bits": 3}', 'a budget of "bits" and "methods"'),
        ('{"bits": true, "methods": [{"method": "rtn"}]}', '"bits" is a number above 0, got true'),
        ('{"bits": 3, "methods": []}', '"methods" is a list of some'),
        ('{"bits": 3, "methods": [{"method": null}]}', "each method of a budget has a name"),
        ('{"bits": 3, "methods": ["rtn"]}', 'each method is {"method": name, ...}, got "rtn"'),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text, message, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_recipe_and_a_budget_come_from_files(tmp_path):
    file = tmp_path / "recipe.json"
    base = {"method": "rtn", "bits": 3}
    rules = [{"pattern": "head", "method": None}, {"pattern": ".", "method": "dec-dec", "base": base}]
    file.write_text(json.dumps(rules))
    assert read_recipe(file) == [("head", None), (".", jl.DecDec(base=jl.Rtn(bits=3)))]
    file.write_text(json.dumps({"bits": 2.5, "methods": [{"method": "rtn", "bits": 2}, {"method": "rtn"}]}))
    assert read_recipe(file) == Budget(2.5, (jl.Rtn(bits=2), jl.Rtn()))
