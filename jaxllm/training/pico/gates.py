"""The gates that ship with pico's target, and the texts they learn from.

jaxllm train gates --data texts/ --form fast --out gates/
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.eviction.gates import Gate, save_gates
from jaxllm.training.gates import train_gates
from jaxllm.training.pico import corpus
from jaxllm.training.pico.exercises import Words, list_end, lookup
from jaxllm.training.trainer import Trained


def pico_texts(
    tokenizer, texts: Sequence[corpus.Text], count: int, *, longest: int, seed: int
) -> list[list[int]]:
    """Contexts behind a begin token: plain text (half), lists of keys and values, random passages."""
    words, rows = Words.from_tokenizer(tokenizer), []
    inner = tokenizer.backend_tokenizer
    streams = [corpus.encode(inner, text.train) for text in texts]
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        length = int(rng.integers(longest // 4, longest))
        if i % 4 < 2:
            stream = streams[rng.integers(len(streams))]
            at = rng.integers(0, max(1, len(stream) - length))
            row = stream[at : at + length]
        elif i % 4 == 2:
            row = lookup(rng, words, min(length // 5, 64)).tokens[1:]  # the list, without the questions
            row = row[: list_end(row, words)]
        else:
            row = rng.choice(words.ordinary, length)
        rows.append([words.bos, *(int(token) for token in row)])
    return rows


def train_pico_gates(
    model, tokenizer, texts: Sequence[corpus.Text], *, texts_read: int, longest: int, seed: int, **options
) -> tuple[Gate, Trained]:
    """Gates for a model with pico's tokenizer, trained on `texts_read` contexts of at most `longest` tokens.

    options: as for `train_gates`. A context must fit the model's twice.
    """
    rows = pico_texts(tokenizer, texts, texts_read, longest=longest, seed=seed)
    return train_gates(model, rows, tokenizer=tokenizer, prefix=1, seed=seed, **options)


def save_pico_gates(gates: Gate, done: Trained, out: Path, **settings) -> None:
    """Writes gates in float16, with the settings and losses of the run that made them."""
    first, last = (round(float(np.mean(x)), 4) for x in (done.losses[:50], done.losses[-50:]))
    half = jax.tree.map(lambda x: x.astype(jnp.float16), gates)
    save_gates(half, out, **settings, loss_first_50=first, loss_last_50=last)
