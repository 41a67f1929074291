"""`jaxllm bench` on a machine without a GPU."""

import pytest
from command_line import assert_refused

from pallas_kernels import measure

CASE = ("--case", "dequant_gemm, llama-3-8b q, 1 row, triton")


@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_without_a_gpu_it_says_so_in_one_line(jaxllm, command):
    assert_refused(jaxllm("bench", command, "--json"), f"bench {command}: needs an NVIDIA GPU .*, got cpu")


def test_with_one_it_tells_times_and_tiles(jaxllm, monkeypatch):
    times = {"kernel": [1e-6, 2e-6, 9e-6], "xla": [4e-6]}
    tuned = {"case": "a product", "tile": {"n": 2}, "seconds": 3e-6, "file": "tiles.json"}
    monkeypatch.setattr(measure, "require_gpu", lambda who: "a GPU")
    monkeypatch.setattr(measure, "measure", lambda case, rounds: times)
    monkeypatch.setattr(measure, "tune", lambda case, rounds: tuned)
    done = jaxllm("bench", "kernels", *CASE)
    assert done.status == 0 and done.out.startswith(f"{CASE[1]}: kernel 2.0 us, xla 4.0 us, ")
    assert jaxllm("bench", "tune", *CASE).out == "a product: {'n': 2}, 3.0 us, in tiles.json\n"


def test_a_case_that_is_none_is_refused(jaxllm, monkeypatch):
    monkeypatch.setattr(measure, "require_gpu", lambda who: "a GPU")
    assert_refused(
        jaxllm("bench", "kernels", "--case", "nothing"), "--case must be part of .*, got 'nothing'"
    )
