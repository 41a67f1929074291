"""A kernel at one real shape: what ahead-of-time compilation, tests and benchmarks share."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

GPUS = ("h100", "a100", "l4", "b200")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel and its operands, without their numbers.

    name: operation, model and shape, backend; run(*arrays, interpret=False) is the kernel with its tile, and
      reference(*arrays) what it must equal.
    gpus: what it compiles for. num_bytes: what must be moved between memory and the chip, at least.
    operations: two for each multiplication with its addition.
    units: weights, cached pairs or points that all threads go over; units_per_turn: what one thread does of
      them in one turn of its innermost loop, which instructions are counted by.
    loops_above: how many loops of the kernel are larger than the one that runs, those of other branches.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    arrays: tuple[jax.ShapeDtypeStruct | None, ...]
    make: Callable[[np.random.Generator], tuple[Any, ...]] | None = None  # None: `random_arrays`
    gpus: tuple[str, ...] = GPUS
    num_bytes: int
    operations: int
    units: int
    units_per_turn: float
    loops_above: int = 0

    def operands(self, seed: int = 0) -> tuple[Any, ...]:
        """Numbers for the arrays."""
        rng = np.random.default_rng(seed)
        return random_arrays(self.arrays, rng) if self.make is None else self.make(rng)


def random_arrays(
    arrays: tuple[jax.ShapeDtypeStruct | None, ...], rng: np.random.Generator
) -> tuple[jax.Array | None, ...]:
    """Normal floats, and whole numbers of all bits that their type has."""

    def one(a: jax.ShapeDtypeStruct | None) -> jax.Array | None:
        if a is None:
            return None
        if jnp.issubdtype(a.dtype, jnp.integer):
            least, most = np.iinfo(a.dtype).min, np.iinfo(a.dtype).max
            return jnp.asarray(rng.integers(least, most, a.shape, a.dtype, endpoint=True))
        return jnp.asarray(rng.standard_normal(a.shape, np.float32)).astype(a.dtype)

    return tuple(map(one, arrays))


def bytes_loaded(f: Callable[..., Any], *arrays: Any, branch: int = 0) -> dict[str, int]:
    """Bytes that Triton kernels in `f(*arrays)` ask for, by the type of the numbers: `{"uint32": 4096}`.

    Counted in the program, masked loads whole; a grid is as many programs, a loop its length times its body,
    also around a kernel.
    What caches give back counts each time: words of weights are asked for once, levels and activations again.

    arrays: or their shapes. branch: which way each choice goes, as between the widths of
      `any_precision_gemm`, the narrowest first.
    Raises NotImplementedError for loops of a length known only when they run (a tile of some `splits`).
    """
    total: collections.Counter[str] = collections.Counter()

    def count(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            name, parameters = equation.primitive.name, equation.params
            again = times
            inner: Iterable[Any] = jaxprs_in_params(parameters)
            if name == "pallas_call":
                again = times * math.prod(parameters["grid_mapping"].grid)
            elif name in ("masked_load", "get"):
                array = equation.outvars[0].aval
                total[array.dtype.name] += times * array.size * array.dtype.itemsize
            elif name == "cond":
                inner = [parameters["branches"][branch]]
            elif name == "scan":
                again = times * parameters["length"]
            elif name == "while":
                raise NotImplementedError(
                    "bytes_loaded: a loop must have a length, got one that has a condition"
                )
            for program in inner:
                count(getattr(program, "jaxpr", program), again)

    count(jax.make_jaxpr(f)(*arrays).jaxpr, 1)
    return dict(total)
