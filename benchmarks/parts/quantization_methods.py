"""What `quantization.py` compares: the jobs of each of its parts."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from parts.mixed_ablations import ByRule, OneOfFour, at_random, by_range, by_weight_and_hessian

import jaxllm as jl

SEQUENCES = (2, 4, 8, 32, 128)
K_CHUNKS = (16, 32, 51, 102, 205, 410)  # of each 1024; 51 is 5 %
NESTED = (3, 4, 5, 6)


@dataclasses.dataclass(frozen=True)
class Job:
    """One result to be had: `method` on the statistics of one seed's text."""

    what: str
    name: str
    bits: int | None  # of a code
    method: Any
    seed: int
    group_size: int | None = None
    sequences: int | None = None  # None: --sequences of --length; else these many of width / 2
    read: int | None = None  # the width that an Any-Precision parent is read at

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other jobs of a run."""
        names = ("what", "name", "bits", "group_size", "sequences", "seed")
        return {name: getattr(self, name) for name in names}


def affine(bits: int, group_size: int) -> dict[str, Any]:
    """Methods that share the affine format."""
    grid = {"bits": bits, "group_size": group_size}
    return {
        "RTN": jl.Rtn(**grid),
        "RTN, clipped": jl.Rtn(**grid, clip=True),
        "GPTQ, as published": jl.Gptq(**grid, act_order=False, clip=False, rounds=1),
        "GPTQ": jl.Gptq(**grid),
        "GPTQ, guided": jl.Gptq(**grid, guided=True),
        "AWQ": jl.Awq(**grid),
        "DASH-Q, paper": jl.DashQ(**grid, mode="paper"),
        "DASH-Q": jl.DashQ(**grid),
        "DASH-Q, whole zero": jl.DashQ(**grid, integer_zero_point=True),
        "DASH-Q, feedback": jl.DashQ(**grid, feedback=True),
        "DASH-Q, feedback, whole zero": jl.DashQ(**grid, integer_zero_point=True, feedback=True),
    }


def codebooks(bits: int, seed: int) -> dict[str, Any]:
    """Methods with a table an output."""
    return {
        "SqueezeLLM": jl.SqueezeLlm(bits=bits, seed=seed),
        "LNQ": jl.Lnq(bits=bits, seed=seed),
        "LNQ, guided": jl.Lnq(bits=bits, guided=True, seed=seed),
    }


def others(seed: int, group_size: int) -> dict[str, Any]:
    """What has no width of its own."""
    return {
        "2/4/16-bit": jl.MixedTwoBit(seed=seed),
        "NestedFP, fp8": jl.NestedFp(mode="fp8"),
        "NestedFP, fp16": jl.NestedFp(mode="fp16"),
        "DecDEC on 3-bit RTN": jl.DecDec(base=jl.Rtn(bits=3, group_size=group_size), k_chunk=51),
    }


def in_methods(args) -> Iterator[Job]:
    parent = {"seed_bits": min(args.bits), "parent_bits": max(args.bits)}
    for seed in args.seeds:
        for bits in args.bits:
            for group_size in args.group_size:
                for name, method in affine(bits, group_size).items():
                    yield Job("methods", name, bits, method, seed, group_size)
            for name, method in codebooks(bits, seed).items():
                yield Job("methods", name, bits, method, seed)
            for name, how in {
                "Any-Precision": {},
                "Any-Precision of guided LNQ": {"seeder": "lnq"},
            }.items():
                method = jl.AnyPrecision(**parent, **how, seed=seed)
                yield Job("methods", name, bits, method, seed, read=bits)
        for name, method in others(seed, args.group_size[0]).items():
            yield Job("methods", name, None, method, seed)


def in_curve(args) -> Iterator[Job]:
    left_out = ("AWQ", "GPTQ, guided", "DASH-Q, feedback")
    for seed in args.seeds:
        for sequences in args.curve:
            for name, method in affine(2, args.group_size[0]).items():
                if name not in left_out:
                    yield Job("curve", name, 2, method, seed, args.group_size[0], sequences)


def in_nested(args) -> Iterator[Job]:
    parent = {"seed_bits": min(NESTED), "parent_bits": max(NESTED)}
    for seed in args.seeds:
        for bits in NESTED:
            nested = jl.AnyPrecision(**parent, seed=seed)
            yield Job("nested", "Any-Precision", bits, nested, seed, read=bits)
            yield Job("nested", "SqueezeLLM", bits, jl.SqueezeLlm(bits=bits, seed=seed), seed)


def in_dec_dec(args) -> Iterator[Job]:
    grid = {"bits": 3, "group_size": args.group_size[0]}
    bases = {"RTN": jl.Rtn(**grid), "AWQ": jl.Awq(**grid)}
    for base_name, base in bases.items():
        for selector in ("bucket", "exact", "static", "random") if base_name == "RTN" else ("bucket",):
            for k in (0, *args.k_chunk):
                for seed in args.seeds if selector == "random" else args.seeds[:1]:
                    method = jl.DecDec(base=base, k_chunk=k, selector=selector, seed=seed)
                    yield Job("dec_dec", f"{base_name}, {selector}, {k}", 3, method, seed, args.group_size[0])


def in_ablations(args) -> Iterator[Job]:
    for seed in args.seeds:
        variants = {
            "columns by gain, outliers at 2 bits": jl.MixedTwoBit(seed=seed),
            "columns by weight x Hessian": ByRule(rule=by_weight_and_hessian, seed=seed),
            "columns by range": ByRule(rule=by_range, seed=seed),
            "columns at random": ByRule(rule=at_random, seed=seed),
            "outliers anywhere": jl.MixedTwoBit(where="anywhere", seed=seed),
            "no outliers": jl.MixedTwoBit(where="none", seed=seed),
            "grids from the range": jl.MixedTwoBit(fit="paper", seed=seed),
            "one of every four columns": OneOfFour(seed=seed),
        }
        for name, method in variants.items():
            yield Job("ablations", f"2/4/16: {name}", None, method, seed)
        for group_size in (20, 32, 64):
            for name, method in affine(2, group_size).items():
                if name in ("RTN", "RTN, clipped", "GPTQ", "DASH-Q, whole zero"):
                    yield Job("ablations", name, 2, method, seed, group_size)
        yield Job("ablations", "DASH-Q", 2, jl.DashQ(bits=2, group_size=32), seed, 32)


JOBS: dict[str, Callable[[Any], Iterator[Job]]] = {
    "methods": in_methods,
    "curve": in_curve,
    "nested": in_nested,
    "dec_dec": in_dec_dec,
    "ablations": in_ablations,
}
