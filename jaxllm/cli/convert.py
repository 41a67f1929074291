"""`jaxllm convert`: a checkpoint read, and written as another directory or file."""

import time
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

import jaxllm as jl
from jaxllm import files
from jaxllm.cli.options import DTYPE, JSON
from jaxllm.cli.output import read_text, shows_progress, tell

LAYOUTS = ["native", "huggingface", "gptq", "awq", "compressed-tensors", "any-precision", "gguf"]


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(LAYOUTS),
    default="native",
    help="What to write: any model, a dense one, or a quantized one as other tools serve it.",
)
@click.option(
    "--requantize", is_flag=True, help="Round weights that the layout cannot hold, and tell the change."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="With --requantize: UTF-8 file of which to measure the perplexity before and after.",
)
@DTYPE
@click.option(
    "--unsafe-format",
    type=click.Choice(["pickle"]),
    help="Read pytorch_model.bin: tensors and nothing else of it, nothing is run.",
)
@JSON
def convert(
    src: str,
    dst: Path,
    to: files.Layout,
    requantize: bool,
    text: Path | None,
    dtype: str | None,
    unsafe_format: Literal["pickle"] | None,
    as_json: bool,
) -> None:
    """Read a checkpoint SRC (file, directory, hub id) and write the new directory, or GGUF file, DST.

    A quantized model is written for others exactly or not at all; --requantize rounds what they cannot hold.
    """
    if text is not None and not requantize:
        raise click.UsageError("convert: --text applies with --requantize")
    words = None if text is None else read_text(text, "--text")
    start = time.perf_counter()
    changed: dict[str, Any] = {}

    def round_model(model: Any, tokenizer: Any) -> Any:
        small, changes = files.requantize(model, to)
        changed["requantized"] = len(changes)
        changed["relative_change"] = float(np.mean(list(changes.values()))) if changes else 0.0
        if words is not None:
            changed["perplexity_before"] = _perplexity(model, tokenizer, words)
            changed["perplexity"] = _perplexity(small, tokenizer, words)
        return small

    model, _ = files.convert(
        src, dst, to, dtype=dtype, unsafe_format=unsafe_format, change=round_model if requantize else None
    )
    held = jl.report_bytes(model)
    result = {"out": str(dst), "weight_bytes": held.weight_bytes}
    result |= {"bits_per_weight": held.bits_per_weight, **changed, "seconds": time.perf_counter() - start}
    tell(result, as_json)


def _perplexity(model: Any, tokenizer: Any, words: str) -> float:
    """Of a text, in windows of the model's context."""
    if tokenizer is None:
        raise ValueError("convert: --text needs a tokenizer, and this model has none")
    ids = tokenizer.encode(words)
    bos = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
    return jl.perplexity(model, ids, bos=bos, progress=shows_progress()).perplexity
