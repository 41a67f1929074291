"""Kernels on a GPU against the roofline, XLA's fusion of the same, and XLA's bfloat16 product (check D).

    python benchmarks/kernels.py --results docs/results        on a machine with an NVIDIA GPU; some minutes
    python benchmarks/kernels.py --case "dequant_gemm"         some of the cases

Every case is a real shape (`pallas_kernels/cases.py`). Operands all differ and are 512 MB at least, so
that weights come from memory. The roofline is what a copy and a bfloat16 product of 8192 reach in the same
run. Where there is no GPU, cells say "not run". --tiny does that with two cases.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
from parts import common
from parts.common import Page, Run, Table, begin, parse, parser, save, show
from tqdm import tqdm

from pallas_kernels import measure
from pallas_kernels.cases import all_cases
from pallas_kernels.choice import target_capability

NOT_RUN = "not run"


def measured(args: argparse.Namespace) -> Run:
    """Seconds of each case by who computes it; None without a GPU."""
    run = begin(args, {"rounds": args.rounds, "device": jax.devices()[0].device_kind})
    has_gpu = target_capability() is not None
    run["rates"] = measure.rates(args.rounds) if has_gpu else None
    run["cases"] = {}
    names = [name for name in all_cases() if args.case in name][: 2 if args.tiny else None]
    for name in tqdm(names, desc="kernels", disable=not sys.stderr.isatty()):
        case = all_cases()[name]
        run["cases"][name] = {
            "seconds": measure.measure(case, args.rounds) if has_gpu else None,
            "bytes": case.num_bytes,
            "operations": case.operations,
        }
        save(args, run)
    return run


def page(run: Run) -> Page:
    """The page of a run."""
    rates = run["rates"]
    text = f"On {run['settings']['device']}: " + (
        "no NVIDIA GPU, nothing was timed; what machine code says is in `pallas_kernels/AOT.md`."
        if rates is None
        else f"a copy moves {rates['bytes_per_s'] / 1e12:.2f} TB/s, a bfloat16 product of 8192 does "
        f"{rates['ops_per_s'] / 1e12:.0f} TFLOP/s; {run['settings']['rounds']} interleaved rounds, "
        "medians (least to most)."
    )
    columns = {
        "case": "operation, model and shape, bits, rows, backend",
        "kernel": "microseconds of a call",
        "of the roofline": "share of the greater of bytes / copy and operations / product that is reached",
        "XLA": "the definition as XLA fuses it, times the kernel's seconds",
        "bfloat16": "XLA's product of the dense bfloat16 weight, times the kernel's seconds",
    }
    rows = [_row(name, found, rates) for name, found in run["cases"].items()]
    return Page("Kernels on a GPU", text, [Table("Cases", columns, rows)])


def _row(name: str, found: dict[str, Any], rates: dict[str, float] | None) -> tuple[str, ...]:
    if rates is None or found["seconds"] is None:
        return (name, NOT_RUN, NOT_RUN, NOT_RUN, NOT_RUN)
    times = found["seconds"]
    kernel = statistics.median(times["kernel"])
    least = max(found["bytes"] / rates["bytes_per_s"], found["operations"] / rates["ops_per_s"])
    others = [
        show(common.ratios(times[other], times["kernel"]), 2) if other in times else ""
        for other in ("xla", "bfloat16")
    ]
    return (name, show([1e6 * t for t in times["kernel"]], 1), f"{100 * least / kernel:.0f} %", *others)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser("kernels", __doc__)
    made.add_argument("--case", default="", help="only cases whose name has this in it")
    made.add_argument("--rounds", type=int, default=9)
    common.main(parse(made, argv, tiny={"rounds": 1}), measured, page)


if __name__ == "__main__":
    main()
