"""Finished blocks of a quantization run, a file each, so that a run that was stopped goes on there."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.storage import checksums, former_names
from jaxllm.storage.arrays import read_npz, write_npz
from jaxllm.storage.directory import one_line_for_a_full_disk
from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers
from jaxllm.storage.manifest import arrays_of, build, describe, pack_arrays, unpack_arrays
from jaxllm.storage.metadata import excerpt, one_line, parse_json, read_meta, write_meta

META, FORMAT, VERSION = "run.json", "jaxllm quantization", 3  # with checksums
FINGERPRINTS = {1: fingerprint_of_first_numbers, 2: fingerprint, VERSION: fingerprint}  # by the version


class BlockCheckpoint:
    """Finished blocks of the quantization of a model, a file each.

    method, source: what tells this run from another of the model: what is done, and from which statistics.
    Raises ValueError for a directory of another run.
    """

    def __init__(self, path: str | Path, model, method: str, source: list[Any]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._checked = True
        file, run = self.path / META, {"method": former_names.method(method), "source": source}
        if not file.is_file():
            if any(self.path.iterdir()):
                raise ValueError(f"quantize: checkpoint must be new or empty, got {str(path)!r}")
            with one_line_for_a_full_disk("quantize", self.path):
                write_meta(file, FORMAT, VERSION, run | {"model": fingerprint(model)})
            return
        begun = read_meta("quantize", file, FORMAT, *FINGERPRINTS, older=_names_of_today)
        self._checked = begun["version"] >= VERSION or checksums.is_covered(self.path)
        run["model"] = FINGERPRINTS[begun["version"]](model)
        if run != {key: begun.get(key) for key in run}:
            raise ValueError(
                f"quantize: checkpoint must hold the same model, method and text, got {str(path)!r}"
            )

    def has(self, block: str) -> bool:
        """Whether a block is there."""
        return (self.path / f"{block}.npz").is_file()

    def read(self, block: str) -> dict[str, Any]:
        """The weights of a block by name; ValueError in one line where the file is damaged."""
        file = self.path / f"{block}.npz"
        if self._checked:
            checksums.verify_file("quantize", self.path, file.name)
        try:
            stored = read_npz(file)
            described = parse_json("described", str(stored.get("described")).encode())
            if not isinstance(described, dict):
                raise ValueError(f"described must be a JSON object, got {excerpt(described)}")
            make = unpack_arrays(stored)
            return {name: build(what, name, make) for name, what in described.items()}
        except ValueError as error:
            raise ValueError(f"quantize: checkpoint {str(file)!r} is damaged: {one_line(error)}") from error

    def write(self, block: str, weights: dict[str, Any]) -> None:
        """Keeps a block; the file appears whole. OSError in one line when the disk is full."""
        described = {name: describe(w, name) for name, w in weights.items()}
        arrays = {key: x for name, w in weights.items() for key, x in arrays_of(w, name)}
        packed = pack_arrays(arrays) | {"described": np.asarray(json.dumps(described))}
        with one_line_for_a_full_disk("quantize", self.path):
            write_npz(self.path, f"{block}.npz", packed, checked=self._checked)


def _names_of_today(run: Any) -> Any:
    """What an earlier version wrote: 0.1.0 a list, and both other names of options."""
    if isinstance(run, list):
        method, model, *source = run
        run = {"format": FORMAT, "version": 1, "method": method, "model": model, "source": source}
    if not isinstance(run, dict) or not isinstance(run.get("method"), str):
        return run
    return run | {"method": former_names.method(run["method"])}
