"""A minGPT model in JSON to a `Gpt`: llm-viz's export of `gpt-nano` (github.com/bbycroft/llm-viz).

One object: `config` (n_layer, n_head, n_embd, vocab_size, block_size) and, by PyTorch's name of
each parameter, {shape, dtype, data} with `data` the base64 of little-endian float32, row by row.
Names are GPT-2's; matrices are [out, in] here, the head is its own, `attn.bias` is the causal mask.
"""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np

from checkpoints_convert.build_model import build_model
from checkpoints_convert.families import gpt
from jaxllm.models.gpt import Config

FAMILY = dataclasses.replace(
    gpt.GPT2,
    model_type="minGPT",
    rows=tuple(dataclasses.replace(row, transposed=False) for row in gpt.GPT2.rows),
)


def load(path, *, dtype=None, mesh=None):
    """The model of a minGPT JSON file, and None: it has no tokenizer."""
    path = Path(path)
    try:
        saved = json.loads(path.read_text("utf-8"))
        sizes = saved.pop("config")
        config = Config(
            layers=sizes["n_layer"],
            width=sizes["n_embd"],
            heads=sizes["n_head"],
            ffn=4 * sizes["n_embd"],
            vocab=sizes["vocab_size"],
            context=sizes["block_size"],
            tied=False,
        )
        tensors = {name: tensor(entry) for name, entry in saved.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"mingpt.load: must be minGPT's config and tensors in JSON, got {path.name}: "
            f"{type(error).__name__} {error}"
        ) from error
    return build_model(FAMILY, config, tensors, dtype=dtype, mesh=mesh), None


def tensor(entry: dict) -> np.ndarray:
    """One tensor of the file."""
    return np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(entry["shape"])
