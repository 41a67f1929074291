"""`jaxllm bench`: kernels timed on the GPU at hand, and tiles chosen by that."""

import statistics
from typing import Any

import click
from tqdm import tqdm

from jaxllm.cli.options import JSON
from jaxllm.cli.output import print_json, shows_progress


@click.group()
def bench() -> None:
    """Time the kernels on the GPU at hand, or choose their tiles by it."""


CASE = click.option("--case", "wanted", default="", help="Only cases whose name has this in it.")
ROUNDS = click.option("--rounds", type=click.IntRange(1), default=9, help="Interleaved runs of each.")


@bench.command("kernels")
@CASE
@ROUNDS
@JSON
def kernels(wanted: str, rounds: int, as_json: bool) -> None:
    """Seconds of each kernel at real shapes, beside XLA's fusion of the same and its bfloat16 product."""
    from pallas_kernels import measure

    device = measure.require_gpu("bench kernels")
    found = []
    for case in tqdm(chosen(wanted), desc="bench", unit="case", disable=not shows_progress()):
        medians = {name: statistics.median(times) for name, times in measure.measure(case, rounds).items()}
        found.append({"case": case.name, "seconds": medians, "bytes": case.num_bytes})
    if as_json:
        print_json({"device": device, **measure.rates(), "cases": found})
        return
    for row in found:
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in row["seconds"].items())
        click.echo(f"{row['case']}: {times}, {row['bytes'] / row['seconds']['kernel'] / 1e9:.0f} GB/s")


@bench.command("tune")
@CASE
@ROUNDS
@JSON
def tune(wanted: str, rounds: int, as_json: bool) -> None:
    """Try the tiles of each kernel at real shapes, and keep the fastest for this kind of GPU."""
    from pallas_kernels import measure

    device = measure.require_gpu("bench tune")
    bar = tqdm(chosen(wanted), desc="tune", unit="case", disable=not shows_progress())
    found = [row for case in bar if (row := measure.tune(case, rounds)) is not None]
    if as_json:
        print_json({"device": device, "cases": found})
        return
    for row in found:
        click.echo(f"{row['case']}: {row['tile']}, {1e6 * row['seconds']:.1f} us, in {row['file']}")


def chosen(wanted: str) -> list[Any]:
    """The cases with `wanted` in their name; ValueError for none."""
    from pallas_kernels.cases import all_cases

    cases = [case for name, case in all_cases().items() if wanted in name]
    if not cases:
        raise ValueError(f"bench: --case must be part of a case's name, got {wanted!r}")
    return cases
