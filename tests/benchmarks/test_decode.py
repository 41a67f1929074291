"""The benchmark against transformers says what others read from it."""

import json

import decode
import pytest


@pytest.mark.parity
def test_both_libraries_make_the_same_tokens(torch, tmp_path):
    decode.main(["--tiny", "--results", str(tmp_path)])
    run = json.loads((tmp_path / "decode.json").read_text())
    (result,) = run["results"]
    assert result["same_tokens"] == 1.0
    assert set(result["seconds"]) == {"transformers", "jaxllm"} == set(result["first_call_s"])
    assert all(s > 0 for times in result["seconds"].values() for s in times["total"])
    assert result["step_bytes"] > 0 and {"jax", "transformers", "torch"} <= set(run["versions"])
    text = (tmp_path / "decode.md").read_text()
    assert "| float32 | " in text
    decode.main(["--render", str(tmp_path / "decode.json"), "--results", str(tmp_path / "again")])
    assert (tmp_path / "again" / "decode.md").read_text() == text
