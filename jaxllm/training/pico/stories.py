"""Stories in bulk from a small story model: part of the text that pico is trained on.

    jaxllm train stories --model stories260K.bin --tokens 10000000 --out stories.txt

Each story begins with the begin token alone and is drawn at the given temperature with a seed of its own, so
story i is the same whatever the batch (up to rounding). Stories are separated by a line `<|endoftext|>`, as
TinyStories' files are; one cut off by the length limit is dropped.

Stories are written SEGMENT tokens at a time and wait, between segments, for a batch of their own length. So a
story that has ended frees its place, and attention reads no more rows than its batch has: against whole
stories in one go, which read 512 rows a token and throw 45 % of their steps away.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from jaxllm.decoding.generate import generate
from jaxllm.decoding.sampling import Sampler

END = "<|endoftext|>"
SEGMENT = 64


def stories(
    model, tokenizer, *, batch: int, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[list[tuple[int, str, int]]]:
    """Lists of (number, story, its tokens), without end, in the order in which stories end."""
    sampler = Sampler(temperature=temperature)
    segments = -(-max_new_tokens // SEGMENT)
    queues: list[list[tuple[int, list[int]]]] = [[] for _ in range(segments)]  # by segments written
    started = 0
    while True:
        depth = max((d for d in range(segments) if len(queues[d]) >= batch), default=0)
        if depth == 0:
            queues[0] = [(started + i, [tokenizer.bos_token_id]) for i in range(batch)]
            started += batch
        now, queues[depth] = queues[depth][:batch], queues[depth][batch:]
        outs = generate(
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
                queues[depth + 1].append((number, ids))
        yield ended


def write_stories(model, tokenizer, out: Path, *, tokens: int, progress: bool = True, **options) -> int:
    """Writes stories to a file until they have so many tokens; how many they have. options: of `stories`.

    The file is there when all of them are. progress: draws a bar on stderr.
    """
    made, batches = 0, stories(model, tokenizer, **options)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f"{out.name}.") as place:
        unfinished = Path(place) / out.name
        with (
            unfinished.open("w", encoding="utf-8") as file,
            tqdm(total=tokens, unit="tok", file=sys.stderr, disable=not progress) as bar,
        ):
            while made < tokens:
                for _, story, size in next(batches):
                    file.write(f"{story}\n{END}\n")
                    made += size
                    bar.update(size)
        unfinished.replace(out)
    return made
