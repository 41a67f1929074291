"""The benchmark against transformers runs and says what others read from it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parity
def test_the_benchmark_runs_at_tiny_size_and_both_libraries_make_the_same_tokens(torch, root, tmp_path):
    command = [sys.executable, str(root / "benchmarks" / "decode.py"), "--tiny", "--rounds", "1"]
    command += ["--dtype", "float32", "--batch", "2", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "decode.json").read_text())
    (result,) = report["results"]
    assert result["same_tokens"] == 1.0
    assert set(result["libraries"]) == {"transformers", "jaxllm"}
    assert result["jaxllm_over_transformers"]["decode"]["median"] > 0
    assert done.stdout.startswith((tmp_path / "decode.md").read_text().rstrip("\n"))
