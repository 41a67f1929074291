"""Checkpoints that other tools quantized, as our formats: nothing is dequantized and nothing is rounded.

    model, tokenizer = huggingface.load("path/to/Llama-GPTQ")           # its linears are `Affine`

config.json picks a scheme. A linear is quantized where the files have the scheme's tensors in place of its
`weight`; all else (embeddings, norms, biases, linears left out) is dense. For a linear of K inputs and N
outputs at b bits, with G groups of inputs (codes lie in int32 words, the first in the lowest bits):

    gptq                qweight [K b/32, N], qzeros [G, N b/32], scales [G, N], g_idx [K]       b = 2, 3, 4, 8
    awq                 qweight [K, N/8], qzeros [G, N/8], scales [G, N]                        b = 4
    compressed-tensors  weight_packed [N, K b/32], weight_scale [N, G], weight_shape [2],       b = 4, 8
                        weight_zero_point [N b/32, G], weight_g_idx [K]
    any-precision       qweight [B, N, K/32], lut{b} [N, 2**b]                                  b <= B <= 8

The first three mean (code - zero) * scale and become `Affine`: a zero that is the middle code everywhere is
None, scales keep the file's float type. Act-order (`g_idx`: the group of each input) becomes `Permuted`. The
last becomes `BitPlanes`, and is what can be written, too. The layouts are those that AutoGPTQ and GPTQModel,
AutoAWQ, compressed-tensors and SNU-ARC/any-precision-llm on GitHub write.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import tensor_files
from checkpoints_convert.family import Tensor
from jaxllm.quant import packing
from jaxllm.quant.affine import Affine
from jaxllm.quant.any_precision import BitPlanes, from_cuda_planes, to_cuda_planes
from jaxllm.quant.packing import Packed
from jaxllm.quant.permuted import Permuted

SUPPORTED = (
    "gptq (2, 3, 4 or 8 bits), awq (gemm, 4 bits), compressed-tensors (pack-quantized, 4 or 8 bits), "
    "any-precision"
)
FLOATS = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, in each field of a word

T = TypeVar("T")
Tensors = dict[str, np.ndarray]  # of one linear, by the last part of their names
Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # what they must be: shape, types


# A scheme says what tensors a linear has (`shapes`) and reads them as something of which `part(start, stop,
# dtype)` is our weight of some outputs: several of ours may be stacked in one of theirs. `main` is the tensor
# that tells a quantized linear, `optional` are those that may be absent; `transposes`: matrices that are
# [in, out] in dense files are stored like all others.


# What config.json says.


def scheme_of(raw: dict[str, Any]) -> "Scheme | None":
    """The scheme a config.json names, None for plain weights."""
    planes, given = raw.get("anyprec"), raw.get("quantization_config")
    if planes:
        return _any_precision(_mapping(planes, "anyprec"))
    if not given:
        return None
    given = _mapping(given, "quantization_config")
    match given.get("quant_method") or given.get("quant_algo") or "unknown":
        case "gptq":
            return _gptq(given)
        case "awq":
            return _awq(given)
        case "compressed-tensors":
            return _compressed_tensors(given)
        case other:
            raise refused(other)


def refused(what: Any) -> ValueError:
    """The error for a scheme that is not supported."""
    return ValueError(
        f"huggingface.load: weights must be plain floats or of {SUPPORTED}, got a checkpoint quantized by "
        f"another tool: quantization_config names {what!r}"
    )


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"huggingface.load: {name} must be a JSON object, got {value!r}")
    return value


def _whole(given: dict[str, Any], *names: str, allowed=None) -> int:
    """The whole number under one of several names; `allowed` None: a group, at least 1 or -1."""
    value = next((given[name] for name in names if given.get(name) is not None), None)
    good = type(value) is int and (value in allowed if allowed else value == -1 or value >= 1)
    if not good:
        must = ", ".join(map(str, allowed)) if allowed else "-1 or at least 1"
        raise ValueError(f"huggingface.load: {names[0]} of quantized weights must be {must}, got {value!r}")
    assert isinstance(value, int)
    return value


def _gptq(given: dict[str, Any]) -> "Gptq":
    layout = given.get("checkpoint_format") or given.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or given.get("is_marlin_format"):
        raise refused(f"gptq as {'marlin' if given.get('is_marlin_format') else layout}")
    return Gptq(
        bits=_whole(given, "bits", allowed=(2, 3, 4, 8)),
        group=_whole(given, "group_size"),
        second=layout == "gptq_v2",
        act_order=bool(given.get("desc_act")),
        symmetric=bool(given.get("sym")),
    )


def _awq(given: dict[str, Any]) -> "Awq":
    layout = given.get("version") or given.get("checkpoint_format") or given.get("format") or "gemm"
    if str(layout).lower() != "gemm":
        raise refused(f"awq as {layout}")
    _whole(given, "bits", "w_bit", allowed=(4,))
    return Awq(group=_whole(given, "group_size", "q_group_size"))


def _compressed_tensors(given: dict[str, Any]) -> "CompressedTensors | ByTarget":
    if given.get("format") != "pack-quantized":
        raise refused(f"compressed-tensors as {given.get('format')}")
    ways: list[tuple[tuple[str, ...], CompressedTensors]] = []
    for name, entry in _mapping(given.get("config_groups"), "config_groups").items():
        entry = _mapping(entry, name)
        if entry.get("input_activations") or entry.get("output_activations"):
            raise refused("compressed-tensors with quantized activations")
        weights = _mapping(entry.get("weights"), f"{name}.weights")
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise refused(f"compressed-tensors as {weights.get('type')} by {strategy}")
        way = CompressedTensors(
            bits=_whole(weights, "num_bits", allowed=(4, 8)),
            group=-1 if strategy == "channel" else _whole(weights, "group_size"),
            symmetric=bool(weights.get("symmetric", True)),
        )
        targets = entry.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"huggingface.load: {name}.targets must be a list of names, got {targets!r}")
        ways.append((tuple(targets), way))
    if not ways:
        raise ValueError("huggingface.load: config_groups must have a group, got none")
    return ways[0][1] if len({way for _, way in ways}) == 1 else ByTarget(tuple(ways))


def _any_precision(given: dict[str, Any]) -> "AnyPrecision":
    widths = tuple(range(1, 9))
    parent = _whole(given, "parent_precision", allowed=widths)
    seed = _whole(given, "seed_precision", allowed=widths[:parent])
    if given.get("group_count", 1) != 1 or given.get("sparse_numvals"):
        raise ValueError(
            "huggingface.load: anyprec must have one table a row and no sparse part, "
            f"got group_count={given.get('group_count', 1)!r}, "
            f"sparse_numvals of {len(given.get('sparse_numvals') or ())} linears"
        )
    return AnyPrecision(seed, parent)


# The schemes.


def groups_of(K: int, group: int) -> tuple[int, int]:
    """Inputs a group and the number of groups; -1 is one group."""
    group = K if group == -1 else min(group, K)
    return group, -(-K // group)


def words_of(n: int, bits: int) -> int:
    """Words of 32 bits that n codes fill."""
    if n * bits % 32:
        raise ValueError(f"codes must fill words of 32 bits, got {n} codes of {bits} bits")
    return n * bits // 32


@dataclasses.dataclass(frozen=True)
class Grid:
    """A linear in affine codes."""

    codes: Packed  # [N, K], the inputs in `order`
    scale: np.ndarray  # [G, N]
    zero: np.ndarray | None  # uint8 [G, N]; None: the middle code
    group: int
    order: np.ndarray | None  # int32 [K]; None: as they come

    def part(self, start: int, stop: int, dtype) -> Affine | Permuted:
        bits, K = self.codes.bits, self.codes.size
        zero = None if self.zero is None else self.zero[:, start:stop]
        if zero is not None and (zero == 2 ** (bits - 1)).all():
            zero = None
        w = on_host(
            Affine,
            codes=on_host(Packed, words=self.codes.words[start:stop], bits=bits, size=K),
            scale=self.scale[:, start:stop],
            zero=None if zero is None else pack(zero, bits),
            group=self.group,
            shape=(K, stop - start),
            dtype=dtype,
        )
        return w if self.order is None else on_host(Permuted, weight=w, order=self.order)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's files.

    second: zeros are as they are; the first version has them less one. act_order: `g_idx` counts.
    """

    bits: int
    group: int
    second: bool
    act_order: bool
    symmetric: bool
    name: ClassVar[str] = "gptq"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)
    transposes: ClassVar[bool] = True

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group)
        return {
            "qweight": ((words_of(K, self.bits), N), ("I32",)),
            "qzeros": ((G, words_of(N, self.bits)), ("I32",)),
            "scales": ((G, N), FLOATS),
            "g_idx": ((K,), ("I32",)),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group, G = groups_of(K, self.group)
        order = sorted_inputs(tensors["g_idx"], group, G) if self.act_order and "g_idx" in tensors else None
        codes = packed(unsigned(tensors["qweight"]).T, self.bits, K, order)
        return Grid(codes, tensors["scales"], self.zeros(unsigned(tensors["qzeros"]), N), group, order)

    def zeros(self, words: np.ndarray, N: int) -> np.ndarray:
        """The zeros of all groups.

        subtle: in the first version, a zero of 0 less one. AutoGPTQ spoils the rest of the word when it
        writes one, and its kernels and vLLM's read 2**bits. GPTQModel, which transformers uses, subtracts 1
        of all fields of a word at once and adds it back the same way, borrow and carry included (not at 3
        bits: there each field wraps by itself). That is followed here: it gives back what was written.
        """
        stored = unpacked(words, self.bits)[:, :N]
        if self.second:
            return stored
        if self.symmetric and (stored == 2 ** (self.bits - 1)).all():
            return stored  # some files of GPTQModel 5 say the first version and are of the second
        if self.bits == 3:
            return (stored + 1) & 7
        one = np.uint32(sum(1 << at for at in range(0, 32, self.bits)))
        return unpacked(words + one, self.bits)[:, :N]


@dataclasses.dataclass(frozen=True)
class Awq:
    """AutoAWQ's files of version "gemm"; the scales of inputs are folded into the layers before."""

    group: int
    name: ClassVar[str] = "awq"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ()
    transposes: ClassVar[bool] = False

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group)
        words = words_of(N, 4)
        return {
            "qweight": ((K, words), ("I32",)),
            "qzeros": ((G, words), ("I32",)),
            "scales": ((G, N), FLOATS),
        }

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group, _ = groups_of(K, self.group)
        place = np.argsort(AWQ_ORDER)
        codes, zero = (
            unpacked(unsigned(tensors[name]), 4)[:, :N].reshape(-1, N // 8, 8)[..., place].reshape(-1, N)
            for name in ("qweight", "qzeros")
        )
        return Grid(pack(codes.T, 4), tensors["scales"], zero, group, None)


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors' files of format "pack-quantized"."""

    bits: int
    group: int
    symmetric: bool
    name: ClassVar[str] = "compressed-tensors"
    main: ClassVar[str] = "weight_packed"
    optional: ClassVar[tuple[str, ...]] = ("weight_g_idx",)
    transposes: ClassVar[bool] = False

    def shapes(self, K: int, N: int) -> Shapes:
        _, G = groups_of(K, self.group)
        fields = 32 // self.bits
        shapes: Shapes = {
            "weight_packed": ((N, -(-K // fields)), ("I32",)),
            "weight_scale": ((N, G), FLOATS),
            "weight_shape": ((2,), ("I32", "I64")),
            "weight_g_idx": ((K,), ("I32",)),
        }
        if not self.symmetric:
            shapes["weight_zero_point"] = ((-(-N // fields), G), ("I32",))
        return shapes

    def read(self, tensors: Tensors, K: int, N: int) -> Grid:
        group, G = groups_of(K, self.group)
        if tuple(tensors["weight_shape"]) != (N, K):
            raise ValueError(f"weight_shape must be {(N, K)}, got {tuple(tensors['weight_shape'].tolist())}")
        order = tensors.get("weight_g_idx")
        if order is not None:  # -1 where it was never set
            order = None if (order == -1).any() else sorted_inputs(order, group, G)
        codes = packed(unsigned(tensors["weight_packed"]), self.bits, K, order)
        zero = None
        if not self.symmetric:
            zero = unpacked(unsigned(tensors["weight_zero_point"]).T, self.bits)[:, :N]
        return Grid(codes, tensors["weight_scale"].T, zero, group, order)


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

    def of(self, linear: str) -> CompressedTensors:
        """How one linear is stored."""
        by_target = {target: way for targets, way in self.ways for target in targets}
        patterns = sorted(target for target in by_target if target.startswith("re:"))
        matching = (pattern for pattern in patterns if re.match(pattern.removeprefix("re:"), linear))
        target = linear if linear in by_target else next(matching, "Linear")
        if target not in by_target:
            raise ValueError(f"checkpoint: a target of config_groups must name {linear}, none does")
        return by_target[target]


@dataclasses.dataclass(frozen=True)
class Planes:
    """A linear in bit planes."""

    planes: np.ndarray  # uint32 [B, N, K / 32]
    tables: tuple[np.ndarray, ...]  # float16 [N, 2**b], narrowest first
    seed: int

    def part(self, start: int, stop: int, dtype) -> BitPlanes:
        B, _, words = self.planes.shape
        return on_host(
            BitPlanes,
            planes=self.planes[:, start:stop],
            tables=tuple(table[start:stop] for table in self.tables),
            bits=B,
            seed_bits=self.seed,
            parent_bits=B,
            shape=(32 * words, stop - start),
            dtype=dtype,
        )


@dataclasses.dataclass(frozen=True)
class AnyPrecision:
    """Any-Precision's files: all widths from `seed` to `parent` bits; read at `parent`."""

    seed: int
    parent: int
    name: ClassVar[str] = "any-precision"
    main: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ()
    transposes: ClassVar[bool] = False

    def shapes(self, K: int, N: int) -> Shapes:
        shapes: Shapes = {"qweight": ((self.parent, N, words_of(K, 1)), ("I32",))}
        return shapes | {f"lut{b}": ((N, 2**b), ("F16",)) for b in range(self.seed, self.parent + 1)}

    def read(self, tensors: Tensors, K: int, N: int) -> Planes:
        tables = tuple(tensors[f"lut{b}"] for b in range(self.seed, self.parent + 1))
        return Planes(from_cuda_planes(tensors["qweight"], K), tables, self.seed)


OneWay = Gptq | Awq | CompressedTensors | AnyPrecision
Scheme = OneWay | ByTarget


# Codes in words.


def on_host(cls: type[T], **fields) -> T:
    """A format around numpy arrays, made as JAX makes one around anything: without its checks."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def pack(codes: np.ndarray, bits: int) -> Packed:
    """Codes as our format packs them, on the host."""
    return jax.tree.map(np.asarray, packing.pack(jnp.asarray(codes), bits))


def unsigned(words: np.ndarray) -> np.ndarray:
    """int32 words as uint32, so that shifts bring in zeros."""
    return words.view(np.uint32)


def in_blocks(words: np.ndarray, bits: int) -> np.ndarray:
    """Words [R, w] as blocks of 32 codes [R, n, bits], filled up with zeros."""
    R, w = words.shape
    return np.pad(words, ((0, 0), (0, -w % bits))).reshape(R, -1, bits)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes uint8 [R, 32 n] of words [R, w]: code i begins at bit i * bits, counted over all words."""
    blocks = in_blocks(words, bits)
    codes = np.empty((*blocks.shape[:2], 32), np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        field = blocks[..., word] >> shift
        if shift + bits > 32:  # only at 3 bits
            field = field | (blocks[..., word + 1] << (32 - shift))
        codes[..., i] = field & (2**bits - 1)
    return codes.reshape(len(words), -1)


def packed(words: np.ndarray, bits: int, K: int, order: np.ndarray | None) -> Packed:
    """Codes [N, K] of words [N, w] as our format packs them, the inputs sorted."""
    if order is None and bits != 3:  # the same bits at the same places
        return on_host(Packed, words=in_blocks(words, bits), bits=bits, size=K)
    codes = unpacked(words, bits)[:, :K]
    return pack(codes if order is None else codes[:, order], bits)


def sorted_inputs(g_idx: np.ndarray, group: int, G: int) -> np.ndarray | None:
    """The inputs sorted by group, None where they are."""
    K = len(g_idx)
    sizes = np.full(G, group)
    sizes[-1] = K - group * (G - 1)
    inside = g_idx.min() >= 0 and g_idx.max() < G
    if not inside or not np.array_equal(np.bincount(g_idx, minlength=G), sizes):
        raise ValueError(f"g_idx must put {group} inputs in each of {G} groups")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(K)).all() else order


# Linears among the tensors of a checkpoint.


def stem(tensor: Tensor) -> str | None:
    """The name of their linear, None for a tensor that is no linear's weight."""
    linear = tensor.theirs.endswith(".weight") and all(name.endswith(".w") for name in tensor.ours)
    return tensor.theirs.removesuffix(".weight") if linear else None


def way_of(scheme: Scheme, tensor: Tensor) -> OneWay:
    """How one linear is stored."""
    return scheme.of(str(stem(tensor))) if isinstance(scheme, ByTarget) else scheme


def last_names(scheme: Scheme) -> set[str]:
    """What the names of a linear's tensors end in."""
    ways = [way for _, way in scheme.ways] if isinstance(scheme, ByTarget) else [scheme]
    return {last for way in ways for last in way.shapes(32, 32)}  # the same for all sizes


def possible_names(scheme: Scheme, wanted: list[Tensor]) -> list[str]:
    """The names that linears' tensors may have, and their biases'."""
    stems = [name for tensor in wanted if (name := stem(tensor)) is not None]
    return [f"{name}.{last}" for name in stems for last in (*last_names(scheme), "bias")]


def split(scheme: Scheme, wanted: list[Tensor], found: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are dense in these files, and those that are quantized."""
    dense: list[Tensor] = []
    quantized: list[Tensor] = []
    for tensor in wanted:
        is_quantized = stem(tensor) is not None and f"{stem(tensor)}.{scheme.main}" in found
        (quantized if is_quantized else dense).append(tensor)
        if is_quantized and tensor.transposed and not scheme.transposes:
            raise ValueError(f"checkpoint: {scheme.name} has no [in, out] matrices, got {tensor.theirs}")
    return dense, quantized


def names_of(scheme: Scheme, tensor: Tensor, found: Tensors) -> list[Tensor]:
    """What the files must have of a linear, and may have and do."""
    way = way_of(scheme, tensor)
    names = {last: f"{stem(tensor)}.{last}" for last in way.shapes(32, 32)}
    must = [name for last, name in names.items() if last not in way.optional or name in found]
    return [Tensor(name, tensor.ours, False) for name in must]


def without_empty_biases(quantized: list[Tensor], wanted: list[Tensor], found: Tensors) -> Tensors:
    """The tensors but biases of quantized linears that the model has not and that are 0.

    Some versions of AutoGPTQ gave every linear a bias.
    """
    extra = {f"{stem(tensor)}.bias" for tensor in quantized} - {tensor.theirs for tensor in wanted}
    return {name: value for name, value in found.items() if name not in extra or np.any(value)}


def read_linears(
    scheme: Scheme, quantized: list[Tensor], found: Tensors, leaves: dict[str, Any], dtype
) -> dict[str, Any]:
    """Our weight for each of our leaves, in host memory. All shapes are checked before any is read."""
    given = []
    for tensor in quantized:
        sizes = [leaves[name].shape for name in tensor.ours]
        K, N = sizes[0][1], sum(size[0] for size in sizes)
        names = names_of(scheme, tensor, found)
        tensors = {entry.theirs.rpartition(".")[2]: found[entry.theirs] for entry in names}
        try:
            check(way_of(scheme, tensor), tensors, K, N)
        except ValueError as error:
            raise ValueError(f"checkpoint: {stem(tensor)}: {error}") from error
        given.append((tensor, tensors, K, N))
    weights = {}
    for tensor, tensors, K, N in given:
        try:
            linear = way_of(scheme, tensor).read(tensors, K, N)
        except ValueError as error:
            raise ValueError(f"checkpoint: {stem(tensor)}: {error}") from error
        start = 0
        for name in tensor.ours:
            stop = start + leaves[name].shape[0]
            weights[name] = linear.part(start, stop, dtype)
            start = stop
    return weights


def check(scheme: OneWay, tensors: Tensors, K: int, N: int) -> None:
    """Raises ValueError unless the tensors of a linear are of the shapes and types they must be."""
    for last, (shape, kinds) in scheme.shapes(K, N).items():
        value = tensors.get(last)
        if value is None:
            continue  # optional: names are checked before
        kind = tensor_files.NAMES[value.dtype]
        if value.shape != shape or kind not in kinds:
            must = f"{' or '.join(kinds)} {list(shape)}"
            raise ValueError(f"{last} must be {must} by config.json, got {kind} {list(value.shape)}")


# Writing Any-Precision's files.


def any_precision_entries(tensor: Tensor, parts: list[BitPlanes]) -> list[tensor_files.Tensor]:
    """The tensors of a linear, of which `parts` are stacked along the outputs."""
    w, K = parts[0], parts[0].shape[0]
    if tensor.transposed:
        raise ValueError(f"huggingface.save: any-precision has no [in, out] matrices, got {tensor.theirs}")
    if K % 32:
        raise ValueError(
            f"huggingface.save: any-precision needs K divisible by 32, got {tensor.theirs} of {K=}"
        )
    if any(p.parent_bits != w.parent_bits or p.seed_bits != w.seed_bits for p in parts):
        raise ValueError(f"huggingface.save: all parts of {tensor.theirs} must have the same widths")
    N = sum(part.shape[1] for part in parts)

    def planes() -> np.ndarray:
        return to_cuda_planes(np.concatenate([np.asarray(part.planes) for part in parts], axis=1), K)

    def table(i: int) -> np.ndarray:
        return np.concatenate([np.asarray(part.tables[i]) for part in parts])

    B, dtype = w.parent_bits, np.dtype("<f2")
    entries: list[tensor_files.Tensor] = [
        (f"{stem(tensor)}.qweight", (B, N, K // 32), np.dtype("<i4"), planes)
    ]
    for i, b in enumerate(range(w.seed_bits, B + 1)):
        entries.append((f"{stem(tensor)}.lut{b}", (N, 2**b), dtype, functools.partial(table, i)))
    return entries


def any_precision_config(quantized: dict[str, BitPlanes], names: list[str]) -> dict[str, Any]:
    """The `anyprec` of config.json, from their names of the linears in bit planes and of all tensors.

    The authors' loader puts the same modules in every layer and knows one pair of widths.
    """
    pattern = re.compile(r"(.+?)\.(\w+)\.(\d+)\.(.+)\.weight")
    modules: dict[str, set[str]] = {}  # the layers that have each
    for name in quantized:
        match = pattern.fullmatch(name)
        if match is None:
            raise ValueError(f"huggingface.save: any-precision quantizes linears of layers, got {name}")
        modules.setdefault(match[4], set()).add(f"{match[1]}.{match[2]}.{match[3]}")
    layers = {f"{match[1]}.{match[2]}.{match[3]}" for match in map(pattern.fullmatch, names) if match}
    places = {layer.rpartition(".")[0].rpartition(".")[::2] for layer in layers}
    widths = {(w.seed_bits, w.parent_bits) for w in quantized.values()}
    if len(places) != 1 or len(widths) != 1 or any(having != layers for having in modules.values()):
        raise ValueError(
            "huggingface.save: any-precision needs the same linears and widths in every layer, "
            f"got {len(quantized)} linears of widths {sorted(widths)}"
        )
    ((outer, inner),) = places
    ((seed, parent),) = widths
    arch = {"model_name": outer, "layers_name": inner, "module_names": list(modules)}
    return {"seed_precision": seed, "parent_precision": parent, "group_count": 1, "arch_config": arch}
