"""What a command left, and how a refusal must look: helpers of the tests of the command line."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tiny_llama import TINY, tiny_weights, write_checkpoint


class Done(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def assert_refused(done: Done, message: str, *, left: list[Path] | None = None):
    """One line on stderr that matches, status 2, nothing on stdout, nothing left in the folder."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.status == 2, done
    assert done.out == ""
    assert len(lines) == 1, done.err
    assert lines[0].startswith("jaxllm: ")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(Path().iterdir()) == sorted(left or [])


def broken_checkpoint(directory: Path, how: str) -> Path:
    """A tiny checkpoint with one thing wrong."""
    configs = {
        "unknown": {**TINY, "model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        "quantized": {**TINY, "quantization_config": {"quant_method": "hqq", "bits": 4}},
    }
    write_checkpoint(directory, config=configs.get(how, TINY))
    weights = directory / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "shape":
        tensors = tiny_weights()
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        save_file(tensors, weights)
    elif how == "missing":
        tensors = tiny_weights()
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif how == "pickled":
        weights.unlink()
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    return directory
