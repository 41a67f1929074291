"""Options that several commands share, their types, and the decorator that opens a model by them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.output import results_alone

OpenModel = Callable[..., tuple[Any, Any]]


class FiniteNumber(click.ParamType):
    """A number; NaN and the infinities, which Python reads too, are none."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


FINITE = FiniteNumber()
COUNT = click.IntRange(min=1)

MODEL = click.option("--model", metavar="DIR|ID", help="Directory or hub id. [default: pico, which ships]")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type the weights are converted to. [default: as stored]",
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub id.")
CONTEXT = click.option(
    "--model-context", type=COUNT, help="Longest text in tokens, in place of what the model's files say."
)
OFFLINE = click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
# subtle: JAX takes larger seeds and cuts them down, so that two would be one
SEED = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of what is random.")
TARGET_BITS = click.option(
    "--target-bits",
    type=FINITE,
    help="Average bits of a dp-llm model: one of its targets. [default: as saved]",
)
AVERAGE_BITS = click.option(
    "--average-bits",
    type=FINITE,
    help="Hold what a dp-llm model decodes to these bits a weight, between its targets.",
)
JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=results_alone,
    help="Print one JSON object on stdout, all else on stderr.",
)


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose a model; the command gets `open_model(**more)` in their place."""

    @MODEL
    @DTYPE
    @REVISION
    @CONTEXT
    @OFFLINE
    @functools.wraps(command)
    def with_model(*, model, dtype, revision, model_context, local_files_only, **options):
        def open_model(**more: Any) -> tuple[Any, Any]:
            more |= {"revision": revision, "local_files_only": local_files_only}
            return jl.load(model, dtype=dtype, context=model_context, **more)

        command(open_model=open_model, **options)

    return with_model
