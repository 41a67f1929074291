"""Bits chosen for each token against the same bits for all: perplexity by the bits that are really read.

    python benchmarks/precision.py --text FILE --unseen FILE --results docs/results

    quality   perplexity on unseen text of DP-LLM with each estimator, of static widths by layer, of a random
              choice at the same rate, of a schedule by position, and of whole widths
    gain      how errors are spread over tokens, and what bits estimates could save, linear by linear
    outliers  some methods where a few channels are made larger without changing the function
    cost      what the estimators multiply and read, exact counts
    traffic   what the Triton kernel of a width that is known only when it runs asks memory for, counted in it
    time      a step of decoding, of a random Llama of 200 M parameters: planes read at a known width, and at
              the width that each token chooses, also where half of all tokens choose the wider one

Every seed is another draw of the calibration text and of what is random. Bits are those of planes read, on
the unseen text; what calibration text reads stands beside them. A window is 256 tokens, each of which chooses
as it would where it is decoded.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parts import common
from parts.common import (
    Page,
    Run,
    add_data,
    begin,
    load,
    model_name,
    parse,
    parser,
    resume,
    rounds,
    save,
)
from parts.precision_gain import by_kind, gains, with_outliers
from parts.precision_tables import (
    cost_table,
    curves,
    gain_table,
    outliers_table,
    quality_tables,
    time_table,
    traffic_table,
)
from tqdm import tqdm

import jaxllm as jl
from jaxllm.models.decoder import Config, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.models.taps import WidthTap, in_turn
from jaxllm.precision import DpLlm, StaticWidths, attach_precision, set_target
from jaxllm.weights.planes import bit_planes
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, always, every_token_chooses
from pallas_kernels.any_precision_gemm import triton
from pallas_kernels.case import bytes_loaded

LLAMA = Config(
    layers=12, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, tied=True, context=1024
)
TARGETS = (3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75)
MEMORY, SEED, PARENT = 5.0, 3, 6
METHODS: dict[str, dict[str, Any]] = {
    "DP-LLM, exact": {"estimator": "exact"},
    "DP-LLM": {},
    "DP-LLM, estimators as published": {"estimator": "published"},
    "DP-LLM, lines alone": {"estimator": "linear"},
    "DP-LLM, projections alone": {"estimator": "projection"},
    "DP-LLM, asynchronous": {"asynchronous": True},
    "DP-LLM, from the target on": {"start": "target"},
    "DP-LLM, the target everywhere": {"start": "target", "steps": 0},
    "random choice": {"estimator": "random"},
}
STATIC = {"static, Fisher": "fisher", "static, trace": "trace", "static, first order": "gradient"}
SCHEDULE = "by position"
BLOCKS = {  # inputs and outputs of a block's linears
    "pico target": [(256, 256), (256, 64), (256, 64), (256, 256), (256, 384), (256, 384), (384, 256)],
    "201 M Llama": [
        (1024, 1024), (1024, 256), (1024, 256), (1024, 1024), (1024, 2816), (1024, 2816), (2816, 1024)
    ],
    "Llama-3-8B": [
        (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)
    ],
}  # fmt: skip
WITH_OUTLIERS = ("DP-LLM, exact", "DP-LLM", "random choice", "static, Fisher")


def windows_of(ids: Sequence[int], context: int, count: int) -> np.ndarray:
    """The first windows of a text, side by side."""
    rows = [ids[at : at + context] for at in range(0, len(ids) - context + 1, context)][:count]
    return np.asarray(rows, np.int32)


@partial(jax.jit, static_argnames="scheduled")
def read(model, tokens, part, *, scheduled: bool) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood [B, T - 1] of tokens, and the bits [B, T] that each reads.

    scheduled: the first `part` of the positions read the upper width everywhere, the others the lower one.
    """
    first = jnp.arange(tokens.shape[1], dtype=jnp.float32) < part * float(tokens.shape[1])

    def by_position(path: str, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(first[None], x.shape) if path.endswith(".high") else x

    widths = WidthTap(model)
    tap = in_turn(by_position, widths) if scheduled else widths
    logits, _ = every_token_chooses(model)(tokens, tap=tap)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -found[..., 0], widths.mean()


def measured(model, windows: np.ndarray, target: float, scheduled: bool = False) -> dict[str, Any]:
    """Perplexity and bits on windows, and how far windows differ in these."""
    nll, bits = [], []
    for at in range(0, len(windows), 8):
        got = read(model, windows[at : at + 8], jnp.float32(target % 1), scheduled=scheduled)
        nll.append(np.asarray(got[0], np.float64))
        bits.append(np.asarray(got[1], np.float64))
    every = np.concatenate(bits)
    return {
        "perplexity": math.exp(np.concatenate(nll).mean()),
        "bits": every.mean(),
        "spread": every.mean(axis=1).std(),
    }


@dataclasses.dataclass
class Trained:
    """DP-LLM whose averages are trained once for all its estimators."""

    method: DpLlm
    averages: dict[str, np.ndarray]

    @property
    def targets(self) -> tuple[float, ...]:
        return self.method.targets

    @property
    def memory_bits(self) -> float:
        return self.method.memory_bits

    @property
    def asynchronous(self) -> bool:
        return self.method.asynchronous

    @property
    def by(self) -> Any:
        return self.method.by

    def choose(self, model, held, costs, sizes, text, *, progress: bool) -> dict[str, AdaptivePlanes]:
        """The weights that choose."""
        if not self.averages:
            self.averages.update(self.method.averages(model, held, costs, sizes, text, progress=progress))
        return self.method.widths(model, held, self.averages, text, progress=progress)


def planes(args, model, rows: Sequence[Sequence[int]], seed: int) -> Any:
    """The model at 3 to 6 bits."""
    method = jl.AnyPrecision(parent_bits=PARENT, seed_bits=SEED, restarts=args.restarts, seed=seed)
    return jl.quantize(model, method, rows, progress=False)


def quality(args, seed: int) -> list[dict[str, Any]]:
    """One entry a method and target."""
    model, rows, test = data(args, seed)
    nested, found = planes(args, model, rows.tolist(), seed), []
    for bits in range(SEED, PARENT + 1):
        at = measured(jl.read_at(nested, bits), test, bits)
        found.append({"seed": seed, "method": "whole widths", "target": bits, **at})
    return found + each_method(args, nested, args.only, rows, test, seed)


def outliers(args, seed: int) -> list[dict[str, Any]]:
    """One entry a strength, method and target; what could be saved stands beside."""
    model, rows, test = data(args, seed)
    found = []
    for strength in args.strengths:
        changed = with_outliers(model, strength, args.channels, seed)
        nested = planes(args, changed, rows.tolist(), seed)
        saved = float(np.mean([one["exact"] for one in gains(nested, rows[:8], test[:8])]))
        at = {"strength": strength, "saved": saved}
        some = argparse.Namespace(**vars(args) | {"targets": args.targets[1::2][:2]})
        names = [name for name in WITH_OUTLIERS if name in args.only]
        found += [at | one for one in each_method(some, nested, names, rows, test, seed)]
    return found


def data(args, seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The model, this seed's windows of calibration text, and those of unseen text."""
    model, tokenizer = load(args)
    seen, unseen = (text_ids(args, tokenizer, file) for file in (args.text, args.unseen))
    rows = windows_of(seen[seed * args.sequences * args.context :], args.context, args.sequences)
    return model, rows, windows_of(unseen, args.context, args.windows)


def each_method(args, nested, names: Sequence[str], rows, test, seed: int) -> list[dict[str, Any]]:
    """One entry a method and target."""
    trained: dict[str, np.ndarray] = {}
    found = []
    for name in tqdm(names, f"seed {seed}", file=sys.stderr):
        for one in by_method(args, nested, name, rows, test, seed, trained):
            found.append({"seed": seed, "method": name, **one})
    return found


def by_method(
    args,
    nested,
    name: str,
    rows: np.ndarray,
    test: np.ndarray,
    seed: int,
    trained: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """What a method reads, and how well, at each target. trained: this seed's averages, if there are any."""
    same = {"targets": tuple(args.targets), "memory_bits": MEMORY}
    if name in STATIC:
        method: Any = StaticWidths(by=STATIC[name], **same)
    elif name == SCHEDULE:
        same = {"targets": tuple(t for t in args.targets if t % 1), "memory_bits": PARENT}
        method = DpLlm(estimator="random", steps=0, **same)
    else:
        own = DpLlm(**{"steps": args.steps, "seed": seed} | same | METHODS[name])
        method = Trained(own, trained if own.start == "costs" else {})
    model = attach_precision(nested, method, rows, progress=False)
    kinds = [w.estimator for w in linear_weights(model).values() if isinstance(w, AdaptivePlanes)]
    found = []
    for target in method.targets:
        at = set_target(model, target)
        one = measured(at, test, target, name == SCHEDULE)
        one["bits on calibration"] = measured(at, rows[: len(test)], target, name == SCHEDULE)["bits"]
        found.append({"target": target, "lines": kinds.count("linear") / len(kinds), **one})
    return found


def text_ids(args, tokenizer, file: Path | None) -> list[int]:
    """The tokens of a file; --tiny: of some sentences."""
    if args.tiny:
        words = " ".join(
            f"{a} saw {b}." for a in ("Anna", "Tom", "a king") for b in ("a ball", "bread", "Tom")
        )
        return tokenizer.encode(words * 20)
    return tokenizer.encode(Path(file).read_text("utf-8"))


def cost() -> list[dict[str, Any]]:
    """Multiplications and bytes of a token's estimates, and of its products at 3.5 bits."""
    rows = DpLlm().projection_rows
    found = []
    for name, block in BLOCKS.items():
        weights = sum(K * N for K, N in block)
        for kind, operations, held in (
            ("linear", sum(K for K, _ in block), 0),
            ("projection", sum(K * rows for K, _ in block), sum(2 * K * rows for K, _ in block)),
        ):
            read_bytes = weights * 3.5 / 8
            found.append(
                {
                    "model": name,
                    "estimator": kind,
                    "operations": operations / weights,
                    "bytes": held / read_bytes,
                }
            )
    return found


def traffic() -> list[dict[str, Any]]:
    """Bytes of a token's products at each width, of the linears of a block."""
    array, widths = jax.ShapeDtypeStruct, range(SEED, PARENT + 1)
    found = []
    for name, block in BLOCKS.items():
        total = {bits: {"words": 0, "levels": 0, "read": 0} for bits in widths}
        for K, N in block:
            planes = array((PARENT, N, K // 32), jnp.uint32)
            tables = tuple(array((N, 2**bits), jnp.float16) for bits in widths)
            tile = triton.default_tile(1, N, K // 32, bits=PARENT, capability=(9, 0))
            run = partial(triton.any_precision_gemm, tile=dataclasses.replace(tile, splits=1))
            for i, bits in enumerate(widths):
                arrays = array((1, K), jnp.float16), planes, tables, array((), jnp.int32)
                total[bits]["read"] += bytes_loaded(run, *arrays, branch=i)["uint32"]
                total[bits]["words"] += K * N * bits // 8
                total[bits]["levels"] += 2 * N * 2**bits
        found += [{"model": name, "bits": bits, **one} for bits, one in total.items()]
    return found


def random_planes(rows: jax.Array) -> Any:
    """Planes of 3 and 4 bits, evenly spaced levels."""
    least, most = (np.asarray(f(rows, axis=1, keepdims=True)) for f in (jnp.min, jnp.max))
    codes = np.clip((np.asarray(rows) - least) / (most - least) * 16, 0, 15).astype(np.int32)
    tables = tuple(jnp.asarray(least + (most - least) * (np.arange(2**b) + 0.5) / 2**b) for b in (3, 4))
    return bit_planes.from_codes(jnp.asarray(codes), tables, bits=4)


def step_times(args) -> list[dict[str, Any]]:
    """Seconds of a decoded token, a round each."""
    model = Decoder(common.TINY if args.tiny else LLAMA, rngs=nnx.Rngs(0))
    weights = {name: w for name, w in linear_weights(model).items() if "." in name}
    held = {name: random_planes(w.rows) for name, w in weights.items()}
    planes_of = replace_weights(model, held)
    lines = {name: always(w, (4.0,)) for name, w in held.items()}
    rows = DpLlm().projection_rows
    projections = {
        name: dataclasses.replace(
            w, estimator="projection", projection=jnp.ones((1, rows, w.shape[0]), jnp.float16)
        )
        for name, w in lines.items()
    }
    below = {name: dataclasses.replace(w, threshold=jnp.full((1,), jnp.inf)) for name, w in lines.items()}
    half = {
        name: dataclasses.replace(w, estimator="random", threshold=jnp.full((1,), 0.5))
        for name, w in lines.items()
    }
    models = {
        "4 bits, known": planes_of,
        "3 bits, known": jl.read_at(planes_of, 3),
        "4 bits, chosen by lines": replace_weights(model, lines),
        "3 bits, chosen by lines": replace_weights(model, below),
        "4 bits, chosen by projections alone": replace_weights(model, projections),
        "3 or 4 bits, half of all tokens each": replace_weights(model, half),
    }
    found = []
    for requests in args.requests:
        prompts = [[5, 6, 7, 8 + i] for i in range(requests)]
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn, name in rounds(models, args.rounds):
            out = jl.generate(
                models[name], None, prompts, max_new_tokens=args.new, stop_tokens=(), timings=True
            )
            if turn:
                times[name].append(out[0].timings.decode_s / (args.new - 1))
        found += [{"requests": requests, "what": name, "seconds": some} for name, some in times.items()]
    return found


# -- the page

PARTS = ("quality", "gain", "outliers", "cost", "traffic", "time")


def measure(args: argparse.Namespace) -> Run:
    """The parts asked for; those of a run in --results stay."""
    names = ("context", "windows", "sequences", "steps", "seeds", "restarts", "channels")
    settings = {name: getattr(args, name) for name in names} | {"model": model_name(args)}
    settings |= {"targets": args.targets, "texts": [f and f.name for f in (args.text, args.unseen)]}
    run = resume(args, begin(args, settings))
    if "cost" in args.what:
        run["cost"] = cost()
    if "traffic" in args.what:
        run["traffic"] = traffic()
    if "time" in args.what:
        run["time"] = step_times(args)
        save(args, run)
    if "gain" in args.what:
        model, rows, test = data(args, 0)
        run["gain"] = by_kind(gains(planes(args, model, rows.tolist(), 0), rows[:8], test[:8]))
        save(args, run)
    for name, part in (("quality", quality), ("outliers", outliers)):
        if name in args.what:
            run[name] = []
            for seed in range(args.seeds):
                run[name] += part(args, seed)
                save(args, run)
    return run


def page(run: Run) -> Page:
    """The table of each part, and the curves."""
    s = run["settings"]
    text = (
        f"{s['model']}, Any-Precision from {SEED} to {PARENT} bits, planes within {MEMORY:g} bits a weight; "
        f"{s['windows']} windows of {s['context']} unseen tokens, calibrated on {s['sequences']} others; "
        f"averages trained for {s['steps']} steps; {s['seeds']} seeds, means (least to most)."
    )
    tables = []
    if "quality" in run:
        tables += quality_tables(run["quality"])
    if "gain" in run:
        tables.append(gain_table(run["gain"]))
    if "outliers" in run:
        tables.append(outliers_table(run["outliers"]))
    if "cost" in run:
        tables.append(cost_table(run["cost"]))
    if "traffic" in run:
        tables.append(traffic_table(run["traffic"]))
    if "time" in run:
        tables.append(time_table(run["time"]))
    figures = {"curves": partial(curves, run["quality"])} if "quality" in run else {}
    return Page("Bits chosen while a model runs", text, tables, figures)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("precision", __doc__)
    add_data(made)
    add = made.add_argument
    add("--what", nargs="+", choices=PARTS, default=PARTS)
    add("--model", help="what jaxllm.load takes; None: pico")
    add("--text", type=Path, help="to calibrate on")
    add("--unseen", type=Path, help="to measure on")
    every = [*METHODS, *STATIC, SCHEDULE]
    add("--only", nargs="+", choices=every, default=every)
    add("--targets", type=float, nargs="+", default=list(TARGETS))
    add("--strengths", type=float, nargs="+", default=[1.0, 8.0, 64.0], help="of outliers, powers of two")
    add("--channels", type=int, default=2, help="that are outliers, of what a block's parts read")
    add("--context", type=int, default=256)
    add("--windows", type=int, default=32, help="of unseen text")
    add("--sequences", type=int, default=32, help="windows of calibration text, a seed")
    add("--steps", type=int, default=40, help="of training averages")
    add("--seeds", type=int, default=3)
    add("--restarts", type=int, default=4, help="of Any-Precision's seed")
    add("--rounds", type=int, default=7, help="of steps that are timed")
    add("--new", type=int, default=24, help="tokens of a round")
    add("--requests", type=int, nargs="+", default=[1, 4], help="at once, of steps that are timed")
    tiny = {
        "rounds": 1,
        "new": 4,
        "requests": [2],
        "targets": [3.5, 4.0],
        "strengths": [8.0],
        "context": 16,
        "windows": 4,
        "sequences": 4,
        "steps": 1,
        "seeds": 1,
    }
    tiny |= {"only": ["DP-LLM", "static, Fisher"], "restarts": 1}
    common.main(parse(made, argv, tiny=tiny, needs=("text", "unseen")), measure, page)


if __name__ == "__main__":
    main()
