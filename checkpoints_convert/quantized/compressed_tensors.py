"""compressed-tensors' files of format "pack-quantized", read and written (layout: `scheme.py`)."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from checkpoints_convert.json_fields import TEXT, list_of
from checkpoints_convert.quantized.affine import (
    Grid,
    check_bits,
    check_whole_groups,
    rounded,
)
from checkpoints_convert.quantized.config import (
    check_flags,
    json_object,
    module_pattern,
    unsupported,
    whole_number,
)
from checkpoints_convert.quantized.words import (
    FLOATS,
    Shapes,
    Tensors,
    groups_of,
    packed,
    sorted_inputs,
    to_words,
    unpacked,
    unsigned,
)
from jaxllm.storage.metadata import excerpt
from jaxllm.weights.affine import Affine
from jaxllm.weights.weight import Weight

BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors' files of format "pack-quantized"."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    name: ClassVar[str] = "compressed-tensors"
    main: ClassVar[str] = "weight_packed"
    transposes: ClassVar[bool] = False

    @property
    def optional(self) -> tuple[str, ...]:
        return ("weight_g_idx", "weight_zero_point") if self.symmetric else ("weight_g_idx",)

    @classmethod
    def from_config(cls, given: dict[str, Any]) -> "CompressedTensors | ByTarget":
        """What a quantization_config says; ValueError for what is not supported."""
        if given.get("format") != "pack-quantized":
            raise unsupported(f"compressed-tensors as {given.get('format')}")
        ways: list[tuple[tuple[str, ...], CompressedTensors]] = []
        for name, entry in json_object(given.get("config_groups"), "config_groups").items():
            entry = json_object(entry, name)
            if entry.get("input_activations") or entry.get("output_activations"):
                raise unsupported("compressed-tensors with quantized activations")
            weights = json_object(entry.get("weights"), f"{name}.weights")
            check_flags(weights, "symmetric")
            strategy = weights.get("strategy")
            if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
                raise unsupported(f"compressed-tensors as {weights.get('type')} by {strategy}")
            way = cls(
                bits=whole_number(weights, "num_bits", allowed=BITS),
                group_size=-1 if strategy == "channel" else whole_number(weights, "group_size"),
                symmetric=weights.get("symmetric") is not False,
                act_order=weights.get("actorder") == "group",
            )
            targets: Any = entry.get("targets")
            if not list_of(TEXT).holds(targets):
                got = excerpt(targets)
                raise ValueError(f"huggingface.load: {name}.targets must be a list of names, got {got}")
            for target in targets:
                module_pattern(target.removeprefix("re:") if target.startswith("re:") else "")
            ways.append((tuple(targets), way))
        if not ways:
            raise ValueError("huggingface.load: config_groups must have a group, got none")
        return ways[0][1] if len({way for _, way in ways}) == 1 else ByTarget(tuple(ways))

    @classmethod
    def holding(cls, parts: Sequence[Weight]) -> "CompressedTensors":
        """The scheme of a linear in which these weights are stacked; ValueError if none holds them."""
        linear = Grid.of(parts)
        check_bits(linear, BITS)
        check_whole_groups(linear)
        return cls(
            bits=linear.codes.bits,
            group_size=linear.group_size,
            symmetric=linear.zero_point is None,
            act_order=linear.order is not None,
        )

    @classmethod
    def round(cls, w: Weight) -> Affine:
        """The weight on a plain grid that `holding` takes."""
        return rounded(w, BITS, whole_groups=True)

    @classmethod
    def to_config(cls, ways: dict[str, "CompressedTensors"], dense: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of linears stored so and of dense ones, by their names.

        The commonest way is that of "Linear", all linears that no other group names.
        """
        common = [way for way, _ in collections.Counter(ways.values()).most_common()]
        groups = {}
        for i, way in enumerate(common):
            targets = ["Linear"] if i == 0 else [name for name, other in ways.items() if other == way]
            groups[f"group_{i}"] = {
                "targets": targets,
                "weights": way.to_weights(),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": cls.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dense),
        }

    def to_weights(self) -> dict[str, Any]:
        """What a config group says of its weights."""
        grouped = self.group_size != -1
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False,
            **({"actorder": "group"} if self.act_order else {}),
        }

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group_size)
        fields = 32 // self.bits
        return {
            "weight_packed": ((N, -(-K // fields)), ("I32",)),
            "weight_scale": ((N, G), FLOATS),
            "weight_shape": ((2,), ("I64", "I32")),
            "weight_g_idx": ((K,), ("I32",)),
            "weight_zero_point": ((-(-N // fields), G), ("I32",)),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group_size, G = groups_of(K, self.group_size)
        if tuple(tensors["weight_shape"]) != (N, K):
            raise ValueError(f"weight_shape must be {(N, K)}, got {tuple(tensors['weight_shape'].tolist())}")
        order = tensors.get("weight_g_idx")
        if order is not None:  # -1 where it was never set
            order = None if (order == -1).all() else sorted_inputs(order, group_size, G)
        elif self.act_order and G > 1:
            raise ValueError("actorder sorts inputs into groups, so there must be a weight_g_idx, got none")
        codes = packed(unsigned(tensors["weight_packed"]), self.bits, K, order)
        zero_point = None
        if "weight_zero_point" in tensors:
            zero_point = unpacked(unsigned(tensors["weight_zero_point"]).T, self.bits)[:, :N]
            if self.symmetric and (zero_point != 2 ** (self.bits - 1)).any():
                raise ValueError("weight_zero_point must be the middle code by symmetric=true, got others")
        return Grid(codes, tensors["weight_scale"].T, zero_point, group_size, order)

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of all tensors that are written."""
        zeros = () if self.symmetric else ("weight_zero_point",)
        order = ("weight_g_idx",) if self.act_order else ()
        return "weight_packed", "weight_scale", "weight_shape", *zeros, *order

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which these weights are stacked: `read` turned around."""
        linear = Grid.of(parts)
        match last:
            case "weight_packed":
                return to_words(linear.codes_as_they_come(), self.bits)
            case "weight_scale":
                return linear.scale.T
            case "weight_shape":
                return np.array(linear.shape[::-1], np.int64)
            case "weight_zero_point":
                return to_words(linear.zeros, self.bits).T
            case _:
                return linear.g_idx


@dataclasses.dataclass(frozen=True)
class ByTarget:
    """compressed-tensors' files whose linears are stored in several ways, each for the targets it names.

    A target is a linear's name, "re:" and a pattern that its name begins with, or "Linear" for all; the most
    particular kind decides, and among patterns the first in alphabetical order.
    """

    ways: tuple[tuple[tuple[str, ...], CompressedTensors], ...]
    name: ClassVar[str] = CompressedTensors.name
    main: ClassVar[str] = CompressedTensors.main
    transposes: ClassVar[bool] = False

    @property
    def schemes(self) -> tuple[CompressedTensors, ...]:
        """All of them."""
        return tuple(way for _, way in self.ways)

    def scheme_of(self, linear: str) -> CompressedTensors:
        """How one linear is stored."""
        by_target = {target: way for targets, way in self.ways for target in targets}
        patterns = sorted(target for target in by_target if target.startswith("re:"))
        matching = (pattern for pattern in patterns if re.match(pattern.removeprefix("re:"), linear))
        target = linear if linear in by_target else next(matching, "Linear")
        if target not in by_target:
            raise ValueError(f"checkpoint: a target of config_groups must name {linear}, none does")
        return by_target[target]
