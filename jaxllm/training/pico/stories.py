"""Stories in bulk from a small story model: part of the text that pico is trained on.

    python -m jaxllm.training.pico.stories --model stories260K.bin --tokens 10000000 --out stories.txt

Each story begins with the begin token alone and is drawn at the given temperature with a seed of its own, so
story i is the same whatever the batch (up to rounding). Stories are separated by a line `<|endoftext|>`, as
TinyStories' files are; one cut off by the length limit is dropped.

Stories are written SEGMENT tokens at a time and wait, between segments, for a batch of their own length. So a
story that has ended frees its place, and attention reads no more rows than its batch has: against whole
stories in one go, which read 512 rows a token and throw 45 % of their steps away.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import jaxllm as jl

END = "<|endoftext|>"
SEGMENT = 64


def stories(
    model, tokenizer, *, batch: int, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[list[tuple[int, str, int]]]:
    """Lists of (number, story, its tokens), without end, in the order in which stories end."""
    sampler = jl.Sampler(temperature=temperature)
    segments = -(-max_new_tokens // SEGMENT)
    waiting: list[list[tuple[int, list[int]]]] = [[] for _ in range(segments)]  # by segments written
    started = 0
    while True:
        depth = max((d for d in range(segments) if len(waiting[d]) >= batch), default=0)
        if depth == 0:
            waiting[0] = [(started + i, [tokenizer.bos_token_id]) for i in range(batch)]
            started += batch
        now, waiting[depth] = waiting[depth][:batch], waiting[depth][batch:]
        outs = jl.generate(
            model,
            tokenizer,
            [ids for _, ids in now],
            max_new_tokens=min(SEGMENT, max_new_tokens - depth * SEGMENT),
            sampler=sampler,
            seed=[(seed + number) * segments + depth for number, _ in now],
        )
        ended = []
        for (number, ids), out in zip(now, outs, strict=True):
            ids = ids + out.token_ids
            if out.finish_reason == "stop":
                story = tokenizer.decode(ids, skip_special_tokens=True).strip()
                ended.append((number, story, len(ids) - 1))
            elif depth + 1 < segments:
                waiting[depth + 1].append((number, ids))
        yield ended


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
            for _, story, tokens in next(batches):
                file.write(f"{story}\n{END}\n")
                made += tokens
                bar.update(tokens)
    print(f"{made} tokens in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
