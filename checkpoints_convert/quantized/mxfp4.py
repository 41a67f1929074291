"""The experts of GPT-OSS as it is published: MXFP4, floats of 4 bits with a power of 2 for each 32 inputs.

    w = value * 2**(scale - 127),   value = +-0, 0.5, 1, 1.5, 2, 3, 4, 6     (OCP Microscaling 1.0, section 5)

A byte of `blocks` holds two values, the first in its lower half: a sign and the index of a magnitude. Twice a
value is a whole number of -12 .. 12, so all of it is exact as `Affine` in 5 bits with half the scale: 5.5
bits a weight where the files have 4.25.
"""

import dataclasses
from typing import ClassVar

import ml_dtypes
import numpy as np

from checkpoints_convert.quantized.affine import Grid
from checkpoints_convert.quantized.words import Shapes, Tensors, pack

BLOCK = 32  # inputs that share a scale
BITS = 5
TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
CODES = (TWICE + 2 ** (BITS - 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """The scheme of GPT-OSS's files, which has no settings."""

    name: ClassVar[str] = "mxfp4"
    main: ClassVar[str] = "blocks"
    optional: ClassVar[tuple[str, ...]] = ()
    transposes: ClassVar[bool] = False

    def shapes(self, K: int, N: int) -> Shapes:
        if K % BLOCK:
            raise ValueError(f"{BLOCK} must divide the inputs, got {K}")
        return {
            "blocks": ((N, K // BLOCK, BLOCK // 2), ("U8",)),
            "scales": ((N, K // BLOCK), ("U8",)),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        scales = tensors["scales"].T
        if scales.size and scales.max() == 255:
            raise ValueError("scales must be below 255, which is no number, got 255")
        bytes_ = tensors["blocks"].reshape(N, K // 2)
        codes = np.stack([CODES[bytes_ & 15], CODES[bytes_ >> 4]], axis=-1).reshape(N, K)
        scale = np.ldexp(np.float32(1), scales.astype(np.int32) - 128).astype(ml_dtypes.bfloat16)
        return Grid(pack(codes, BITS), scale, None, BLOCK, None)
