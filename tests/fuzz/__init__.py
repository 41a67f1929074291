"""Broken and hostile files, made from good ones by seed: each must open to what is right or fail in one line.

    pytest tests/fuzz                                            a few hundred, in seconds
    python -m tests.fuzz --inputs 1000000 [--format NAME] [--seed N] [--results docs/results]

mutate      one change of one file: bits, bytes, JSON, the arrays of an .npz
formats     a good sample of each format, and how it is opened
outcome     what came of one input
processes   many inputs in processes with limits
"""
