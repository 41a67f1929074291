"""How many residual rows a GPU has time to fetch: DecDEC's tuner (arXiv:2412.20185, section 4.4).

    recipe = tune_dec_dec(model, DecDec(base=Rtn(bits=3)), gpu="RTX 4090", slowdown=0.05)
    small = quantize(model, recipe, tokens)

`tune_dec_dec` takes its times from a model of two bandwidths; `tune` is the search itself, for tables of
measured times. A token's fetching hides behind reading the base up to a knee, and costs its share above.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from jaxllm.models.linears import block_of, linear_weights
from jaxllm.quant.methods.dec_dec import DecDec
from jaxllm.quant.statistics import Method
from jaxllm.weights.host_residual import INPUTS_PER_CHUNK, selected

# GB/s of memory and of the link to the host (the paper's table of GPUs)
GPUS = {
    "RTX 4090": (1008.0, 32.0),
    "RTX 4080S": (736.0, 32.0),
    "RTX 4070S": (504.0, 32.0),
    "RTX 4070M": (256.0, 16.0),
    "RTX 4050M": (192.0, 16.0),
}


def tune_dec_dec(model, method: DecDec, *, gpu: str, slowdown: float = 0.05) -> list[tuple[str, Method]]:
    """A recipe for `quantize`: `method` with the `k_chunk` that each kind of linear can afford on a GPU.

    gpu: one of `GPUS`, or the bandwidths of its memory and of its link to the host in GB/s, "1008/32".
    slowdown: by how much fetching may lengthen one token's products of all blocks together (0.05: 5 %).
    What `modelled_times` says, nothing is measured. A kind that can afford no row gets the base alone.

    Raises ValueError for a GPU that is not known, a slowdown below 0, a base without a number of bits, and a
    model of experts: which of them a token reads is not modelled.
    """
    if getattr(model.config, "experts", 0):
        raise ValueError(f"tune_dec_dec: the model must have no experts, got {model.config.experts=}")
    sizes = {name: w.shape for name, w in linear_weights(model).items() if "." in name}
    each = modelled_times(sizes, bits=_bits(method.base), residual_bits=method.residual_bits, gpu=gpu)
    kinds: dict[str, list[str]] = {}  # "attention.q": those of all blocks
    for name in sizes:
        kinds.setdefault(name.removeprefix(f"{block_of(name)}."), []).append(name)
    times = {
        kind: [sum(column) for column in zip(*(each[name] for name in names), strict=True)]
        for kind, names in kinds.items()
    }
    found = tune(
        {kind: {1: table} for kind, table in times.items()},
        {kind: table[0] for kind, table in times.items()},
        slowdown,
        weights={kind: sum(math.prod(sizes[name]) for name in names) for kind, names in kinds.items()},
    )
    return [
        (rf"\.{re.escape(kind)}$", dataclasses.replace(method, k_chunk=k) if k else method.base)
        for kind, k in found.k_chunk.items()
    ]


def _bits(base: Method) -> int | float:
    """Bits a weight of a base, scales left out."""
    bits = getattr(base, "bits", getattr(base, "target_bits", None))
    if bits is None:
        raise ValueError(f"tune_dec_dec: the base must have a number of bits, got {type(base).__name__}")
    return bits


def modelled_times(
    sizes: Mapping[str, tuple[int, int]], *, bits: int | float, gpu: str, residual_bits: int = 4
) -> dict[str, list[float]]:
    """For each [K, N] the microseconds of a token's product with k_chunk = 0 .. 1024, and infinity for more.

    The slower of reading a base of `bits` a weight from the GPU's memory and fetching rows over its link.
    """
    memory, link = bandwidths(gpu)
    times = {}
    for name, (K, N) in sizes.items():
        base = K * N * bits / 8 / memory / 1e3
        fetched = (selected(K, k) * N * residual_bits / 8 / link / 1e3 for k in range(INPUTS_PER_CHUNK + 1))
        times[name] = [*(max(base, time) for time in fetched), math.inf]
    return times


def bandwidths(gpu: str) -> tuple[float, float]:
    """GB/s of a GPU's memory and of its link to the host, by its name or as "memory/link"."""
    if gpu in GPUS:
        return GPUS[gpu]
    try:
        memory, link = map(float, gpu.split("/"))
        if not (memory > 0 and link > 0):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"tune_dec_dec: gpu must be one of {', '.join(GPUS)}, or GB/s of memory and link as 1008/32, "
            f"got {gpu!r}"
        ) from None
    return memory, link


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found: for each module how many inputs of each 1024, and how many thread blocks."""

    k_chunk: dict[str, int]
    thread_blocks: dict[str, int]
    uniform: int  # what the first phase gave to every module in it
    max_thread_blocks: int
    time: float  # of all modules together


Times = Mapping[str, Mapping[int, Sequence[float]]]  # of a module, with so many thread blocks, by k_chunk
ROUNDING = 1e-12  # sums of the same times in another order differ by less, and so meet the same limit


def tune(
    times: Times,
    base_times: Mapping[str, float],
    slowdown: float,
    *,
    weights: Mapping[str, int],
) -> Tuning:
    """The most inputs that keep all modules together within (1 + slowdown) times their time without.

    times: module -> thread blocks -> time for k_chunk = 0, 1, 2 ..; weights: how many each module has.
    First one k_chunk for all (leaving out the smallest modules if none fits, of equal ones the first), then
    one more at a time where that costs least. A slowdown that cannot be met gives zeros. ValueError if the
    tables end too early.
    """
    if slowdown < 0:
        raise ValueError(f"tune: slowdown must be at least 0, got {slowdown=}")
    if not set(times) == set(base_times) == set(weights):
        raise ValueError(f"tune: tables must have the same modules, got {set(times)}, {set(base_times)}")
    limit = sum(base_times.values()) * (1 + slowdown) * (1 + ROUNDING)
    included = sorted(times, key=lambda m: weights[m])
    while included:
        found = _uniform(times, base_times, limit, included)
        if found is not None:
            break
        del included[0]
    else:
        zero = dict.fromkeys(times, 0)
        return Tuning(zero, dict(zero), 0, 0, sum(base_times.values()))
    k, most, _ = found
    blocks = {m: _blocks(times[m], most) if m in included else 0 for m in times}
    k_chunk = {m: k if m in included else 0 for m in times}
    spent = {m: times[m][blocks[m]][k] if m in included else base_times[m] for m in times}

    def step(m):
        table = times[m][blocks[m]] if m in included else ()
        return table[k_chunk[m] + 1] - table[k_chunk[m]] if k_chunk[m] + 1 < len(table) else math.inf

    changed = True
    while changed:
        changed = False
        costs = {m: step(m) for m in times}
        for m in sorted(costs, key=lambda m: costs[m]):
            if sum(spent.values()) + costs[m] <= limit:
                k_chunk[m] += 1
                spent[m] += costs[m]
                changed = True
    return Tuning(k_chunk, blocks, k, most, sum(spent.values()))


def _uniform(
    times: Times, base_times: Mapping[str, float], limit: float, included: Sequence[str]
) -> tuple[int, int, float] | None:
    """The greatest k_chunk for all included modules, with its thread blocks and time; None if that is 0."""
    rest = sum(time for m, time in base_times.items() if m not in included)
    least = max(min(times[m]) for m in included)
    best: tuple[int, int, float] | None = None
    for most in sorted({n for m in included for n in times[m] if n >= least}):
        tables = [times[m][_blocks(times[m], most)] for m in included]
        totals = [rest + sum(column) for column in zip(*tables, strict=False)]
        over = next((k for k, total in enumerate(totals) if total > limit), None)
        if over is None:
            raise ValueError(f"tune: tables must go on until the slowdown is exceeded, got {len(totals)=}")
        if over > 1 and (best is None or (over - 1, -totals[over - 1]) > (best[0], -best[2])):
            best = over - 1, most, totals[over - 1]
    return best


def _blocks(table: Mapping[int, Sequence[float]], most: int) -> int:
    return max(n for n in table if n <= most)


def thread_blocks(d_in: int, d_out: int) -> list[int]:
    """Numbers of thread blocks worth measuring: one a chunk of inputs, or even shares of 256 outputs."""
    parts = -(-d_out // 256)
    even = {n for n in range(1, parts + 1) if -(-parts // -(-parts // n)) == n}
    return sorted(even | set(range(1, d_in // INPUTS_PER_CHUNK + 1)))
