"""The command line: a thin skin over the library, for people and for scripts.

    jaxllm demo | generate | eval | convert | quantize

Results go to stdout, progress and notes to stderr; with `--json` stdout holds exactly one JSON
object. What the user can get wrong ends in one line on stderr and exit status 2, Ctrl-C in 130;
a traceback is a bug.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

import jaxllm as jl
from jaxllm import demo as demonstration
from jaxllm.files import convert as convert_checkpoint

OpenModel = Callable[..., tuple[Any, Any]]

MODEL = click.option("--model", metavar="DIR|ID", help="Directory or hub id. [default: pico]")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type the weights are converted to. [default: as stored]",
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub id.")
OFFLINE = click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
GATES: dict[str, Literal["fast", "zap"]] = {"fast-kvzip": "fast", "kvzap": "zap"}
KV_METHODS = ("kvzip", "kvzip+", *GATES, "snapkv", "h2o", "tova", "expected", "streaming", "random")
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(jl.__version__)
def cli() -> None:
    """Run, measure and convert language models with JAX."""


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), help="Directory to make for the report.")
@JSON
def demo(out: Path | None, as_json: bool) -> None:
    """Show the model that ships: text, measures, a figure; writes a report."""
    report = demonstration.run(out, note=note)
    if as_json:
        print_json(report)
    else:
        click.echo((Path(report["out"]) / "report.md").read_text("utf-8"))


@cli.command()
@loads_a_model
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; repeatable.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="UTF-8 file, one prompt.")
@click.option("--max-new-tokens", type=int, default=64)
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens of this total only.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: avoid repeating.")
@click.option("--seed", type=int, default=0)
@click.option("--stop", multiple=True, help="Text that ends a completion; repeatable.")
@click.option("--kv-bits", type=int, help="Keep keys and values in 2, 4 or 8 bits. [default: as they are]")
@click.option("--context", type=click.Path(path_type=Path), help="UTF-8 file that all prompts follow.")
@click.option("--kv-ratio", type=float, help="Keep this part of the context's keys and values only.")
@click.option("--kv-method", type=click.Choice(KV_METHODS), default=KV_METHODS[0], help="What is kept.")
@click.option("--kv-hold", type=int, help="Keep about so many tokens, however long the text grows.")
@click.option("--kv-gates", type=click.Path(path_type=Path), help="Gates of the model. [default: pico's]")
@click.option("--logprobs", is_flag=True, help="Also give each token's log probability.")
@click.option("--chat", is_flag=True, help="Treat each prompt as a message to a chat model.")
@click.option("--stream", is_flag=True, help="Print text as it comes (one prompt, no --chat).")
@JSON
def generate(
    open_model: OpenModel,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    max_new_tokens: int,
    seed: int,
    stop: tuple[str, ...],
    kv_bits: int | None,
    context: Path | None,
    kv_ratio: float | None,
    kv_method: str,
    kv_hold: int | None,
    kv_gates: Path | None,
    logprobs: bool,
    chat: bool,
    stream: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Go on from one or more prompts. tokens_per_s counts compilation too."""
    if prompt_file is not None:
        prompts = (*prompts, read_text(prompt_file, "--prompt-file").removesuffix("\n"))
    if not prompts:
        raise click.UsageError("generate: --prompt or --prompt-file must be given")
    if stream and (as_json or chat or logprobs or len(prompts) > 1):
        raise click.UsageError("generate: --stream takes one prompt and no --json, --chat, --logprobs")
    if context is None and kv_ratio is not None:
        raise click.UsageError("generate: --kv-ratio is of a --context, which must be given")
    if kv_hold is not None and kv_method not in ("kvzip", *GATES):
        raise click.UsageError(f"generate: --kv-hold goes with kvzip and gates, got --kv-method {kv_method}")
    if kv_method in GATES and kv_ratio is None and kv_hold is None:
        raise click.UsageError(f"generate: --kv-method {kv_method} goes with --kv-ratio or --kv-hold")
    if kv_gates is not None and kv_hold is None and kv_method not in GATES:
        gated = " or ".join(GATES)
        raise click.UsageError(f"generate: --kv-gates goes with --kv-hold or --kv-method {gated}")
    if context is not None and chat:
        raise click.UsageError("generate: --context takes plain prompts, no --chat")
    sampler = jl.Sampler(**sampling)
    text = None if context is None else read_text(context, "--context")
    model, tokenizer = open_model()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "seed": seed,
        "stop": stop,
        "kv_bits": kv_bits,
    }
    asked: list[Any] = list(prompts)
    gates = hold = None
    if kv_hold is not None or kv_method in GATES:
        form = GATES.get(kv_method, "fast")
        gates = jl.eviction.pico_gates(form) if kv_gates is None else jl.eviction.load_gates(kv_gates)
        hold = None if kv_hold is None else jl.eviction.Hold(gates=gates, tokens=kv_hold)
        options["hold"] = hold
    if text is not None:
        options |= {
            "kv_bits": None,
            "cache": context_cache(model, tokenizer, text, kv_ratio, kv_method, kv_bits, gates, hold),
        }
        asked = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    if stream:
        for token in jl.stream(model, tokenizer, asked[0], **options):
            click.echo(token.text, nl=False)
        click.echo()
        return
    options["logprobs"] = logprobs
    start = time.perf_counter()
    if chat:
        said = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outs = [jl.chat(model, tokenizer, messages, **options) for messages in said]
    else:
        outs = jl.generate(model, tokenizer, asked, **options)
    seconds = time.perf_counter() - start
    made = sum(len(out.token_ids) for out in outs)
    if as_json:
        pairs = zip(prompts, outs, strict=True)
        completions = [completion_json(prompt, out) for prompt, out in pairs]
        print_json({"prompts": completions, "tokens_per_s": made / seconds})
        return
    for prompt, out in zip(prompts, outs, strict=True):
        click.echo(out.text if chat else prompt + out.text)
        if out.logprobs is not None:
            click.echo(" ".join(f"{value:.4f}" for value in out.logprobs))
    note(f"{made} tokens in {seconds:.1f} s, compilation included")


def context_cache(
    model,
    tokenizer,
    text: str,
    ratio: float | None,
    method: str,
    bits: int | None,
    gates: jl.eviction.Gate | None,
    hold: jl.eviction.Hold | None,
):
    """A text read into a cache, of which a part is kept."""
    if tokenizer is None:
        raise ValueError("generate: --context needs a tokenizer, this model has none")
    ids = tokenizer.encode(text)
    prefix = int(ids[:1] == [tokenizer.bos_token_id])
    slack = min(2000, len(ids)) + 128  # for prompts; KVzip's repeats the text
    if ratio is None:
        if hold is not None:
            return jl.prefill_held(model, [ids], hold, bits=bits)
        return jl.prefill(model, [ids], slack=slack, bits=bits)
    if gates is not None and method in GATES:
        cache, scores = jl.prefill_scored(model, [ids], gates, prefix=prefix, slack=slack, bits=bits)
    elif method.startswith("kvzip"):
        cache = jl.prefill(model, [ids], slack=slack, bits=bits)
        scores = jl.eviction.kvzip_scores(
            model,
            cache,
            [ids[prefix:]],
            tokenizer=tokenizer,
            prefix=prefix,
            output_aware=method == "kvzip+",
        )
    else:
        cache = jl.prefill(model, [ids], slack=slack, bits=bits)
        scores = getattr(jl.eviction, f"{method}_scores")(model, [ids], prefix=prefix)
    small = jl.eviction.evict(cache, scores, ratio=ratio, prefix=prefix, rows=1)  # `generate` makes the room
    before, after = jl.cache.num_bytes(cache), jl.cache.num_bytes(small)
    note(f"{len(ids)} tokens of context: {before:,} bytes of keys and values, {after:,} after eviction")
    return small


def completion_json(prompt: str, out: Any) -> dict[str, Any]:
    """One entry of `prompts`; `logprobs` only where they were asked for."""
    fields = {"prompt": prompt, "text": out.text, "prompt_ids": out.prompt_ids}
    fields["token_ids"] = out.token_ids
    if out.logprobs is not None:
        fields["logprobs"] = out.logprobs
    return fields | {"finish_reason": out.finish_reason}


@cli.command("eval")
@loads_a_model
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 file: its perplexity.")
@click.option("--context", type=int, help="Tokens of a window. [default: the model's context]")
@click.option("--stride", type=int, help="Tokens between windows. [default: side by side]")
@click.option("--kv-bits", type=int, help="Keys and values in 2, 4 or 8 bits; with --text.")
@click.option("--task", help="Multiple-choice task; needs --data.")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines file of the task.")
@click.option("--limit", type=int, help="Take the first examples only.")
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
    if tokenizer is None:
        raise ValueError("eval: text needs a tokenizer, and this model has none")
    if text is not None:
        ids, size = tokenizer.encode(words), len(words.encode())
        bos = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
        options = {"context": context, "stride": stride, "bos": bos, "num_bytes": size}
        options["kv_bits"] = kv_bits
        found = jl.perplexity(model, ids, progress=True, **options)
        held = jl.report_bytes(model)
        result = {
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "nll_per_token": found.nll_per_token,
            "tokens": found.tokens,
            "bits_per_weight": held.bits_per_weight,
            "weight_bytes": held.weight_bytes,
        }
    else:
        assert task is not None and data is not None
        scored = jl.score_choices(model, tokenizer, task, data, limit=limit, progress=True)
        fields = ("task", "accuracy", "stderr", "examples")
        result = {name: getattr(scored, name) for name in fields}
    tell(result, as_json)


@cli.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["native", "huggingface"]), default="native")
@DTYPE
@JSON
def convert(
    src: str, dst: Path, to: Literal["native", "huggingface"], dtype: str | None, as_json: bool
) -> None:
    """Read a checkpoint SRC (file, directory, hub id) and write the new directory DST."""
    start = time.perf_counter()
    model, _ = convert_checkpoint(src, dst, to, dtype=dtype)
    held = jl.report_bytes(model)
    result = {"out": str(dst), "weight_bytes": held.weight_bytes}
    result |= {"bits_per_weight": held.bits_per_weight, "seconds": time.perf_counter() - start}
    tell(result, as_json)


@cli.command()
@loads_a_model
@click.option("--list", "lists", is_flag=True, help="Show the methods and exit.")
@click.option("--method", metavar="NAME", help="How linears are stored; see --list.")
@click.option("--bits", type=int, help="Bits a code. [default: the method's]")
@click.option("--group", type=int, help="Inputs that share a scale. [default: the method's]")
@click.option("--option", "more", multiple=True, metavar="NAME=JSON", help="Another option; repeatable.")
@click.option("--recipe", type=click.Path(path_type=Path), help="JSON: a method by pattern, or a budget.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="UTF-8 text; for a T5, lines of source, tab, target.",
)
@click.option("--sequences", type=int, default=128, help="Take so many pieces of it at most.")
@click.option("--length", type=int, default=512, help="Tokens of a piece.")
@click.option("--sequential", is_flag=True, help="Calibrate each block on quantized ones before it.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Directory to go on from if stopped.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to make.")
@JSON
def quantize(
    open_model: OpenModel,
    lists: bool,
    method: str | None,
    recipe: Path | None,
    calibration: Path | None,
    sequences: int,
    length: int,
    sequential: bool,
    checkpoint: Path | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Store a model's weights in fewer bits; write it to a new directory."""
    from jaxllm.measure.report import linear_bits
    from jaxllm.quant.methods import METHODS, make_method
    from jaxllm.quant.recipe import Budget, read_recipe
    from jaxllm.quant.sensitivity import sensitivity, spend
    from jaxllm.quant.text import text_sequences

    if lists:
        list_methods(METHODS, as_json)
        return
    if (method is None) == (recipe is None) or out is None:
        raise click.UsageError("quantize: --out and exactly one of --method and --recipe must be given")
    chosen: Any = method_options(**options)
    if recipe is not None and chosen:
        raise click.UsageError(
            "quantize: a recipe names its own options, --bits, --group, --option do not apply"
        )
    chosen = read_recipe(recipe) if recipe is not None else make_method(str(method), chosen)
    words = None if calibration is None else read_text(calibration, "--calibration")
    if out.exists():
        raise FileExistsError(f"quantize: {out} exists already")
    model, tokenizer = open_model(mapped=True)
    rows = None if words is None else text_sequences(model, tokenizer, words, length=length, limit=sequences)
    start = time.perf_counter()
    if isinstance(chosen, Budget):
        chosen = spend(sensitivity(model, chosen.methods, rows), bits=chosen.bits)
    small = jl.quantize(model, chosen, rows, sequential=sequential, checkpoint=checkpoint, consume=True)
    seconds = time.perf_counter() - start
    jl.save(small, out, tokenizer)
    held = jl.report_bytes(small)
    result = {"out": str(out), "weight_bytes": held.weight_bytes, "bits_per_weight": held.bits_per_weight}
    result |= {"linear_bits_per_weight": linear_bits(small), "seconds": seconds}
    tell(result, as_json)


def method_options(bits: int | None, group: int | None, more: tuple[str, ...]) -> dict[str, Any]:
    """The options of a method that were given."""
    found: dict[str, Any] = {
        name: value for name, value in (("bits", bits), ("group", group)) if value is not None
    }
    for text in more:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"quantize: --option must be NAME=JSON, got {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value  # a word without quotes
    return found


def list_methods(methods: dict[str, Any], as_json: bool) -> None:
    """Names, bits, exactness and options of the methods."""
    if as_json:
        fields = ("bits", "exactness", "about")
        print_json({name: {key: getattr(entry, key) for key in fields} for name, entry in methods.items()})
        return
    for name, entry in methods.items():
        click.echo(f"{name:14} {entry.bits:14} {entry.exactness:30} {entry.about}")


def tell(result: dict[str, Any], as_json: bool) -> None:
    """A flat result: one JSON object, or a line a field."""
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        click.echo(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")


def read_text(path: Path, option: str) -> str:
    """A file's text; the error says which option named it."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: the file must be UTF-8, got {path} with a bad byte at {error.start}"
        ) from error


def note(text: str) -> None:
    """A line for people: stderr, never stdout."""
    click.echo(text, err=True)


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def main(args: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 what was asked cannot be, 130 interrupted."""
    sys.exit(status(args))


def status(args: list[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    # A text longer than the context is refused, or cut into windows, here: no warning is due.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return cli.main(args, prog_name="jaxllm", standalone_mode=False) or 0
    except click.ClickException as error:
        return refuse(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        note("jaxllm: interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as in `jaxllm ... | head`
        silence_stdout()
        return 141
    except OSError as error:  # without "[Errno 2]"
        where = "" if error.filename is None else f": {error.filename}"
        return refuse(f"{error.strerror}{where}" if error.strerror else str(error))
    except (ValueError, NotImplementedError) as error:
        return refuse(str(error))


def silence_stdout() -> None:
    """Lets what is still buffered go nowhere, so that the end of Python does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(message: str) -> int:
    """Says in one line why not; exit status 2."""
    note("jaxllm: " + " ".join(message.split()))
    return 2
