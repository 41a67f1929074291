"""What `kv_eviction.py` and `kv_speed.py` share: methods that score a cache, and caches to score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm as jl
from jaxllm import eviction
from jaxllm.training.pico.exercises import Words, list_end, lookup

CHUNK = 256  # tokens of a repetition, at most

Scorer = Callable[[Any, list[int], list[int], int], jax.Array]  # cache, context, a first question, seed
Methods = dict[str, tuple[Scorer, dict[str, Any]]]  # with the options that `evict` gets


def methods(model, tokenizer, gates: Mapping[str, eviction.Gate], only: Sequence[str] | None) -> Methods:
    """Scores of a cache that holds <bos> and a context, and how its budget is spent, by name.

    `snapkv, asked` scores with the first question in its window, as it is published: that question is then
    easy, and only the others count. `kvzip, heads` drops whole heads by scores of another context.
    """
    every = {**_kvzip(model, tokenizer), **_learnt(model, tokenizer, gates), **_baselines(model, tokenizer)}
    if only and set(only) - set(every):
        raise SystemExit(f"--only must name some of {', '.join(every)}, got {', '.join(only)}")
    return {name: found for name, found in every.items() if only is None or name in only}


def _kvzip(model, tokenizer) -> Methods:
    zip_ = partial(
        eviction.kvzip_scores, model, replay=eviction.RepeatPrompt.of(tokenizer), prefix=1, chunk=CHUNK
    )
    # heads are learnt from one context that no part measures: a list behind random tokens
    words, rng = Words.of(tokenizer), np.random.default_rng([0, 99])
    sample = [*rng.choice(words.ordinary, 128).tolist(), *listed(rng, words, 40)[0]]
    heads = eviction.head_scores(
        zip_(filled(model, jnp.asarray([[words.bos, *sample]]), rows=len(sample) + 1), [sample])
    )
    return {
        "kvzip": (lambda cache, row, asked, seed: zip_(cache, [row]), {}),
        "kvzip+": (lambda cache, row, asked, seed: zip_(cache, [row], output_aware=True), {}),
        "kvzip, heads": (
            lambda cache, row, asked, seed: eviction.spread(heads, cache, prefix=1),
            {"budget": "head"},
        ),
    }


def _learnt(model, tokenizer, gates: Mapping[str, eviction.Gate]) -> Methods:
    def by_gate(gate: eviction.Gate) -> Scorer:
        return lambda cache, row, asked, seed: jl.prefill_with_scores(
            model, [[tokenizer.bos_token_id, *row]], gate, prefix=1
        )[1]

    return {name: (by_gate(gate), {}) for name, gate in gates.items()}


def _baselines(model, tokenizer) -> Methods:
    def scored(score: Callable[..., jax.Array], **options) -> tuple[Scorer, dict[str, Any]]:
        def of(cache, row, asked, seed):
            return score(model, [[tokenizer.bos_token_id, *row]], prefix=1, **options)

        return of, {}

    def with_question(cache, row, asked, seed):
        rows = [[tokenizer.bos_token_id, *row, *asked]]
        return eviction.snapkv_scores(model, rows, prefix=1, window=8)[..., : len(row)]

    def at_random(cache, row, asked, seed):
        return eviction.random_scores(model, [[tokenizer.bos_token_id, *row]], prefix=1, seed=seed)

    return {
        "h2o": scored(eviction.h2o_scores),
        "snapkv": scored(eviction.snapkv_scores, window=16),
        "snapkv, asked": (with_question, {}),
        "tova": scored(eviction.tova_scores),
        "expected": scored(eviction.expected_scores),
        "streaming": scored(eviction.streaming_scores),
        "random": (at_random, {}),
    }


def compressed(
    some: Methods, cache, row: list[int], asked: list[int], seed: int, ratios: Sequence[float]
) -> Iterator[tuple[str, float, Any]]:
    """(method, ratio, what it leaves of the cache); first everything."""
    yield "everything", 1.0, cache
    for name, (score, options) in some.items():
        scores = score(cache, row, asked, seed)
        for ratio in ratios:
            yield name, ratio, eviction.evict(cache, scores, ratio=ratio, prefix=1, **options)


@partial(jax.jit, static_argnames="rows")
def filled(model, tokens, *, rows: int):
    """The cache of some tokens."""
    return model(tokens, model.make_cache(tokens.shape[0], rows), logits="last")[1]


def listed(rng: np.random.Generator, words: Words, pairs: int) -> tuple[list[int], list[list[int]]]:
    """A list of key=value lines, and the lines in another order."""
    tokens = lookup(rng, words, pairs, value_tokens=2).tokens  # of one length: few compilations
    one, gap = tokens.tolist(), list_end(tokens, words)
    lines: list[list[int]] = [[]]
    for token in one[gap:-1]:
        lines[-1].append(token)
        if token == words.newline:
            lines.append([])
    return one[1:gap], lines[:-1]
