"""`jaxllm convert`: a checkpoint read, and written as another directory."""

import time
from pathlib import Path
from typing import Literal

import click

import jaxllm as jl
from jaxllm import files
from jaxllm.cli.options import DTYPE, JSON
from jaxllm.cli.output import tell


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["native", "huggingface"]), default="native")
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
    to: Literal["native", "huggingface"],
    dtype: str | None,
    unsafe_format: Literal["pickle"] | None,
    as_json: bool,
) -> None:
    """Read a checkpoint SRC (file, directory, hub id) and write the new directory DST."""
    start = time.perf_counter()
    model, _ = files.convert(src, dst, to, dtype=dtype, unsafe_format=unsafe_format)
    held = jl.report_bytes(model)
    result = {"out": str(dst), "weight_bytes": held.weight_bytes}
    result |= {"bits_per_weight": held.bits_per_weight, "seconds": time.perf_counter() - start}
    tell(result, as_json)
