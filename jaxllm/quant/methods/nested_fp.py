"""NestedFP: a float16 weight as two bytes, the upper of which is itself an 8-bit float weight.

Paper: arXiv:2506.02024, section 4. For |w| < 1.875 the top bit of float16's exponent is 0, so that

    upper = float8_e4m3fn(256 w), rounded to nearest even            8 bits: all that mode "fp8" reads
    lower = the low 8 bits of float16's                              with upper: the float16, bit for bit

One mantissa bit is in both: exact below, rounded above, so the difference tells how upper was rounded. Ours
differs: a layer with larger weights is first scaled by 2**-shift, if that loses nothing (the paper's shift is
0); a few outputs that are not eligible even so stay in float16 beside the bytes, in every mode, instead of
the whole layer (the paper's exceptions are layers); what is not eligible is refused, never corrupted; both
scales of mode "fp8" are applied in float32.

    w = encode(rows, mode="fp8")          # rows [N, K], exact in float16
    y = matmul(x, with_mode(w, "fp16"))   # the same bytes, read in full

Modes: "fp16": x @ w, lossless against the float16 weights (a bfloat16 below 2**-17 or a float32 may have been
changed by the cast to float16: `changed_by_float16` of `nested_float` counts). "fp8": each row of x is
rounded to float8 at the scale 448 / its greatest |x|, and upper is the weight: lossy, a weight's relative
error at most 1/17 from 2**-14 up (6.7% above 1.75, where it saturates; absolute 2**-18 below; both times
2**shift).
"traced": `switch`, an int32 scalar, 0 for fp16, else fp8, chooses while running: the model's modes in one
program. A mode is for all rows of x: one a row would read both bytes anyway.

Layout: upper uint8 [N, K], the bits of float8_e4m3fn, lower uint8 [N, K], apart, so that fp8 streams one of
them. 16 bits a weight. Letters: K inputs, N outputs.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.quant.statistics import Stats
from jaxllm.weights.dense import Dense
from jaxllm.weights.nested_float import NestedFloat, encode, find_shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedFp:
    """NestedFP. Lossless against the float16 weights in fp16 mode; of others see `changed_by_float16`.

    mode: how the model starts ("traced": in fp16). exceptions: what becomes of weights that are not eligible;
    "rows" keeps their outputs in float16 in every mode if they are at most `max_exceptions` of a layer's, a
    share, or else the layer (`Dense`); "layer" always the layer; "refuse" is an error.
    """

    mode: Literal["fp16", "fp8", "traced"] = "fp16"
    exceptions: Literal["rows", "layer", "refuse"] = "rows"
    max_exceptions: float = 1 / 16

    def __post_init__(self):
        if self.mode not in ("fp16", "fp8", "traced"):
            raise ValueError(f"nested_fp: mode must be fp16, fp8 or traced, got {self.mode=}")
        if self.exceptions not in ("rows", "layer", "refuse"):
            raise ValueError(f"nested_fp: exceptions must be rows, layer or refuse, got {self.exceptions=}")
        if not 0 <= self.max_exceptions <= 1:
            raise ValueError(f"nested_fp: max_exceptions must be 0 to 1, a share, got {self.max_exceptions=}")

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset()

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> NestedFloat | Dense:
        """The rows, cast to float16, in two bytes; those that are not eligible, or the layer, as they are."""
        half = rows.astype(jnp.float16)
        if not bool(jnp.isfinite(half).all()):
            raise ValueError(
                f"nested_fp: weights must be finite in float16, got NaN or above 65504 in {name=}"
            )
        allowed = self.max_exceptions if self.exceptions == "rows" else 0.0
        if self.exceptions != "refuse" and int(find_shift(half)[1].sum()) > allowed * len(half):
            return Dense(half)
        mode = jnp.int32(0) if self.mode == "traced" else self.mode
        return encode(half, mode=mode, max_exceptions=allowed, dtype=dtype)
