"""Finished blocks of a quantization run, a file each, so that a run that was stopped goes on there."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.storage.fingerprint import fingerprint, fingerprint_of_first_numbers


def _run(model, method: str, source: list[Any], *, version: int) -> list[Any] | dict[str, Any]:
    """What tells a run from another, as a version of its file has it."""
    if version == 1:
        return [method, fingerprint_of_first_numbers(model), *source]
    return {"version": version, "method": method, "model": fingerprint(model), "source": source}


class _Kept:
    """Finished blocks of a run, a file each."""

    def __init__(self, path: str | Path, model, method: str, source: list[Any]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "run.json"
        if not file.is_file():
            if any(self.path.iterdir()):
                raise ValueError(f"quantize: checkpoint must be new or empty, got {str(path)!r}")
            file.write_text(json.dumps(_run(model, method, source, version=2)))
        begun = json.loads(file.read_text())
        version = 1 if isinstance(begun, list) else 2  # the first version wrote a list
        if begun != _run(model, method, source, version=version):
            raise ValueError(
                f"quantize: checkpoint must hold the same model, method and text, got {str(path)!r}"
            )

    def has(self, block: str) -> bool:
        """Whether a block is there."""
        return (self.path / f"{block}.npz").is_file()

    def read(self, block: str) -> dict[str, Any]:
        """The weights of a block by name."""
        from jaxllm.storage.manifest import build

        with np.load(self.path / f"{block}.npz") as stored:
            described = json.loads(str(stored["described"]))
            get = lambda key, shape, dtype: jnp.asarray(stored[key].view(dtype).reshape(shape))  # noqa: E731
            return {name: build(what, name, get) for name, what in described.items()}

    def write(self, block: str, weights: dict[str, Any]) -> None:
        """Keeps a block; the file appears whole."""
        from jaxllm.storage.manifest import arrays_of, describe

        described = {name: describe(w, name) for name, w in weights.items()}
        raw = {key: np.asarray(x) for name, w in weights.items() for key, x in arrays_of(w, name)}
        raw = {key: x.reshape(-1).view(np.uint8) for key, x in raw.items()}  # npz knows no bfloat16
        part = self.path / f"{block}.part.npz"
        np.savez(part, described=np.asarray(json.dumps(described)), **raw)  # type: ignore[arg-type]
        part.rename(self.path / f"{block}.npz")
