"""Witten-Bell interpolated byte n-grams: the yardstick for bits per byte on small texts.

Bell, Cleary, Witten, "Text Compression", 1990 (method C), in its interpolated form. With n(h, c) how often
byte c followed context h in training, n(h) their sum and t(h) how many different bytes followed h,

    P(c | h) = (n(h, c) + t(h) P(c | h without its first byte)) / (n(h) + t(h))

down to the uniform 1/256 below the empty context; an unseen h says what the shorter context says. Order k
predicts from the k bytes before (so order 5 counts 6-grams). Counts are fixed after training.

    python benchmarks/witten_bell.py --data ../shared/data --results docs/results
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from parts import common
from parts.common import Page, Run, Table, add_data, begin, parse, parser, save, texts
from tqdm import tqdm


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


def measure(args: argparse.Namespace) -> Run:
    """Bits per byte of every text by every order."""
    run = begin(args, {"orders": args.orders}) | {"results": []}
    for text in tqdm(texts(args), "texts", file=sys.stderr):
        train, held_out = ("\n".join(part).encode() for part in (text.train, text.held_out))
        found = {str(order): bits_per_byte(train, held_out, order) for order in args.orders}
        run["results"].append(
            {"text": text.name, "train": len(train), "held_out": len(held_out), "bits_per_byte": found}
        )
        save(args, run)
    return run


def page(run: Run) -> Page:
    """A table of texts and orders."""
    order = "bits per byte of the held-out part, predicted from so many bytes before each"
    columns = {
        "text": "one source of pico's corpus",
        "trained on": "bytes counted",
        "held out": "bytes predicted: the last 5 % of the source",
        **{f"order {k}": order for k in run["settings"]["orders"]},
    }
    rows = [
        (r["text"], f"{r['train']:,}", f"{r['held_out']:,}")
        + tuple(f"{bits:.3f}" for bits in r["bits_per_byte"].values())
        for r in run["results"]
    ]
    text = (
        "Witten-Bell interpolated byte n-grams, the yardstick that a language model of little text must "
        "beat. Documents are joined by line breaks."
    )
    return Page("Byte n-grams", text, [Table("Bits per byte", columns, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("witten_bell", __doc__)
    add_data(made)
    made.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6])
    common.main(parse(made, argv, tiny={"orders": [0, 2]}, needs=["data"]), measure, page)


if __name__ == "__main__":
    main()
