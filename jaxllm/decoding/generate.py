"""Text from a model: prompts in, completions out, one compiled loop.

A run has two compiled parts: the prompts are read and each request's first token is sampled (`prefill.read`,
`loop.first_tokens`); then a `lax.while_loop` feeds the last token and samples the next until every request
has ended or a given step is reached (`loop.decode_until`). `generate` runs it to the end, `stream` a step at
a time, stop strings some steps at a time: the tokens are the same because the function is. Shapes are rounded
up to buckets, so nearby batches and lengths share a compilation.

    outs = generate(model, tokenizer, ["Once upon a time"], max_new_tokens=64)
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.decoding.messages import encode_messages
from jaxllm.decoding.options import GenerationOptions, spells_out_options
from jaxllm.decoding.run import Completion, GenerationRun, Prompt, Timings
from jaxllm.decoding.text import stable_prefix

TOKENS_PER_STOP_CHECK = 16  # made between two looks for a stop string


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One step of a stream; `text` may be empty while a character is incomplete."""

    text: str
    token_id: int
    logprob: float | None


@spells_out_options
def generate(
    model, tokenizer, prompts: Sequence[Prompt], *, timings: bool = False, **options: Any
) -> list[Completion]:
    """What the model writes after each prompt. Greedy by default; the same seed gives the same tokens.

    prompts: texts, or lists of token ids. Texts are encoded as the tokenizer does by itself, begin token
      included if that is its policy. For an encoder-decoder they are the source.
    timings: also give the seconds of the two parts; between them the host waits for the device.
    options: as in `GenerationOptions`: max_new_tokens, sampler, seed, stop, stop_tokens, cache, logprobs.

    A request whose logits cease to be finite (a float16 overflows) ends there, "nonfinite", with a warning.
    Raises ValueError for an empty prompt, a token out of range, or a prompt that fills the context, TypeError
    inside of jax.jit and its kind: its loop is compiled, and the host looks at the tokens between the parts.
    """
    refuse_tracing(model, prompts)
    begin = time.perf_counter()
    run = GenerationRun(model, tokenizer, prompts, GenerationOptions(**options))
    first = run.wait() if timings else begin
    if not run.stop:
        run.advance(run.longest)
    while run.stop and not run.ended():
        run.advance(TOKENS_PER_STOP_CHECK)
        run.end_at_stop_strings()
    seconds = Timings(prefill_s=first - begin, decode_s=run.wait() - first) if timings else None
    return run.completions(seconds)


@spells_out_options
def stream(model, tokenizer, prompt: Prompt, **options: Any) -> Iterator[Token]:
    """The tokens of `generate` for one prompt, each as soon as it is made. Options as there.

    Raises FloatingPointError behind the last good token where logits cease to be finite.
    """
    refuse_tracing(model, prompt)
    return _tokens(GenerationRun(model, tokenizer, [prompt], GenerationOptions(**options)))


def _tokens(run: GenerationRun) -> Iterator[Token]:
    given = emitted = 0  # tokens and characters given out
    while True:
        run.end_at_stop_strings()
        made, last = run.completions()[0], run.ended()
        ids = made.token_ids
        for count in range(given + 1, len(ids) + 1):
            text = made.text
            if not last or count < len(
                ids
            ):  # a stop string may have begun: what could be its beginning waits
                whole = run.text(0, ids[:count])
                text = whole.shown(stable_prefix(whole.all(), run.stop))
            text, emitted = text[emitted:], max(emitted, len(text))
            logprob = made.logprobs[count - 1] if made.logprobs else None
            yield Token(text=text, token_id=ids[count - 1], logprob=logprob)
        if made.error is not None:
            raise FloatingPointError(made.error)
        if last:
            return
        given = len(ids)
        run.advance(1)


def refuse_tracing(model, prompts) -> None:
    """Raises TypeError where JAX is tracing: inside of jit, grad, vmap, scan."""
    leaves = jax.tree.leaves((model, prompts))
    if any(isinstance(x, jax.core.Tracer) for x in (*leaves, jnp.zeros(()))):
        raise TypeError(
            "generate: must be called outside of jax.jit, grad, vmap and scan, for it compiles its own loop, "
            "got a call inside; there use model(tokens, cache), or decoding.loop.decode_until for the loop"
        )


@spells_out_options
def chat(model, tokenizer, messages: Sequence[dict[str, str]], **options: Any) -> Completion:
    """The model's answer to a conversation, laid out by the tokenizer's chat template.

    messages: dicts with "role" and "content". options: as for `generate`.
    Raises ValueError when the tokenizer has no template, and for messages or roles that it does not take.
    """
    return generate(model, tokenizer, [encode_messages(tokenizer, messages)], **options)[0]
