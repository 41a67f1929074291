"""Every benchmark runs at a tiny size, and its page can be made again from what it wrote."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
LEFT_OUT = {"decode"}  # needs torch (test_decode.py)
NAMES = sorted({path.stem for path in SCRIPTS.glob("*.py")} - LEFT_OUT)
QUICK = "gpu_decode_memory"  # each of the others takes longer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in NAMES]
)
def test_it_runs_and_writes_a_page(name, tmp_path):
    script = importlib.import_module(name)
    script.main(["--tiny", "--results", str(tmp_path)])
    run, text = json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text()
    assert run["benchmark"] == name and run["tiny"] and "numbers mean nothing" in text
    tables = text.split("\n## ")[1:]
    assert tables and all("\n| " in table and "\n- **" in table for table in tables)
    script.main(["--render", str(tmp_path / f"{name}.json"), "--results", str(tmp_path / "again")])
    assert (tmp_path / "again" / f"{name}.md").read_text() == text


EVERY_ERROR = ["RTN", "RTN, clipped", "GPTQ", "GPTQ, guided", "AWQ", "DASH-Q", "DASH-Q, feedback, whole zero"]
EVERY_ERROR += ["SqueezeLLM", "LNQ", "LNQ, guided", "Any-Precision", "2/4/16-bit"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, only",
    [
        ("kv_eviction", ["kvzip", "kvzip, heads", "fast kvzip", "snapkv", "random"]),
        ("quantization", ["RTN", "GPTQ", "SqueezeLLM"]),
        ("quantization_error", EVERY_ERROR),
        ("quantization_speed", ["RTN", "GPTQ", "DASH-Q", "LNQ"]),
    ],
)
def test_methods_that_tiny_leaves_out_run_too(name, only, tmp_path):
    importlib.import_module(name).main(["--tiny", "--only", *only, "--results", str(tmp_path)])
    text = (tmp_path / f"{name}.md").read_text()
    assert all(f"| {method} " in text for method in only)
