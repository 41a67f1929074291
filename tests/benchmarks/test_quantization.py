"""The benchmark of quantization runs on a tiny model, goes on where it stopped, and reads its own results."""

import json

import pytest
import quantization
from parts.quantization_tables import expectations

RUN = [
    "--what",
    "methods",
    "curve",
    "--bits",
    "2",
    "--group-size",
    "16",
    "--seeds",
    "0",
    "--only",
    "RTN, clipped",
]
RUN += ["--curve", "2", "--sequences", "4", "--length", "16", "--context", "32", "--tokens", "64"]


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """Calls the benchmark's command line on two texts."""
    texts = {
        "calibration": "The calibration text says this.\n" * 12,
        "text": "Another one, quite short.\n" * 8,
    }

    def call(**other):
        args = ["--model", str(tiny_checkpoint), "--results", str(tmp_path / "out"), *RUN]
        for name, text in (texts | other).items():
            (tmp_path / name).write_text(text)
            args += [f"--{name}", str(tmp_path / name)]
        quantization.main(args)
        return tmp_path / "out"

    return call


@pytest.mark.slow
def test_the_command_writes_json_markdown_and_figures_and_goes_on_where_it_stopped(command):
    out = command()
    run = json.loads((out / "quantization.json").read_text())
    one, other = run["results"]
    assert (one["what"], other["what"], other["sequences"]) == ("methods", "curve", 2)
    assert one["bits_per_weight"] > 2 and one["kl"] > 0 and one["seconds"] > 0
    assert run["given"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "RTN, clipped" in (out / "quantization.md").read_text()
    assert {p.name for p in out.glob("*.png")} == {"quantization_methods.png", "quantization_curve.png"}
    run["results"] = [one | {"kl": 7.0}]  # as if the rest were still to be done
    (out / "quantization.json").write_text(json.dumps(run))
    command()
    again = json.loads((out / "quantization.json").read_text())["results"]
    assert [r["what"] for r in again] == ["methods", "curve"] and again[0]["kl"] == 7.0


def test_calibration_and_evaluation_text_must_differ(command):
    line = "A line of more than forty characters that is in both of the texts.\n"
    with pytest.raises(SystemExit, match="must differ, both have the line 'A line of more"):
        command(calibration=line * 9, text=line)


def test_expectations_are_read_from_the_results():
    def row(name, perplexity, **other):
        common = {"group_size": None, "sequences": None, "seed": 0, "kl": 1.0, "loss_increase": 1.0}
        times = {"standard_error": 0.1, "seconds": 1.0, "memory": None, "bits_per_weight": 3.0}
        return {"name": name, "perplexity": perplexity, "bits": 3} | common | times | other

    results = [row("LNQ, guided", 5.0, what="methods"), row("SqueezeLLM", 6.0, what="methods")]
    results += [row("RTN", 5.5, what="methods"), row("Any-Precision", 6.1, what="nested")]
    results += [row("SqueezeLLM", 6.0, what="nested")]
    results += [row("RTN, bucket, 0", 8.0, what="dec_dec"), row("RTN, bucket, 51", 6.5, what="dec_dec")]
    found = expectations({"results": results, "given": {"perplexity": 5.0}})
    assert [holds for _, _, holds in found] == [False, True, True]
    assert found[0][1] == "5.000, 6.000, 5.500" and "+1.7 %" in found[1][1] and "50 %" in found[2][1]
