"""The table of methods that score a cache: what each is made of, and what is lost.

    method = METHODS["snapkv"]
    scores = method.score(model, cache, [ids], prefix=1)               # [L, B, K, T], for `evict`

The command line, `demo` and the benchmarks choose from it. A new method is a function that gives scores, and
an entry here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from jaxtyping import Array, Float

from jaxllm.cache.dense import DenseCache
from jaxllm.cache.paged import PagedCache
from jaxllm.eviction import baselines
from jaxllm.eviction.gates import pico_gates
from jaxllm.eviction.kvzip import kvzip_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictionMethod:
    """One way to tell what cached pairs are worth.

    title: the published name. help: one line of it. lossy: why what stays may not be what later text needs.
    needs: what scores are made of, and with it what `scorer` is:
        "cache"    a cache and the contexts that it holds: scorer(model, cache, contexts, tokenizer=, prefix=)
        "tokens"   all tokens of the cache: scorer(model, tokens, prefix=)
        "gates"    gates that watch the text being read (`prefill_with_scores`): scorer() opens pico's
    """

    title: str
    help: str
    lossy: str
    needs: Literal["cache", "tokens", "gates"]
    scorer: Callable[..., Any]

    def score(
        self,
        model,
        cache: DenseCache | PagedCache,
        tokens: Sequence[Sequence[int]],
        *,
        prefix: int = 0,
        tokenizer: Any = None,
        **options: Any,
    ) -> Float[Array, "L B K T"]:
        """Scores of what a cache of `tokens` holds behind the first `prefix`; options: of the method's own.

        Raises ValueError for a method of gates, and where the scorer does.
        """
        if self.needs == "cache":
            contexts = [row[prefix:] for row in tokens]
            return self.scorer(model, cache, contexts, tokenizer=tokenizer, prefix=prefix, **options)
        if self.needs == "tokens":
            return self.scorer(model, tokens, prefix=prefix, **options)
        raise ValueError(f"{self.title}: a cache is scored while it is filled, by prefill_with_scores")


OWN_QUERIES = "scores know the text's own queries, not those of a later question"

METHODS = {
    "kvzip": EvictionMethod(
        title="KVzip",
        help="attention while the context is repeated",
        lossy="scores know what repeats the text, and no question",
        needs="cache",
        scorer=kvzip_scores,
    ),
    "kvzip+": EvictionMethod(
        title="KVzip+",
        help="the same, weighed by how far a value moves the output",
        lossy="as KVzip",
        needs="cache",
        scorer=partial(kvzip_scores, output_aware=True),
    ),
    "fast-kvzip": EvictionMethod(
        title="Fast KVzip",
        help="gates that guess KVzip's scores while the context is read",
        lossy="scores are guesses of KVzip's",
        needs="gates",
        scorer=partial(pico_gates, "fast"),
    ),
    "kvzap": EvictionMethod(
        title="KVzap",
        help="gates that guess the logarithm of KVzip+'s scores",
        lossy="scores are guesses of KVzip+'s",
        needs="gates",
        scorer=partial(pico_gates, "zap"),
    ),
    "snapkv": EvictionMethod(
        title="SnapKV",
        help="attention from the last queries, smoothed",
        lossy=OWN_QUERIES,
        needs="tokens",
        scorer=baselines.snapkv_scores,
    ),
    "h2o": EvictionMethod(
        title="H2O",
        help="attention from all later queries",
        lossy=OWN_QUERIES,
        needs="tokens",
        scorer=baselines.h2o_scores,
    ),
    "tova": EvictionMethod(
        title="TOVA",
        help="attention from the last query, all heads together",
        lossy=OWN_QUERIES,
        needs="tokens",
        scorer=baselines.tova_scores,
    ),
    "expected": EvictionMethod(
        title="Expected Attention",
        help="attention that later queries may be expected to give",
        lossy="later queries are taken to be like the text's own",
        needs="tokens",
        scorer=baselines.expected_scores,
    ),
    "streaming": EvictionMethod(
        title="StreamingLLM",
        help="the first tokens and the most recent ones",
        lossy="the middle of the text goes, whatever it says",
        needs="tokens",
        scorer=baselines.streaming_scores,
    ),
    "random": EvictionMethod(
        title="random",
        help="drawn by seed, to compare with",
        lossy="scores know nothing of the text",
        needs="tokens",
        scorer=baselines.random_scores,
    ),
}
