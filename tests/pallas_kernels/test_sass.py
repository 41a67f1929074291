"""What is read out of machine code."""

import pytest

from pallas_kernels.sass import largest_loop

TEXT = """
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MOV R2, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0030*/                   LOP3.LUT R5, R4, 0xf, RZ, 0xc0, !PT ;
        /*0040*/                   HFMA2.MMA R6, R5, R5, R6 ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/                   LDGSTS.E.128 [R2], [R4.64] ;
        /*0070*/                   NOP ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_the_largest_loop_is_the_inner_one_and_its_instructions_are_told_apart():
    loop = largest_loop(TEXT)
    assert loop is not None
    assert loop.instructions == 6
    assert loop.kinds == {
        "global loads": 1, "integers": 1, "packed floats": 1, "tensor": 1, "async copies": 1, "other": 1,
    }  # fmt: skip


@pytest.mark.parametrize("end", ["EXIT ;", "@!P1 EXIT ;"])
def test_a_wait_that_goes_on_behind_the_end_is_no_loop(end):
    long = "\n".join(["/*0090*/ MOV R1, R2 ;"] * 20)  # what stands before the end, and is no part of a loop
    waiting = TEXT.replace("BRA `(.L_x_2)", "BRA `(.L_x_1)").replace("        /*00a0*/", f"{long}\n/*00a0*/")
    assert largest_loop(waiting.replace("EXIT ;", end)) == largest_loop(TEXT)


def test_a_smaller_loop_may_be_asked_for():
    smaller = "\n".join(["MOV R1, R2 ;"] * 11)
    code = f".L_x_7:\n{smaller}\n@P0 BRA `(.L_x_7) ;".split("\n")
    lines = [line if line.startswith(".L") else f"/*0000*/ {line}" for line in code]
    larger = [line.replace("_7", "_8") for line in (lines[0], *lines[1:-1], *lines[1:])]
    text = "\n".join([*lines, *larger])
    first, second = (largest_loop(text, above=i) for i in range(2))
    assert first is not None and second is not None
    assert (first.instructions, second.instructions) == (23, 12)


def test_code_without_a_loop_has_none():
    assert largest_loop("/*0000*/ EXIT ;") is None
