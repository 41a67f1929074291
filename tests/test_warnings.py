"""Warnings fail a run where our modules are at fault, and are only reported where others are."""

import os
import re
import subprocess
import sys

import pytest

# Each case is a test of the inner run. `says(module)` is a function of that module which warns;
# `calls(module, f)` one that calls f.
PROGRAM = """
import io
import warnings

import pytest

CATEGORIES = ["DeprecationWarning", "FutureWarning", "UserWarning", "ResourceWarning"]


def function(module, body, **names):
    space = {"__name__": module, "warnings": warnings, **names}
    exec(compile(f"def f():\\n    {body}", module.replace(".", "/") + ".py", "exec"), space)
    return space["f"]


def says(module, category="DeprecationWarning", level=1):
    return function(module, f"warnings.warn('SAID BY {module}', {category}, stacklevel={level})")


def calls(module, other):
    return function(module, "other()", other=other)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", ["jaxllm", "jaxllm.a.b", "checkpoints_convert.a", "pallas_kernels.a"])
def test_ours_warns(module, category):
    says(module, category)()


def test_ours_calls_what_is_deprecated():
    calls("jaxllm.models.a", says("jax.numpy", level=2))()


def test_ours_leaves_a_file_open():
    function("jaxllm.a", "open(__import__('os').devnull)")()


def test_ours_tells_the_caller():
    warnings.warn("calibrate: a Hessian should see more tokens than it has columns", stacklevel=2)


def test_ours_donates_in_vain():
    import jax
    import jax.numpy as jnp

    jax.jit(lambda x: x.sum(), donate_argnums=0)(jnp.zeros(8)).block_until_ready()


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", ["transformers.models.a", "jax._src.a", "ipykernel", "jaxllmore.a"])
def test_theirs_warns(module, category):
    says(module, category)()


def test_theirs_warns_inside_a_call_of_ours():
    calls("jaxllm.load", calls("transformers", says("torch", level=2)))()


def test_theirs_deprecates_an_argument_of_the_test():
    says("transformers", "FutureWarning", level=2)()


def test_theirs_leaves_a_file_open():
    function("transformers.a", "open(__import__('os').devnull)")()
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_warnings_of_ours_fail_a_run_and_those_of_others_are_reported(root, tmp_path, workers):
    (tmp_path / "test_inner.py").write_text(PROGRAM)
    options = ["-c", str(root / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-n", str(workers), "-rA", str(tmp_path)]
    env = {name: x for name, x in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONWARNINGS")}
    env["COLUMNS"] = "300"  # reasons whole
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    out = done.stdout
    passed = re.findall(r"^PASSED .*?::test_(ours|theirs)", out, re.M)
    failed = re.findall(r"^FAILED .*?::test_(ours|theirs)\S* - \S*Warning: ", out, re.M)
    assert passed == ["theirs"] * (16 + 3) and failed == ["ours"] * (16 + 4), out
    assert re.search(r"= 20 failed, 19 passed, \d+ warnings in ", out), out
    for said in ("SAID BY transformers.models.a", "SAID BY torch", "SAID BY ipykernel"):
        assert f"Warning: {said}" in out, out
