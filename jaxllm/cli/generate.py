"""`jaxllm generate`: go on from prompts, also behind a context of which a part is kept."""

import time
from pathlib import Path
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.options import JSON, OpenModel, loads_a_model
from jaxllm.cli.output import note, print_json, read_text
from jaxllm.eviction import METHODS

GATES = [name for name, method in METHODS.items() if method.needs == "gates"]
KV_METHOD_HELP = "What is kept: " + "; ".join(f"{name}, {m.help}" for name, m in METHODS.items()) + "."


@click.command()
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
@click.option("--kv-method", type=click.Choice(list(METHODS)), default="kvzip", help=KV_METHOD_HELP)
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
        "cache": jl.CacheOptions(bits=kv_bits),
    }
    asked: list[Any] = list(prompts)
    gates = budget = None
    if kv_hold is not None or kv_method in GATES:
        shipped = METHODS[kv_method if kv_method in GATES else "fast-kvzip"].scorer
        gates = shipped() if kv_gates is None else jl.eviction.load_gates(kv_gates)
        budget = None if kv_hold is None else jl.eviction.CacheBudget(gates=gates, tokens=kv_hold)
        options["cache"] = jl.CacheOptions(bits=kv_bits, budget=budget)
    if text is not None:
        given = context_cache(model, tokenizer, text, kv_ratio, kv_method, kv_bits, gates, budget)
        options["cache"] = jl.CacheOptions(start=given, budget=budget)
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
    budget: jl.eviction.CacheBudget | None,
):
    """A text read into a cache, of which a part is kept."""
    if tokenizer is None:
        raise ValueError("generate: --context needs a tokenizer, this model has none")
    ids = tokenizer.encode(text)
    prefix = int(ids[:1] == [tokenizer.bos_token_id])
    slack = min(2000, len(ids)) + 128  # for prompts; KVzip's repeats the text
    if ratio is None:
        if budget is not None:
            return jl.prefill_within_budget(model, [ids], budget, bits=bits)
        return jl.prefill(model, [ids], slack=slack, bits=bits)
    if gates is not None and method in GATES:
        cache, scores = jl.prefill_with_scores(model, [ids], gates, prefix=prefix, slack=slack, bits=bits)
    else:
        cache = jl.prefill(model, [ids], slack=slack, bits=bits)
        scores = METHODS[method].score(model, cache, [ids], prefix=prefix, tokenizer=tokenizer)
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
