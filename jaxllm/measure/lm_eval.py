"""EleutherAI's lm-evaluation-harness on a model of this library (`pip install 'jaxllm[eval]'`).

    import lm_eval
    from jaxllm.measure.lm_eval import HarnessModel

    lm_eval.simple_evaluate(HarnessModel(*jl.load()), tasks=["lambada_openai"], limit=100)

The three requests of its interface (`lm_eval.api.model.LM`, 0.4.13): `loglikelihood` scores as
`choices.py` does, `loglikelihood_rolling` predicts each token of a text once with as much before
it as the windows allow, and `generate_until` is `generate` with stop strings. Texts longer than
the context lose their first tokens, as in the harness's own adapters.
"""

from collections.abc import Sequence
from typing import Any

from jaxllm.decoding.generate import generate
from jaxllm.decoding.sampling import Sampler
from jaxllm.measure.choices import encode, encode_example, fit, front_token, sum_after
from jaxllm.measure.perplexity import score

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError(
        "jaxllm.measure.lm_eval: needs lm-evaluation-harness (pip install 'jaxllm[eval]')"
    ) from error

# Names under which tasks ask for a number of new tokens; the first one given counts.
MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(LM):
    """A model and its tokenizer as the harness sees them.

    batch: sequences a call when scoring; None chooses. prompts: how many are generated at once.
    max_new_tokens: where a task does not say.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch: int | None = None,
        prompts: int = 8,
        max_new_tokens: int = 256,
        progress: bool = True,
    ):
        super().__init__()
        if tokenizer is None:
            raise ValueError("HarnessModel: needs a tokenizer, got None")
        self.model = model
        self.tokenizer = tokenizer
        self.batch = batch
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.progress = progress

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability, and whether greedy would write it."""
        rows, firsts = [], []
        for context, continuation in (request.args for request in requests):
            asked = context.rstrip(" ")  # a space at the seam belongs to what follows
            text = context[len(asked) :] + continuation
            some, first = encode_example(self.tokenizer, asked, [text])
            some, starts, _ = fit(some, first, self.model.config.context)
            rows += some
            firsts += starts
        scores = score(self.model, rows, batch=self.batch, progress=self.progress)
        return [sum_after(scores, i, first) for i, first in enumerate(firsts)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """For each text its log-probability after the begin token, every token predicted once.

        Windows of `context` predictions lie side by side; the last reaches back to a full context.
        """
        context = self.model.config.context
        front = front_token(self.tokenizer)
        rows, owners, news = [], [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            ids = encode(self.tokenizer, text)
            ids = [front, *(ids[1:] if ids[:1] == [front] else ids)]
            for start in range(1, len(ids), context):
                end = min(start + context, len(ids))
                rows.append(ids[max(0, end - 1 - context) : end])
                owners.append(owner)
                news.append(end - start)
        scores = score(self.model, rows, batch=self.batch, progress=self.progress)
        totals = [0.0] * len(requests)
        for i, (owner, new) in enumerate(zip(owners, news, strict=True)):
            totals[owner] += sum_after(scores, i, len(rows[i]) - new)[0]
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """For each (context, settings) what the model writes, up to one of the stop strings."""
        texts: list[str] = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(i)
        for (stop, new, sampler), members in groups.items():
            room = self.model.config.context - new
            if room < 1:
                raise ValueError(
                    "HarnessModel: new tokens must leave room in the context, "
                    f"got max_gen_toks={new}, context={self.model.config.context}"
                )
            for start in range(0, len(members), self.prompts):
                some = members[start : start + self.prompts]
                prompts = [encode(self.tokenizer, requests[i].args[0])[-room:] for i in some]
                outs = generate(
                    self.model,
                    self.tokenizer,
                    [ids or [front_token(self.tokenizer)] for ids in prompts],
                    max_new_tokens=new,
                    sampler=sampler,
                    stop=stop,
                )
                for i, out in zip(some, outs, strict=True):
                    if out.error is not None:
                        raise FloatingPointError(out.error)
                    texts[i] = out.text
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampler]:
        """Stop strings, number of new tokens and sampler of one request."""
        asked = dict(asked)
        until = asked.pop("until", None) or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        given = [value for name in MOST_NEW if (value := asked.pop(name, None)) is not None]
        new = int(given[0]) if given else self.max_new_tokens
        temperature = float(asked.pop("temperature", None) or 0.0)
        draws = asked.pop("do_sample", temperature > 0)
        filters = {name: value for name in FILTERS if (value := asked.pop(name, None)) is not None}
        if asked:
            raise ValueError(f"HarnessModel: a task asks for settings not known here, got {asked}")
        if not draws:
            temperature = 0.0
        elif temperature == 0.0:
            temperature = 1.0
        return (
            tuple(text for text in stop if text),
            new,
            Sampler(temperature=temperature, **filters),
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template, or "" for none."""
        return (getattr(self.tokenizer, "chat_template", None) or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
