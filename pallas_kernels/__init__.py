"""Kernels for NVIDIA GPUs, one folder an operation: meaning (reference), speed (kernels), choice (its face).

Each takes plain arrays, so that it can be lifted out alone, and imports nothing of jaxllm. README.md beside
this file says which operations there are, what was checked of each, and by which commands.

    choice          which implementation runs: `kernels`, and the one rule
    compat          what differs between versions of Pallas
    case, cases     a kernel at one real shape; all operations' cases
    aot, sass, gpus check C: compiled ahead of time, machine code counted, data sheets
    measure, tiles  check D: timed on a GPU; tiles that were measured
    fold            a few rows times weights in codes, on a CPU
    assembly        instructions that Triton does not choose by itself
    wgmma           what kernels on Hopper share whose first operand comes from registers
    words           codes of 1 to 8 bits in 32-bit words
    dot             a dense dot, and weights that wait for their inputs
    distance        squared distances with the same bits everywhere
"""

from pallas_kernels.choice import kernels

__all__ = ["kernels"]
