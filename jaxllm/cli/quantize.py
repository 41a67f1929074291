"""`jaxllm quantize`: a model's weights in fewer bits, by a method, a recipe or a budget."""

import json
import time
from pathlib import Path
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.options import COUNT, FINITE, JSON, OpenModel, loads_a_model
from jaxllm.cli.output import print_json, read_text, shows_progress, tell

DP_LLM = "dp-llm"  # a method for whole models, behind one for weights


@click.command()
@loads_a_model
@click.option("--list", "lists", is_flag=True, help="Show the methods, or --method's options, and exit.")
@click.option("--method", metavar="NAME", help="How linears are stored: a name of --list.")
@click.option("--bits", type=COUNT, help="Bits a code. [default: the method's]")
@click.option("--group-size", type=COUNT, help="Inputs that share a scale. [default: the method's]")
@click.option(
    "--option",
    "more",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option, as --list --method NAME shows them; repeatable. A value is JSON or a word.",
)
@click.option(
    "--target-bits",
    "targets",
    multiple=True,
    type=FINITE,
    help="For dp-llm: average bits that the model can be set to; repeatable. [default: the method's]",
)
@click.option("--memory-bits", type=FINITE, help="For dp-llm: planes held, a weight. [default: the method's]")
@click.option("--tune", metavar="GPU", help="For dec-dec: a GPU by name, or by its memory/link in GB/s.")
@click.option("--slowdown", type=FINITE, help="With --tune: slower by so much at most. [default: 0.05]")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="JSON file: a method for each pattern of names, or a budget.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="UTF-8 file that most methods learn from; for a T5, lines of source, tab, target.",
)
@click.option("--sequences", type=COUNT, default=128, help="Pieces of the calibration text, at most.")
@click.option("--length", type=COUNT, default=512, help="Tokens of a piece.")
@click.option("--sequential", is_flag=True, help="Calibrate each block on quantized ones before it.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Directory of finished blocks; a run that was stopped goes on there.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory to make.")
@JSON
def quantize(
    open_model: OpenModel,
    lists: bool,
    method: str | None,
    targets: tuple[float, ...],
    memory_bits: float | None,
    tune: str | None,
    slowdown: float | None,
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
    """Store a model's weights in fewer bits; write it to a new directory.

    Methods that stand on another one, dec-dec and rotate, call it base, and its options follow a dot:

    \b
        jaxllm quantize --method rotate --option base=rtn --option base.bits=3 --out SMALL

    dp-llm takes an any-precision model, or makes one of a dense model first, by options behind "base.".
    """
    from jaxllm.measure.report import linear_bits
    from jaxllm.quant.dec_dec_tuner import tune_dec_dec
    from jaxllm.quant.method_options import make_method
    from jaxllm.quant.recipe import Budget, read_recipe
    from jaxllm.quant.sensitivity import allocate_bits, sensitivity
    from jaxllm.quant.text import text_sequences
    from jaxllm.weights.host_residual import bytes_fetched

    if lists:
        if method is None:
            list_methods(as_json)
        else:
            list_options(method, as_json)
        return
    if (method is None) == (recipe is None) or out is None:
        raise click.UsageError("quantize: --out and exactly one of --method and --recipe must be given")
    chosen: Any = method_options(**options)
    if (targets or memory_bits is not None) and method != DP_LLM:
        raise click.UsageError(
            f"quantize: --target-bits and --memory-bits apply to --method {DP_LLM}, got {method or recipe}"
        )
    if recipe is not None and chosen:
        raise click.UsageError(
            "quantize: a recipe names its own options, --bits, --group-size, --option do not apply"
        )
    if tune is not None and method != "dec-dec":
        raise click.UsageError(f"quantize: --tune applies to --method dec-dec, got {method or recipe}")
    if slowdown is not None and tune is None:
        raise click.UsageError(f"quantize: --slowdown applies with --tune, got {slowdown}")
    attached: Any = None
    of_base = [name for name in chosen if name.startswith("base.")]
    if method == DP_LLM:
        attached, method, chosen = of_dp_llm(chosen, targets, memory_bits)
    chosen = read_recipe(recipe) if recipe is not None else make_method(str(method), chosen)
    words = None if calibration is None else read_text(calibration, "--calibration")
    if out.exists():
        raise FileExistsError(f"quantize: {out} exists already")
    model, tokenizer = open_model(mapped=True)
    rows = None if words is None else text_sequences(model, tokenizer, words, length=length, limit=sequences)
    start = time.perf_counter()
    if tune is not None:
        chosen = tune_dec_dec(model, chosen, gpu=tune, slowdown=0.05 if slowdown is None else slowdown)
    if isinstance(chosen, Budget):
        table = sensitivity(model, chosen.methods, rows, progress=shows_progress())
        chosen = allocate_bits(table, bits=chosen.bits)
    if attached is not None and has_planes(model):
        if of_base or sequential or checkpoint is not None:
            got = of_base[0] if of_base else "--sequential" if sequential else "--checkpoint"
            raise click.UsageError(f"quantize: the model has planes, of which none are made, got {got}")
    else:
        model = jl.quantize(
            model,
            chosen,
            rows,
            sequential=sequential,
            checkpoint=checkpoint,
            consume=True,
            progress=shows_progress(),
        )
    small = model
    if attached is not None:
        small = jl.attach_precision(model, attached, rows, progress=shows_progress())
    seconds = time.perf_counter() - start
    jl.save(small, out, tokenizer)
    held = jl.report_bytes(small)
    result = {"out": str(out), "weight_bytes": held.weight_bytes, "bits_per_weight": held.bits_per_weight}
    result |= {"linear_bits_per_weight": linear_bits(small), "seconds": seconds}
    if tune is not None:
        kinds = {pattern.replace("\\", "").strip(".$"): tuned for pattern, tuned in chosen}
        result |= {"k_chunk": {kind: getattr(tuned, "k_chunk", 0) for kind, tuned in kinds.items()}}
        result |= {"bytes_fetched_per_token": bytes_fetched(small, 1)}
    if attached is not None:
        result |= {"target_bits": list(attached.targets), "memory_bits": attached.memory_bits}
    tell(result, as_json)


def of_dp_llm(
    options: dict[str, Any], targets: tuple[float, ...], memory_bits: float | None
) -> tuple[Any, str, dict[str, Any]]:
    """DP-LLM's method, and name and options of the one that makes the planes it chooses among."""
    from jaxllm.quant.method_options import fill_options

    base = {key.removeprefix("base."): value for key, value in options.items() if key.startswith("base.")}
    own = {key: value for key, value in options.items() if not key.startswith("base.")}
    own |= ({"targets": targets} if targets else {}) | (
        {} if memory_bits is None else {"memory_bits": memory_bits}
    )
    return fill_options(DP_LLM, jl.DpLlm, own), "any-precision", {"parent_bits": 6} | base


def has_planes(model) -> bool:
    """Whether a model has any-precision weights, choosing already or not."""
    from jaxllm.models.linears import linear_weights
    from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes
    from jaxllm.weights.planes.bit_planes import BitPlanes

    return any(isinstance(w, BitPlanes | AdaptivePlanes) for w in linear_weights(model).values())


def method_options(bits: int | None, group_size: int | None, more: tuple[str, ...]) -> dict[str, Any]:
    """The options of a method that were given."""
    found: dict[str, Any] = {
        name: value for name, value in (("bits", bits), ("group_size", group_size)) if value is not None
    }
    for text in more:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"quantize: --option must be NAME=VALUE, got {text!r}")
        if name in found:
            raise click.UsageError(f"quantize: an option must be given once, got {name} twice")
        try:
            found[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            found[name] = value  # a word without quotes
    return found


def list_methods(as_json: bool) -> None:
    """Names, bits and exactness of the methods."""
    from jaxllm.quant.methods import METHODS, Entry

    known = METHODS | {
        DP_LLM: Entry(jl.DpLlm, "3-6, by token", "lossy", "each layer picks its bits for each token")
    }
    if as_json:
        fields = ("bits", "exactness", "about")
        print_json({name: {key: getattr(entry, key) for key in fields} for name, entry in known.items()})
        return
    for name, entry in known.items():
        click.echo(f"{name:14} {entry.bits:14} {entry.exactness:30} {entry.about}")


def list_options(method: str, as_json: bool) -> None:
    """Names, types and defaults of a method's options."""
    from jaxllm.quant.method_options import describe_fields, describe_options

    options = describe_fields(jl.DpLlm) if method == DP_LLM else describe_options(method)
    if as_json:
        print_json(options)
        return
    for name, option in options.items():
        default = f"[default: {json.dumps(option['default'])}]" if "default" in option else "[must be given]"
        click.echo(f"{name:23} {option['type']:44} {default}")
