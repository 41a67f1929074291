"""Which model a file was written for: a hash of all that the model computes with.

    meta["model"] = fingerprint(model)                          # written
    if meta["model"] != fingerprint(model): raise ...           # read

Caches, calibrations and stopped quantizations belong to one model; that of another opens without an error and
means nothing. So every byte of every weight counts, and so does the config: another rotation or window gives
other keys from the same weights. In which mode nested formats are read does not count: they are switched
while a cache lives.
"""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxllm.storage.former_names import path_in_0_1_0, type_in_0_1_0


def fingerprint(model) -> str:
    """Tells a model from every other: its class, its config, all numbers of its weights (SHA-256).

    The same wherever the weights lie. Reads them all once, a few arrays on the host at a time: some 2 GB/s a
    processor core, so 10 ms for pico and half a second for 200 million float32 numbers.
    """
    made = [type(model).__name__, _settings(model.config)]
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    with ThreadPoolExecutor(max_workers=4) as pool:
        for part in pool.map(_digest, *_leaves(model)):
            digest.update(part)
    return digest.hexdigest()


def _leaves(model) -> tuple[list[str], list[jax.Array]]:
    """The path of every array in a model, and the arrays."""
    found = jax.tree_util.tree_flatten_with_path(model)[0]
    return [jax.tree_util.keystr(path) for path, _ in found], [x for _, x in found]


def _digest(path: str, x: jax.Array) -> bytes:
    digest = hashlib.sha256(f"{x.shape} {type_in_0_1_0(path, x.dtype)}".encode())
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _settings(value: Any) -> Any:
    """A config as JSON; without what is at its default, so that a field that is new later changes nothing."""
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)
        }
        return {name: _settings(own) for name, (own, default) in fields.items() if own != default}
    if isinstance(value, tuple):
        return [_settings(part) for part in value]
    return value


def fingerprint_of_first_numbers(model) -> str:
    """What earlier files hold, to be read only: names, shapes, types and the first 16 numbers of every array.

    Models that differ behind those share one.
    """
    digest = hashlib.sha256()
    for path, x in zip(*_leaves(model), strict=True):
        name, kind = path_in_0_1_0(path), type_in_0_1_0(path, x.dtype)
        digest.update(f"{name} {x.shape} {kind}".encode())
        digest.update(np.asarray(x).reshape(-1)[:16].tobytes())  # on the host: nothing is compiled for it
    return digest.hexdigest()
