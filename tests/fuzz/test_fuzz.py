"""Broken and hostile files of every format open to what is right, or fail in one line."""

import pytest

from fuzz.__main__ import write_page
from fuzz.formats import FORMATS
from fuzz.outcome import GOOD, Sample, outcome
from jaxllm.storage import checksums

INPUTS = {"native": 60, "native_of_0_1_0": 6, "training": 12, "llama2c": 12, "calibration": 15, "gguf": 15}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "native")) for name in FORMATS]


@pytest.mark.parametrize("name", NAMES)
def test_broken_files_are_one_line_or_right(name, tmp_path):
    sample = FORMATS[name](tmp_path)
    for seed in range(INPUTS.get(name, 30)):
        sample.restore()
        kind, said = outcome(sample, seed)
        assert kind in GOOD, (seed, said)


@pytest.mark.parametrize("wrong", ["silent", "traceback", "hang"])
def test_a_reader_that_believes_its_file_is_found_out(wrong, tmp_path, monkeypatch):
    file = tmp_path / "numbers.bin"
    file.write_bytes(bytes(range(200)))
    checksums.write(tmp_path, [file.name])
    monkeypatch.setattr("fuzz.outcome.LIMIT", 1)

    def opened():
        data = file.read_bytes()
        while wrong == "hang" and len(data) != 200:
            pass
        return [1 / (len(data) == 200)] if wrong == "traceback" else list(data)

    sample, found = Sample(tmp_path, opened, stored=True), set()
    for seed in range(60):
        if wrong not in found:
            sample.restore()
            found.add(outcome(sample, seed)[0])
    assert wrong in found


def test_a_page_keeps_what_is_not_run_again(tmp_path):
    write_page(tmp_path, "first", {"cache": {"traceback": 1}, "gates": {"refused": 3}})
    write_page(tmp_path, "second", {"cache": {"refused": 4}})
    text = (tmp_path / "fuzz.md").read_text("utf-8")
    assert "first\nsecond\n" in text
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row[:2] == "| "]
    rows = {name: [int(cell) for cell in counts] for name, *counts in cells if name != "format"}
    assert rows == {"cache": [4, *[0] * 7], "gates": [3, *[0] * 7], "all": [7, *[0] * 7]}
