"""`jaxllm train`: the models that ship, gates of a cache, and stories to train on."""

import time
from pathlib import Path
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.options import COUNT, FINITE, JSON, SEED
from jaxllm.cli.output import shows_progress, tell

PATH = click.Path(path_type=Path)


@click.group(invoke_without_command=True)
@click.pass_context
def train(context: click.Context) -> None:
    """Train the models that ship, gates of a cache; write stories."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@train.command()
@click.option(
    "--data", type=PATH, required=True, help="Directory of the texts (tinyshakespeare, gsm8k, ...)."
)
@click.option("--stories", type=PATH, help="File of stories, each followed by a line <|endoftext|>.")
@click.option("--out", type=PATH, required=True, help="Directory to make.")
@click.option(
    "--member",
    type=click.Choice(["target", "draft", "companion"]),
    default="target",
    help="Which of the models.",
)
@click.option("--steps", type=COUNT, required=True, help="Steps of the optimizer.")
@click.option("--stop", type=COUNT, help="End after so many of the steps, with the weights of that time.")
@click.option(
    "--plan",
    type=click.Choice(["main", "long", "repeat", "recite"]),
    default="main",
    help="Phases: a whole run, or a later one on long rows, repetition, recital.",
)
@click.option("--length", type=COUNT, default=256, help="Tokens a row in the main phase.")
@click.option("--batch", type=COUNT, default=16, help="Rows a step in the main phase.")
@click.option("--accumulate", type=COUNT, default=1, help="Microbatches a step.")
@click.option("--muon", type=FINITE, default=0.006, help="Peak rate of Muon.")
@click.option("--adam", type=FINITE, default=0.0015, help="Peak rate of Adam.")
@click.option("--warmup", type=click.IntRange(min=0), default=50, help="Steps before the peak rate.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, help="Seed of what is random.")
@click.option("--checkpoint", type=PATH, help="Directory of checkpoints; a run found there goes on.")
@click.option("--save-every", type=COUNT, default=100, help="Steps between checkpoints.")
@click.option("--tokenizer", type=PATH, help="Directory of a tokenizer.json. [default: a new one]")
@click.option("--init", type=PATH, help="Hugging Face directory to start from.")
@click.option("--plain", is_flag=True, help="Start from plain random weights, not wired to copy.")
@click.option("--teacher", type=PATH, help="Hugging Face directory of a model to learn from.")
@click.option("--note", help="A sentence that the card should say as well.")
@JSON
def pico(as_json: bool, **settings: Any) -> None:
    """Train a member of pico; writes a Hugging Face directory with its card."""
    from jaxllm.training.pico import recipe

    run = recipe.train_member(recipe.Settings(**settings), progress=shows_progress())
    tell({"out": str(settings["out"]), "steps": run.steps, "tokens": run.tokens, "loss": run.loss}, as_json)


@train.command()
@click.option("--model", metavar="DIR|ID", help="A model with pico's tokenizer. [default: pico]")
@click.option("--data", type=PATH, required=True, help="Directory of the texts that pico is trained on.")
@click.option("--stories", type=PATH, help="File of stories.")
@click.option(
    "--form",
    type=click.Choice(["fast", "zap", "zap-linear"]),
    default="fast",
    help="Fast KVzip's, or KVzap's.",
)
@click.option("--hidden", type=COUNT, default=512, help="Width of the MLP of zap.")
@click.option("--texts", type=COUNT, default=1024, help="Texts to learn from.")
@click.option("--longest", type=COUNT, default=448, help="Tokens of a text; it must fit the context twice.")
@click.option("--tokens", type=COUNT, default=2**18, help="Of the texts, to learn from at most.")
@click.option("--steps", type=COUNT, default=4000, help="Steps of the optimizer.")
@click.option("--batch", type=COUNT, default=2048, help="Tokens a step.")
@SEED
@click.option("--out", type=PATH, required=True, help="Directory to make.")
@JSON
def gates(
    model: str | None, data: Path, stories: Path | None, texts: int, out: Path, as_json: bool, **options: Any
) -> None:
    """Train gates of a cache on KVzip's scores (Fast KVzip's form, or KVzap's)."""
    from jaxllm.training.pico import corpus
    from jaxllm.training.pico.gates import save_pico_gates, train_pico_gates

    if out.exists():
        raise FileExistsError(f"train gates: {out} exists already")
    loaded, tokenizer = jl.load(model, dtype="float32")
    read = corpus.read(data, stories)
    made, done = train_pico_gates(
        loaded, tokenizer, read, texts_read=texts, progress=shows_progress(), **options
    )
    settings = {name: value for name, value in options.items() if name != "hidden"}
    save_pico_gates(made, done, out, texts=texts, **settings)
    result = {"out": str(out), "loss": float(done.losses[-1]), "steps": len(done.losses)}
    tell(result | {"seconds": done.seconds}, as_json)


@train.command()
@click.option("--model", metavar="DIR|ID", required=True, help="A story model, any that jaxllm loads.")
@click.option("--tokens", type=COUNT, default=10_000_000, help="Tokens to write, at least.")
@click.option("--batch", type=COUNT, default=256, help="Stories at a time.")
@click.option("--max-new-tokens", type=COUNT, default=500, help="Tokens of a story; longer ones go.")
@click.option("--temperature", type=FINITE, default=1.0, help="0 takes the likeliest token.")
@SEED
@click.option("--out", type=PATH, required=True, help="File to write.")
@JSON
def stories(model: str, tokens: int, out: Path, as_json: bool, **options: Any) -> None:
    """Draw stories in bulk from a small story model."""
    from jaxllm.training.pico.stories import write_stories

    loaded, tokenizer = jl.load(model)
    start = time.perf_counter()
    made = write_stories(loaded, tokenizer, out, tokens=tokens, progress=shows_progress(), **options)
    tell({"out": str(out), "tokens": made, "seconds": time.perf_counter() - start}, as_json)
