"""Broken and hostile files of every format open to what is right, or fail in one line."""

import pytest

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
