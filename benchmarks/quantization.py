"""How well every quantization method keeps a model: tables, curves and ablations, written as they come.

    python benchmarks/quantization.py --data ../shared/data --results docs/results            # pico
    python benchmarks/quantization.py --model stories260K.bin --calibration FILE --lines FILE --results DIR

    methods    every method at every width (and group size): total bits, divergence, perplexity, seconds,
               memory
    curve      affine methods at 2 bits, calibrated on 2 to 128 sequences of width / 2 tokens (as many tokens
               an input as sequences of 2,048 give a model 4,096 wide)
    nested     one Any-Precision parent read at 3 to 6 bits, against k-means of each width alone
    dec_dec    3-bit bases whose rounding errors are fetched for some inputs: how many, and how selected
    ablations  2/4/16 bits: which columns, which outliers, against affine models of at most 3 total bits

pico is calibrated on what `training/pico/corpus.py` trains on and judged on the first 8,000 characters of
what it holds out of each text. For other models --calibration and --text are files; --lines instead of --text
has one story a line, each cut to --context tokens, lines that are equal but for case taken once. Calibration
and evaluation text must differ (checked: no line of 40 or more characters in both). In both a line
`<|endoftext|>` parts documents. The text is cut into windows of --context tokens. A seed draws the
--sequences calibration pieces of --length tokens out of all there are, and is the method's own seed too; what
needs no text and draws nothing has one seed.

Perplexity and the mean Kullback-Leibler divergence to the given model (KL), in nats a token, are over all
predictions; the standard error of the loss increase is over sequences, paired. Bits a weight count everything
stored for the linears of the blocks (DecDEC's residual too, which lies in host memory). Seconds are CPU
seconds of all threads, which other programs disturb less, of `jl.quantize` with finished statistics, the
first seed's with compilation; statistics are timed apart. Memory is how far the process's peak resident size
rose above its size before (Linux only), of the seed where that was least: freed pages that are used again do
not count, compilation does where no seed ran compiled.

Every result goes into --results at once; the same command goes on where a run was stopped.
"""

import argparse
import hashlib
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts import common
from parts.common import (
    Run,
    add_data,
    begin,
    load,
    measured,
    model_name,
    parse,
    parser,
    resident_bytes,
    resume,
    save,
    texts,
)
from parts.quantization_methods import JOBS, K_CHUNKS, SEQUENCES, Job
from parts.quantization_tables import page
from tqdm import tqdm

import jaxllm as jl
from jaxllm.measure.report import linear_bits
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.storage.fingerprint import fingerprint
from jaxllm.weights.affine import Affine
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.dense import Dense
from jaxllm.weights.mixed_columns import MixedColumns
from jaxllm.weights.nested_float import NestedFloat
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.scaled import Scaled

END = "<|endoftext|>"
JUDGED = 8000  # characters of each text held out
CACHES = 1.5e9  # bytes of the process above which compiled programs are let go
READ_BACK = (Affine, Codebook, BitPlanes, MixedColumns, Scaled)


# -- how it is judged


class Judge:
    """Compares models with the given one on the same sequences."""

    def __init__(self, model, rows: list[list[int]], batch: int = 8):
        T = max(map(len, rows))
        self.parts = []
        for i in range(0, len(rows), batch):
            tokens, lengths = np.zeros((batch, T), np.int32), np.ones((batch,), np.int32)
            for j, row in enumerate(rows[i : i + batch]):
                tokens[j, : len(row)], lengths[j] = row, len(row)
            self.parts.append((tokens, lengths, np.asarray(_log_probs(model, tokens, lengths))))
        self.given = self.sums(model)

    def sums(self, model) -> np.ndarray:
        """Of each sequence its negative log-likelihood, its divergence, its predictions [S, 3]."""
        found = [np.asarray(_sums(model, *part), np.float64) for part in self.parts]
        found = np.concatenate(found, axis=1).T
        return found[found[:, 2] > 0]

    def __call__(self, model) -> dict[str, float]:
        sums = self.sums(model)
        nll, divergence, count = sums.sum(0)
        more, S = sums[:, 0] - self.given[:, 0], len(sums)
        off = more - more.sum() / count * sums[:, 2]
        return {
            "perplexity": float(np.exp(nll / count)),
            "kl": float(divergence / count),
            "loss_increase": float(more.sum() / count),
            "standard_error": float(np.sqrt((off**2).sum() * S / max(S - 1, 1)) / count),
        }


@jax.jit
def _log_probs(model, tokens, lengths):
    return jax.nn.log_softmax(model(tokens, lengths=lengths)[0][:, :-1])


@jax.jit
def _sums(model, tokens, lengths, theirs):
    ours = jax.nn.log_softmax(model(tokens, lengths=lengths)[0][:, :-1])
    real = (jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
    came = jnp.take_along_axis(ours, tokens[:, 1:, None], axis=2)[..., 0]
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return jnp.stack([-(came * real).sum(1), (divergence * real).sum(1), real.sum(1)])


class Statistics:
    """Calibrations by seed and number of sequences, measured when asked for."""

    def __init__(
        self, model, pieces: list[list[int]], short: list[list[int]], sequences: int, jobs: list[Job]
    ):
        self.model, self.pieces, self.short, self.sequences = model, pieces, short, sequences
        self.want = frozenset().union(*(job.method.required_stats for job in jobs if job.sequences is None))
        self.want_short = frozenset().union(
            *(job.method.required_stats for job in jobs if job.sequences is not None)
        )
        self.done: dict[Any, Any] = {}

    def of_seed(self, seed: int, sequences: int | None):
        if (seed, sequences) not in self.done:
            whole = sequences is None
            pieces, count = (self.pieces, self.sequences) if whole else (self.short, sequences)
            order = np.random.default_rng([seed, int(whole)]).permutation(len(pieces))
            text = [pieces[i] for i in order[:count]]  # fewer sequences: the first of those of more
            with warnings.catch_warnings():
                if not whole:  # too little text is what the curve is about
                    warnings.simplefilter("ignore", UserWarning)
                want = self.want if whole else self.want_short
                self.done[seed, sequences] = jl.calibrate(self.model, text, want=want, progress=False)
        return self.done[seed, sequences]

    def seconds(self) -> dict[str, float]:
        """Of each statistic alone, everything compiled."""
        text, found = self.pieces[: self.sequences], {}
        for want in sorted(self.want):
            for _ in range(2):
                start = time.process_time()
                jl.calibrate(self.model, text, want={want}, progress=False)
                found[want] = time.process_time() - start
        return found


def result(job: Job, model, statistics: Statistics, judge: Judge, parents: dict) -> dict[str, Any]:
    """Runs one job."""
    given = statistics.of_seed(job.seed, job.sequences) if job.method.required_stats else None
    key = (job.method, job.seed)
    if job.read is None or key not in parents:
        small, seconds, memory = measured(
            lambda: jl.quantize(model, job.method, given, progress=False), time.process_time
        )
        if job.read is not None:
            parents[key] = small, seconds, memory
    else:
        small, seconds, memory = parents[key]
    if job.read is not None:
        small = jl.read_at(small, job.read)
    found = job.key | {"bits_per_weight": linear_bits(small), "seconds": seconds, "memory": memory}
    if job.name == "NestedFP, fp16":
        # the same product of both: what is compared is the weights, and that they are all there is
        found["bitwise"] = same_logits(dense(small, NestedFloat), halved(model), judge)
    return found | judge(dense(small))


def dense(model, formats=READ_BACK):
    """The model with its weights read back into plain numbers, but for formats that also look at the inputs.

    The same numbers in one compiled program for all methods; in float32 the products differ by rounding.
    """
    weights = {name: w for name, w in linear_weights(model).items() if isinstance(w, formats)}
    return replace_weights(model, {name: Dense(_rows(w)) for name, w in weights.items()})


@jax.jit
def _rows(w):
    return w.dequantize_rows(jnp.float32)


def halved(model):
    """The model with the linears of its blocks rounded to float16."""
    weights = {name: w for name, w in linear_weights(model).items() if "." in name}
    half = {name: w.rows.astype(jnp.float16).astype(w.rows.dtype) for name, w in weights.items()}
    return replace_weights(model, {name: Dense(rows) for name, rows in half.items()})


def same_logits(a, b, judge: Judge) -> bool:
    """Whether two models give the same bits on the first batch."""
    tokens, lengths, _ = judge.parts[0]
    return bool((_log_probs(a, tokens, lengths) == _log_probs(b, tokens, lengths)).all())


# -- texts


def encode(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The begin token, if the tokenizer has one, and the ids of all documents joined."""
    begin = tokenizer.bos_token_id
    ids: list[int] = []
    for document in text.split(f"{END}\n"):
        if document.strip():
            ids += tokenizer.encode(document.strip("\n"))
    start = [begin] if begin is not None and ids[:1] == [begin] else []
    return start, ids[len(start) :]


def pieces_of(start: list[int], ids: list[int], length: int) -> list[list[int]]:
    """Pieces of `length` tokens side by side, each begun as documents are; the shorter rest left out."""
    size = length - len(start)
    return [start + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def rows_of(tokenizer, text: str, args) -> list[list[int]]:
    """The evaluation sequences."""
    if args.lines is None:
        start, ids = encode(tokenizer, text)
        return pieces_of(start, ids[: args.tokens], args.context)
    distinct = {line.lower(): line for line in reversed(text.splitlines()) if line.strip()}
    return [tokenizer.encode(line)[: args.context] for line in reversed(distinct.values())]


def both_texts(args) -> tuple[str, str]:
    """What methods learn from, and what they are judged on."""
    if args.calibration is None:
        found = texts(args)
        learnt = joined([document for text in found for document in text.train])
        judged = joined([d for text in found for d in beginning(text.held_out, JUDGED)])
    else:
        learnt, judged = (p.read_bytes().decode("utf-8") for p in (args.calibration, args.text or args.lines))
    shared = {line for line in learnt.splitlines() if len(line) >= 40} & set(judged.splitlines())
    if shared and not args.tiny:
        line = min(shared)[:40]
        raise SystemExit(
            f"quantization.py: calibration and evaluation text must differ, both have the line {line!r}"
        )
    return learnt, judged


def joined(documents: Sequence[str]) -> str:
    """Documents as one text."""
    return f"{END}\n".join(document.strip("\n") + "\n" for document in documents)


def beginning(documents: Sequence[str], size: int) -> list[str]:
    """The first `size` characters of all documents, the last of them cut."""
    found = []
    for document in documents:
        if size <= 0:
            break
        found.append(document[:size])
        size -= len(document)
    return found


# -- a run


def settings_of(model, ids: list[int], rows: list[list[int]], judge: Judge, args) -> dict[str, Any]:
    """What makes two runs one."""
    return {
        "model": model_name(args),
        "weights": fingerprint(model)[:16],
        "calibration": hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16],
        "evaluation": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        "predictions": int(judge.given[:, 2].sum()),
        "sequences": args.sequences,
        "length": args.length,
        "width": model.config.width,
    }


def measure(args: argparse.Namespace) -> Run:
    """The jobs asked for that a run in --results has not done yet."""
    model, tokenizer = load(args)
    learnt, judged = both_texts(args)
    start, ids = encode(tokenizer, learnt)
    pieces, short = (pieces_of(start, ids, n) for n in (args.length, max(model.config.width // 2, 8)))
    if len(pieces) < args.sequences or ("curve" in args.what and len(short) < max(args.curve)):
        raise SystemExit(f"quantization.py: the calibration text must be longer, got {len(ids)} tokens")
    rows = rows_of(tokenizer, judged, args)
    judge = Judge(model, rows)
    run = resume(args, begin(args, settings_of(model, ids, rows, judge, args)) | {"results": []})
    run["given"] = judge(model)
    known = [{key: r[key] for key in Job("", "", None, None, 0).key} for r in run["results"]]
    jobs = [job for what in args.what for job in JOBS[what](args)]
    jobs = [job for job in jobs if args.only is None or job.name in args.only]
    jobs = [job for job in jobs if job.seed == args.seeds[0] or is_random(job)]
    statistics = Statistics(model, pieces, short, args.sequences, jobs)
    parents: dict = {}
    for job in tqdm([job for job in jobs if job.key not in known], "quantize", file=sys.stderr):
        run["results"].append(result(job, model, statistics, judge, parents))
        save(args, run)
        if (size := resident_bytes()) is not None and size > CACHES:
            jax.clear_caches()
    if "methods" in args.what and "calibration_seconds" not in run:
        run["calibration_seconds"] = statistics.seconds()
    return run


def is_random(job: Job) -> bool:
    """Whether another seed may give another result."""
    return bool(job.method.required_stats) or "random" in job.name


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("quantization", __doc__)
    add_data(made)
    add = made.add_argument
    add("--what", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    add("--model", help="as `jl.load` takes it (default: pico)")
    add("--calibration", type=Path, help="file to learn from; with --text or --lines, in place of --data")
    add("--text", type=Path, help="file to be judged on")
    add("--lines", type=Path, help="the same, a story a line")
    add("--bits", type=int, nargs="+", default=[2, 3, 4])
    add("--group-size", type=int, nargs="+", default=[32], help="the first serves the other parts")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", help="names of methods; others are left out")
    add("--curve", type=int, nargs="+", default=SEQUENCES, help="sequences to calibrate on")
    add("--k-chunk", type=int, nargs="+", default=K_CHUNKS, help="inputs of each 1024")
    add("--context", type=int, default=512)
    add("--tokens", type=int, default=8192, help="of the text that is judged, at most")
    add("--sequences", type=int, default=64, help="calibration pieces of --length tokens")
    add("--length", type=int, default=256)
    tiny = {"what": ["methods", "curve"], "bits": [2], "seeds": [0], "curve": [2], "sequences": 8}
    tiny |= {"length": 16, "context": 32, "tokens": 64, "only": ["RTN", "GPTQ"]}
    args = parse(made, argv, tiny=tiny)
    if (args.calibration is None) != (args.text is None and args.lines is None) or (args.text and args.lines):
        made.error("--calibration must come with one of --text and --lines")
    if not (args.data or args.calibration or args.tiny or args.render):
        made.error("--data or --calibration must be given")
    common.main(args, measure, page)


if __name__ == "__main__":
    main()
