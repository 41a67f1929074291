"""GPTQ: AutoGPTQ's and GPTQModel's files, both versions read, the second written (layout: `scheme.py`)."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from checkpoints_convert.quantized.affine import Grid, check_bits, rounded
from checkpoints_convert.quantized.config import (
    check_flags,
    json_object,
    layers_by_linear,
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
    words_of,
)
from jaxllm.storage.metadata import excerpt
from jaxllm.weights.affine import Affine
from jaxllm.weights.weight import Weight

BITS = (2, 3, 4, 8)


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
            bits=whole_number(given, "bits", allowed=BITS),
            group_size=whole_number(given, "group_size"),
            second=second,
            act_order=bool(given.get("desc_act")),
            symmetric=given.get("sym"),
        )

    @classmethod
    def holding(cls, parts: Sequence[Weight]) -> "Gptq":
        """The scheme of a linear in which these weights are stacked; ValueError if none holds them."""
        linear = Grid.of(parts)
        check_bits(linear, BITS)
        return cls(
            bits=linear.codes.bits,
            group_size=linear.group_size,
            second=True,
            act_order=linear.order is not None,
            symmetric=linear.zero_point is None,
        )

    @classmethod
    def round(cls, w: Weight) -> Affine:
        """The weight on a plain grid that `holding` takes."""
        return rounded(w, BITS, whole_groups=False)

    @classmethod
    def to_config(cls, ways: dict[str, "Gptq"], dense: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of linears stored so and of dense ones, by their names.

        What most linears share stands once; `dynamic` has the others, and the dense ones of the blocks. For
        transformers, which does not read it, the blocks' linears are named, too, where all have the same.
        """
        (bits, group_size), _ = collections.Counter(
            (w.bits, w.group_size) for w in ways.values()
        ).most_common(1)[0]
        dynamic: dict[str, Any] = {
            f"+:{re.escape(name)}$": {"bits": way.bits, "group_size": way.group_size}
            for name, way in ways.items()
            if (way.bits, way.group_size) != (bits, group_size)
        }
        left_out = [name for name in dense if "." in name]  # the head is, unasked
        dynamic |= {f"-:{re.escape(name)}$": {} for name in left_out}
        linears, everywhere = layers_by_linear(ways), layers_by_linear((*ways, *left_out))
        named: dict[str, Any] = {}
        if left_out and all(having == everywhere[linear] for linear, having in linears.items()):
            named["modules_in_block_to_quantize"] = [[linear for linear in linears if linear]]
        return {
            "quant_method": cls.name,
            "bits": bits,
            "group_size": group_size,
            "desc_act": any(way.act_order for way in ways.values()),
            "sym": all(way.symmetric for way in ways.values()),
            "checkpoint_format": "gptq_v2",
            "lm_head": any("." not in name for name in ways),
            **({"dynamic": dynamic} if dynamic else {}),
            **named,
        }

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

    @property
    def written(self) -> tuple[str, ...]:
        """The last names of all tensors that are written."""
        return "qweight", "qzeros", "scales", "g_idx"

    def write(self, parts: Sequence[Weight], last: str) -> np.ndarray:
        """One tensor of the linear in which these weights are stacked: `read` turned around."""
        linear = Grid.of(parts)
        match last:
            case "qweight":
                return to_words(linear.codes_as_they_come(), self.bits).T
            case "qzeros":
                return to_words(linear.zeros, self.bits)
            case "scales":
                return linear.scale
            case _:
                return linear.g_idx

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
