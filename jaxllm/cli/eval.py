"""`jaxllm eval`: perplexity of a text, or accuracy at a multiple-choice task."""

from pathlib import Path
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.options import JSON, TARGET_BITS, OpenModel, loads_a_model
from jaxllm.cli.output import read_text, shows_progress, tell
from jaxllm.measure.choices import TASKS
from jaxllm.weights.planes.adaptive_planes import any_adaptive


@click.command("eval")
@loads_a_model
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 file of which to measure the perplexity."
)
@click.option("--context", type=int, help="Tokens of a window. [default: the model's context]")
@click.option("--stride", type=int, help="Tokens between windows. [default: side by side]")
@click.option("--kv-bits", type=int, help="Store keys and values in 2, 4 or 8 bits; with --text.")
@click.option("--task", metavar="NAME", help=f"One of {', '.join(TASKS)}; needs --data.")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines file of the task.")
@click.option("--limit", type=int, help="Take the first examples only.")
@TARGET_BITS
@JSON
def evaluate(
    open_model: OpenModel,
    text: Path | None,
    context: int | None,
    stride: int | None,
    kv_bits: int | None,
    task: str | None,
    data: Path | None,
    limit: int | None,
    target_bits: float | None,
    as_json: bool,
) -> None:
    """Perplexity of a text, or accuracy at a multiple-choice task.

    A tokenizer that begins texts with a token has every window begin with it.
    """
    if (text is None) == (task is None):
        raise click.UsageError("eval: exactly one of --text and --task must be given")
    if (task is None) != (data is None):
        raise click.UsageError("eval: --task and --data must be given together")
    if task is not None and kv_bits is not None:
        raise click.UsageError("eval: --kv-bits goes with --text")
    words = "" if text is None else read_text(text, "--text")
    model, tokenizer = open_model()
    if target_bits is not None:
        model = jl.precision.set_target(model, target_bits)
    if tokenizer is None:
        raise ValueError("eval: text needs a tokenizer, and this model has none")
    if text is not None:
        ids, size = tokenizer.encode(words), len(words.encode())
        bos = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
        options: dict[str, Any] = {"context": context, "stride": stride, "bos": bos, "num_bytes": size}
        options["cache"] = jl.CacheOptions(bits=kv_bits)
        found = jl.perplexity(model, ids, progress=shows_progress(), **options)
        held = jl.report_bytes(model)
        result = {
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "nll_per_token": found.nll_per_token,
            "tokens": found.tokens,
            "bits_per_weight": held.bits_per_weight,
            "weight_bytes": held.weight_bytes,
        }
        if any_adaptive(model):
            result["realised_bits"] = jl.precision.bits_read(model, ids, context=context).mean
    else:
        assert task is not None and data is not None
        scored = jl.score_choices(model, tokenizer, task, data, limit=limit, progress=shows_progress())
        fields = ("task", "accuracy", "stderr", "examples")
        result = {name: getattr(scored, name) for name in fields}
    tell(result, as_json)
