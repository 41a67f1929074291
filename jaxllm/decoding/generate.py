"""Text from a model: prompts in, completions out, one compiled loop.

A run has two compiled parts. `read` reads the prompts, `_first` chooses each request's first token; `_decode`
is a `lax.while_loop` that feeds the last token and chooses the next until every request has ended or a given
step is reached. `generate` runs it to the end, `stream` a step at a time, stop strings a block at a time: the
tokens are the same because the function is. Shapes are rounded up to buckets, so nearby batches and lengths
share a compilation.

    outs = generate(model, tokenizer, ["Once upon a time"], max_new_tokens=64)

Letters: B requests (rounded up), T prompt tokens (rounded up), N new tokens (rounded up), V vocabulary.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

from jaxllm.cache import Cache
from jaxllm.decoding.run import Completion, Prompt, Timings, _Run
from jaxllm.decoding.sampling import Sampler
from jaxllm.eviction.running_budget import Hold

# How many tokens are made between two looks for a stop string.
BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One step of a stream; `text` may be empty while a character is incomplete."""

    text: str
    token_id: int
    logprob: float | None


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    cache: Cache | None = None,
    kv_bits: int | None = None,
    hold: Hold | None = None,
    logprobs: bool = False,
    timings: bool = False,
) -> list[Completion]:
    """What the model writes after each prompt. Greedy by default; the same seed gives the same tokens.

    prompts: texts, or lists of token ids. Texts are encoded as the tokenizer does by itself, begin token
      included if that is its policy. For an encoder-decoder they are the source.
    max_new_tokens: for all requests or one number each. A request also ends where the model's context does.
    seed: for all (request i draws from key(seed) folded with i), or one a request, independent of i.
    stop: texts that end a request; neither they nor what follows are in `text`.
    stop_tokens: ids that end a request; None takes the model's own, or else the tokenizer's end token.
    cache: what every prompt continues: one request (shared) or one a prompt. It is read, never changed.
    kv_bits: 2, 4 or 8 keeps keys and values in codes of so many bits (lossy); a given cache has its own.
    hold: keeps the cache within a budget while the text grows, up to the model's context (lossy;
      `eviction/gates.py`). A cache given with it must be an evicted one to which nothing was added.
    logprobs: also give each token's log-probability.
    timings: also give the seconds of the two parts; between them the host waits for the device.

    Raises ValueError for an empty prompt, a token out of range, or a prompt that fills the context.
    """
    begin = time.perf_counter()
    run = _Run(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        sampler,
        seed,
        stop_tokens,
        cache,
        kv_bits,
        hold,
        logprobs,
    )
    first = run.wait() if timings else begin
    if not stop:
        run.advance(run.longest)
    while stop and not run.ended():
        run.advance(BLOCK)
        run.end_at(stop)
    seconds = Timings(prefill_s=first - begin, decode_s=run.wait() - first) if timings else None
    return run.completions(stop, seconds)


def stream(
    model,
    tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    cache: Cache | None = None,
    kv_bits: int | None = None,
    hold: Hold | None = None,
    logprobs: bool = False,
) -> Iterator[Token]:
    """The tokens of `generate` for one prompt, each as soon as it is made. Arguments as there."""
    run = _Run(
        model,
        tokenizer,
        [prompt],
        max_new_tokens,
        sampler,
        seed,
        stop_tokens,
        cache,
        kv_bits,
        hold,
        logprobs,
    )
    return _tokens(run, tuple(stop))


def _tokens(run: "_Run", stop: tuple[str, ...]) -> Iterator[Token]:
    told = 0  # characters given out
    while True:
        made = run.completions(stop)[0]
        run.end_at(stop)
        last = run.ended()
        # A stop string may have begun: what could be its beginning waits.
        safe = len(made.text) if last else _safe(made.text, stop)
        text, told = made.text[told:safe], max(told, safe)
        logprob = made.logprobs[-1] if made.logprobs else None
        yield Token(text=text, token_id=made.token_ids[-1], logprob=logprob)
        if last:
            return
        run.advance(1)


def _safe(text: str, stop: tuple[str, ...]) -> int:
    """How much of `text` no later token can take back."""
    end = len(text.rstrip("\ufffd"))  # an incomplete character decodes to this
    for string in stop:
        for size in range(min(len(string) - 1, end), 0, -1):
            if text[:end].endswith(string[:size]):
                end -= size
                break
    return end


def chat(model, tokenizer, messages: Sequence[dict[str, str]], **options) -> Completion:
    """The model's answer to a conversation, laid out by the tokenizer's chat template.

    messages: dicts with "role" and "content". options: as for `generate`.
    Raises ValueError when the tokenizer has no template.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer must have a chat template, this model's has none")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes its own
    return generate(model, tokenizer, [ids], **options)[0]
