"""What is stored of the machine code is whole and what the page says; the comparison finds differences."""

import dataclasses
import json
import math
import re

import pytest

from pallas_kernels import aot
from pallas_kernels.gpus import GPUS


@pytest.fixture(scope="module")
def stored():
    return json.loads(aot.STORED.read_text())


@pytest.fixture(scope="module")
def rows(stored):
    return [aot.Compiled(**row) for row in stored["kernels"]]


def test_every_case_is_stored_for_every_gpu_that_it_is_compiled_for(rows):
    wanted = {(name, gpu) for gpu in aot.BUILDS for name in aot.cases_for(gpu)}
    assert {(row.case, row.gpu) for row in rows} == wanted


def test_nothing_that_is_stored_failed_or_spilled(rows):
    assert not [row for row in rows if row.error or row.spill_bytes]


def test_the_page_is_that_of_what_is_stored(rows, stored):
    assert aot.STORED.with_suffix(".md").read_text() == aot.page(rows, stored["versions"])


def test_few_rows_and_attention_wait_for_memory_but_for_what_the_page_of_kernels_names(rows):
    over = {}  # times the memory's time that instructions take
    for name, case in aot.all_cases().items():
        mine = [row for row in rows if (row.case, row.gpu) == (name, "h100")]
        few = "gemm" in name and math.prod(case.arrays[0].shape[:-1]) <= 16
        if not mine or not (few or name.startswith(("attend_pages", "attend_rows"))):
            continue
        for gpu in ("h100", "h200"):
            times = aot.bounds(case, aot.main_kernel(mine), GPUS[gpu])
            if max(times, key=lambda key: times[key]) == "instructions":
                over[gpu, name] = times["instructions"] / times["memory"]
    assert not [name for gpu, name in over if gpu == "h100"]
    named = {
        r"any_precision.* 4 bits": 1.13,
        r"any_precision.* 6 bits": 1.43,
        r"mixed_two_bit.* (8|16)x": 1.4,
        r"codebook.* 2 bits.* mosaic_gpu": 1.15,
        r"codebook.* 4 bits": 1.03,
        r"codebook.* 2 bits.* triton": 1.01,
        r"attend.* 2 bits mosaic_gpu": 1.33,
        r"attend.*1B 32k, 4 bits mosaic_gpu": 1.03,
    }
    for (_, name), times in over.items():
        most = next(most for pattern, most in named.items() if re.search(pattern, name))
        assert times < most + 0.005, name


def test_a_difference_is_found_whatever_it_is(rows, stored, monkeypatch):
    monkeypatch.setattr(aot, "versions", lambda: stored["versions"])
    assert aot.differences(rows, stored) == []
    first, *others = rows
    [changed] = aot.differences([dataclasses.replace(first, registers=first.registers + 1), *others], stored)
    assert changed.case == first.case and "differs" in changed.error
    renamed = dataclasses.replace(first, kernel="another")
    errors = [row.error for row in aot.differences([renamed, *others], stored)]
    assert len(errors) == 2 and "is stored and not there" in errors
    monkeypatch.setattr(aot, "versions", lambda: {"jax": "0.0"})
    with pytest.raises(SystemExit, match="AOT.json needs"):
        aot.differences(rows, stored)


def test_what_is_written_keeps_the_other_cases(rows, stored, monkeypatch):
    monkeypatch.setattr(aot, "versions", lambda: stored["versions"])
    again = [dataclasses.replace(row, registers=7) for row in rows if row.case == rows[0].case]
    whole = aot.together(again, stored)
    assert len(whole) == len(rows)
    assert {row.registers for row in whole if row.case == rows[0].case} == {7}
    assert [row for row in whole if row.case != rows[0].case] == [r for r in rows if r.case != rows[0].case]
    monkeypatch.setattr(aot, "versions", lambda: {"jax": "0.0"})
    assert aot.together(again, stored) == again  # of other versions nothing is kept
