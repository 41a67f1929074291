"""Options that several commands share, and the decorator that opens a model by them."""

import functools
from collections.abc import Callable
from typing import Any

import click

import jaxllm as jl

OpenModel = Callable[..., tuple[Any, Any]]

MODEL = click.option("--model", metavar="DIR|ID", help="Directory or hub id. [default: pico]")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type the weights are converted to. [default: as stored]",
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub id.")
OFFLINE = click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose a model; the command gets `open_model(**more)` in their place."""

    @MODEL
    @DTYPE
    @REVISION
    @OFFLINE
    @functools.wraps(command)
    def with_model(*, model, dtype, revision, local_files_only, **options):
        def open_model(**more: Any) -> tuple[Any, Any]:
            return jl.load(model, dtype=dtype, revision=revision, local_files_only=local_files_only, **more)

        command(open_model=open_model, **options)

    return with_model
