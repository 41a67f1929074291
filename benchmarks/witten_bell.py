"""Witten-Bell interpolated byte n-grams: the yardstick for bits per byte on small texts.

Bell, Cleary, Witten, "Text Compression", 1990 (method C), in its interpolated form. With n(h, c) how often
byte c followed context h in training, n(h) their sum and t(h) how many different bytes followed h,

    P(c | h) = (n(h, c) + t(h) P(c | h without its first byte)) / (n(h) + t(h))

down to the uniform 1/256 below the empty context; an unseen h says what the shorter context says. Order k
predicts from the k bytes before (so order 5 counts 6-grams). Counts are fixed after training.

    python benchmarks/witten_bell.py train.txt held_out.txt --order 2 5
"""

import argparse
import json
from pathlib import Path

import numpy as np


def probabilities(train: bytes, held_out: bytes, order: int) -> np.ndarray:
    """Probability that the model of `train` gives to each byte of `held_out`, float64."""
    if order < 0:
        raise ValueError(f"witten_bell: order must be at least 0, got {order=}")
    text = np.frombuffer(train + held_out, np.uint8).astype(np.int64)
    size, here = len(train), len(train)
    test = np.arange(here, len(text))
    p = np.full(len(test), 1 / 256)
    context = np.zeros(len(text), np.int64)  # number of the k bytes before each position
    for k in range(order + 1):
        if k:
            # subtle: rows before the k-th have no such context; they are never read below
            context[1:] = context[:-1] * 256 + text[:-1]
            context[0] = 0
            context = np.unique(context, return_inverse=True)[1].astype(np.int64)
        pairs = context * 256 + text
        seen, counts = np.unique(pairs[k:size], return_counts=True)
        contexts = int(context.max()) + 1
        n = np.bincount(seen // 256, weights=counts, minlength=contexts)
        t = np.bincount(seen // 256, minlength=contexts)
        usable = test >= here + k  # the first bytes have a shorter past
        h = context[test]
        if len(seen):
            at = np.minimum(np.searchsorted(seen, pairs[test]), len(seen) - 1)
            count = np.where(seen[at] == pairs[test], counts[at], 0)
        else:
            count = np.zeros(len(test))
        total = n[h] + t[h]
        known = usable & (total > 0)
        p = np.where(known, (count + t[h] * p) / np.maximum(total, 1), p)
    return p


def bits_per_byte(train: bytes, held_out: bytes, order: int) -> float:
    """Mean code length of the bytes of `held_out` under the model of `train`."""
    if not held_out:
        raise ValueError("witten_bell: held_out must not be empty")
    return float(-np.log2(probabilities(train, held_out, order)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--order", type=int, nargs="+", default=[2, 5])
    args = parser.parse_args()
    train, held_out = args.train.read_bytes(), args.held_out.read_bytes()
    print(json.dumps({f"order {k}": bits_per_byte(train, held_out, k) for k in args.order}))


if __name__ == "__main__":
    main()
