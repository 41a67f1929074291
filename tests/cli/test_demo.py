"""`jaxllm demo`: the report that it writes."""

import json
from pathlib import Path

import pytest
from command_line import assert_refused
from tiny_llama import TINY, write_checkpoint

import jaxllm as jl
from jaxllm.cli import demo


@pytest.mark.slow
def test_demo_writes_report_and_figure_and_no_second_time(jaxllm, monkeypatch, tmp_path_factory):
    longer = {**TINY, "max_position_embeddings": 2048}
    tiny = write_checkpoint(tmp_path_factory.mktemp("demo") / "tiny", config=longer)
    loaded = jl.load(tiny)
    monkeypatch.setattr(jl, "load", lambda: loaded)
    few = [("RTN", "RTN, 4 bits", jl.Rtn()), ("NestedFP, fp8", "NestedFP, fp8 mode", jl.NestedFp(mode="fp8"))]
    monkeypatch.setattr(demo, "compared", lambda model: few)
    done = jaxllm("demo", "--out", "report", "--json")
    assert done.status == 0, done.err
    report = json.loads(Path("report/report.json").read_text("utf-8"))
    assert done.json == report
    names = [section["name"] for section in report["sections"]]
    wanted = [
        "generation",
        "perplexity",
        "repetition",
        "size",
        "speed",
        "quantization",
        "precision",
        "eviction",
    ]
    assert names == wanted
    for figure in ("repetition", "quantization"):
        assert Path(f"report/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "![A passage read twice](repetition.png)" in Path("report/report.md").read_text("utf-8")
    assert sorted(path.name for path in Path().iterdir()) == ["report"]
    assert_refused(jaxllm("demo", "--out", "report"), "report", left=[Path("report")])


def test_demo_that_fails_leaves_nothing(jaxllm, monkeypatch, tiny_checkpoint):
    loaded = jl.load(tiny_checkpoint)  # its context is too short for the demo's passage
    monkeypatch.setattr(jl, "load", lambda: loaded)
    done = jaxllm("demo", "--out", "report")
    assert done.status == 2
    assert list(Path().iterdir()) == []
