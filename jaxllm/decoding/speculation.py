"""What speculative decoding may be asked for, and what came of it.

generate(model, tokenizer, prompts, speculation=Speculation(draft=small))
generate(model, tokenizer, prompts, speculation=Speculation(draft=LookupDraft(), tokens=8))
"""

import dataclasses
from typing import Any, get_args

from jaxllm.decoding.acceptance import Verification
from jaxllm.decoding.drafts import Draft, LookupDraft, ModelDraft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """Tokens that are drafted cheaply and looked at by the model many at a time: exact (`acceptance.py`).

    draft: another model of the same tokenizer, the model in fewer layers (`first_layers`) or bits
      (`read_at`), or `LookupDraft`, which needs no model; or anything that has the methods of `drafts.Draft`,
      whose `count` holds in place of `tokens`.
    tokens: drafted at most between two looks.
    verification: where tokens are drawn, "token" looks at one draft after another and "block" at all
      together, of which more stand: both give the model's law. "noise" gives token for token what the model
      does alone with the same seed, and fewer stand. Greedy is the same tokens by each.
    doubt: drafting ends before a token whose law at the draft has sqrt(entropy) above this, in nats: models.
    tokenizer: the draft's, to be compared with the model's; needed where their vocabularies differ in size.

    Same tokens up to near-ties: a row of a chunk and a row alone are sums in another order.
    """

    draft: Any
    tokens: int = 4
    verification: Verification = "token"
    doubt: float | None = None
    tokenizer: Any = None

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"Speculation: tokens must be at least 1, got {self.tokens}")
        if self.verification not in (known := get_args(Verification)):
            raise ValueError(
                f"Speculation: verification must be one of {', '.join(known)}, got {self.verification!r}"
            )
        if self.doubt is not None and not self.doubt > 0:
            raise ValueError(f"Speculation: doubt must be positive, got {self.doubt}")


@dataclasses.dataclass(frozen=True)
class Speculated:
    """What came of a request's drafts."""

    proposed: int  # tokens that the model looked at
    stood: int  # of them, those that are in the text
    steps: int  # times that the model was asked, behind the prompt


def make_draft(asked: Speculation, model, tokenizer, cache) -> Draft:
    """Who drafts for a model, checked; ValueError for what does not go together.

    cache: the run's `CacheOptions`.
    """
    draft = asked.draft
    if hasattr(model, "encode"):
        raise ValueError("generate: speculation needs a decoder alone, got a model that reads a source")
    if cache.budget is not None:
        raise ValueError("generate: speculation needs a cache that is not evicted as it grows, got a budget")
    if asked.doubt is not None and isinstance(draft, Draft):
        raise ValueError(f"generate: doubt is of a model that drafts, got a {type(draft).__name__}")
    if isinstance(draft, LookupDraft):
        return dataclasses.replace(draft, count=asked.tokens)
    if isinstance(draft, Draft):
        return draft
    if not hasattr(draft, "make_cache") or hasattr(draft, "encode"):
        got = type(draft).__name__
        raise ValueError(f"generate: a draft must be a decoder, a LookupDraft or a drafts.Draft, got {got}")
    if cache.start is not None:
        raise ValueError(
            "generate: a model that drafts must have read the whole text, got a cache to start from"
        )
    if asked.tokenizer is not None and tokenizer is not None:
        if asked.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError("generate: the draft's tokenizer must have the model's tokens, got other ones")
    elif draft.config.vocab != model.config.vocab:
        raise ValueError(
            f"generate: a draft must have the model's {model.config.vocab} tokens, or its tokenizer must be "
            f"given to be compared (Speculation(tokenizer=...)), got {draft.config.vocab}"
        )
    return ModelDraft(draft, asked.tokens, model.config.vocab, asked.doubt)


def of_request(drafted, i: int) -> Speculated:
    """What came of request i's drafts, of the loop's `Drafted`."""
    return Speculated(int(drafted.proposed[i]), int(drafted.stood[i]), int(drafted.steps[i]))
