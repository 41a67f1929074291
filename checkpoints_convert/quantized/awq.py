"""AWQ: AutoAWQ's files of version "gemm", read and written (layout: `scheme.py`)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from checkpoints_convert.quantized.affine import (
    Grid,
    check_bits,
    check_whole_groups,
    rounded,
)
from checkpoints_convert.quantized.config import check_flags, unsupported, whole_number
from checkpoints_convert.quantized.words import (
    AWQ_ORDER,
    FLOATS,
    Shapes,
    Tensors,
    groups_of,
    pack,
    to_words,
    unpacked,
    unsigned,
    words_of,
)
from jaxllm.weights.affine import Affine
from jaxllm.weights.weight import Weight

BITS = (4,)


@dataclasses.dataclass(frozen=True)
class Awq:
    """AutoAWQ's files of version "gemm"; the scales of inputs are folded into the layers before."""

    group_size: int
    symmetric: bool
    name: ClassVar[str] = "awq"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ()
    transposes: ClassVar[bool] = False

    @classmethod
    def from_config(cls, given: dict[str, Any]) -> "Awq":
        """What a quantization_config says; ValueError for what is not supported."""
        check_flags(given, "zero_point")
        layout = given.get("version") or given.get("checkpoint_format") or given.get("format") or "gemm"
        if str(layout).lower() != "gemm":
            raise unsupported(f"awq as {layout}")
        whole_number(given, "bits", "w_bit", allowed=BITS)
        return cls(
            group_size=whole_number(given, "group_size", "q_group_size"),
            symmetric=given.get("zero_point") is False,
        )

    @classmethod
    def holding(cls, parts: Sequence[Weight]) -> "Awq":
        """The scheme of a linear in which these weights are stacked; ValueError if none holds them."""
        linear = Grid.of(parts)
        check_bits(linear, BITS)
        check_whole_groups(linear)
        if linear.order is not None:
            raise ValueError("inputs must be in their own order, got act-order: gptq holds it")
        return cls(linear.group_size, symmetric=False)  # its kernels read the zeros in any case

    @classmethod
    def round(cls, w: Weight) -> Affine:
        """The weight on a plain grid that `holding` takes."""
        return rounded(w, BITS, whole_groups=True)

    @classmethod
    def to_config(cls, ways: dict[str, "Awq"], dense: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of linears stored so and of dense ones, by their names.

        Raises ValueError for groups of several sizes, and a quantized head, which its tools have dense.
        """
        sizes = sorted({way.group_size for way in ways.values()})
        if len(sizes) > 1:
            raise ValueError(f"all linears must have one group_size, got {sizes}: gptq holds several")
        if heads := [name for name in ways if "." not in name]:
            raise ValueError(f"{heads[0]} must be dense, got codes: gptq holds a quantized head")
        return {
            "quant_method": cls.name,
            "bits": 4,
            "group_size": sizes[0],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(dense),
        }

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group_size)
        words = words_of(N, 4)
        return {
            "qweight": ((K, words), ("I32",)),
            "qzeros": ((G, words), ("I32",)),
            "scales": ((G, N), FLOATS),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group_size, _ = groups_of(K, self.group_size)
        place = np.argsort(AWQ_ORDER)
        codes, zero_point = (
            unpacked(unsigned(tensors[name]), 4)[:, :N].reshape(-1, N // 8, 8)[..., place].reshape(-1, N)
            for name in ("qweight", "qzeros")
        )
        if self.symmetric and (zero_point != 8).any():
            raise ValueError("qzeros must be 8 everywhere by zero_point=false, got others")
        return Grid(pack(codes.T, 4), tensors["scales"], zero_point, group_size, None)

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of all tensors that are written."""
        return "qweight", "qzeros", "scales"

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which these weights are stacked: `read` turned around."""
        linear = Grid.of(parts)
        if last == "scales":
            return linear.scale
        codes = linear.codes_as_they_come().T if last == "qweight" else linear.zeros
        fields = codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER]
        return to_words(fields.reshape(codes.shape), 4)
