"""`jaxllm generate`: go on from prompts, also behind a context of which a part is kept."""

import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import click

import jaxllm as jl
from jaxllm.cli.options import AVERAGE_BITS, COUNT, JSON, SEED, TARGET_BITS, OpenModel, loads_a_model
from jaxllm.cli.output import note, print_json, read_text
from jaxllm.eviction import METHODS
from jaxllm.models.linears import linear_weights
from jaxllm.weights.planes.bit_planes import BitPlanes

GATES = [name for name, method in METHODS.items() if method.needs == "gates"]
KV_METHOD_HELP = "What is kept: " + "; ".join(f"{name}, {m.help}" for name, m in METHODS.items()) + "."


@click.command()
@loads_a_model
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeatable.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="UTF-8 file, one prompt.")
@click.option("--max-new-tokens", type=int, default=64, help="Tokens to add at most.")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option(
    "--top-p", type=float, help="Draw from the likeliest tokens that together have this probability."
)
@click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one's probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: avoid repeating.")
@SEED
@click.option("--stop", multiple=True, help="Text that ends a completion; repeatable.")
@click.option("--kv-bits", type=int, help="Store keys and values in 2, 4 or 8 bits. [default: as they are]")
@click.option("--context", type=click.Path(path_type=Path), help="UTF-8 file that all prompts follow.")
@click.option("--kv-ratio", type=float, help="Keep this part of the context's keys and values only.")
@click.option("--kv-method", type=click.Choice(list(METHODS)), default="kvzip", help=KV_METHOD_HELP)
@click.option(
    "--kv-budget", type=int, help="Keep the keys and values of about so many tokens, however long the text."
)
@click.option("--kv-gates", type=click.Path(path_type=Path), help="Gates of the model. [default: pico's]")
@click.option(
    "--draft",
    metavar="DIR|lookup|self",
    help="Who drafts tokens that the model then only looks at, so that what it writes stays the same: a "
    "smaller model of its tokenizer, its own text, or itself in fewer bits (of several widths) or half its "
    "layers.",
)
@click.option("--draft-tokens", type=COUNT, default=4, help="Tokens drafted between two looks, at most.")
@click.option("--logprobs", is_flag=True, help="Also give each token's log probability.")
@click.option("--chat", is_flag=True, help="Treat each prompt as a message to a chat model.")
@click.option("--stream", is_flag=True, help="Print text as it comes (one prompt, no --chat).")
@TARGET_BITS
@AVERAGE_BITS
@JSON
def generate(
    open_model: OpenModel,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    max_new_tokens: int,
    seed: int,
    stop: tuple[str, ...],
    context: Path | None,
    draft: str | None,
    draft_tokens: int,
    logprobs: bool,
    chat: bool,
    stream: bool,
    target_bits: float | None,
    average_bits: float | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Continue one or more prompts; what is timed has the compilation in it."""
    if prompt_file is not None:
        prompts = (*prompts, read_text(prompt_file, "--prompt-file").removesuffix("\n"))
    if not prompts:
        raise click.UsageError("generate: --prompt or --prompt-file must be given")
    if stream and (as_json or chat or logprobs or len(prompts) > 1):
        raise click.UsageError("generate: --stream takes one prompt and no --json, --chat, --logprobs")
    of_cache = {name: more.pop(name) for name in list(more) if name.startswith("kv_")}
    kept = KvOptions(**of_cache, behind_context=context is not None)
    if context is not None and chat:
        raise click.UsageError("generate: --context takes plain prompts, no --chat")
    if target_bits is not None and average_bits is not None:
        raise click.UsageError("generate: --target-bits and --average-bits exclude each other")
    sampler = jl.Sampler(**more)
    text = None if context is None else read_text(context, "--context")
    model, tokenizer = open_model()
    if target_bits is not None:
        model = jl.precision.set_target(model, target_bits)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "seed": seed,
        "stop": stop,
        "cache": kept.options(model, tokenizer, text),
        "average_bits": average_bits,
        "speculation": None if draft is None else speculation(draft, draft_tokens, model),
    }
    asked: list[Any] = list(prompts)
    if text is not None:
        asked = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    if stream:
        for token in jl.stream(model, tokenizer, asked[0], **options):
            click.echo(token.text, nl=False)
        click.echo()
        return
    options["logprobs"] = logprobs
    start = time.perf_counter()
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # said at the end, as an error
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
        raise_for_errors(outs)
        return
    for prompt, out in zip(prompts, outs, strict=True):
        click.echo(out.text if chat else prompt + out.text)
        if out.logprobs is not None:
            click.echo(" ".join(f"{value:.4f}" for value in out.logprobs))
    note(f"{made} tokens in {seconds:.1f} s, compilation included")
    if of := [out.speculation for out in outs if out.speculation is not None]:
        stood, proposed, steps = (
            sum(getattr(one, name) for one in of) for name in ("stood", "proposed", "steps")
        )
        note(f"{stood} of {proposed} drafted tokens stand; the model was asked {steps} times")
    raise_for_errors(outs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvOptions:
    """The options that say what is kept of keys and values; the command's help tells them."""

    kv_bits: int | None
    kv_ratio: float | None
    kv_method: str
    kv_budget: int | None
    kv_gates: Path | None
    behind_context: bool  # whether a text is read first

    def __post_init__(self):
        if not self.behind_context and self.kv_ratio is not None:
            raise click.UsageError("generate: --kv-ratio is of a --context, which must be given")
        if self.kv_budget is not None and self.kv_method not in ("kvzip", *GATES):
            got = f"got --kv-method {self.kv_method}"
            raise click.UsageError(f"generate: --kv-budget goes with kvzip and gates, {got}")
        if self.kv_method in GATES and self.kv_ratio is None and self.kv_budget is None:
            raise click.UsageError(
                f"generate: --kv-method {self.kv_method} goes with --kv-ratio or --kv-budget"
            )
        if self.kv_gates is not None and self.kv_budget is None and self.kv_method not in GATES:
            gated = " or ".join(GATES)
            raise click.UsageError(f"generate: --kv-gates goes with --kv-budget or --kv-method {gated}")

    def options(self, model, tokenizer, text: str | None) -> jl.CacheOptions:
        """What the run's cache is, with the text read into it."""
        gates = self.gates()
        budget = None
        if gates is not None and self.kv_budget is not None:
            budget = jl.eviction.CacheBudget(gates=gates, tokens=self.kv_budget)
        if text is None:
            return jl.CacheOptions(bits=self.kv_bits, budget=budget)
        if tokenizer is None:
            raise ValueError("generate: --context needs a tokenizer, this model has none")
        return jl.CacheOptions(start=self.read(model, tokenizer, text, gates, budget), budget=budget)

    def gates(self) -> jl.eviction.Gate | None:
        """Those that were asked for, or pico's where some are needed."""
        if self.kv_budget is None and self.kv_method not in GATES:
            return None
        shipped = METHODS[self.kv_method if self.kv_method in GATES else "fast-kvzip"].scorer
        return shipped() if self.kv_gates is None else jl.eviction.load_gates(self.kv_gates)

    def read(
        self,
        model,
        tokenizer,
        text: str,
        gates: jl.eviction.Gate | None,
        budget: jl.eviction.CacheBudget | None,
    ) -> jl.cache.Cache:
        """A text read into a cache, of which a part is kept."""
        ids, bits = tokenizer.encode(text), self.kv_bits
        prefix = int(ids[:1] == [tokenizer.bos_token_id])
        slack = min(2000, len(ids)) + 128  # for prompts; KVzip's repeats the text
        if self.kv_ratio is None:
            if budget is not None:
                return jl.prefill_within_budget(model, [ids], budget, bits=bits)
            return jl.prefill(model, [ids], slack=slack, bits=bits)
        if gates is not None and self.kv_method in GATES:
            cache, scores = jl.prefill_with_scores(model, [ids], gates, prefix=prefix, slack=slack, bits=bits)
        else:
            cache = jl.prefill(model, [ids], slack=slack, bits=bits)
            method = METHODS[self.kv_method]
            scores = method.score(model, cache, [ids], prefix=prefix, tokenizer=tokenizer)
        # `generate` makes the room
        small = jl.eviction.evict(cache, scores, ratio=self.kv_ratio, prefix=prefix, capacity=1)
        before, after = jl.cache.num_bytes(cache), jl.cache.num_bytes(small)
        note(f"{len(ids)} tokens of context: {before:,} bytes of keys and values, {after:,} after eviction")
        return small


def speculation(draft: str, tokens: int, model) -> jl.Speculation:
    """What `--draft` asks for."""
    if draft == "lookup":
        return jl.Speculation(draft=jl.LookupDraft(), tokens=tokens)
    if draft != "self":
        small, tokenizer = jl.load(draft)
        return jl.Speculation(draft=small, tokenizer=tokenizer, tokens=tokens)
    widths = [w for w in linear_weights(model).values() if isinstance(w, BitPlanes) and w.bits > w.seed_bits]
    if widths:
        return jl.Speculation(draft=jl.read_at(model, widths[0].seed_bits), tokens=tokens)
    return jl.Speculation(draft=jl.first_layers(model, model.config.layers // 2), tokens=tokens)


def raise_for_errors(outs: list[jl.Completion]) -> None:
    """Raises FloatingPointError where logits ceased to be finite; what was made is printed by then."""
    for out in outs:
        if out.error is not None:
            raise FloatingPointError(out.error)


def completion_json(prompt: str, out: Any) -> dict[str, Any]:
    """One entry of `prompts`; `logprobs`, `realised_bits`, `speculation` only where they were asked for."""
    fields = {"prompt": prompt, "text": out.text, "prompt_ids": out.prompt_ids}
    fields["token_ids"] = out.token_ids
    if out.logprobs is not None:
        fields["logprobs"] = out.logprobs
    if out.bits is not None:
        fields["realised_bits"] = out.bits
    if out.speculation is not None:
        fields["speculation"] = dataclasses.asdict(out.speculation)
    return fields | {"finish_reason": out.finish_reason}
