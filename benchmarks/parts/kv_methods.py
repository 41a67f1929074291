"""What `kv_eviction.py` and `kv_speed.py` share: methods that score a cache, and caches to score."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    # heads are learnt from one context that no part measures: a list behind random tokens
    words, rng = Words.from_tokenizer(tokenizer), np.random.default_rng([0, 99])
    sample = [words.bos, *rng.choice(words.ordinary, 128).tolist(), *listed(rng, words, 40)[0]]
    options = {"prefix": 1, "tokenizer": tokenizer, "chunk": CHUNK}

    @functools.cache
    def heads():
        cache = filled(model, jnp.asarray([sample]), capacity=len(sample))
        return eviction.head_scores(eviction.METHODS["kvzip"].score(model, cache, [sample], **options))

    def by_heads(cache, row, asked, seed):
        return eviction.broadcast_head_scores(heads(), cache, prefix=1)

    return {
        "kvzip": _by_name("kvzip", model, tokenizer, chunk=CHUNK),
        "kvzip+": _by_name("kvzip+", model, tokenizer, chunk=CHUNK),
        "kvzip, heads": (by_heads, {"budget": "whole_heads"}),
    }


def _by_name(name: str, model, tokenizer, **options) -> tuple[Scorer, dict[str, Any]]:
    def of(cache, row, asked, seed):
        tokens = [[tokenizer.bos_token_id, *row]]
        return eviction.METHODS[name].score(model, cache, tokens, prefix=1, tokenizer=tokenizer, **options)

    return of, {}


def _learnt(model, tokenizer, gates: Mapping[str, eviction.Gate]) -> Methods:
    def by_gate(gate: eviction.Gate) -> Scorer:
        def of(cache, row, asked, seed):
            return jl.prefill_with_scores(model, [[tokenizer.bos_token_id, *row]], gate, prefix=1)[1]

        return of

    return {name: (by_gate(gate), {}) for name, gate in gates.items()}


def _baselines(model, tokenizer) -> Methods:
    def with_question(cache, row, asked, seed):
        rows = [[tokenizer.bos_token_id, *row, *asked]]
        return eviction.snapkv_scores(model, rows, prefix=1, window=8)[..., : len(row)]

    def at_random(cache, row, asked, seed):
        return eviction.random_scores(model, [[tokenizer.bos_token_id, *row]], prefix=1, seed=seed)

    return {
        "h2o": _by_name("h2o", model, tokenizer),
        "snapkv": _by_name("snapkv", model, tokenizer, window=16),
        "snapkv, asked": (with_question, {}),
        "tova": _by_name("tova", model, tokenizer),
        "expected": _by_name("expected", model, tokenizer),
        "streaming": _by_name("streaming", model, tokenizer),
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


@functools.partial(jax.jit, static_argnames="capacity")
def filled(model, tokens, *, capacity: int):
    """The cache of some tokens."""
    return model(tokens, model.make_cache(tokens.shape[0], capacity), logits="last")[1]


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
