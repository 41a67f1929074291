"""The gates that ship with pico's target: the texts they learn from, and the command that made them.

python -m jaxllm.training.pico.gates --data texts/ --form fast --out gates/
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm as jl
from jaxllm.eviction.gates import save_gates
from jaxllm.training.gates import train_gates
from jaxllm.training.pico import corpus
from jaxllm.training.pico.exercises import Words, list_end, lookup


def pico_texts(
    tokenizer, texts: Sequence[corpus.Text], count: int, *, longest: int, seed: int
) -> list[list[int]]:
    """Contexts behind a begin token: plain text (half), lists of keys and values, random passages."""
    words, rows = Words.of(tokenizer), []
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as `jl.load` takes it, with pico's tokenizer (default: pico)")
    add("--data", type=Path, required=True, help="folder of the texts that pico is trained on")
    add("--stories", type=Path, help="file of sampled stories")
    add("--form", choices=("fast", "zap", "zap-linear"), default="fast")
    add("--hidden", type=int, default=512, help="width of the MLP of zap")
    add("--texts", type=int, default=1024)
    add("--longest", type=int, default=448, help="tokens of a text; it must fit the context twice")
    add("--tokens", type=int, default=2**18, help="of the texts, to learn from at most")
    add("--steps", type=int, default=4000)
    add("--batch", type=int, default=2048, help="tokens a step")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = jl.load(args.model, dtype="float32")
    texts = corpus.read(args.data, args.stories)
    rows = pico_texts(tokenizer, texts, args.texts, longest=args.longest, seed=args.seed)
    gates, done = train_gates(
        model,
        rows,
        form=args.form,
        tokenizer=tokenizer,
        prefix=1,
        tokens=args.tokens,
        steps=args.steps,
        batch=args.batch,
        hidden=args.hidden,
        seed=args.seed,
    )
    notes = {
        name: getattr(args, name) for name in ("form", "texts", "longest", "tokens", "steps", "batch", "seed")
    }
    first, last = (float(np.mean(x)) for x in (done.losses[:50], done.losses[-50:]))
    half = jax.tree.map(lambda x: x.astype(jnp.float16), gates)
    save_gates(half, args.out, **notes, loss_first_50=round(first, 4), loss_last_50=round(last, 4))
    print(f"loss {first:.3f} -> {last:.3f} in {done.seconds:.0f} s")


if __name__ == "__main__":
    main()
