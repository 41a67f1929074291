"""How many residual rows a GPU has time to fetch: DecDEC's tuner (arXiv:2412.20185, section 4.4)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxllm.weights.host_residual import CHUNK, selected

# GB/s of memory and of the link to the host (dossier section 4)
GPUS = {
    "RTX 4090": (1008.0, 32.0),
    "RTX 4080S": (736.0, 32.0),
    "RTX 4070S": (504.0, 32.0),
    "RTX 4070M": (256.0, 16.0),
    "RTX 4050M": (192.0, 16.0),
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found: for each module how many inputs of each 1024, and how many thread blocks."""

    k_chunk: dict[str, int]
    blocks: dict[str, int]
    uniform: int  # what the first phase gave to every module in it
    most_blocks: int
    time: float  # of all modules together


ROUNDING = 1e-12  # sums of the same times in another order differ by less, and so meet the same target


def tune(
    times: Mapping[str, Mapping[int, Sequence[float]]],
    base_times: Mapping[str, float],
    target: float,
    *,
    sizes: Mapping[str, tuple[int, int]],
) -> Tuning:
    """The most inputs that keep all modules together within (1 + target) times their time without.

    times: module -> thread blocks -> time for k_chunk = 0, 1, 2 ..; sizes: module -> (d_in, d_out).
    First one k_chunk for all (leaving out the smallest modules if none fits), then one more at a time where
    that costs least. A target that cannot be met gives zeros. Raises ValueError if the tables end too early.
    """
    if target < 0 or set(times) != set(base_times) or set(times) != set(sizes):
        raise ValueError(f"tune: tables must have the same modules, target >= 0, got {target=}, {set(times)}")
    limit = sum(base_times.values()) * (1 + target) * (1 + ROUNDING)
    included = sorted(times, key=lambda m: math.prod(sizes[m]), reverse=True)
    while included:
        found = _uniform(times, base_times, limit, included)
        if found is not None:
            break
        included.pop()
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


def _uniform(times, base_times, limit, included) -> tuple[int, int, float] | None:
    """The greatest k_chunk for all included modules, with its thread blocks and time; None if that is 0."""
    rest = sum(time for m, time in base_times.items() if m not in included)
    least = max(min(times[m]) for m in included)
    best: tuple[int, int, float] | None = None
    for most in sorted({n for m in included for n in times[m] if n >= least}):
        tables = [times[m][_blocks(times[m], most)] for m in included]
        totals = [rest + sum(column) for column in zip(*tables, strict=False)]
        over = next((k for k, total in enumerate(totals) if total > limit), None)
        if over is None:
            raise ValueError(f"tune: tables must go on until the target is exceeded, got {len(totals)=}")
        if over > 1 and (best is None or (over - 1, -totals[over - 1]) > (best[0], -best[2])):
            best = over - 1, most, totals[over - 1]
    return best


def _blocks(table: Mapping[int, Sequence[float]], most: int) -> int:
    return max(n for n in table if n <= most)


def thread_blocks(d_in: int, d_out: int) -> list[int]:
    """Numbers of thread blocks worth measuring: one a chunk of inputs, or even shares of 256 outputs."""
    parts = -(-d_out // 256)
    even = {n for n in range(1, parts + 1) if -(-parts // -(-parts // n)) == n}
    return sorted(even | set(range(1, d_in // CHUNK + 1)))


def knee(bits: int | float, gpu: str) -> float:
    """The k_chunk up to which fetching hides behind reading the base: 1024 / R_bw * bits / 4."""
    memory, link = GPUS[gpu]
    return CHUNK * link / memory * bits / 4


def modelled_times(
    sizes: Mapping[str, tuple[int, int]], *, bits: int | float, gpu: str, k_max: int
) -> tuple[dict[str, dict[int, list[float]]], dict[str, float]]:
    """Tables for `tune` in microseconds: the slower of reading the base and fetching 4-bit rows. A model."""
    memory, link = GPUS[gpu]
    base = {m: d_in * d_out * bits / 8 / memory / 1e3 for m, (d_in, d_out) in sizes.items()}
    times = {
        m: {1: [max(base[m], selected(d_in, k) * d_out / 2 / link / 1e3) for k in range(k_max + 1)]}
        for m, (d_in, d_out) in sizes.items()
    }
    return times, base
