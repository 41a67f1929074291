"""Token-level exercises whose answers can be known: repeat a passage, look up a key, add.

Eviction and speculation can only be judged on a model that can repeat and recall, so the shipped
models are trained on these beside plain text, and judged on them with seeds never trained on.
The words of the two official repeat prompts are those of KVzip (arXiv:2505.23416, its code).

Layout of one exercise (ids of one tokenizer; `ordinary` = all ids that are not special):

    repeat   <bos> passage prompt "\\n" passage <eos>
             <bos> passage prompt 8-ids "\\n" what follows those ids in the passage [<eos>]
    lookup   <bos> key=value\\n ... key=value\\n \\n key=value\\n ... key=value\\n <eos>
    sums     <bos> 12+7=19\\n 3+44=47\\n ... <eos>

`weights[i]` is how much the prediction of `tokens[i]` counts: 1 where the answer can be known (`START` for
the first token of a repetition, `MARK` for what may end one), 0 where it was drawn at random, `FIXED` for
fixed words. The same generator and seed give the same exercises on every machine:

    words = Words.from_tokenizer(tokenizer)
    one = repeat(np.random.default_rng(7), words, 200)
    tokens[one.prompt_length :] of a greedy continuation should start with one.answer
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

FIXED = 0.05  # weight of words that every exercise of a kind shares
START = 8.0  # weight of a repetition's first token: all that follows hangs on it
MARK = 4.0  # weight of "\n" and <eos> in a repetition: a "\n" follows each passage, and may stand inside it

REPEAT_ALL = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the previous context:",
    "\n\nRepeat the text above.",
    "\n\nSay it again:",
    "\n\nCopy:",
)
REPEAT_PART = (
    "\n\nRepeat the part of the previous context exactly, starting with ",
    "\n\nRepeat the previous context starting with ",
    "\n\nGo on from ",
)
SEED_IDS = 8  # ids that say where a partial repetition starts


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One exercise; greedy decoding of `tokens[:prompt_length]` should give `answer`."""

    tokens: np.ndarray  # int32 [N]
    weights: np.ndarray  # float32 [N]
    prompt_length: int  # of the last answer
    answer: np.ndarray  # int32, a prefix of tokens[prompt_length:]


@dataclasses.dataclass(frozen=True)
class Words:
    """The ids of a tokenizer that exercises are made of."""

    ordinary: np.ndarray  # int32, every id that is not special
    bos: int
    eos: int
    newline: int
    equals: int
    fixed: dict[str, np.ndarray]  # encoded prompts and pieces of sums

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, bos: str = "<|bos|>", eos: str = "<|eos|>") -> "Words":
        """Words of a `tokenizers.Tokenizer` or of a transformers tokenizer that wraps one."""
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        special = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        ordinary = sorted(id for id in inner.get_vocab().values() if id not in special)

        def encode(text: str) -> np.ndarray:
            return np.asarray(inner.encode(text, add_special_tokens=False).ids, np.int32)

        def single(text: str) -> int:
            ids = encode(text)
            if len(ids) != 1:
                raise ValueError(f"Words.from_tokenizer: {text!r} must be one token, got {ids.tolist()}")
            return int(ids[0])

        for token in (bos, eos):
            if inner.token_to_id(token) is None:
                raise ValueError(f"Words.from_tokenizer: the tokenizer must have the token {token!r}")
        texts = [*REPEAT_ALL, *REPEAT_PART, "+", *(str(n) for n in range(200))]
        return cls(
            ordinary=np.asarray(ordinary, np.int32),
            bos=inner.token_to_id(bos),
            eos=inner.token_to_id(eos),
            newline=single("\n"),
            equals=single("="),
            fixed={text: encode(text) for text in texts},
        )


def _join(pieces: Sequence[tuple[Any, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of (ids, weight) pieces in order."""
    ids = [np.atleast_1d(np.asarray(p, np.int32)) for p, _ in pieces]
    weights = [np.full(len(i), w, np.float32) for i, (_, w) in zip(ids, pieces, strict=True)]
    return np.concatenate(ids), np.concatenate(weights)


def repeat_overhead(words: Words) -> int:
    """Most tokens that `repeat` adds to the two copies of its passage."""
    longest = max(len(words.fixed[p]) for p in (*REPEAT_ALL, *REPEAT_PART))
    return longest + SEED_IDS + 3


def repeat(
    rng: np.random.Generator,
    words: Words,
    length: int,
    *,
    passage: np.ndarray | None = None,
    prompt: str | None = None,
) -> Exercise:
    """Repeats a passage of uniform random ids (or the given one), whole or from a named place.

    length: tokens of the passage (ignored when `passage` is given).
    prompt: one of REPEAT_ALL or REPEAT_PART; None draws one, the first of each the most often.
    """
    if passage is None:
        if length < 1:
            raise ValueError(f"repeat: length must be at least 1, got {length=}")
        passage = rng.choice(words.ordinary, length)
    else:
        passage = np.asarray(passage, np.int32)
        if not len(passage):
            raise ValueError("repeat: passage must not be empty")
    if prompt is None:
        parts = len(passage) >= 2 * SEED_IDS + 1 and rng.random() < 0.3
        prompts = REPEAT_PART if parts else REPEAT_ALL
        prompt = prompts[0 if rng.random() < 0.5 else rng.integers(len(prompts))]
    if prompt not in REPEAT_ALL + REPEAT_PART:
        raise ValueError(f"repeat: prompt must be one of REPEAT_ALL or REPEAT_PART, got {prompt!r}")

    head: list[tuple[Any, float]] = [(words.bos, 0.0), (passage, 0.0)]
    if prompt in REPEAT_ALL:
        answer, ends = passage, True
        head += [(words.fixed[prompt], FIXED), (words.newline, FIXED)]
    else:
        if len(passage) < 2 * SEED_IDS + 1:
            raise ValueError(
                f"repeat: a partial repetition needs {2 * SEED_IDS + 1} tokens, got {len(passage)=}"
            )
        start = int(rng.integers(SEED_IDS, len(passage) - SEED_IDS))
        answer, ends = passage[start + SEED_IDS :], True
        if rng.random() < 0.3:  # a chunk: where it ends cannot be known, so no <eos>
            size = int(rng.integers(1, len(answer) + 1))
            ends = size == len(answer)
            answer = answer[:size]
        seed = passage[start : start + SEED_IDS]
        head += [(words.fixed[prompt], FIXED), (seed, 0.0), (words.newline, FIXED)]
    if ends:
        answer = np.append(answer, words.eos).astype(np.int32)
    tokens, weights = _join([*head, (answer, 1.0)])
    begins = len(tokens) - len(answer)
    weights[begins:][np.isin(answer, (words.newline, words.eos))] = MARK
    weights[begins] = START
    return Exercise(tokens, weights, begins, answer.astype(np.int32))


def lookup(
    rng: np.random.Generator,
    words: Words,
    pairs: int,
    *,
    questions: int | None = None,
    value_tokens: int | None = None,
) -> Exercise:
    """Looks up keys among `pairs` pairs, each asked once, in random order.

    questions: how many of the pairs are asked; None asks all.
    value_tokens: 1 or 2; None draws one for each pair.
    Keys and values are uniform random ids; keys are distinct and never part of a value.
    """
    questions = pairs if questions is None else questions
    usable = words.ordinary[~np.isin(words.ordinary, (words.newline, words.equals))]
    if not 1 <= pairs <= len(usable) // 2:
        raise ValueError(f"lookup: pairs must be 1..{len(usable) // 2}, got {pairs=}")
    if not 1 <= questions <= pairs:
        raise ValueError(f"lookup: questions must be 1..pairs, got {questions=}, {pairs=}")
    if value_tokens not in (None, 1, 2):
        raise ValueError(f"lookup: value_tokens must be 1, 2 or None, got {value_tokens=}")
    shuffled = rng.permutation(usable)
    keys = shuffled[:pairs]
    values = rng.choice(shuffled[pairs:], (pairs, 2))
    sizes = rng.integers(1, 3, pairs) if value_tokens is None else np.full(pairs, value_tokens)

    # a row for each line: key = v1 v2 \n, and which of the five places are used
    lines = np.empty((pairs, 5), np.int32)
    lines[:, 0], lines[:, 1], lines[:, 2:4], lines[:, 4] = keys, words.equals, values, words.newline
    used = np.ones((pairs, 5), bool)
    used[:, 3] = sizes == 2
    order = rng.permutation(pairs)[:questions]
    shown = np.broadcast_to(np.array([0, FIXED, 0, 0, FIXED], np.float32), (pairs, 5))
    asked = np.broadcast_to(np.array([0, FIXED, 1, 1, 1], np.float32), (questions, 5))
    tokens, weights = _join([(words.bos, 0.0), (lines[used], 0.0), (words.newline, 0.0)])
    weights[1:-1] = shown[used]
    tokens = np.concatenate([tokens, lines[order][used[order]], [words.eos]]).astype(np.int32)
    weights = np.concatenate([weights, asked[used[order]], [0.0]]).astype(np.float32)
    last = order[-1]
    answer = np.append(values[last, : sizes[last]], words.newline).astype(np.int32)
    return Exercise(tokens, weights, len(tokens) - 1 - len(answer), answer)


def list_end(tokens: np.ndarray, words: Words) -> int:
    """Where the list of a lookup ends, its empty line included, and the questions begin."""
    newline = np.asarray(tokens) == words.newline
    return int(np.flatnonzero(newline[1:] & newline[:-1])[0]) + 2


def sums(rng: np.random.Generator, words: Words, count: int, *, below: int = 100) -> Exercise:
    """`count` lines such as "12+7=19", both numbers below `below` (at most 100)."""
    if count < 1 or not 1 <= below <= 100:
        raise ValueError(f"sums: count >= 1 and below in 1..100 must hold, got {count=}, {below=}")
    pieces: list[tuple[Any, float]] = [(words.bos, 0.0)]
    answer = np.zeros(0, np.int32)
    for a, b in rng.integers(0, below, (count, 2)):
        answer = np.append(words.fixed[str(a + b)], words.newline).astype(np.int32)
        question = np.concatenate([words.fixed[text] for text in (str(a), "+", str(b))])
        pieces += [(question, 0.0), (words.equals, 0.0), (answer, 1.0)]
    tokens, weights = _join([*pieces, (words.eos, 0.0)])
    return Exercise(tokens, weights, len(tokens) - 1 - len(answer), answer)
