"""What `generate`, `stream` and `chat` may be asked for, said once.

options = GenerationOptions(max_new_tokens=64, cache=CacheOptions(bits=4))
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxllm.cache import Cache
from jaxllm.decoding.sampling import Sampler
from jaxllm.decoding.speculation import Speculation
from jaxllm.eviction.running_budget import CacheBudget


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What the cache of a run is.

    bits: 2, 4 or 8 keeps keys and values in codes of so many bits (lossy); None as the model computes them.
    budget: keeps the cache within a budget while the text grows, up to the model's context (lossy;
      `eviction/gates.py`).
    start: what every prompt continues: one request (shared) or one a prompt. It is read, never changed, and
      has its own bits. With a budget it must be an evicted one to which nothing was added. A cache in place
      of options is this alone.

    Raises ValueError where bits are given with a start.
    """

    bits: int | None = None
    budget: CacheBudget | None = None
    start: Cache | None = None

    def __post_init__(self):
        if self.start is not None and self.bits is not None:
            raise ValueError(
                f"CacheOptions: bits must be None where a start, which has its own, is given, got {self.bits}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The keywords that `generate`, `stream` and `chat` share. Greedy by default.

    max_new_tokens: for all requests or one number each. A request also ends where the model's context does.
    sampler: how the next token is chosen.
    seed: for all (request i draws from key(seed) folded with i), or one a request, independent of i.
    stop: texts that end a request, special tokens' among them; neither they nor what follows are in `text`.
    stop_tokens: ids that end a request; None takes the model's own, or else the tokenizer's end token.
    cache: a cache that every prompt continues, or what an own one is.
    logprobs: also give each token's log-probability.
    speculation: who drafts tokens, and how they are looked at.
    average_bits: of a model that chooses its widths (`attach_precision`), between its targets: what decoded
      tokens read on average, whatever the text; the prompt takes all planes.
    """

    max_new_tokens: int | Sequence[int] = 64
    sampler: Sampler = Sampler()
    seed: int | Sequence[int] = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    cache: Cache | CacheOptions | None = None
    logprobs: bool = False
    speculation: Speculation | None = None
    average_bits: float | None = None

    def cache_options(self) -> CacheOptions:
        """`cache` as options, whatever was given."""
        return self.cache if isinstance(self.cache, CacheOptions) else CacheOptions(start=self.cache)


F = TypeVar("F", bound=Callable[..., Any])


def spells_out_options(function: F) -> F:
    """Shows the fields of `GenerationOptions` in place of `**options`: in help, in a notebook's tooltip."""
    own = inspect.signature(function)
    shown = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shown += inspect.signature(GenerationOptions).parameters.values()  # keywords only
    function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    return function
