"""A minGPT model in JSON to a `Gpt`: llm-viz's export of `gpt-nano` (github.com/bbycroft/llm-viz).

One object: `config` (n_layer, n_head, n_embd, vocab_size, block_size) and, by PyTorch's name of
each parameter, {shape, dtype, data} with `data` the base64 of little-endian float32, row by row.
Names are GPT-2's; matrices are [out, in] here, the head is its own, `attn.bias` is the causal mask.
"""

import base64
import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.build_model import build_model
from checkpoints_convert.families import gpt
from jaxllm.models.gpt import Config
from jaxllm.storage.metadata import excerpt, one_line, parse_json

FAMILY = dataclasses.replace(
    gpt.GPT2,
    model_type="minGPT",
    rows=tuple(dataclasses.replace(row, transposed=False) for row in gpt.GPT2.rows),
)


def load(path, *, dtype=None, mesh=None):
    """The model of a minGPT JSON file, and None: it has no tokenizer."""
    path = Path(path)
    saved = parse_json(f"mingpt.load: {path.name}", path.read_bytes())
    try:
        if not isinstance(saved, dict):
            raise ValueError(f"a {type(saved).__name__}")
        config = to_config(saved.pop("config", None), most_layers=len(saved))
        tensors = {name: tensor(entry) for name, entry in saved.items()}
    except ValueError as error:
        raise ValueError(
            f"mingpt.load: must be minGPT's config and tensors in JSON, got {path.name}: {one_line(error)}"
        ) from error
    return build_model(FAMILY, config, tensors, dtype=dtype, mesh=mesh), None


def to_config(sizes: Any, *, most_layers: int) -> Config:
    """The config of the file's sizes; a layer has tensors, so that these bound the layers."""
    sizes = sizes if isinstance(sizes, dict) else {}
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
        most = most_layers if name == "n_layer" else 1 << 31
        if type(sizes.get(name)) is not int or not 1 <= sizes[name] <= most:
            raise ValueError(f"{name} must be a whole number of 1 to {most}, got {excerpt(sizes.get(name))}")
    return Config(
        layers=sizes["n_layer"],
        width=sizes["n_embd"],
        heads=sizes["n_head"],
        ffn=4 * sizes["n_embd"],
        vocab=sizes["vocab_size"],
        context=sizes["block_size"],
        tied=False,
    )


def tensor(entry: Any) -> np.ndarray:
    """One tensor of the file; ValueError unless its data fill its shape."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, data = (entry.get(name) for name in ("dtype", "shape", "data"))
    if kind != "torch.float32" or not isinstance(data, str):
        raise ValueError(f"a tensor must be torch.float32 in base64, got dtype={excerpt(kind)}")
    numbers = base64.b64decode(data, validate=True)
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(numbers) != 4 * prod(shape):
        raise ValueError(f"data must fill shape={excerpt(shape)}, got {len(numbers)} bytes")
    return np.frombuffer(numbers, "<f4").reshape(shape)
