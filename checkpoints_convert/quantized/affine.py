"""Schemes of (code - zero_point) * scale: GPTQ, AWQ, compressed-tensors (layouts: `scheme.py`)."""

import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from checkpoints_convert.json_fields import TEXT, list_of
from checkpoints_convert.quantized.config import (
    check_flags,
    json_object,
    module_pattern,
    unsupported,
    whole_number,
)
from checkpoints_convert.quantized.words import (
    AWQ_ORDER,
    FLOATS,
    Shapes,
    Tensors,
    groups_of,
    on_host,
    pack,
    packed,
    sorted_inputs,
    unpacked,
    unsigned,
    words_of,
)
from jaxllm.ops.packing import Packed
from jaxllm.storage.metadata import excerpt
from jaxllm.weights.affine import Affine
from jaxllm.weights.permuted import Permuted


@dataclasses.dataclass(frozen=True)
class Grid:
    """A linear in affine codes."""

    codes: Packed  # [N, K], the inputs in `order`
    scale: np.ndarray  # [G, N]
    zero_point: np.ndarray | None  # uint8 [G, N]; None: the middle code
    group_size: int
    order: np.ndarray | None  # int32 [K]; None: as they come

    def part(self, start: int, stop: int, dtype) -> Affine | Permuted:
        bits, K = self.codes.bits, self.codes.size
        zero_point = None if self.zero_point is None else self.zero_point[:, start:stop]
        if zero_point is not None and (zero_point == 2 ** (bits - 1)).all():
            zero_point = None
        w = on_host(
            Affine,
            codes=on_host(Packed, words=self.codes.words[start:stop], bits=bits, size=K),
            scale=self.scale[:, start:stop],
            zero_point=None if zero_point is None else pack(zero_point, bits),
            group_size=self.group_size,
            shape=(K, stop - start),
            dtype=dtype,
        )
        return w if self.order is None else on_host(Permuted, weight=w, order=self.order)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's files.

    second: zeros are as they are; the first version has them less one. act_order: `desc_act`, by which there
    must be a `g_idx`; which input is in which group, `g_idx` alone says. symmetric: `sym`, None if not said.
    """

    bits: int
    group_size: int
    second: bool
    act_order: bool
    symmetric: bool | None
    name: ClassVar[str] = "gptq"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)
    transposes: ClassVar[bool] = True

    @classmethod
    def from_config(cls, given: dict[str, Any]) -> "Gptq | ByModule":
        """What a quantization_config says; ValueError for what is not supported."""
        check_flags(given, "desc_act", "sym", "is_marlin_format")
        layout = given.get("checkpoint_format") or given.get("format") or "gptq"
        if layout not in ("gptq", "gptq_v2") or given.get("is_marlin_format"):
            raise unsupported(f"gptq as {'marlin' if given.get('is_marlin_format') else layout}")
        rest = cls.of_block(given, second=layout == "gptq_v2")
        if not given.get("dynamic"):
            return rest
        ways: list[tuple[re.Pattern[str], Gptq | None]] = []
        for text, own in json_object(given["dynamic"], "dynamic").items():
            own = json_object(own, f"dynamic of {excerpt(text)}")
            pattern = module_pattern(text.removeprefix("-:").removeprefix("+:"))
            check_flags(own, "desc_act", "sym")
            dense = text.startswith("-:")
            ways.append((pattern, None if dense else cls.of_block(given | own, second=rest.second)))
        return ByModule(tuple(ways), rest)

    @classmethod
    def of_block(cls, given: dict[str, Any], *, second: bool) -> "Gptq":
        """The scheme of one block of settings."""
        return cls(
            bits=whole_number(given, "bits", allowed=(2, 3, 4, 8)),
            group_size=whole_number(given, "group_size"),
            second=second,
            act_order=bool(given.get("desc_act")),
            symmetric=given.get("sym"),
        )

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group_size)
        return {
            "qweight": ((words_of(K, self.bits), N), ("I32",)),
            "qzeros": ((G, words_of(N, self.bits)), ("I32",)),
            "scales": ((G, N), FLOATS),
            "g_idx": ((K,), ("I32",)),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group_size, G = groups_of(K, self.group_size)
        if self.act_order and G > 1 and "g_idx" not in tensors:
            raise ValueError("desc_act sorts inputs into groups, so there must be a g_idx, got none")
        order = sorted_inputs(tensors["g_idx"], group_size, G) if "g_idx" in tensors else None
        codes = packed(unsigned(tensors["qweight"]).T, self.bits, K, order)
        return Grid(codes, tensors["scales"], self.zeros(unsigned(tensors["qzeros"]), N), group_size, order)

    def zeros(self, words: np.ndarray, N: int) -> np.ndarray:
        """The zeros of all groups.

        subtle: in the first version, a zero of 0 less one. AutoGPTQ spoils the rest of the word when it
        writes one, and its kernels and vLLM's read 2**bits. GPTQModel, which transformers uses, subtracts 1
        of all fields of a word at once and adds it back the same way, borrow and carry included (not at 3
        bits: there each field wraps by itself). That is followed here: it gives back what was written.

        Symmetric files have the middle code everywhere, by which their version is known whatever they say:
        some of GPTQModel 5 say the first and are of the second. Where the flag and the zeros contradict each
        other, one of them is wrong, and which is not known.
        """
        middle = 2 ** (self.bits - 1)
        stored = unpacked(words, self.bits)[:, :N]
        if self.symmetric:
            if not ((stored == middle).all() or (stored == middle - 1).all() and not self.second):
                version = "second" if self.second else "first"
                raise ValueError(
                    "qzeros must be the middle code everywhere by sym=true in a file of the "
                    f"{version} version, got {stored.min()} to {stored.max()} stored"
                )
            return np.full_like(stored, middle)
        if self.second:
            return stored
        if (stored == middle).all() and stored.size >= 32:  # the middle of the second version, none of this
            raise ValueError(
                f"qzeros must be of the first version by checkpoint_format, got {middle} everywhere: "
                "say sym=true or checkpoint_format=gptq_v2"
            )
        if self.bits == 3:
            return (stored + 1) & 7
        one = np.uint32(sum(1 << at for at in range(0, 32, self.bits)))
        return unpacked(words + one, self.bits)[:, :N]


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
        whole_number(given, "bits", "w_bit", allowed=(4,))
        return cls(
            group_size=whole_number(given, "group_size", "q_group_size"),
            symmetric=given.get("zero_point") is False,
        )

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
                bits=whole_number(weights, "num_bits", allowed=(4, 8)),
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

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group_size)
        fields = 32 // self.bits
        return {
            "weight_packed": ((N, -(-K // fields)), ("I32",)),
            "weight_scale": ((N, G), FLOATS),
            "weight_shape": ((2,), ("I32", "I64")),
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


@dataclasses.dataclass(frozen=True)
class ByModule:
    """GPTQ files of which some modules have their own settings: GPTQModel's `dynamic`.

    A key is a pattern that a module's name begins with, after "+:" or nothing; in the order of the file, the
    first that fits decides. What its settings leave out is as in other modules. After "-:" it names modules
    that are dense: None here.
    """

    ways: tuple[tuple[re.Pattern[str], Gptq | None], ...]
    rest: Gptq
    name: ClassVar[str] = Gptq.name
    main: ClassVar[str] = Gptq.main
    transposes: ClassVar[bool] = Gptq.transposes

    @property
    def schemes(self) -> tuple[Gptq, ...]:
        """All of them."""
        return (self.rest, *(way for _, way in self.ways if way is not None))

    def scheme_of(self, linear: str) -> Gptq:
        """How one linear is stored, which the files have as a quantized one."""
        way = next((way for pattern, way in self.ways if pattern.match(linear)), self.rest)
        if way is None:
            raise ValueError(f"checkpoint: dynamic leaves {linear} dense, got {self.main} of it")
        return way


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
