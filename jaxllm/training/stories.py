"""Stories in bulk from a small story model: part of the text that pico is trained on.

    python -m jaxllm.training.stories --model stories260K.bin --tokens 10000000 --out stories.txt

Each story begins with the begin token alone and is drawn at the given temperature with a seed of its own, so
story i is the same whatever the batch. Stories are separated by a line `<|endoftext|>`, as TinyStories' files
are; one cut off by the length limit is dropped.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import jaxllm as jl

END = "<|endoftext|>"


def stories(
    model, tokenizer, *, batch: int, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[list[tuple[str, int]]]:
    """Batches of (story, its number of tokens), without end; unfinished stories are left out."""
    sampler = jl.Sampler(temperature=temperature)
    prompts = [[tokenizer.bos_token_id]] * batch
    while True:
        outs = jl.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=list(range(seed, seed + batch)),
        )
        seed += batch
        yield [(o.text.strip(), len(o.token_ids)) for o in outs if o.finish_reason == "stop"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a story model, any that jaxllm loads")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = jl.load(args.model)
    made, begin = 0, time.time()
    batches = stories(
        model,
        tokenizer,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    with args.out.open("w", encoding="utf-8") as file, tqdm(total=args.tokens, unit="tok") as bar:
        while made < args.tokens:
            for story, tokens in next(batches):
                file.write(f"{story}\n{END}\n")
                made += tokens
                bar.update(tokens)
    print(f"{made} tokens in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
