"""Times kernels on the GPU at hand, beside what would be taken instead (check D), and tries tiles.

One program calls a function on operands that are all different, more than a cache holds, so that what is read
comes from memory and the launch of a program is not what is timed. Candidates are interleaved, and medians
taken by who asks.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.case import Case
from pallas_kernels.choice import target_capability

DISTINCT = 512 << 20  # bytes of operands in rotation
MOST_CALLS = 64  # of one program


def require_gpu(who: str) -> str:
    """The kind of the GPU; NotImplementedError where there is none."""
    if target_capability() is None:
        raise NotImplementedError(
            f"{who}: needs an NVIDIA GPU and jax with CUDA, got {jax.devices()[0].device_kind}"
        )
    return jax.devices()[0].device_kind


def repeated(function: Callable[..., Any]) -> Callable[[Sequence[tuple[Any, ...]]], Any]:
    """One compiled program that calls the function on each of some operands."""

    @jax.jit
    def calls(many):
        return [function(*arrays) for arrays in many]

    return calls


def seconds(
    functions: dict[str, Callable[..., Any]], operands: dict[str, Sequence[tuple[Any, ...]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one call of each function in each round, without the first, which compiles."""
    programs = {name: repeated(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        names = list(programs) if turn % 2 else list(programs)[::-1]
        for name in names:
            begin = time.perf_counter()
            jax.block_until_ready(programs[name](operands[name]))
            if turn:
                times[name].append((time.perf_counter() - begin) / len(operands[name]))
    return times


def rotation(case: Case) -> list[tuple[Any, ...]]:
    """Operands that are all different, together more than caches hold."""
    count = min(MOST_CALLS, max(1, -(-DISTINCT // max(1, case.num_bytes))))
    return [jax.device_put(case.operands(seed)) for seed in range(count)]


def measure(case: Case, rounds: int = 9) -> dict[str, list[float]]:
    """Seconds of the kernel, of XLA's fusion of what it means, and of XLA's bfloat16 product where due."""
    functions: dict[str, Callable[..., Any]] = {"kernel": case.run, "xla": case.reference}
    operands: dict[str, Sequence[tuple[Any, ...]]] = dict.fromkeys(functions, rotation(case))
    if sizes := product_sizes(case):
        M, K, N = sizes
        count = min(MOST_CALLS, max(1, -(-DISTINCT // (2 * K * N))))
        keys = jax.random.split(jax.random.key(0), count)
        x = jax.random.normal(keys[0], (M, K), jnp.bfloat16)
        operands["bfloat16"] = [(x, jax.random.normal(key, (K, N), jnp.bfloat16)) for key in keys]
        functions["bfloat16"] = jnp.dot
    return seconds(functions, operands, rounds)


def product_sizes(case: Case) -> tuple[int, int, int] | None:
    """Rows, K and N of a case that is a product with a weight, None for others."""
    x = case.arrays[0]
    if "_gemm" not in case.name or x is None:
        return None
    M, K = x.shape
    return M, K, jax.eval_shape(case.reference, *case.arrays).shape[-1]


def rates(rounds: int = 9) -> dict[str, float]:
    """Bytes a second of a copy, operations a second of a bfloat16 product: the roofline of this GPU."""
    numbers = [(jnp.full((1 << 28,), i, jnp.float32),) for i in range(2)]
    square = [(jnp.full((8192, 8192), i, jnp.bfloat16),) * 2 for i in range(2)]
    times = seconds({"copy": jnp.negative, "product": jnp.dot}, {"copy": numbers, "product": square}, rounds)
    return {
        "bytes_per_s": 2 * 4 * 2**28 / min(times["copy"]),
        "ops_per_s": 2 * 8192**3 / min(times["product"]),
    }


def tune(case: Case, rounds: int = 5) -> dict[str, Any] | None:
    """Tries variations of the case's tile and stores the fastest in the user's file; None if it has no tile.

    Says what was tried, and what failed.
    """
    kind = require_gpu("tune")
    run, operands = without_tile(case.run), rotation(case)
    asked = tiles.asked_by(run, *operands[0])
    if asked is None:
        return None
    found: dict[Any, float] = {}
    failed: list[dict[str, Any]] = []
    for tile in tiles.variations(asked.tile):
        try:
            with tiles.trying(asked.kernel, tile):
                found[tile] = sorted(seconds({"": run}, {"": operands}, rounds)[""])[rounds // 2]
        except Exception as error:  # a tile that does not fit this GPU
            failed.append({"tile": dataclasses.asdict(tile), "error": str(error).splitlines()[0][:200]})
    if not found:
        raise RuntimeError(f"tune: some tile must run for {case.name}, got {failed[:1]}")
    best = min(found, key=lambda tile: found[tile])
    path = tiles.store(kind, asked, best)
    return {
        "case": case.name,
        "tile": dataclasses.asdict(best),
        "seconds": found[best],
        "before": found.get(asked.tile),
        "failed": failed,
        "file": str(path),
    }


def without_tile(run: Callable[..., Any]) -> Callable[..., Any]:
    """A case's kernel, whose tile is asked for rather than given."""
    if not isinstance(run, functools.partial):
        return run
    kept = {name: value for name, value in run.keywords.items() if name != "tile"}
    return functools.partial(without_tile(run.func), *run.args, **kept)
