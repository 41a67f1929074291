"""What new tokens say: all of it, in which stop strings are looked for, and what of it a user is shown.

    text = NewText(tokenizer, prompt, ids)
    text.first_stop(("<|im_end|>",))                        # where the first stop string begins, or None
    text.shown(end)                                         # up to there, without special tokens

A stop string is looked for in the text with its special tokens, as Hugging Face's `stop_strings` does, so
that it may be one, or reach over one; a text that is shown has none.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class NewText:
    """The text of new tokens: what they add to the prompt's, for a first space may depend on it."""

    tokenizer: Any  # None: tokens say nothing
    prompt: Sequence[int]  # () where the new tokens stand alone, as an encoder-decoder's do
    ids: Sequence[int]

    def all(self) -> str:
        """With special tokens."""
        return self._added(len(self.ids), special=True)

    def first_stop(self, stop: Sequence[str]) -> int | None:
        """Where in `all` the first of some stop strings begins; None: none is there."""
        text = self.all() if stop else ""
        return min((text.find(string) for string in stop if string in text), default=None)

    def shown(self, end: int | None = None) -> str:
        """Without special tokens; up to `end` of `all` if given."""
        if end is None:
            return self._added(len(self.ids), special=False)
        text = self.all()[:end]
        if text == self._added(len(self.ids), special=False)[:end]:
            return text
        # The tokens that end before it, and what the next one has of it, unless that is a special token.
        n = len(self.ids)
        while not text.startswith(self._added(n, special=True)):
            n -= 1
        rest = text[len(self._added(n, special=True)) :]
        special = n < len(self.ids) and not self._decode([self.ids[n]], special=False)
        return self._added(n, special=False) + ("" if special else rest)

    def _added(self, n: int, *, special: bool) -> str:
        """What the first n tokens add."""
        ids, before = list(self.ids[:n]), self._decode(self.prompt, special=special)
        whole = self._decode([*self.prompt, *ids], special=special)
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids, special=special)

    def _decode(self, ids: Sequence[int], *, special: bool) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)


def stable_prefix(text: str, stop: Sequence[str]) -> int:
    """How many characters of `text` no later token can take back."""
    end = len(text.rstrip("\ufffd"))  # an incomplete character decodes to this
    for string in stop:
        for size in range(min(len(string) - 1, end), 0, -1):
            if text[:end].endswith(string[:size]):
                end -= size
                break
    return end
